"""A Hydra callback that tests the output folder before Hydra writes to it: Hydra itself would end in a traceback."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from zi_experiments import lines

_PROBE_BYTES = 1 << 16  # more than Hydra writes there, so that a full disk is noticed


class OutputFolder(Callback):
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _try("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _try("hydra.sweep.dir", config.hydra.sweep.dir)


def _try(key: str, folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * _PROBE_BYTES)
    except OSError as error:
        # Hydra turns any other exception into a warning
        text = f"refused {key}={folder}: {error.strerror}: pass {key}=/a/writable/folder"
        sys.exit(lines.fit(text, sys.stderr))
