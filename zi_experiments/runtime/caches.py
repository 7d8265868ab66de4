"""The cache folders of libraries and of this package: in the home, or in a temporary folder if that is not writable."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

from zi_experiments import environment

# environment variable: default below the home. Used by torch, the hub, W&B and this package; by W&B; by Triton
_USUAL = {"XDG_CACHE_HOME": ".cache", "XDG_DATA_HOME": ".local/share", "TRITON_HOME": ""}


def settle() -> str | None:
    """Make sure that this process and its children can write caches. Return a line that says where; None: in the home.

    Raises `ConfigError` when the temporary folder cannot be made, or is not this user's alone.
    """
    home = environment.home()
    usual = {name: environment.folder(name) or (home / inside if home else None) for name, inside in _USUAL.items()}
    lacking = [name for name, folder in usual.items() if folder is None or not _can_be_written(folder)]
    if not lacking:
        return None
    elsewhere = _private(Path(gettempdir()) / f"zi-caches-{os.getuid()}")
    values = dict.fromkeys(lacking, str(elsewhere))
    if home is None:
        values["HOME"] = str(elsewhere)
    elif "XDG_CACHE_HOME" in lacking and (hub := home / ".cache" / "huggingface").is_dir():
        # earlier downloads there can still be read
        values |= {"HF_HOME": str(hub), "HF_MODULES_CACHE": str(elsewhere / "huggingface" / "modules")}
    environment.set_variables(values)
    problem = f"{usual[lacking[0]]} cannot be written" if usual[lacking[0]] else "there is no home"
    return f"{problem}: caches are in {elsewhere}, unless HOME or {lacking[0]} names a folder of yours"


def _can_be_written(folder: Path) -> bool:
    """Return whether files can be created in `folder`, which need not exist yet."""
    there = next(
        path for path in (folder, *folder.parents) if os.path.exists(path)
    )  # Path.exists raises without permission
    try:
        with TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _private(folder: Path) -> Path:
    """Return the folder, created if missing and accessible to this user only: compiled code is run from there."""
    from zi_experiments.config.schema import (
        ConfigError,  # imports Hydra; the doctor has to work without it
    )

    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be created for caches ({error.strerror}): set HOME to a folder of yours"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder} is not a folder that only this user can access: set HOME to a folder of yours")
    return folder
