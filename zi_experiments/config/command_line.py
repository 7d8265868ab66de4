"""What was typed, and values as one types them."""

from argparse import Namespace
from enum import Enum
from typing import Any

from hydra._internal.utils import get_args_parser


def typed(arguments: list[str]) -> Namespace:
    """Return a command line as Hydra parses it: `overrides`, `config_dir`, its other flags, and what it leaves `unknown`."""
    found, unknown = get_args_parser().parse_known_args(arguments)
    found.unknown = unknown
    return found


def literal(value: Any) -> str:
    """Return a value as typed after `KEY=`."""
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
