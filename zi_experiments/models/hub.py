"""Access to the Hugging Face hub, for model names that are not local folders."""

from pathlib import Path

from zi_experiments import environment


def named(name: str, revision: str | None) -> str:
    """Return a hub name as people write it, with its revision after an `@`."""
    return name if revision is None else f"{name}@{revision}"


def commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub model's configuration in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


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
