"""get_ds_model computes what plain transformers computes, whatever the checkpoint's dtype and layout."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cli
import pytest
import torch
from families import IDS, plain, save_checkpoint, tiny_config
from places import HELPERS


def deepspeed_result(tmp_path: Path, started=cli.run, *, offload: str = "cpu", **arguments) -> dict:
    """What logits.py writes, as one process or as `started(words, folder, environment)`."""
    arguments = {
        "cpu_offload": offload == "cpu",
        "disk_offload": offload == "nvme",
        "offload_dir": str(tmp_path / "disk"),
        "dummy_weights": None,
        "group_size": 64,
        **arguments,
    }
    (tmp_path / "disk").mkdir(exist_ok=True)
    out = tmp_path / "out.pt"
    done = started([str(HELPERS / "logits.py"), str(out), json.dumps(arguments)], tmp_path, dict(os.environ))
    if done.returncode:
        raise RuntimeError(done.stderr)
    assert not list((tmp_path / "disk").glob("*")), "the offload folder outlives the process"
    return torch.load(out)


def by_torchrun(words, folder, environment):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", f"--log-dir={folder}/logs"]
    return subprocess.run([sys.executable, *launcher, *words], env=environment, capture_output=True, text=True)


def as_torchrun_does(words, folder, environment):
    """Two forked processes that find each other as torchrun's do, which import nothing any more."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    with ThreadPoolExecutor() as both:
        ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return max(both.map(lambda each: cli.run(words, folder, each), ranks), key=lambda done: abs(done.returncode))


def test_logits_equal_plain_transformers(tmp_path):
    """An fp32 checkpoint in several files, INT4, on disk; test_families.py has the others, without this function."""
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "opt", torch.float32, layout="sharded")

    result = deepspeed_result(tmp_path, model_name=str(checkpoint), bits=4, offload="nvme")

    with torch.no_grad():
        logits = plain(checkpoint, 4, dtype=result["logits"].dtype)(IDS).logits
    assert torch.equal(result["logits"], logits)
    assert torch.equal(result["again"], logits)
    assert result["on_disk"] > 0


@pytest.mark.parametrize(("started", "bits", "offload"), [(by_torchrun, 4, "cpu"), (as_torchrun_does, 16, "nvme")])
def test_two_ranks_compute_what_one_does(tmp_path, started, bits, offload):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "opt", torch.float32)
    arguments = {"model_name": str(checkpoint), "bits": bits, "offload": offload}

    one = deepspeed_result(tmp_path, **arguments)
    two = deepspeed_result(tmp_path, started, **arguments, batch_size=2)

    assert torch.equal(one["logits"], two["logits"])
    assert torch.equal(one["tokens"], two["tokens"])


def test_a_checkpoint_without_a_weight_is_refused_by_its_name(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "llama", torch.float32, layout="bin")
    state = torch.load(checkpoint / "pytorch_model.bin")
    del state["lm_head.weight"]
    torch.save(state, checkpoint / "pytorch_model.bin")

    with pytest.raises(RuntimeError, match=r"lacks tensors that its config\.json asks for \(lm_head\.weight\)"):
        deepspeed_result(tmp_path, model_name=str(checkpoint), bits=4)


def test_random_weights_depend_on_nothing_but_the_seed(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "shape")
    arguments = {"model_name": str(tmp_path / "shape"), "dummy_weights": "random"}

    on_cpu = deepspeed_result(tmp_path, bits=16, **arguments)
    resident = deepspeed_result(tmp_path, bits=16, offload="none", **arguments)
    quantized = deepspeed_result(tmp_path, bits=8, **arguments)

    assert torch.isfinite(on_cpu["logits"]).all()
    assert on_cpu["logits"].float().std() > 0.1
    assert torch.equal(on_cpu["logits"], resident["logits"])
    error = (quantized["logits"].float() - on_cpu["logits"].float()).norm() / on_cpu["logits"].float().norm()
    assert 0 < error < 0.05
