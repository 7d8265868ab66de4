"""Names of output folders."""

import hashlib
import re
from typing import Any

# settings that do not affect the result, with the exception of launch.nnodes
ASIDE = {"name", "tracking", "launch", "plan_only", "force", "question", "published"}


def sweep_name(overrides: list[str]) -> str:
    """Return the folder name of a sweep: equal overrides give an equal name; those in `ASIDE` do not count."""
    telling = [text for text in overrides if is_telling(text)]
    varied = [text for text in telling if "," in text] or telling
    digest = hashlib.sha256("\n".join(telling).encode()).hexdigest()[:8]
    return f"{slug(' '.join(varied))[:60]}-{digest}"


def is_telling(override: str) -> bool:
    """Return whether an override may affect the result."""
    key = re.split(r"[/=]", override.lstrip("+~"))[0]
    return key == "launch.nnodes" or key.split(".")[0] not in ASIDE | {"hydra"}


def telling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration that may affect the result."""
    launch = config.get("launch")
    nodes = launch.get("nnodes", 1) if isinstance(launch, dict) else 1  # as in records of before there were several
    return {key: value for key, value in config.items() if key not in ASIDE} | {"launch": {"nnodes": nodes}}


def slug(text: str) -> str:
    """Return `text` as a valid name of a file or folder."""
    return re.sub(r"[^\w=,.+-]+", "_", text)[:100].strip(".") or "_"
