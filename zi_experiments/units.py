"""Amounts as text."""


def seconds(value: float) -> str:
    """Return a time as text: in seconds, or in milliseconds below one second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def joules(value: float) -> str:
    """Return an energy as text: in joules, or in millijoules below one joule."""
    return f"{value:,.2f} J" if value >= 1 else f"{1000 * value:.1f} mJ"


def gigabytes(amount: float, digits: int = 2) -> str:
    """Return bytes as text: in gigabytes (10⁹) with `digits` decimals, or in megabytes below 0.1 GB."""
    return f"{amount / 1e9:.{digits}f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def scaled(value: float, unit: str) -> str:
    """Return a number as text, with the prefix (k to P) that leaves one to three digits before the point."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value / 1e3:.1f} k{unit}"
