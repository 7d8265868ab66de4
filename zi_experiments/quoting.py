"""Text that others have written, as messages quote it."""

_LONGEST_QUOTE = 300  # characters


def reason(error: BaseException) -> str:
    """Return the first line of an error message, made printable: it may quote a checkpoint."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """Return text from an untrusted source without line breaks or terminal control characters, and truncated."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"
