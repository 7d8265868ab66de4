"""Names of output folders."""

import hashlib
import re

# settings that a result does not depend on
ASIDE = {"name", "tracking", "launch", "plan_only", "force"}


def sweep_name(overrides: list[str]) -> str:
    """The folder of a sweep: the same for the same overrides, but for those that a result does not depend on."""
    telling = [text for text in overrides if re.split(r"[./=]", text.lstrip("+~"))[0] not in ASIDE | {"hydra"}]
    varied = [text for text in telling if "," in text] or telling
    digest = hashlib.sha256("\n".join(telling).encode()).hexdigest()[:8]
    return f"{slug(' '.join(varied))[:60]}-{digest}"


def slug(text: str) -> str:
    """A text as the name of one file or folder."""
    return re.sub(r"[^\w=,.+-]+", "_", text)[:100].strip(".") or "_"
