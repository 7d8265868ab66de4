"""get_ds_model computes what plain transformers computes, whatever the checkpoint's dtype and layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import IDS, plain, save_checkpoint, tiny_config
from places import HELPERS


def deepspeed_result(tmp_path: Path, *, offload: str = "cpu", ranks: int = 1, **arguments) -> dict:
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
    script = HELPERS / "logits.py"
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", f"--log-dir={tmp_path}/logs"]
    launcher = several if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), str(out), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    assert not list((tmp_path / "disk").glob("*")), "the offload folder outlives the process"
    return torch.load(out)


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


@pytest.mark.parametrize(("bits", "offload"), [(4, "cpu"), (16, "nvme")])
def test_two_ranks_compute_what_one_does(tmp_path, bits, offload):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "opt", torch.float32)
    arguments = {"model_name": str(checkpoint), "bits": bits, "offload": offload}

    one = deepspeed_result(tmp_path, **arguments)
    two = deepspeed_result(tmp_path, **arguments, ranks=2, batch_size=2)

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
