"""Output of a console of 80 columns."""

import re

COLUMNS = 80
# to be typed or opened as they stand: a path, and a command, with what it is for before it
_WHOLE = re.compile(r"\s*(\S+|(\w+: )?(python -m|wandb sync|mkdir -p) .*)")


def too_wide(text):
    """The lines that do not fit, and could."""
    return [line for line in text.splitlines() if len(line) > COLUMNS and not _WHOLE.fullmatch(line)]
