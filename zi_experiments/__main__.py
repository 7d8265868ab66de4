"""`python -m zi_experiments`: Hydra's entry point."""

import signal
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from zi_experiments import config


def main() -> None:
    """Compose the configuration from the command line and carry it out, once or as a sweep."""
    config.register()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    entry = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")(_run)
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)


def _run(cfg: DictConfig) -> None:
    from zi_experiments.job import RunFailed, run_job  # imports torch, which --help and --cfg do without

    try:
        run_job(cfg)
    except RunFailed:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # Hydra goes on with the sweep and exits with 1 at its end
        sys.exit(1)  # what was wrong has been said


if __name__ == "__main__":
    main()
