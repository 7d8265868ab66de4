from pathlib import Path

import pytest

from zi_experiments.config.schema import ConfigError
from zi_experiments.runtime import scratch


def test_what_is_no_link_any_more_is_passed_by(tmp_path, monkeypatch):
    """Of runs that begin at once each removes what others have left, and a link between two looks at it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    abandoned = tmp_path / "zi-0123456789ab"
    scratch.Scratch(abandoned)._lock.release()
    (scratch._links() / "0").touch()

    assert scratch.remove_abandoned() == [abandoned]
    assert not abandoned.exists()


def test_weights_folders_are_there_and_each_once(tmp_path):
    """A link to a folder is that folder: its drive would be read twice and not two drives at once."""
    names = [str(tmp_path / name) for name in ("a", "b", "link")]
    for name in names[:2]:
        Path(name).mkdir()
    Path(names[2]).symlink_to(names[0])

    scratch.check_bases("offload.path", names[:2])
    with pytest.raises(ConfigError, match=rf"^offload.path names {names[0]} twice: pass offload.path=\[/a,/b\]"):
        scratch.check_bases("offload.path", names)
    with pytest.raises(ConfigError, match=f"^offload.path={tmp_path}/c is no folder: mkdir -p"):
        scratch.check_bases("offload.path", [names[0], f"{tmp_path}/c"])
