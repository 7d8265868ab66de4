"""Where libraries and runs keep what they need not find out again: at home, or elsewhere for who has no home to write to."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

from zi_experiments import environment

# what names a folder, and which it is at home: of torch, the hub, W&B and us; of W&B; of Triton
_USUAL = {"XDG_CACHE_HOME": ".cache", "XDG_DATA_HOME": ".local/share", "TRITON_HOME": ""}


def settle() -> str | None:
    """See that this process and those that it starts can write caches; a line that says where, unless it is at home.

    Raises `ConfigError` when the place for them elsewhere is not this user's alone.
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
        # what was downloaded before can be read
        values |= {"HF_HOME": str(hub), "HF_MODULES_CACHE": str(elsewhere / "huggingface" / "modules")}
    environment.set_variables(values)
    problem = f"{usual[lacking[0]]} cannot be written" if usual[lacking[0]] else "there is no home"
    return f"{problem}: caches are in {elsewhere}, unless HOME or {lacking[0]} names a folder of yours"


def _can_be_written(folder: Path) -> bool:
    """Whether it is there, or can be made, and files in it."""
    there = next(
        path for path in (folder, *folder.parents) if os.path.exists(path)
    )  # Path.exists raises without permission
    try:
        with TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _private(folder: Path) -> Path:
    """The folder, made if need be, which nobody else may look into: compiled code is run from there."""
    from zi_experiments.config.schema import (
        ConfigError,  # with Hydra, of which the doctor may have to say that it is missing
    )

    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made for caches ({error.strerror}): set HOME to a folder of yours"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder} is no folder for caches of this user's alone: set HOME to a folder of yours")
    return folder
