"""The baselines: real runs of accelerate and FSDP2 on the CPU, and what their plans say of a GPU."""

import pytest
import torch
from cli import Cli
from families import save_checkpoint
from torch import nn

from zi_experiments.config.schema import ConfigError
from zi_experiments.engines import accelerate, modules

BASELINES = ("accelerate", "fsdp")


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def check(result, *, num_parameters=None):
    """Verification has compared logits and tokens with plain transformers, so what is left is that all of it was there."""
    assert result["status"] == "ok", result["error"]
    assert result["verification"]["passed"]
    assert result["verification"]["max_rel_error"] == 0
    assert result["verification"]["tokens_equal_fraction"] == 1
    assert sum(result["plan"]["placement"].values()) == result["plan"]["weight_bytes"]
    assert result["metrics"]["decode_tok_per_s"] > 0


def test_each_baseline_runs_with_each_offload_it_knows(cli):
    engines = f"engine={','.join(BASELINES)}"
    done = cli.run("-m", engines, "offload=none,cpu,nvme", "quant=fp16", "kv_cache=cpu", "tracking=none")

    results = {(r["choices"]["engine"], r["choices"]["offload"]): r for r in cli.results()}
    assert len(results) == 6, done.stdout + done.stderr
    refused = results.pop(("fsdp", "nvme"))
    assert refused["status"] == "refused"
    assert "pass offload=cpu, or engine=accelerate" in refused["error"]["message"]
    for result in results.values():
        check(result)
    assert results["accelerate", "none"]["engine_config"] == {"call": None}
    assert results["accelerate", "cpu"]["engine_config"] == {"call": "cpu_offload"}
    assert results["fsdp", "cpu"]["engine_config"] == {"cpu_offload": False, "pin_memory": False, "forward_prefetch": 2}
    on_disk = results["accelerate", "nvme"]
    placed = on_disk["plan"]["placement"]["nvme_bytes"]
    assert on_disk["metrics"]["disk_peak_bytes"] >= placed == on_disk["plan"]["weight_bytes"]
    assert not list((on_disk["folder"] / "offload").iterdir())


def test_each_baseline_reads_a_checkpoint(cli):
    save_checkpoint(cli.folder / "checkpoint", "opt")
    chosen = ("model=local", "weights=pretrained", f"model.path={cli.folder / 'checkpoint'}")

    done = cli.run("-m", *chosen, f"engine={','.join(BASELINES)}", "quant=fp16", "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cli.results()) == 2
    for result in cli.results():
        check(result)


def test_two_ranks_share_the_layers_under_fsdp(cli):
    done = cli.run("engine=fsdp", "hardware=cpu", "hardware.num_gpus=2", "quant=fp16", "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    check(result)
    assert done.stdout.count("measure: done") == 1, "only rank 0 speaks"


@pytest.fixture
def tied():
    """Two layers with one matrix, without memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_parameters_stay_one(tied):
    (names,) = modules.names_of(tied)
    modules.put(tied, names, torch.eye(4))

    assert names == ["0.weight", "1.weight"]
    assert tied[0].weight is tied[1].weight
    assert torch.equal(tied[1].weight, torch.eye(4))


def test_tied_parameters_are_on_disk_once(tied, tmp_path):
    value = torch.arange(16.0, dtype=torch.bfloat16).view(4, 4) / 16
    values = iter([(["0.weight", "1.weight"], value)])
    tied.to(torch.bfloat16)

    accelerate._on_disk(tied, values, torch.device("cpu"), {"offload_dir": str(tmp_path)})

    assert (tmp_path / "0.weight.dat").samefile(tmp_path / "1.weight.dat")
    assert torch.equal(tied(torch.eye(4, dtype=torch.bfloat16)), value.T @ value.T)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine=accelerate", "quant=int4"), "engine=accelerate keeps 16-bit weights: pass quant=fp16"),
        (("engine=fsdp", "quant=int8"), "engine=fsdp keeps 16-bit weights: pass quant=fp16, or engine=stream"),
        (("engine=fsdp", "offload=nvme"), "pass offload=cpu"),
        (("engine=accelerate", "hardware.num_gpus=2"), "pass hardware.num_gpus=1, or engine=fsdp"),
        (("engine=accelerate", "offload.pin_memory=true"), "pass offload.pin_memory=false"),
        (("engine=accelerate", "offload=nvme", "offload.buffer_count=4"), "offload.buffer_count"),
        (("engine=accelerate", "offload=nvme", "offload.aio.queue_depth=4"), "pass offload.aio.queue_depth=null"),
        (("engine=accelerate", "offload=nvme", "offload.use_gds=true"), "use_gds"),
        (("engine=accelerate", "offload.resident=0.5"), "or engine=stream"),
        (("engine=fsdp", "offload.resident=auto"), "or engine=stream"),
        (("engine=accelerate", "workload.micro_batches=2"), "or engine=stream"),
        (("engine=fsdp", "workload.micro_batches=2"), "or engine=stream"),
        (("engine=fsdp", "engine.profile=tuned"), "engine.profile=tuned is only used with engine=deepspeed"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused(make_plan, overrides, message):
    quant = () if any(override.startswith("quant=") for override in overrides) else ("quant=fp16",)
    with pytest.raises(ConfigError) as refused:
        make_plan("model=opt-125m", *quant, *overrides)

    assert message in str(refused.value)


@pytest.mark.parametrize("engine", BASELINES)
def test_on_a_gpu_weights_live_where_offload_says(make_plan, engine):
    everything = 2 * 125_239_296
    homes = {"none": "gpu_bytes", "cpu": "cpu_bytes"} | ({"nvme": "nvme_bytes"} if engine == "accelerate" else {})

    for offload, home in homes.items():
        plan = make_plan("model=opt-125m", "quant=fp16", f"engine={engine}", f"offload={offload}")
        assert plan.weight_bytes == getattr(plan.placement, home) == everything
        assert (plan.streamed_bytes_per_pass > 0) == (offload != "none")


def test_accelerate_moves_every_module_in_every_pass(make_plan):
    plan = make_plan("model=opt-125m", "quant=fp16", "engine=accelerate")

    assert plan.streamed_bytes_per_pass == plan.weight_bytes
    assert plan.storage.gpu_buffer_bytes == 2 * 50272 * 768, "the embedding, of all modules"


@pytest.mark.parametrize(("ranks", "live"), [(1, 2), (2, 4)])
def test_fsdp_moves_layers_and_keeps_what_is_outside(make_plan, ranks, live):
    plan = make_plan("model=opt-125m", "quant=fp16", "engine=fsdp", f"hardware.num_gpus={ranks}")

    layer = 2 * (12 * 768 * 768 + 13 * 768)
    outside = plan.weight_bytes - 12 * layer
    assert plan.streamed_bytes_per_pass == 12 * layer
    assert plan.storage.gpu_buffer_bytes == live * layer + outside
