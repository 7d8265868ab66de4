"""`python -m zi_experiments`: Hydra's entry point."""

import signal
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from zi_experiments import config


def main() -> None:
    """Compose the configuration from the command line and carry it out, once or as a sweep."""
    config.register()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep: list[Any] = []

    def run(cfg: DictConfig) -> None:
        _run(cfg, sweep)

    entry = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")(run)
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if sweep:
            from zi_experiments.sinks.console import show_sweep

            show_sweep(sweep)


def _run(cfg: DictConfig, sweep: list[Any]) -> None:
    from zi_experiments.job import RunFailed, run_job  # imports torch, which --help and --cfg do without

    many = HydraConfig.get().mode is RunMode.MULTIRUN
    record = None
    try:
        record = run_job(cfg)
    except RunFailed as failed:
        record = failed.record
        if many:
            raise  # Hydra goes on with the sweep and exits with 1 at its end
        sys.exit(1)  # what was wrong has been said
    finally:
        if many and record is not None:
            sweep.append((list(HydraConfig.get().overrides.task), record))


if __name__ == "__main__":
    main()
