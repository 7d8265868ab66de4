"""Access to the Hugging Face hub, for model names that are not local folders."""

import json
from contextlib import suppress
from pathlib import Path

from zi_experiments import environment

# file names in the order in which transformers looks for them
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def named(name: str, revision: str | None) -> str:
    """Return a hub name as people write it, with its revision after an `@`."""
    return name if revision is None else f"{name}@{revision}"


def commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub model's configuration in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def download(name: str, revision: str | None) -> Path:
    """Return the folder of a hub model with its weights, downloaded unless the hub's cache has them.

    Raises `OSError` when it cannot be downloaded, or has no weights.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = None
    for candidate in WEIGHT_FILES:
        with suppress(EntryNotFoundError):
            file = Path(hf_hub_download(name, candidate, revision=revision))
            break
    if file is None:
        raise FileNotFoundError(f"it has no {', '.join(WEIGHT_FILES)}")
    if file.suffix == ".json":
        for part in sorted(set(json.loads(file.read_bytes())["weight_map"].values())):
            hf_hub_download(name, part, revision=revision)
    return file.parent


def settle() -> None:
    """Use only the hub's cache if the hub does not answer: its library would retry for half a minute per file."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library it uses
        constants.HF_HUB_OFFLINE = True
        environment.set_variables({"HF_HUB_OFFLINE": "1"})  # for the workers
