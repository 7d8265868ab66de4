"""Access to the Hugging Face hub, for model names that are not local folders."""

from zi_experiments import environment


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
