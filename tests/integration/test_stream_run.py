"""Whole runs with engine=stream on the CPU: one rank, two ranks that gather each other's shares, and what the record says."""

import hashlib
import json
import os

import formats
import pytest
import tiny
from checkpoints import write
from cli import Cli, wait_for

from zi_experiments.engines.stream.stripes import STRIPE_BYTES


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def check(result):
    """Verification has compared logits and tokens with plain transformers."""
    assert result["status"] == "ok", result["error"]
    assert result["verification"]["passed"]
    assert result["verification"]["max_rel_error"] == 0
    assert result["verification"]["tokens_equal_fraction"] == 1
    assert result["metrics"]["decode_tok_per_s"] > 0


def test_two_ranks_bring_their_shares(cli):
    """Five layers through three slots, from host memory and from disk; keys and values here or there, in blocks or not."""
    done = cli.run(
        *("-m", "engine=stream", "hardware=cpu", "hardware.num_gpus=2", "offload=cpu,nvme", "tracking=none"),
        "hardware.peer_bytes_per_s=1e9",
        *("model.architecture.num_hidden_layers=5", "kv_cache=cpu", "workload.micro_batches=2"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["choices"]["offload"]: result for result in cli.results()}
    for result in results.values():
        check(result)
    assert done.stdout.count("measure: done") == 2, "only rank 0 speaks"
    on_disk = results["nvme"]
    assert on_disk["metrics"]["disk_peak_bytes"] >= on_disk["plan"]["placement"]["nvme_bytes"] > 0
    assert results["cpu"]["metrics"]["disk_peak_bytes"] == 0
    assert not list((on_disk["folder"] / "offload").iterdir())


def test_two_ranks_compute_from_the_same_memory(cli):
    """Without links of their own nothing is gathered: each fills its half of every slab, and reads all of it."""
    settings = ("engine=stream", "hardware=cpu", "offload=cpu", "model=deep", "quant=fp16", "tracking=none")
    one, two = (cli.run(*settings, f"hardware.num_gpus={ranks}") for ranks in (1, 2))

    assert (one.returncode, two.returncode) == (0, 0), two.stdout + two.stderr
    alone, both = cli.results()
    check(both)
    assert both["engine_config"]["share_slots"] == 0
    assert both["generated"] == alone["generated"]
    streamed = both["plan"]["placement"]["cpu_bytes"]
    assert both["stored"]["cpu_bytes"] - alone["stored"]["cpu_bytes"] < 0.1 * streamed, "what is outside of the layers"


@pytest.mark.parametrize("peer", ["null", "1e9"])
def test_ranks_may_have_one_sequence_fewer(cli, peer):
    """Three ranks generate for five sequences what one rank does, whether they gather or share memory."""
    settings = ("engine=stream", "hardware=cpu", "offload=cpu", "quant=fp16", "tracking=none", "workload.batch_size=5")
    done = cli.run("-m", *settings, f"hardware.peer_bytes_per_s={peer}", "hardware.num_gpus=1,3", "kv_cache=cpu")

    assert done.returncode == 0, done.stdout + done.stderr
    one, three = cli.results()
    check(three)
    assert three["generated"] == one["generated"]
    steps = three["samples"]["step_s"][0]
    assert three["metrics"]["decode_tok_per_s"] == pytest.approx(5 * len(steps) / sum(steps)), "of all ranks"


def test_two_drives_have_half_each(cli):
    """The same tokens as from one, and no file is left on either; two ranks have a file each on both."""
    drives = [cli.folder / "disk", cli.folder / "other"]
    drives[1].mkdir()
    settings = ("engine=stream", "hardware=cpu", "offload=nvme", "quant=fp16", "tracking=none", "hardware.num_gpus=2")
    one = cli.run(*settings, f"offload.path={drives[0]}")
    assert one.returncode == 0, one.stdout + one.stderr
    process = cli.start(*settings, f"offload.path=[{drives[0]},{drives[1]}]", "workload.repeats=20")
    wait_for(process, "measure:")
    sizes = [[path.stat().st_blocks * 512 for path in sorted(drive.glob("zi-*/rank*"))] for drive in drives]
    output, _ = process.communicate()

    assert process.returncode == 0, output
    single, both = cli.results()
    check(both)
    assert both["generated"] == single["generated"]
    placed = both["plan"]["placement"]["nvme_bytes"]
    assert [len(of_drive) for of_drive in sizes] == [2, 2]
    assert all(sum(of_drive) == pytest.approx(placed / 2, abs=4 * STRIPE_BYTES) for of_drive in sizes)
    assert both["metrics"]["disk_peak_bytes"] >= placed
    assert not any(list(drive.iterdir()) for drive in drives)


def test_a_full_drive_of_two_ends_the_run(cli, small_disk):
    other = cli.folder / "other"
    other.mkdir()
    with (small_disk / "somebody-else").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 445 << 20)

    done = cli.run(
        *("engine=stream", "hardware=cpu", "offload=nvme", "quant=fp16", "tracking=none", "model=deep"),
        f"offload.path=[{other},{small_disk}]",
    )

    (result,) = cli.results()
    assert done.returncode == 1, done.stdout + done.stderr
    assert result["status"] == "refused"
    assert "on disk and" in result["error"]["message"]
    assert not list(other.iterdir())


