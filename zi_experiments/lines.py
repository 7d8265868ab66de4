"""Lines of text: wrapped between words where the width is known, whole in a file, where programs look for them."""

import os
import re
import textwrap
from typing import IO, TYPE_CHECKING

from zi_experiments import environment

if TYPE_CHECKING:
    from rich.console import Console

# to be typed as they stand: the beginning of a command, then flags, settings, paths and words that stand for them
_COMMAND = re.compile(r"(?:python -m \S+|wandb sync|mkdir -p|pip install)(?: (?:-\S+|\S*[=/]\S*|[A-Z]+\b))*")
_LEAST_WIDTH = 40


def say(text: str, console: "Console", *, head: str = "", style: str = "bold", indent: int = 2) -> None:
    """Print `head`, in a style of rich's, and `text` after it; further lines are indented. Markup stays text."""
    from rich.text import Text

    shown = Text(fit(head + text, console.file, indent))
    shown.stylize(style, 0, len(head))
    console.print(shown, soft_wrap=True)


def fit(text: str, stream: IO[str], indent: int = 2) -> str:
    """Return `text` wrapped to a terminal, or to COLUMNS; commands and long words, such as paths, are not broken."""
    width = _width(stream)
    if width is None:
        return text
    whole = _COMMAND.sub(lambda found: found[0].replace(" ", "\0"), text)
    wrapper = textwrap.TextWrapper(
        width=max(width, _LEAST_WIDTH),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(map(wrapper.fill, whole.splitlines())).replace("\0", " ")


def _width(stream: IO[str]) -> int | None:
    """Return the columns that lines may take; None for a file."""
    try:
        terminal = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None
    except (OSError, ValueError):  # closed, or no file at all
        terminal = None
    typed = environment.variable("COLUMNS") or ""
    # readline exports both variables from whatever program has loaded it, such as pytest, also without a terminal
    is_meant = typed.isdigit() and (terminal is not None or not environment.variable("LINES"))
    return int(typed) if is_meant else terminal
