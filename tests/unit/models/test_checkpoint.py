"""Checkpoints are input by others: what is refused before it is loaded, what is never run, and what the hashes say."""

import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import remote_code
import tiny
import torch
from cli import Cli
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.execution import preflight
from zi_experiments.models import checkpoint, description, hashes

LAYOUTS = {
    "safetensors": ("model.safetensors",),
    "sharded": ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model.bin",),
    "sharded-bin": ("pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"),
}
INDEX = "model.safetensors.index.json"
QUICK = {"OMP_NUM_THREADS": "1"}  # with more, the tiny models wait for threads


@pytest.fixture(scope="module")
def state():
    return tiny.model("llama").to(torch.bfloat16).state_dict()


@pytest.fixture
def folder(tmp_path):
    """A model folder without weights."""
    tiny.config("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def mark(tmp_path):
    """What is there when code of a checkpoint was run."""
    return tmp_path / "code-was-run"


def save(folder, state, layout):
    """Write weights as transformers has them, in one file or two."""
    *names, last = LAYOUTS[layout]
    write = torch.save if "bin" in layout else save_file
    if not names:
        write(state, folder / last)
        return
    parts = [dict(list(state.items())[start::2]) for start in range(2)]
    for name, part in zip(names, parts, strict=True):
        write(part, folder / name)
    shards = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / last).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def refusal(folder):
    """What is said of a checkpoint: one line."""
    with pytest.raises(ConfigError) as refused:
        checkpoint.check(str(folder))
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).isprintable()
    return str(refused.value)


# --- which files -----------------------------------------------------------------------------------------------------


def resolved(folder):
    """The files that transformers itself would read."""
    named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    files, _ = _get_resolved_checkpoint_files(
        str(folder), None, None, None, None, is_remote_code=False, transformers_explicit_filename=named
    )
    return tuple(map(Path, files))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_checkpoint_passes(folder, state, layout):
    save(folder, state, layout)

    checkpoint.check(str(folder))

    assert checkpoint.find(str(folder)).weights == resolved(folder)


def test_of_several_layouts_transformers_choice_counts(folder, state):
    for layout in LAYOUTS:
        save(folder, state, layout)
    seen = []
    for names in LAYOUTS.values():
        assert checkpoint.find(str(folder)).weights == resolved(folder)
        seen.append(resolved(folder))
        (folder / names[-1]).unlink()

    assert len(set(seen)) == len(LAYOUTS)


def test_a_name_in_the_configuration_counts_before_all(folder, state):
    save(folder, state, "safetensors")
    save_file(state, folder / "other.safetensors")
    remote_code.change(folder / "config.json", transformers_weights="other.safetensors")

    assert checkpoint.find(str(folder)).weights == resolved(folder) == (folder / "other.safetensors",)


def test_of_a_hub_name_nothing_is_looked_at():
    assert checkpoint.find("facebook/opt-125m") is None
    checkpoint.check("facebook/opt-125m")


def test_links_as_in_the_hub_s_cache_pass(tmp_path, state):
    checkpoint.check(str(hub_snapshot(tmp_path, state)))


