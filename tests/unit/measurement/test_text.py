"""Files of text that a workload names."""

import pytest

from zi_experiments.config.schema import ConfigError
from zi_experiments.measurement import text


@pytest.fixture
def check(compose_run):
    return lambda key, name: text.check(
        compose_run("weights=pretrained", "weights.path=x", f"workload.{key}={name}").workload
    )


@pytest.mark.parametrize("key", text.KEYS)
@pytest.mark.parametrize("name", ["nowhere.txt", "folder", "empty.txt", "/dev/zero"])
def test_a_text_that_is_none_is_refused_before_anything_else_is_looked_at(check, tmp_path, monkeypatch, key, name):
    """Also before a tokenizer, which this checkpoint lacks, and before a file without an end is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")

    with pytest.raises(ConfigError, match=rf"^workload.{key}={name} .*: pass a text file$"):
        check(key, name)


def test_a_text_is_not_refused(check, tmp_path):
    (tmp_path / "my.txt").write_text("Call me Ishmael.", encoding="utf-8")

    check("text", tmp_path / "my.txt")
    check("prompts", tmp_path / "my.txt")
