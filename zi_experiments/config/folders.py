"""Names of output folders."""

import hashlib
import re

# settings that do not affect the result
ASIDE = {"name", "tracking", "launch", "plan_only", "force", "question", "published"}


def sweep_name(overrides: list[str]) -> str:
    """Return the folder name of a sweep: equal overrides give an equal name; those in `ASIDE` do not count."""
    telling = [text for text in overrides if is_telling(text)]
    varied = [text for text in telling if "," in text] or telling
    digest = hashlib.sha256("\n".join(telling).encode()).hexdigest()[:8]
    return f"{slug(' '.join(varied))[:60]}-{digest}"


def is_telling(override: str) -> bool:
    """Return whether an override may affect the result."""
    return re.split(r"[./=]", override.lstrip("+~"))[0] not in ASIDE | {"hydra"}


def slug(text: str) -> str:
    """Return `text` as a valid name of a file or folder."""
    return re.sub(r"[^\w=,.+-]+", "_", text)[:100].strip(".") or "_"