def test_a_legacy_bin_file_passes_and_is_not_read(folder, state):
    torch.save(
        state | {"large": torch.zeros(4 << 20)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    os.truncate(folder / "pytorch_model.bin", 4 << 20)  # what describes the tensors comes first

    checkpoint.check(str(folder))


def test_a_large_checkpoint_is_looked_at_at_once(folder):
    numel = 50 << 30
    header = json.dumps({"w": {"dtype": "U8", "shape": [numel], "data_offsets": [0, numel]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + numel)
    began = time.perf_counter()

    checkpoint.check(str(folder))

    assert time.perf_counter() - began < 1


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_without_weights(folder):
    assert re.search(rf"^{folder} has no weights \(model.safetensors, .*: pass weights.path=", refusal(folder))


def test_a_shard_that_is_missing(folder, state):
    save(folder, state, "sharded")
    (folder / "model-2.safetensors").unlink()

    assert f"{folder} lacks 1 of the 2 files that {INDEX} names (model-2.safetensors): copy" in refusal(folder)


def test_a_link_that_leads_nowhere(tmp_path, state):
    snapshot = hub_snapshot(tmp_path, state)
    (snapshot / "model.safetensors").resolve().unlink()

    assert "has no weights" in refusal(snapshot)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, "x\0", "\x1b[2J", "x" * 999]
)
def test_an_index_that_leads_out_of_the_folder(folder, state, name):
    save(folder, state, "sharded")
    (folder.parent / "x.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))

    message = refusal(folder)

    assert re.search("not a file in its own folder and is not read: pass|lacks 1 of the 3 files", message)
    assert len(message) < 700


def test_a_configuration_that_leads_out_of_the_folder(folder, state):
    save(folder, state, "safetensors")
    remote_code.change(folder / "config.json", transformers_weights="../x.safetensors")

    assert "config.json names '../x.safetensors', which is not a file in its own folder" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"w": "model-1.safetensors"}}', "has no metadata"),
    ],
)
def test_an_index_that_is_none(folder, state, content, expected):
    save(folder, state, "sharded")
    (folder / INDEX).write_bytes(content.encode("latin-1"))

    assert f"{folder / INDEX} {expected}" in refusal(folder)


def test_a_distributed_checkpoint(folder, state):
    """Newer versions of transformers would read it, whatever else is there."""
    save(folder, state, "safetensors")
    save_file(state, folder / "shard-00001-model-00001-of-00001.safetensors")

    assert "is a distributed checkpoint" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
@pytest.mark.parametrize("layout", ["safetensors", "sharded"])
def test_a_truncated_safetensors_file(folder, state, layout, kept):
    save(folder, state, layout)
    file = folder / LAYOUTS[layout][0]
    whole = file.stat().st_size
    size = kept % whole
    os.truncate(file, size)

    message = refusal(folder)

    assert f"{file} is truncated: it has {size} bytes" in message
    if kept < 0:
        assert f"and {whole} by its own header: copy or download it again" in message


def header(content):
    return struct.pack("<Q", len(content)) + content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (header(b'{"w": nonsense}'), r"is no safetensors file of \d+ bytes \(.*invalid JSON"),
        (header(b'{"w":{"dtype":"\\u001b[31mF","shape":[1],"data_offsets":[0,4]}}abcd'), r"\\x1b\[31mF"),
        (header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'), "invalid JSON"),
        (header(b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}') + b"abcd", "invalid shape"),
        (
            header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"abcdef",
            "is too long: it has 68 bytes, and 66",
        ),
        (b"<html>404 Not Found</html>", "header too large"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is only a Git LFS pointer to the weights: git lfs pull",
        ),
    ],
)
def test_a_safetensors_file_that_is_none(folder, content, expected):
    (folder / "model.safetensors").write_bytes(content)

    assert re.search(expected, refusal(folder))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(5000)])
def test_a_bin_file_that_is_none(folder, content):
    (folder / "pytorch_model.bin").write_bytes(content)

    assert f"{folder}/pytorch_model.bin is not a file that torch.save has written, or is damaged" in refusal(folder)


def test_a_truncated_bin_file(folder, state):
    save(folder, state, "bin")
    os.truncate(folder / "pytorch_model.bin", (folder / "pytorch_model.bin").stat().st_size - 1000)

    assert "or is damaged (PytorchStreamReader failed" in refusal(folder)


# --- what is never run -----------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


