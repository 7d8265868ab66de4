"""Amounts as people read them."""


def seconds(value: float) -> str:
    """A time in seconds, or below one second in milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def gigabytes(amount: float, digits: int = 2) -> str:
    """Bytes in gigabytes (10⁹) with so many digits, or below a tenth of one in megabytes."""
    return f"{amount / 1e9:.{digits}f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def scaled(value: float, unit: str) -> str:
    """A number with the prefix that leaves one to three digits before the point."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value / 1e3:.1f} k{unit}"
