"""Python files of a checkpoint: they run only if the user trusts it."""

from functools import cache
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models.architecture import ANOTHER_MODEL
from zi_experiments.quoting import printable, reason


def is_refused_code(error: Exception, trusted: bool) -> bool:
    """Return whether the error says that a checkpoint needs its own Python files, which transformers has not run."""
    return not trusted and isinstance(error, ValueError) and "trust_remote_code" in str(error)


def refused_code(path: str, auto_map: Any) -> str:
    """Return the message for such a checkpoint; its `auto_map` has a class, or a list of classes, for each purpose."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    references = [one for value in values for one in (value if isinstance(value, list) else [value]) if one]
    files = ", ".join(sorted({_python_file(str(one)) for one in references}))
    return (
        f"{path} wants to run {printable(files)}, and nothing of that was run: "
        f"pass trust_remote_code=true if you trust {path}"
    )


def _python_file(reference: str) -> str:
    """Return the file of `module.Class`, or of `owner/repository--module.Class`, which is on the hub."""
    repository, _, name = reference.rpartition("--")
    return f"{repository}/{name.partition('.')[0]}.py".lstrip("/")


def is_remote(config: Any) -> bool:
    """Return whether a checkpoint's own code made this configuration, which happens only if the checkpoint is trusted."""
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(config).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def load_class(config: Any, reference: str) -> Any:
    """Return the model class of a trusted checkpoint; `reference` is as in its `auto_map`. Raises `ConfigError`."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return _generating(get_class_from_dynamic_module(reference, config.name_or_path))
    except Exception as error:
        file = printable(_python_file(reference))
        raise ConfigError(
            f"{config.name_or_path}: its {file} cannot be loaded ({reason(error)}): {ANOTHER_MODEL}"
        ) from error


@cache  # one class for all callers: transformers derives a new one at each call
def _generating(remote: Any) -> Any:
    """Return a checkpoint's model class, prepared for generation as `AutoModelForCausalLM` does it."""
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    remote.register_for_auto_class("AutoModelForCausalLM")
    return add_generation_mixin_to_remote_model(remote)
