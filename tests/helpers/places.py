"""Where things of the checkout are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HELPERS = ROOT / "tests" / "helpers"