PICKLES = {
    "torch": lambda content, file: torch.save(content, file),
    "legacy": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    **{f"raw-{p}": lambda content, file, p=p: file.write_bytes(pickle.dumps(content, protocol=p)) for p in (0, 2, 4)},
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_runs_code_is_refused_and_not_run(folder, state, mark, kind):
    file = folder / "pytorch_model.bin"
    PICKLES[kind](state | {"evil": Evil(mark)} if kind in ("torch", "legacy") else Evil(mark), file)

    message = refusal(folder)

    assert re.search(rf"{file} holds code.*, which is not run: convert it to safetensors", message)
    assert not mark.exists()
    torch.load(file, weights_only=False) if kind in ("torch", "legacy") else pickle.loads(file.read_bytes())
    assert mark.exists()


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def pretrained(folder, *more):
    return [
        "model=local",
        f"model.path={folder}",
        "weights=pretrained",
        "quant=fp16",
        "engine=stream",
        "tracking=none",
        *more,
    ]


def test_a_run_of_a_pickle_that_runs_code_is_refused(cli, folder, state, mark):
    torch.save(state | {"evil": Evil(mark)}, folder / "pytorch_model.bin")

    done = cli.run(*pretrained(folder), **QUICK)

    assert done.returncode == 1
    assert not mark.exists()
    [result] = cli.results()
    assert result["status"] == "refused"
    assert "holds code (posix.mkdir), which is not run" in result["error"]["message"]


def test_code_of_a_checkpoint_is_not_run_by_default(cli, tmp_path, mark):
    """In one line, and at once: transformers would ask on the terminal, and wait."""
    remote_code.save(tmp_path / "brought", mark)
    command = cli.command(*pretrained(tmp_path / "brought"))
    variables = cli.environment(HF_MODULES_CACHE=str(tmp_path / "modules"), **QUICK)
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:  # with somebody at the keyboard who types nothing
        assert process.wait(timeout=60) == 1
        said, errors = process.stdout.read(), process.stderr.read()

    files = "configuration_brought.py, modeling_brought.py"
    line = f"{tmp_path}/brought wants to run {files}, and nothing of that was run: pass trust_remote_code=true if you trust"
    assert said.splitlines()[0] == f"refused brought-cpu-fp16: {line} {tmp_path}/brought"
    assert len(said.splitlines()) == 2
    assert errors == ""
    assert not mark.exists()
    assert not (tmp_path / "modules").exists()


def test_code_of_a_tokenizer_is_not_run_by_default(make_plan, machine, tmp_path, mark):
    remote_code.save(tmp_path / "brought", mark, known=True)
    (tmp_path / "text").write_text("Call me Ishmael." * 10)
    plan = make_plan(
        *pretrained(tmp_path / "brought", "workload=smoke", f"workload.text={tmp_path}/text"), on=machine("cpu")
    )

    with pytest.raises(ConfigError, match=r"wants to run tokenization_brought.py, .*pass trust_remote_code=true if"):
        preflight.check(plan, [])

    assert not mark.exists()


def test_of_a_known_model_the_code_that_comes_with_it_is_not_needed(compose_run, tmp_path, mark):
    remote_code.save(tmp_path, mark)
    remote_code.change(tmp_path / "config.json", model_type="llama")

    found = description.load(compose_run(*pretrained(tmp_path)))

    assert found.layer_classes == ("transformers.models.llama.modeling_llama.LlamaDecoderLayer",)
    assert not mark.exists()


def test_names_of_code_cannot_break_the_line(compose_run, tmp_path, mark):
    remote_code.save(tmp_path, mark)
    remote_code.change(
        tmp_path / "config.json", auto_map={"AutoConfig": "o/r--a\n\x1b[2J.B", "AutoTokenizer": [None, 7]}
    )

    with pytest.raises(ConfigError, match=r"wants to run 7\.py, o/r/a\\n\\x1b\[2J\.py, and") as refused:
        description.load(compose_run(*pretrained(tmp_path)))

    assert str(refused.value).isprintable()


def test_trusted_code_runs_from_end_to_end(cli, tmp_path, mark):
    """Its model and its tokenizer, in the launcher and in a worker; DeepSpeed wants one class however often it asks."""
    remote_code.save(tmp_path / "brought-1.0", mark)
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago, never mind how long precisely" * 2)
    trusted = ["trust_remote_code=true", f"workload.text={tmp_path}/text", "engine=deepspeed"]

    done = cli.run(*pretrained(tmp_path / "brought-1.0", *trusted), HF_MODULES_CACHE=str(tmp_path / "modules"), **QUICK)

    assert done.returncode == 0, done.stdout + done.stderr
    [result] = cli.results()
    assert result["verification"]["passed"]
    assert result["verification"]["reference"] == "AutoModelForCausalLM"
    assert result["checkpoint"]["ignored_tensors"] == []
    assert result["metrics"]["perplexity"] > 0
    assert re.fullmatch(r"transformers_modules\..*\.modeling_brought\.BroughtLayer", result["plan"]["layer_class"])
    assert set(mark.read_text().split()) == {"configuration", "modeling", "tokenizer"}


# --- hashes ----------------------------------------------------------------------------------------------------------


def hashed(folder, cache):
    """The hashes of a checkpoint, and the bytes that were told."""
    told = []
    found = checkpoint.find(str(folder))
    result = hashes.of(found, cache, told.append)
    assert sum(told) == found.num_bytes
    return result


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hashes_are_of_the_bytes(folder, state, tmp_path, layout):
    save(folder, state, layout)

    found = hashed(folder, tmp_path / "cache")

    names = {"config.json", *(name for name in LAYOUTS[layout] if not name.endswith("index.json"))}
    assert found == {
        "path": str(folder),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names},
    }
    assert json.loads(json.dumps(found)) == found


