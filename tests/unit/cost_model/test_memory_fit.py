"""What a plan takes of the GPU, of the host and of the disk, by hand for OPT-13B, and what is said when it is too much."""

import re
import shutil
from dataclasses import replace

import pytest

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.prediction import predict
from zi_experiments.execution.preparation import prepare
from zi_experiments.results.record import describe_plan
from zi_experiments.system import disk

GIB = 1 << 30
LAYERS, HIDDEN, WIDEST, VOCABULARY = 40, 5120, 20480, 50272
MATRICES = 12 * HIDDEN**2  # of a layer
VECTORS = 13 * HIDDEN
WEIGHTS = 2 * 12_853_473_280
RESIDENT = 2 * (LAYERS * VECTORS + 2 * HIDDEN)  # norms and biases, which stay on the GPU
KV = 2 * 2 * LAYERS * HIDDEN * 8 * 544  # 16-bit keys and values of 8 sequences of 512 + 32 tokens
CONTEXT, LIBRARIES, PROCESS = GIB, GIB // 8, 2_500_000_000


def workspace(batch, micro_batches=1):
    """16-bit elements within a layer, between layers, and of the last token's logits."""
    within = batch * 512 * (3 * WIDEST + 6 * HIDDEN)
    between = (3 if micro_batches == 1 else 4) * batch * micro_batches * 512 * HIDDEN
    return 2 * (within + between + 5 * batch * micro_batches * VOCABULARY)


@pytest.fixture
def uses(make_plan):
    """`uses(*overrides, on=machine)` → what OPT-13B takes in 16 bits, by where."""

    def uses(*overrides, on=None):
        plan = make_plan("model=opt-13b", "quant=fp16", "workload=zero-inference", *overrides, on=on)
        return {use.where: use for use in memory_fit.uses(plan)}

    return uses


def parts(use):
    names = ("weights", "buffers", "kv_cache", "workspace", "processes", "available")
    return {name: getattr(use, name) for name in names if getattr(use, name)}


def test_offloaded_weights_are_of_the_host_and_two_layers_of_them_of_the_gpu(uses):
    found = uses("offload=cpu")

    assert list(found) == ["GPU", "host"]
    assert parts(found["GPU"]) == {
        "weights": RESIDENT,
        "buffers": 2 * 2 * (MATRICES + VECTORS),
        "kv_cache": KV,
        "workspace": workspace(8),
        "processes": CONTEXT + LIBRARIES,
        "available": 150_000_000_000,
    }
    assert parts(found["host"]) == {
        "weights": WEIGHTS - RESIDENT,
        "processes": PROCESS,
        "available": 2_000_000_000_000,
    }


def test_without_offload_the_gpu_holds_everything(uses):
    found = uses("offload=none")

    assert (found["GPU"].weights, found["GPU"].buffers) == (WEIGHTS, 0)
    assert parts(found["host"]).keys() == {"processes", "available"}


def test_keys_and_values_on_the_host_leave_two_layers_of_them_on_the_gpu(uses):
    found = uses("offload=none", "kv_cache=cpu")

    assert found["host"].kv_cache == KV
    assert found["GPU"].kv_cache == 2 * KV // LAYERS


def test_each_of_two_ranks_has_half_and_a_process_of_its_own(uses):
    one, two = uses("offload=none"), uses("offload=none", "hardware.num_gpus=2")

    assert two["GPU"].weights == WEIGHTS // 2
    assert two["GPU"].kv_cache == KV // 2
    assert two["GPU"].workspace == workspace(4)
    assert two["GPU"].processes == one["GPU"].processes
    assert two["host"].processes == 2 * PROCESS


def test_micro_batches_take_room_between_layers_and_none_within(uses):
    streamed = ("engine=stream", "offload=cpu", "workload.batch_size=2", "workload.micro_batches=4")

    assert uses(*streamed)["GPU"].workspace == workspace(2, 4) < workspace(8)
    assert uses(*streamed)["GPU"].kv_cache == KV


def test_what_is_expanded_counts_as_a_buffer(make_plan):
    plan = make_plan("model=opt-13b", "quant=int4", "offload=none")

    assert memory_fit.uses(plan)[0].buffers == 2 * VOCABULARY * HIDDEN  # the head


