"""What Hydra is told before it composes: the schema, and the resolvers that YAML files use."""

import sys
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments import environment, lines
from zi_experiments.config import folders
from zi_experiments.config.command_line import typed
from zi_experiments.config.schema import PACKAGE, DeviceType, Run


def register() -> None:
    """Register the schema as `schema`, which `conf/config.yaml` lists first, and the resolvers that YAML files use."""
    ConfigStore.instance().store(name="schema", node=Run)
    OmegaConf.register_new_resolver("zi.basename", lambda path: Path(path).name if path else "local", replace=True)
    OmegaConf.register_new_resolver("zi.folder", _folder, replace=True)
    OmegaConf.register_new_resolver("zi.sweep", lambda: folders.sweep_name(typed(sys.argv[1:]).overrides), replace=True)
    OmegaConf.register_new_resolver("zi.env", _variable, replace=True)
    OmegaConf.register_new_resolver("zi.wandb_mode", lambda: environment.wandb_mode() or "auto", replace=True)
    OmegaConf.register_new_resolver("zi.choices", _choices, replace=True)
    OmegaConf.register_new_resolver("zi.gpus_per_node", _gpus_per_node, replace=True)
    OmegaConf.register_new_resolver("zi.data", lambda name: str(PACKAGE / "data" / name), replace=True)


def _choices() -> str:
    """Return a line for each group with its choices, those of --config-dir too."""
    loader = GlobalHydra.instance().config_loader()
    groups = (group for group in sorted(loader.list_groups("")) if group != "hydra")
    shown = (f"{group}: {', '.join(sorted(loader.get_group_options(group)))}" for group in groups)
    return "\n".join(lines.fit(line, sys.stdout) for line in shown)


def _variable(name: str, default: Any) -> Any:
    """Return an environment variable, split into a list if the default is a list; the default when it is not set."""
    said = environment.variable(name)
    if said is None:
        return default
    return (
        [part.strip() for part in said.split(",")] if OmegaConf.is_list(default) or isinstance(default, list) else said
    )


def _gpus_per_node(*, _root_: Any) -> int | None:
    """Return how many GPUs a queue has to reserve on each machine; None for a run on processors."""
    if _root_.hardware.device is DeviceType.cpu:
        return None
    return int(_root_.hardware.num_gpus) // max(1, int(_root_.launch.nnodes))  # 0 is refused later


def _folder(*, _root_: Any) -> str:
    """Return the name of a run as a folder name. A run without a name gets one too: it is refused later, with a message."""
    try:
        name = OmegaConf.select(_root_, "name")
    except OmegaConfBaseException:
        name = None
    return folders.slug(name or "")