def test_a_record_has_the_engines_own_configuration(cli):
    done = cli.run(
        *("engine=stream", "offload=nvme", "offload.resident=0.5", "quant=int8", "workload.micro_batches=3"),
        *("offload.aio.block_size=65536", "offload.aio.intra_op_parallelism=2", "tracking=none"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    check(result)
    assert result["ds_config"] is None
    assert sum(result["plan"]["placement"].values()) == result["plan"]["weight_bytes"]
    config = result["engine_config"]
    assert {"slots": config["slots"], "layers_on_disk": config["layers_on_disk"]} == {"slots": 3, "layers_on_disk": 2}
    assert 0 < config["resident_bytes"] < result["plan"]["weight_bytes"]
    assert result["plan"]["placement"]["nvme_bytes"] <= 2 * config["slot_bytes"]
    assert json.loads((result["folder"] / "engine_config.json").read_text()) == config
    assert not (result["folder"] / "ds_config.json").exists()
    steps, ttft = result["samples"]["step_s"][0], result["samples"]["ttft_s"][0]
    sequences = 3 * result["config"]["workload"]["batch_size"]
    assert result["metrics"]["decode_tok_per_s"] == pytest.approx(sequences * len(steps) / sum(steps))
    assert result["metrics"]["prefill_tok_per_s"] == pytest.approx(
        sequences * result["config"]["workload"]["prompt_len"] / ttft
    )


def test_a_model_that_takes_no_cache_but_its_own(cli, tmp_path):
    write(tmp_path / "checkpoint", "minimax", tiny.MINIMAX)
    done = cli.run(
        *("engine=stream", "model=local", f"model.path={tmp_path / 'checkpoint'}", "weights=pretrained"),
        *("offload=cpu", "quant=fp16", "tracking=none"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    check(result)
    assert result["verification"]["reference"] == "AutoModelForCausalLM"


def test_a_file_of_quantized_weights(cli, tmp_path):
    """From the command to the record: its format, its hash, and plain transformers as the reference."""
    formats.gguf(tmp_path)
    file = tmp_path / "model.gguf"
    done = cli.run(
        *("engine=stream", "model=local", f"model.path={file}", "weights=pretrained", "dtype=bfloat16"),
        *("offload=cpu", "quant=fp16", "tracking=none"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    check(result)
    assert result["verification"]["reference"] == "AutoModelForCausalLM"
    assert (result["plan"]["dtype"], result["plan"]["revision"]) == ("bfloat16", None)
    checkpoint = result["checkpoint"]
    assert list(checkpoint["files"]) == ["model.gguf"]
    assert checkpoint["files"]["model.gguf"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint["format"] == "gguf (Q8_0)"
    assert 4.5 < checkpoint["bits_per_parameter"] < 8.6