def test_a_cap_leaves_out_the_context(uses, machine):
    capped = uses("offload=cpu", on=machine(gpu_memory_is_capped=True))

    assert capped["GPU"].processes == LIBRARIES


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_cpu_everything_is_of_the_host(uses, machine, ranks):
    found = uses("offload=cpu", f"hardware.num_gpus={ranks}", on=machine("cpu"))

    assert list(found) == ["host"]
    assert parts(found["host"]) == {
        "weights": WEIGHTS,
        "kv_cache": KV,
        "workspace": ranks * workspace(8 // ranks),
        "available": 2_000_000_000_000,
    }


def test_weights_on_disk_and_their_buffers(uses, machine):
    found = uses("offload=nvme", on=machine(disk_free_bytes=10**12))

    assert parts(found["disk"]) == {"weights": WEIGHTS - RESIDENT, "available": 10**12}
    # six matrices of two layers, tokens and positions, and one more, each as large as the embedding
    assert parts(found["host"]) == {
        "buffers": 15 * 2 * VOCABULARY * HIDDEN,
        "processes": PROCESS,
        "available": 2_000_000_000_000,
    }


def test_a_disk_counts_where_something_goes_there_and_its_room_is_known(uses, machine):
    assert "disk" not in uses("offload=nvme", on=machine(disk_free_bytes=None))
    assert "disk" not in uses("offload=cpu", on=machine(disk_free_bytes=0))
    assert "disk" in uses("offload=nvme", on=machine(disk_free_bytes=10**12))


def test_a_use_adds_up(uses):
    use = uses("offload=cpu", "kv_cache=cpu")["host"]

    assert use.total == use.weights + use.buffers + use.kv_cache + use.workspace + use.processes
    assert min(use.weights, use.kv_cache, use.processes) > 0
    gpu = uses("offload=cpu")["GPU"]
    assert gpu.total == gpu.weights + gpu.buffers + gpu.kv_cache + gpu.workspace + gpu.processes
    assert min(gpu.buffers, gpu.workspace) > 0


@pytest.mark.parametrize(
    ("name", "field", "where"),
    [
        ("h200", "gpu_memory_bytes", "GPU"),
        ("h200", "host_memory_bytes", "host"),
        ("h200", "disk_free_bytes", "disk"),
        ("cpu", "host_memory_bytes", "host"),
    ],
)
def test_a_plan_fits_to_the_byte(make_plan, machine, name, field, where):
    overrides = ["model=opt-13b", "quant=fp16", "offload=nvme", "workload=zero-inference", "verify=off"]
    roomy = {"disk_free_bytes": 10**12}
    plan = make_plan(*overrides, on=machine(name, **roomy))
    [needed] = [use.total for use in memory_fit.uses(plan) if use.where == where]

    assert memory_fit.problem(make_plan(*overrides, on=machine(name, **roomy | {field: needed}))) is None
    with pytest.raises(ConfigError, match=r"^opt-13b needs "):
        make_plan(*overrides, on=machine(name, **roomy | {field: needed - 1}))


def test_what_is_lacking_is_named_with_its_parts_the_largest_first(refusal, machine):
    overrides = ["model=opt-13b", "quant=fp16", "workload=zero-inference", "offload=none", "workload.batch_size=32"]
    message = refusal(*overrides, on=machine(gpu_memory_bytes=40 * 10**9))

    # 4 · 3.565 GB of keys and values; a context of 1.125 GiB
    assert message.startswith(
        "opt-13b needs 44.7 GB on each GPU (25.7 GB weights, 14.3 GB KV cache, 3.5 GB activations, 1.2 GB CUDA) "
        "and each has 40.0 GB: pass workload.batch_size="
    )


def test_a_disk_that_is_too_small_is_refused_with_what_fits(refusal, machine):
    message = refusal("model=opt-13b", "quant=fp16", "offload=nvme", on=machine(disk_free_bytes=20 * 10**9))

    assert message == (
        "opt-13b needs 25.7 GB on disk and 20.0 GB are free there: pass offload=cpu, or quant=int4, or offload=none"
    )


def test_a_larger_disk_is_advised_when_nothing_else_fits(make_plan, machine):
    small = machine(disk_free_bytes=10**9, host_memory_bytes=20 * 10**9, gpu_memory_bytes=24 * 10**9)

    with pytest.raises(
        ConfigError, match=r"free there: pass offload\.path=… on a larger disk, or model=… of a smaller one$"
    ):
        make_plan("model=opt-175b", "quant=int4", "offload=nvme", on=small)


def test_amounts_below_a_tenth_of_a_gigabyte_are_in_megabytes(refusal, machine):
    message = refusal("model=opt-125m", "quant=fp16", "offload=nvme", on=machine(disk_free_bytes=7_400_000))

    assert message.startswith("opt-125m needs 0.3 GB on disk and 7.4 MB are free there: ")


def test_the_room_on_this_disk_is_looked_at(compose_run, tmp_path):
    """Enough layers for it, whatever its size: one of OPT-175B takes 3.6 GB."""
    free = disk.free_bytes([tmp_path])
    layers = f"model.architecture.num_hidden_layers={free // 3_000_000_000 + 10}"
    run = compose_run("model=opt-175b", "quant=fp16", "offload=nvme", "hardware=cpu", layers)
    run.hardware.host_memory_gib = 1 << 20

    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    with pytest.raises(ConfigError, match=r"^opt-175b needs [\d.]+ GB on disk and [\d.]+ GB are free there: pass "):
        prepare(run, [tmp_path])


def test_verification_counts_the_weights_that_are_there(make_plan, machine):
    """One layer, embeddings and head in 16 bits, beside the weights of a CPU."""
    reference = 2 * ((VOCABULARY + 2050) * HIDDEN + 2 * HIDDEN + MATRICES + VECTORS)
    overrides = ["model=opt-13b", "quant=fp16", "offload=none", "workload.batch_size=1"]
    exact = machine("cpu", host_memory_bytes=WEIGHTS + reference)

    make_plan(*overrides, on=exact)
    tight = machine("cpu", host_memory_bytes=WEIGHTS + reference - 1)
    make_plan(*overrides, "verify=off", on=tight)
    with pytest.raises(ConfigError, match=r"^verification needs .*: pass (.*, or )?verify=off"):
        make_plan(*overrides, on=tight)


def test_a_record_has_what_is_taken_where(make_plan, machine):
    plan = make_plan("model=opt-13b", "quant=fp16", "offload=nvme", on=machine(disk_free_bytes=10**12))
    memory = describe_plan(plan, predict(plan))["memory"]

    assert [use["where"] for use in memory] == ["GPU", "host", "disk"]
    for use, found in zip(memory, memory_fit.uses(plan), strict=True):
        assert use["total"] == found.total == sum(use[name] for name in parts(found) if name != "available")
        assert re.fullmatch("GPU|host|disk", use["where"])


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("where", [("offload=cpu",), ("offload=cpu", "kv_cache=cpu"), ("offload=nvme",)], ids=str)
def test_each_machine_holds_what_its_own_ranks_have(uses, machine, engine, where):
    if engine == "fsdp" and where != ("offload=cpu",):
        pytest.skip("it has neither")
    here = each = machine(disk_free_bytes=10**12)
    if engine == "stream":  # too small to hold all weights, as each machine does where there is room
        each = replace(here, host_memory_bytes=24 * GIB, disk_free_bytes=20 * 10**9)
    settings = (f"engine={engine}", *where, "hardware.num_gpus=4", "plan_only=true", "verify=off")
    one, two = uses(*settings, on=here), uses(*settings, "launch.nnodes=2", on=each)

    assert parts(two["GPU"]) == parts(one["GPU"])
    for place in one.keys() - {"GPU"}:
        halves = {name: bytes_ // 2 for name, bytes_ in parts(one[place]).items()}
        assert parts(two[place]) == halves | {"available": two[place].available}


def test_with_stream_each_machine_holds_all_weights(uses):
    settings = ("engine=stream", "offload=cpu", "kv_cache=cpu", "hardware.num_gpus=4", "plan_only=true", "verify=off")
    one, two = parts(uses(*settings)["host"]), parts(uses(*settings, "launch.nnodes=2")["host"])

    assert two.pop("weights") == pytest.approx(one.pop("weights"), rel=1e-4)  # but for the padding of shares
    assert two == one | {"kv_cache": one["kv_cache"] // 2, "processes": one["processes"] // 2}


def test_two_machines_hold_what_one_cannot(make_plan, machine):
    small = machine(host_memory_bytes=24 * GIB)
    settings = ("model=opt-13b", "quant=fp16", "offload=cpu", "engine=deepspeed", "hardware.num_gpus=2")

    with pytest.raises(ConfigError, match="of host memory"):
        make_plan(*settings, on=small)
    make_plan(*settings, "launch.nnodes=2", "plan_only=true", on=small)
