"""`python -m zi_experiments`: Hydra's entry point."""

import signal
import sys

import hydra
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
    from zi_experiments.job import run_job  # imports torch, which --help and --cfg do without

    run_job(cfg)


if __name__ == "__main__":
    main()