def test_a_file_larger_than_a_buffer(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(os.urandom((3 << 20) + 7))

    found = hashed(folder, tmp_path / "cache")["files"]

    assert found["model.safetensors"]["sha256"] == sha256(folder / "model.safetensors")


def test_a_file_is_hashed_again_only_when_it_has_changed(folder, state, tmp_path):
    save(folder, state, "safetensors")
    file = folder / "model.safetensors"
    first = hashed(folder, tmp_path / "cache")
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")
    changed = sha256(file)

    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed(folder, tmp_path / "cache") == first

    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert hashed(folder, tmp_path / "cache")["files"]["model.safetensors"]["sha256"] == changed
    assert changed != first["files"]["model.safetensors"]["sha256"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense"])
def test_what_another_left_in_the_cache_is_not_believed(folder, state, tmp_path, content):
    save(folder, state, "safetensors")
    first = hashed(folder, tmp_path / "cache")
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text(content)

    assert hashed(folder, tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_done_without(folder, state, tmp_path):
    save(folder, state, "safetensors")
    (tmp_path / "file").write_text("")

    assert hashed(folder, tmp_path / "file") == hashed(folder, tmp_path / "cache")


def test_hashing_stops_when_told(folder, tmp_path):
    """Ctrl-C does not wait for the end of a file."""
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(20 << 30)
    began = time.perf_counter()

    def interrupt(amount):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hashes.of(checkpoint.find(str(folder)), tmp_path / "cache", interrupt)
    assert time.perf_counter() - began < 2
    assert not list((tmp_path / "cache").rglob("*"))


BLOB = "0123456789abcdef" * 4


def hub_snapshot(root, state):
    """A model as the hub's cache in `root` has it."""
    blobs, snapshot = root / "models--owner--model" / "blobs", root / "models--owner--model" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    tiny.config("llama").save_pretrained(snapshot)
    save_file(state, blobs / BLOB)
    (snapshot / "config.json").rename(blobs / BLOB[:40])
    for name, blob in (("model.safetensors", BLOB), ("config.json", BLOB[:40])):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


HASH = """
import json, sys
from pathlib import Path
from zi_experiments.models import checkpoint, hashes
found = checkpoint.find(sys.argv[1])
print(json.dumps(hashes.of(found, Path(sys.argv[2]), lambda amount: None)))
"""


@pytest.mark.parametrize("inside", [True, False])
def test_in_the_hub_s_cache_alone_a_large_file_s_name_is_its_hash(tmp_path, state, inside):
    """Elsewhere whoever made the folder has chosen the name."""
    snapshot = hub_snapshot(tmp_path / "hub", state)
    hub = {"HF_HUB_CACHE": str(tmp_path / ("hub" if inside else "another"))}

    done = subprocess.run(
        [sys.executable, "-c", HASH, snapshot, tmp_path / "cache"],
        env=os.environ | hub,
        check=True,
        capture_output=True,
    )

    files = json.loads(done.stdout)["files"]
    assert files["model.safetensors"]["sha256"] == (BLOB if inside else sha256(snapshot / "model.safetensors"))
    assert files["config.json"]["sha256"] == sha256(snapshot / "config.json")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.cache_folder() == tmp_path / "xdg" / "zi_experiments"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / ".cache" / "zi_experiments"
