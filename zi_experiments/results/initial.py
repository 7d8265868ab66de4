"""The record of a run at its start: the command and the composed configuration, before validation."""

import uuid
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments import provenance
from zi_experiments.config.schema import Run
from zi_experiments.results.record import Failure, Record, RunInfo


def record(cfg: DictConfig) -> Record:
    """Return the record of a run of which only the request is known yet."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    group = setting(cfg, "tracking.group")
    if group is None and hydra.mode is RunMode.MULTIRUN:
        sweep = Path(hydra.sweep.dir)
        group = sweep.name
    config = _plain(cfg)
    beside = {
        key: config.pop(key, None) for key in ("question", "published")
    }  # what compares runs changes none of them
    return Record(
        status="killed",
        error=Failure(type="Unfinished", message="the run is under way, or was killed together with its launcher"),
        run=RunInfo(
            id=uuid.uuid4().hex[:12],
            name=str(setting(cfg, "name") or folder.name),
            group=group,
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            finished_at=None,
            command=provenance.command(),
            git_revision=provenance.git_revision(),
            overrides=overrides(),
        ),
        folder=str(folder),
        choices={
            group: choice
            for group, choice in hydra.runtime.choices.items()
            if not group.startswith("hydra/") and group not in beside
        },
        config=config,
        **beside,
    )


def overrides() -> list[str]:
    """Return the overrides of this run as typed: an interpolation in one may lead nowhere."""
    typed: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[assignment]
    return typed


def setting(cfg: DictConfig, key: str) -> Any:
    """Return a setting; None if it is missing or cannot be resolved, which validation refuses."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as JSON values; unresolved if it cannot be resolved, since every run has a record."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(cfg, enum_to_str=True)
    jsonable: dict[str, Any] = _jsonable(plain)
    return jsonable


def _jsonable(value: Any) -> Any:
    """Return `value` with the text of what JSON does not have: infinities, NaN, and bytes."""
    if isinstance(value, dict):
        return {key: _jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_jsonable(each) for each in value]
    odd = isinstance(value, bytes) or (isinstance(value, float) and not isfinite(value))
    return str(value) if odd else value


def settled(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the configuration with open settings as they were decided; the command has what was typed."""
    work = {"batch_size": run.workload.batch_size, "micro_batches": run.workload.micro_batches}
    return config | {
        "workload": config["workload"] | work,
        "kv_cache": config["kv_cache"] | {"device": run.kv_cache.device.value},
        "offload": config["offload"] | {"resident": run.offload.resident, "compute": run.offload.compute},
    }
