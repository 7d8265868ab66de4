"""Values as people read them, on the console and in Markdown."""

from zi_experiments.report.columns import Scalar
from zi_experiments.units import gigabytes, joules, scaled, seconds

ABSENT = "–"


def text(value: Scalar, unit: str) -> str:
    """A value with its unit: `s`, `B`, `B/s`, `J`, `tok/s`, `share`, `count`, or none for text; absent as a dash."""
    if value is None or isinstance(value, str | bool) or not unit:
        return absent(value)
    if unit == "s":
        return seconds(value)
    if unit == "J":
        return joules(value)
    if unit == "B":
        return gigabytes(value) if value else "0"
    if unit == "B/s":
        return scaled(value, unit) if value else "0"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.2f}" if unit == "tok/s" else f"{value:,.6g}"


def absent(value: Scalar) -> str:
    """The value as text, and a dash for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ABSENT if value is None else str(value)
