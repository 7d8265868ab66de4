"""The Hugging Face hub, where a name is looked up that is no folder."""

from zi_experiments import environment


def settle() -> None:
    """Where the hub does not answer, go on with what it has given before: its library would ask for half a minute a file."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the library that it speaks HTTP with
        constants.HF_HUB_OFFLINE = True
        environment.set_variables({"HF_HUB_OFFLINE": "1"})  # for the workers
