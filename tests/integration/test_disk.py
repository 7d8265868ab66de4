"""A disk that fails while a model is loaded, for real: a run must end there, and not in figures of another model."""

import itertools
import os
import resource
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from cli import Cli, wait_for

from zi_experiments.engines.deepspeed.checked_writes import bytes_written

MIB = 1 << 20


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def fill_once_a_weight_is_there(disk, stop):
    while not any(disk.glob("zi-*/**/*.swp")):
        if stop.wait(0.001):
            return
    with (disk / "somebody-else").open("wb") as file, suppress(OSError):  # no space left
        for offset in itertools.count(0, MIB):
            os.posix_fallocate(file.fileno(), offset, MIB)


def error_line(done, result):
    """What a run that ended with an error says, in one line."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert result["status"] == "error"
    assert result["metrics"] is None
    assert result["samples"] is None
    message = result["error"]["message"]
    assert "\n" not in message
    return message


def check_failed(done, result, disk):
    message = error_line(done, result)
    assert "during load" in message
    assert f"{disk}/zi-{result['run']['id']}/zero_stage_3/" in message
    assert "_param.tensor.swp holds " in message
    assert message in done.stdout
    assert not list(disk.glob("zi-*"))
    return message


def test_a_disk_that_fills_up_while_loading_ends_the_run(cli, small_disk):
    stop = threading.Event()
    somebody = threading.Thread(target=fill_once_a_weight_is_there, args=(small_disk, stop))
    somebody.start()

    done = cli.run("model=deep", "offload=nvme", f"offload.path={small_disk}", "quant=fp16", "tracking=none")

    stop.set()
    somebody.join()
    (result,) = cli.results()
    message = check_failed(done, result, small_disk)
    assert f"free space on {small_disk}, or pass offload.path=/a/larger/disk" in message


def test_a_limit_on_the_size_of_files_ends_the_run(cli):
    """Operators, records and logs are below this limit, and one weight is above."""
    limit, disk = 32 * MIB, cli.folder / "disk"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = cli.execute(
        "offload=nvme",
        f"offload.path={disk}",
        "quant=fp16",
        "tracking=none",
        "model.architecture.num_hidden_layers=1",
        "model.architecture.ffn_dim=24576",
        preexec_fn=limited,  # Python ignores SIGXFSZ from its start
    )

    (result,) = cli.results()
    message = check_failed(done, result, disk)
    assert f"holds {limit} of the {768 * 24576 * 2} bytes" in message
    assert f"a file may have {limit} bytes at most: ulimit -f unlimited" in message


# --- engine=stream --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_before_anything_is_written(small_disk):
    made = f"DirectFile({str(small_disk / 'rank0')!r}, {600 * MIB}, None, None, 1)"
    code = f"from zi_experiments.engines.stream.store import DirectFile; {made}; print('made')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def check_streamed(done, result, disk):
    message = error_line(done, result)
    assert message in done.stdout
    assert not list(disk.glob("zi-*"))
    return message


def test_a_limit_on_the_size_of_files_ends_a_streamed_run(cli):
    """The file of all layers is above it: nothing is loaded, let alone measured."""
    disk = cli.folder / "disk"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, 8 * MIB))

    done = cli.execute(
        *("engine=stream", "offload=nvme", f"offload.path={disk}", "quant=fp16", "tracking=none"), preexec_fn=limited
    )

    (result,) = cli.results()
    message = check_streamed(done, result, disk)
    assert "File too large" in message
    assert "during load" in message
    assert result["verification"] is None


def test_a_file_that_is_cut_off_during_a_run_ends_it(cli):
    """What can no longer be read is an error, not another model's figures."""
    disk = cli.folder / "disk"
    process = cli.start(
        *("engine=stream", "offload=nvme", f"offload.path={disk}", "quant=fp16", "tracking=none"),
        *("model.architecture.num_hidden_layers=6", "workload.repeats=500"),
    )
    wait_for(process, "measure:")
    (file,) = disk.glob("zi-*/rank0")
    os.truncate(file, file.stat().st_size // 2)
    output, _ = process.communicate()

    (result,) = cli.results()
    assert process.returncode == 1, output
    assert result["status"] == "error"
    assert result["error"]["type"] == "OSError"
    assert "preadv moved 0 bytes at " in result["error"]["message"]
    assert "during measure" in result["error"]["message"]
    assert result["metrics"] is None
    assert not list(disk.glob("zi-*"))


@pytest.fixture
def weight():
    """Four MiB without a zero, but for the third."""
    weight = torch.ones(2 * MIB, dtype=torch.bfloat16)
    weight[MIB : MIB + MIB // 2] = 0
    return weight


def write(path, weight, *parts):
    """Write MiBs of a weight, by their numbers, to a file that has no others."""
    contents = weight.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        for part in parts:
            file.seek(part * MIB)
            file.write(contents[part * MIB : (part + 1) * MIB])


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ([0, 1, 2, 3], 4),
        ([0, 1, 3], 4),  # what a file system that compresses makes of it: zeros that nobody stores
        ([0, 2, 3], 1),
        ([1, 2, 3], 0),
        ([0, 1, 2], 3),
        ([0, 3], 1),
        ([], 0),
    ],
)
def test_what_is_missing_is_found_wherever_it_is(tmp_path, weight, parts, written):
    write(tmp_path / "file", weight, *parts)

    assert bytes_written(tmp_path / "file", weight) == written * MIB


def test_blocks_that_are_merely_allocated_are_missing(tmp_path, weight):
    write(tmp_path / "file", weight, 0)
    with (tmp_path / "file").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, weight.nbytes)

    assert bytes_written(tmp_path / "file", weight) == MIB
