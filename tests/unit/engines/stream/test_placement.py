"""What stays and what is streamed, for models as they ship: everything somewhere, evenly, and no more than it has to."""

from dataclasses import replace
from itertools import pairwise, product
from math import ceil

import pytest
from crossed import crossed

from zi_experiments.config.schema import ConfigError, Quant
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.prediction import predict
from zi_experiments.cost_model.spec import VERIFIED_SEQUENCES, VERIFIED_TOKENS
from zi_experiments.engines.stream import routing, sharing
from zi_experiments.engines.stream.placement import choice, parts, room
from zi_experiments.engines.stream.slab import ALIGNMENT, PAGE, lay_out
from zi_experiments.measurement.verification import GEN_LEN, PROMPT_LEN, SEQUENCES
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import groupwise

GIB = 1 << 30
MODELS = ("opt-125m", "opt-30b", "bloom-7b1", "mixtral-8x7b", "llama-3.1-70b", "qwen3-30b-a3b")
QUANTS = ("fp16", "int4", "int8")
SHARES = (0, 0.3, 0.5, 0.75, 1)


@pytest.fixture(scope="session")
def plan_stream(make_plan, machine):
    """`plan_stream(model, quant, offload, resident, ranks, gpu_gib, **workload)` → the plan of engine=stream."""

    def plan_stream(
        model,
        quant="fp16",
        offload="cpu",
        resident=0,
        *,
        ranks=1,
        gpu_gib=1000,
        host_gib=4000,
        kv_cache="gpu",
        compute="gpu",
        **settings,
    ):
        choices = (f"model={model}", f"quant={quant}", f"offload={offload}", f"kv_cache={kv_cache}", "engine=stream")
        settings = {"hardware.num_gpus": ranks, "offload.resident": resident, "offload.compute": compute} | {
            {"verify": name, "dtype": name, "group_dim": "quant.group_dim"}.get(name, f"workload.{name}"): value
            for name, value in settings.items()
        }
        on = machine(gpu_memory_bytes=int(gpu_gib * GIB), host_memory_bytes=int(host_gib * GIB))
        typed = (f"{name}={value}" for name, value in settings.items())
        return make_plan("workload=zero-inference", *choices, *typed, on=on)

    return plan_stream


def layers_of(plan):
    """The parameters of each layer, as the architecture has them."""
    layers = {}
    for parameter in plan.architecture.parameters:
        if parameter.layer is not None:
            layers.setdefault(parameter.layer, []).append(parameter)
    return [layers[index] for index in sorted(layers)]


def stored(plan, parameters):
    return 2 * sum(plan.stored_numel(parameter) for parameter in parameters)


def streamed_of(layer, parameters):
    """Of a layer's parameters, those that are streamed."""
    names = layer.streamed.names
    return [parameter for parameter in parameters if parameter.name.partition(f".{parameter.layer}.")[2] in names]


def units(plan, parameters):
    """The bytes of what moves together: a parameter, or all experts of a layer."""
    sizes = {}
    for p in parameters:
        sizes[p.experts or p.name] = sizes.get(p.experts or p.name, 0) + stored(plan, [p])
    return list(sizes.values())


@pytest.mark.parametrize(("model", "quant", "resident"), crossed(MODELS, QUANTS, SHARES))
def test_what_is_streamed_is_enough_and_even(plan_stream, model, quant, resident):
    plan = plan_stream(model, quant, resident=resident, batch_size=64)  # so many that all experts are needed
    layers, placed = layers_of(plan), choice.place(plan)
    total = sum(stored(plan, layer) for layer in layers)
    needed = ceil((1 - resident) * total)

    assert len(placed) == len(layers)
    sent = 0
    for index, (layer, parameters) in enumerate(zip(placed, layers, strict=True)):
        chosen = units(plan, streamed_of(layer, parameters))
        smallest = min(chosen, default=0)
        others = [size for size in units(plan, parameters) if size < smallest]
        sent += sum(chosen)
        due = ceil(needed * (index + 1) / len(layers))
        assert sent >= due, "the first layers stream their share, however many"
        assert sent - smallest < due or not chosen, "and no matrix more"
        assert all(sent - smallest + size < due for size in others), "and none that is larger than it has to be"
        if resident >= 0.5:
            assert stored(plan, streamed_of(layer, parameters)) < stored(plan, parameters), (
                "slots are less than a layer"
            )
    assert (sent == 0) == (resident == 1)
    assert (sent == total) == (resident == 0)


@pytest.mark.parametrize(
    ("model", "quant", "resident", "ranks"), crossed(MODELS, ("fp16", "int4"), (0.5, "auto"), (1, 4))
)
def test_every_parameter_is_in_one_slab_where_kernels_and_disks_want_it(plan_stream, model, quant, resident, ranks):
    gpu_gib = 24 if resident == "auto" else 1000
    plan = plan_stream(model, quant, resident=resident, ranks=ranks, gpu_gib=gpu_gib, batch_size=4, prompt_len=32)

    for layer, parameters in zip(choice.place(plan), layers_of(plan), strict=True):
        shapes = {p.name.partition(f".{p.layer}.")[2]: (p.shape, plan.is_quantized(p)) for p in parameters}
        found = [place for part in (layer.resident, layer.streamed) for place in places_of(part)]
        assert len(found) == len(shapes)
        assert {name: (shape, quantized) for name, shape, quantized in found} == shapes
        assert layer.streamed.nbytes % (PAGE * ranks) == 0
        assert layer.resident.nbytes % PAGE == 0
        for part in (layer.resident, layer.streamed):
            check_layout(part)


def places_of(layout):
    """Name, shape and whether it is quantized of each parameter in a slab."""
    yield from ((place.name, place.shape, False) for place in layout.plain)
    yield from ((place.name, place.shape, True) for place in layout.quantized)
    if layout.experts:
        yield from ((name, (layout.experts.count, *shape), q) for name, shape, q in places_of(layout.experts.each))


@pytest.mark.parametrize("group_size", [32, 96])
def test_parameters_of_odd_sizes_are_aligned(group_size):
    shapes = {"a": (3,), "b": (5, group_size), "c": (7, 9), "d": (2, 3, group_size), "e": (1,)}
    parameters = [
        (name, Parameter(name=name, shape=shape, quantizable=True, layer=0)) for name, shape in shapes.items()
    ]

    packing = groupwise(Quant(name="", bits=4, group_size=group_size, group_dim=1))
    check_layout(lay_out(parameters, {"b": packing, "d": packing}, 3))
    check_layout(lay_out(parameters, {}, 3))
    check_layout(lay_out([], {}, 1))


def check_layout(layout):
    for places, end in ((layout.plain, layout.plain_bytes // 2), (layout.quantized, layout.own_elements)):
        starts = [place.start for place in places]
        assert all(2 * start % ALIGNMENT == 0 for start in starts)
        ends = [place.end for place in places]
        assert all(one <= next_one for one, next_one in zip(ends, [*starts, end][1:], strict=False)), "none overlaps"
    assert layout.plain_bytes <= layout.nbytes
    assert bool(layout.regions) == bool(layout.quantized)
    if layout.quantized:
        integers, scales, minima = layout.regions
        assert all(region.start % ALIGNMENT == 0 for region in layout.regions)
        assert layout.plain_bytes == integers.start
        assert integers.stop == scales.start
        assert scales.stop == minima.start
        assert minima.stop <= layout.nbytes
        groups = layout.own_elements // layout.format.group_numel
        assert integers.stop - integers.start >= layout.own_elements * layout.format.bits // 8
        assert scales.stop - scales.start == minima.stop - minima.start >= 2 * groups
        assert all(place.start == place.group * layout.format.group_numel for place in layout.quantized)
    if layout.experts:
        check_layout(layout.experts.each)
        assert layout.nbytes >= layout.own_bytes + layout.experts.count * layout.experts.each.nbytes
        assert layout.own_bytes % PAGE == layout.experts.each.nbytes % PAGE == 0, "each can be copied and read alone"


# --- as much as fits ------------------------------------------------------------------------------------------------

CARDS_GIB = (6, 12, 24, 80, 200)
SMALL = {"batch_size": 1, "verify": "off"}
LARGE = {"batch_size": 16, "prompt_len": 1024, "gen_len": 64}
SPLIT = {"batch_size": 64, "micro_batches": 4, "prompt_len": 512, "kv_cache": "cpu", "ranks": 2, "verify": "off"}


def gpu_bytes(plan):
    """What a GPU has to hold: weights, slots, what is expanded, and keys and values."""
    placed = choice.place(plan)
    resident = sum(layer.resident.nbytes for layer in placed)
    ranks, slab = plan.run.hardware.num_gpus, max(layer.streamed.nbytes for layer in placed)
    slots = room.slots(plan) * slab + sharing.share_slots(plan) * slab // ranks
    expanded = max(sum(p.numel for p in layer if plan.is_quantized(p)) for layer in layers_of(plan))
    outside = sum(p.numel for p in plan.architecture.parameters if p.layer is None)
    kv = plan.kv_cache_bytes if plan.run.kv_cache.device.value == "gpu" else plan.kv_slot_bytes
    return resident + slots + plan.storage.cached_bytes + 2 * expanded + 2 * outside + kv // ranks


@pytest.mark.parametrize(("model", "quant", "work"), crossed(MODELS, QUANTS, (SMALL, LARGE, SPLIT)), ids=str)
def test_auto_fills_the_gpu_and_leaves_room_for_what_computes(plan_stream, model, quant, work):
    streamed = []
    for gpu_gib in CARDS_GIB:
        try:
            plan = plan_stream(model, quant, resident="auto", gpu_gib=gpu_gib, **work)
        except ConfigError:
            with pytest.raises(ConfigError):  # where not even everything streamed would fit
                plan_stream(model, quant, resident=0, gpu_gib=gpu_gib, **work)
            continue
        free = plan.machine.gpu_memory_bytes - gpu_bytes(plan)
        matrix = max(units(plan, layers_of(plan)[0])) * (2 if plan.experts else 1)  # a slot of the ring, and a layer's
        streamed.append(plan.streamed_bytes_per_pass)
        assert free >= plan.workspace_bytes + plan.context_bytes
        if work is SMALL and streamed[-1]:
            assert free < 1.5 * GIB + matrix, "for a context and little else, and what moves together"
    assert streamed
    assert streamed == sorted(streamed, reverse=True), "more memory never streams more"


@pytest.mark.parametrize("quant", QUANTS)
def test_a_model_that_fits_is_not_streamed(plan_stream, quant):
    plan = plan_stream("opt-125m", quant, resident="auto", gpu_gib=24)

    assert plan.streamed_bytes_per_pass == 0
    assert plan.placement.gpu_bytes == plan.weight_bytes


def test_without_offload_nothing_is_streamed(plan_stream):
    plan = plan_stream("opt-30b", "fp16", "none")

    assert plan.streamed_bytes_per_pass == plan.placement.cpu_bytes == plan.placement.nvme_bytes == 0


@pytest.mark.parametrize(("model", "quant"), [("opt-30b", "fp16"), ("llama-3.1-70b", "int4")])
@pytest.mark.parametrize("kv_cache", ["gpu", "cpu"])
def test_auto_from_disk_keeps_in_host_memory_what_fits(plan_stream, model, quant, kv_cache):
    counts = []
    for host_gib in (8, 16, 32, 48, 256):
        plan = plan_stream(model, quant, "nvme", "auto", gpu_gib=12, host_gib=host_gib, kv_cache=kv_cache, **SMALL)
        placed = choice.place(plan)
        slab = max(layer.streamed.nbytes for layer in placed)
        streamed = [layer for layer in placed if layer.streamed.nbytes]
        held = [index for index, layer in enumerate(streamed) if not layer.on_disk]
        kv = plan.kv_cache_bytes if kv_cache == "cpu" else 0
        used = plan.placement.cpu_bytes + plan.storage.host_buffer_bytes + kv + plan.process_bytes
        # what is read ahead has to be there, and the planner decides whether it fits
        assert used <= 0.8 * plan.machine.host_memory_bytes or not held
        if len(held) < len(streamed):
            # each is counted as the largest, so that they can be spread
            assert used + slab > 0.9 * 0.8 * plan.machine.host_memory_bytes, "hardly one more would fit"
            gaps = [after - before for before, after in pairwise(held)]
            assert not gaps or max(gaps) - min(gaps) <= 1, "spread, so that the disk reads ahead steadily"
        assert plan.streamed_bytes_per_pass == plan.placement.nvme_bytes + plan.placement.cpu_bytes
        counts.append(len(held))
    assert counts == sorted(counts)
    assert 0 < counts[1] < counts[-1] == len(streamed)


@pytest.mark.parametrize(("quant", "kv_cache"), [("int8", "gpu"), ("int4", "cpu")])
def test_auto_from_disk_caches_in_host_memory_the_experts_that_fit(plan_stream, quant, kv_cache):
    hosts, cached, read = (12, 16, 24, 32, 256), [], []
    for host_gib in hosts:
        plan = plan_stream(
            "mixtral-8x7b", quant, "nvme", "auto", gpu_gib=12, host_gib=host_gib, kv_cache=kv_cache, **SMALL
        )
        layers = [layer.streamed for layer in choice.place(plan)]
        expert, stored = layers[0].experts.each.nbytes, plan.storage
        kv = plan.kv_cache_bytes if kv_cache == "cpu" else 0
        used = plan.placement.cpu_bytes + stored.host_buffer_bytes + kv + plan.process_bytes
        use = memory_fit.uses(plan)[1]
        if host_gib < hosts[-1]:
            assert plan.placement.nvme_bytes == sum(layer.nbytes for layer in layers), "those in the cache too"
            assert use.experts == stored.host_cached_bytes == room.host_slots(plan, choice.place(plan)) * expert
            assert use.total <= use.available
            assert used <= 0.8 * use.available < used + expert or stored.host_cached_bytes == 8 * expert
            assert stored.disk_bytes_per_step < stored.streamed_bytes_per_step
            assert (stored.disk_bytes_per_step > 0) == (stored.cached_bytes + use.experts < plan.placement.nvme_bytes)
        else:
            assert (plan.placement.nvme_bytes, stored.host_cached_bytes, stored.disk_bytes_per_step) == (0, 0, None)
        cached.append(stored.host_cached_bytes)
        read.append(plan.disk_bytes_per_step)
    assert cached[:-1] == sorted(set(cached[:-1]))
    assert read == sorted(read, reverse=True)
    assert read[0] > read[1] > read[2], "with less than all in the pool and the cache together"


@pytest.mark.parametrize(("batch_size", "needed"), [(1, 8), (3, 8)])
def test_a_share_from_disk_has_a_cache_of_a_layers_step(plan_stream, batch_size, needed):
    """Verification decodes four sequences, whatever the run has."""
    plan = plan_stream("mixtral-8x7b", "int4", "nvme", 0.3, batch_size=batch_size, prompt_len=32)
    experts = choice.place(plan)[0].streamed.experts

    assert plan.storage.host_cached_bytes == needed * experts.each.nbytes
    assert plan.disk_bytes_per_step == plan.streamed_bytes_per_step
    per_layer = plan.distinct_experts(batch_size) * experts.each.nbytes
    assert per_layer * 32 * 0.6 < plan.disk_bytes_per_step < per_layer * 32 * 0.8, "the GPU's pool keeps some"


def test_a_share_from_disk_leaves_nothing_in_host_memory(plan_stream):
    plan = plan_stream("opt-30b", "fp16", "nvme", 0.5)
    buffers = room.BUFFERS * max(layer.streamed.nbytes for layer in choice.place(plan))

    assert plan.placement.cpu_bytes == 0
    assert plan.placement.nvme_bytes == plan.streamed_bytes_per_pass > 0
    assert plan.storage.host_buffer_bytes == buffers


@pytest.mark.parametrize(("ranks", "resident", "offload"), product((1, 2, 4), (0, 0.5), ("cpu", "nvme")))
def test_each_rank_has_what_is_resident_to_itself_and_a_share_of_the_rest(plan_stream, ranks, resident, offload):
    plan = plan_stream("opt-30b", "int4", offload, resident, ranks=ranks)
    placed = choice.place(plan)
    outside = 2 * sum(p.numel for p in plan.architecture.parameters if p.layer is None)

    resident = outside + sum(layer.resident.nbytes for layer in placed)
    assert plan.placement.gpu_bytes == resident
    assert plan.storage.copied_bytes == (ranks - 1) * resident
    assert memory_fit.uses(plan)[0].weights == resident, "on each of them"
    assert plan.streamed_bytes_per_pass == sum(layer.streamed.nbytes for layer in placed)
    assert plan.weight_bytes == resident + plan.streamed_bytes_per_pass
    slab = max(layer.streamed.nbytes for layer in placed)
    shares = slab + slab // ranks if ranks > 1 else 0
    assert plan.storage.gpu_buffer_bytes == 3 * slab + shares + 2 * parts.expanded_elements(placed)


CARD = {"gpu_gib": 23.6, "host_gib": 128, "batch_size": 4, "prompt_len": 32}


@pytest.mark.parametrize(
    ("model", "quant", "offload"),
    [("llama-3.1-70b", "int4", "cpu"), ("llama-3.1-70b", "int4", "nvme"), ("opt-30b", "fp16", "cpu")],
)
def test_verification_leaves_what_is_measured_as_it_is(plan_stream, model, quant, offload):
    """As much is resident as without it: the reference's room is that of weights which wait in host memory meanwhile."""
    on, off = (plan_stream(model, quant, offload, "auto", verify=verify, **CARD) for verify in ("on", "off"))
    use = memory_fit.uses(on)[0]

    assert (on.placement, on.streamed_bytes_per_pass) == (off.placement, off.streamed_bytes_per_pass)
    assert use.total > 0.97 * use.available, "as much as fits while measuring"
    slots = on.storage.gpu_buffer_bytes - 2 * parts.expanded_elements(choice.place(on))
    verifying = use.weights - on.storage.parked_bytes + slots + use.processes
    assert verifying + on.observed_bytes + 2 * on.reference_bytes <= use.available
    assert (on.storage.parked_bytes > 0, off.storage.parked_bytes) == (True, 0)
    host = memory_fit.uses(on)[1]
    assert host.total + on.storage.parked_bytes <= host.available


def test_a_host_without_room_for_what_is_parked_is_refused(plan_stream):
    parked = plan_stream("llama-3.1-70b", "int4", "cpu", "auto", **CARD)
    tight = CARD | {"host_gib": (memory_fit.uses(parked)[1].total + parked.storage.parked_bytes) / GIB - 0.01}

    plan_stream("llama-3.1-70b", "int4", "cpu", "auto", verify="off", **tight)
    with pytest.raises(ConfigError, match=r"^verification moves \d+\.\d GB of the GPU's weights .*: pass .*verify=off"):
        plan_stream("llama-3.1-70b", "int4", "cpu", "auto", **tight)


def test_a_card_with_room_for_the_reference_parks_nothing(plan_stream):
    assert plan_stream("opt-30b", "fp16", "cpu", 0.5).storage.parked_bytes == 0


def test_what_verification_computes_is_what_was_planned_for(plan_stream):
    assert (VERIFIED_SEQUENCES, VERIFIED_TOKENS) == (SEQUENCES, PROMPT_LEN + GEN_LEN)
    plan = plan_stream("opt-30b")
    assert plan.observed_bytes == 2 * 4 * 19 * (48 + 1) * 7168


@pytest.mark.parametrize("key", ["queue_depth", "single_submit", "overlap_events"])
def test_a_setting_of_deepspeeds_disk_is_refused(make_plan, key):
    advice = rf"pass offload\.aio\.{key}=null, or engine=deepspeed$"
    with pytest.raises(ConfigError, match=rf"^offload\.aio\.{key}=.* only used with engine=deepspeed, .*: {advice}"):
        make_plan("engine=stream", "offload=nvme", f"offload.aio.{key}=1")


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"batch_size": 1}, "a decode step brings about 2 of 8 experts of a layer: those that tokens are routed to"),
        ({"batch_size": 32}, "all experts of a layer: 32 sequences need about 8 of 8"),
        ({"batch_size": 2, "ranks": 2}, "all experts of a layer: experts are brought one by one with one GPU only"),
        ({"batch_size": 8, "offload": "cpu"}, "all experts of a layer: 8 sequences need about 7 of 8"),
        ({"batch_size": 8, "offload": "nvme"}, "about 7 of 8 experts of a layer: those that tokens are routed to"),
        ({"batch_size": 32, "offload": "nvme"}, "all experts of a layer: 32 sequences need about 8 of 8"),
        (
            {"batch_size": 1, "gpu_gib": 7.5, "verify": "off"},
            " of the other weights do not fit on the GPU: every step brings them, a prompt brings whole layers",
        ),
        (
            {"batch_size": 1, "gpu_gib": 7, "verify": "off"},
            "all experts of a layer: the GPU has no room for single ones",
        ),
    ],
    ids=str,
)
def test_the_plan_says_which_experts_a_step_brings(plan_stream, settings, note):
    plan = plan_stream("mixtral-8x7b", "int4", prompt_len=32, **settings)

    assert any(note in each for each in plan.notes)
    assert plan.storage.routes == ("all experts" not in note)


@pytest.mark.parametrize(("model", "quant"), [("mixtral-8x7b", "int4"), ("qwen3-30b-a3b", "int8")])
@pytest.mark.parametrize("resident", [0, "auto"])
def test_weights_beside_experts_cross_in_a_step_as_far_as_they_do_not_fit(plan_stream, model, quant, resident):
    work = {"batch_size": 1, "prompt_len": 32, "verify": "off"}
    roomy = plan_stream(model, quant, **work)
    own = stored(roomy, [p for layer in layers_of(roomy) for p in layer if not p.experts])
    used, moved = gpu_bytes(roomy) / GIB + 2, []
    for step in range(60):
        try:
            plan = plan_stream(model, quant, resident=resident, gpu_gib=used - 0.1 * step, **work)
        except ConfigError:
            break
        if not plan.storage.routes:
            break
        placed, brought, use = choice.place(plan), plan.storage.own_bytes_per_step, memory_fit.uses(plan)[0]
        streamed = [layer.streamed for layer in placed]
        assert use.total <= use.available
        assert brought == sum(layout.own_bytes for layout in streamed)
        assert plan.streamed_bytes_per_pass == sum(layout.nbytes for layout in streamed)
        assert plan.streamed_bytes_per_step == brought + routing.per_step(
            plan, streamed, room.expert_slots(plan, placed)
        )
        if brought:
            largest = max(layout.own_bytes for layout in streamed)
            assert use.available - use.total < 0.2 * GIB + 8 * largest, "no more than has to"
        moved.append(brought)
    assert moved == sorted(moved), "less memory never brings less"
    assert moved[0] == 0 < moved[-1] < 1.1 * own


def test_whole_layers_are_brought_where_that_is_predicted_to_be_faster(make_plan, machine):
    """A host so slow that launching what brings single experts takes longer than to copy all of them."""
    settings = (
        "model=mixtral-8x7b",
        "quant=int4",
        "engine=stream",
        "offload=cpu",
        "workload.batch_size=1",
        "verify=off",
    )
    known, plans = machine("measured").calibration, []
    for layer_s in (1e-4, 1.0):
        on = machine("measured", gpu_memory_bytes=8_150_000_000, calibration=replace(known, layer_s=layer_s))
        plans.append(make_plan(*settings, "workload.prompt_len=32", "kv_cache=cpu", on=on))
    parts, whole = plans

    assert (parts.storage.routes, whole.storage.routes) == (True, False)
    assert parts.storage.own_bytes_per_step > whole.storage.own_bytes_per_step == 0
    assert parts.streamed_bytes_per_step < whole.streamed_bytes_per_step == whole.streamed_bytes_per_pass
    assert "a decode step brings all experts of a layer: that is predicted to be faster" in whole.notes


def test_dense_models_have_no_note(plan_stream):
    assert plan_stream("opt-125m", "int4", batch_size=1).notes == ()


# --- several GPUs and machines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "gathers"),
    [
        (["hardware.num_gpus=4"], True),
        (["hardware.num_gpus=4", "hardware.peer_bytes_per_s=40e9"], False),  # three quarters of 63 GB/s are more
        (["hardware.num_gpus=2", "hardware.peer_bytes_per_s=40e9"], True),  # a half is less
        (["hardware.num_gpus=1"], False),
        (["hardware.num_gpus=4", "launch.nnodes=4", "plan_only=true"], False),
        (["hardware.num_gpus=4", "launch.nnodes=2", "plan_only=true"], True),
    ],
    ids=str,
)
def test_slabs_are_gathered_where_links_between_gpus_are_faster(make_plan, machine, overrides, gathers):
    typed = [float(each.partition("=")[2]) for each in overrides if "peer" in each]
    on = machine("h200", peer_bytes_per_s=typed[0]) if typed else machine("h200")
    plan = make_plan("engine=stream", "model=opt-13b", "offload=cpu", "workload.batch_size=8", *overrides, on=on)

    assert sharing.gathers(plan) is gathers
    assert (sharing.share_slots(plan) > 0) is gathers
    note = next((note for note in plan.notes if note.startswith(("each GPU", "each machine"))), "")
    assert ("gathered at" in note) is gathers
    assert bool(note) is (plan.run.hardware.num_gpus > 1)
    assert note.endswith("each machine brings all weights for its own prompts") is (plan.run.launch.nnodes > 1)


def test_without_links_between_gpus_only_what_is_on_disk_is_gathered(make_plan, machine):
    """Each GPU brings everything from host memory, which has it once; a disk would be read by all of them."""
    on, four = machine("h200", peer_bytes_per_s=None), ("engine=stream", "model=opt-13b", "hardware.num_gpus=4")
    host, disk = (make_plan(*four, f"offload={offload}", "workload.batch_size=8", on=on) for offload in ("cpu", "nvme"))
    once = make_plan("engine=stream", "model=opt-13b", "offload=cpu", "workload.batch_size=8", on=on)

    assert (sharing.gathers(host), sharing.gathers(disk)) == (False, True)
    assert host.placement.cpu_bytes == pytest.approx(once.placement.cpu_bytes, rel=1e-3)
    assert host.streamed_bytes_per_pass == 4 * host.placement.cpu_bytes
    assert lower_bound(host).decode_step_s == pytest.approx(lower_bound(once).decode_step_s, rel=1e-3), "no faster"
    assert disk.streamed_bytes_per_pass == disk.placement.nvme_bytes
    assert disk.storage.gathered_bytes == disk.placement.nvme_bytes * 3 // 4


def test_machines_hold_all_weights_each_and_are_as_fast_as_one(make_plan, machine):
    """For its own prompts: twice the machines bring the same for twice the sequences."""
    on = machine("measured")
    one, two = (
        make_plan(
            *("engine=stream", "model=opt-66b", "offload=cpu", "plan_only=true", "hardware.price_per_hour=10"),
            *(f"launch.nnodes={nodes}", f"hardware.num_gpus={8 * nodes}", f"workload.batch_size={64 * nodes}"),
            on=on,
        )
        for nodes in (1, 2)
    )

    host, alone = (next(use for use in memory_fit.uses(plan) if use.where == "host") for plan in (two, one))
    assert (host.weights, host.processes) == (alone.weights, alone.processes)
    assert two.streamed_bytes_per_pass == 2 * one.streamed_bytes_per_pass
    assert lower_bound(two).decode_step_s == pytest.approx(lower_bound(one).decode_step_s)
    now, twice = predict(one), predict(two)
    assert twice.decode_step_s == pytest.approx(now.decode_step_s)
    assert twice.total_tok_per_s == pytest.approx(2 * now.total_tok_per_s)
    assert twice.cost_per_million_tokens == pytest.approx(now.cost_per_million_tokens), "twice the price, twice as fast"


def test_a_gather_that_takes_longer_than_the_copies_decides(make_plan, machine):
    """Eight GPUs receive seven eighths from each other while each brings an eighth."""
    plan = make_plan(
        *("engine=stream", "model=opt-66b", "offload=cpu", "hardware.num_gpus=8", "workload.batch_size=8"),
        on=machine("measured", peer_bytes_per_s=100e9),
    )

    assert sharing.gathers(plan)
    assert predict(plan).decode_step_s == pytest.approx(plan.placement.cpu_bytes * 7 / 8 / 100e9, rel=1e-3)


# --- layers that the host computes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "count"), [("gpu", 0), (0, 0), (0.3, 14), (0.5, 24), (0.71, 34), (1, 48), (0.001, 0)]
)
def test_the_hosts_layers_are_spread_evenly(plan_stream, compute, count):
    plan = plan_stream("opt-30b", compute=compute)
    layers = plan.storage.host_layers

    assert len(layers) == count
    assert (f"the host's cores compute {count} of 48 layers in decode steps" in plan.notes) == (count > 0)
    if count:
        assert {after - before for before, after in pairwise(layers)} <= {48 // count, -(-48 // count)}
        assert layers[-1] == 47
    assert plan.streamed_bytes_per_pass == plan_stream("opt-30b").streamed_bytes_per_pass
    assert plan.streamed_bytes_per_step == plan.streamed_bytes_per_pass * (48 - count) // 48


@pytest.mark.parametrize("resident", [0.5, "auto"])
def test_the_hosts_layers_have_nothing_on_the_gpu(plan_stream, resident):
    """What the GPU holds is of the other layers, and no less of them all together."""
    plan = plan_stream("opt-30b", resident=resident, gpu_gib=40, compute=0.25)
    placed, usual = choice.place(plan), choice.place(plan_stream("opt-30b", resident=resident, gpu_gib=40))

    for index, layer in enumerate(placed):
        assert bool(layer.resident.nbytes) == (index not in plan.storage.host_layers)
    held, before = (sum(layer.resident.nbytes for layer in each) for each in (placed, usual))
    assert held == pytest.approx(before, rel=0.12)


def test_a_share_of_the_gpu_larger_than_the_other_layers_keeps_these_whole(plan_stream):
    plan = plan_stream("opt-30b", resident=0.9, compute=0.5)

    for index, layer in enumerate(choice.place(plan)):
        assert bool(layer.streamed.nbytes) == (index in plan.storage.host_layers)
    assert plan.streamed_bytes_per_step == 0


@pytest.mark.parametrize(("gpu_gib", "slots"), [(80, 6), (18, 5), (13, 3)])
def test_more_slabs_are_ready_beside_layers_on_the_host(plan_stream, gpu_gib, slots):
    """As many as fit into half of what the KV cache and computing leave; a layer of OPT-30B has 1.15 GiB."""
    usual, plan = (plan_stream("opt-30b", compute=compute, gpu_gib=gpu_gib) for compute in ("gpu", 0.5))

    assert room.slots(usual) == 3
    assert room.slots(plan) == slots
    slab = max(layer.streamed.nbytes for layer in choice.place(plan))
    assert plan.storage.gpu_buffer_bytes - usual.storage.gpu_buffer_bytes == (slots - 3) * slab


def test_the_hosts_layers_have_their_keys_and_values_in_host_memory(plan_stream):
    usual, plan = (plan_stream("opt-30b", compute=compute) for compute in ("gpu", 0.5))
    gpu, host = memory_fit.uses(plan)

    assert plan.storage.host_kv_bytes == host.kv_cache == usual.kv_cache_bytes // 2
    assert gpu.kv_cache == usual.kv_cache_bytes // 2 + usual.kv_slot_bytes
    assert plan_stream("opt-30b", compute=0.5, kv_cache="cpu").storage.host_kv_bytes == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int4_on_the_host_is_multiplied_from_the_slabs(plan_stream, dtype):
    usual, plan = (plan_stream("opt-30b", "int4", dtype=dtype, compute=compute) for compute in ("gpu", 0.5))

    assert len(plan.storage.host_layers) == 24
    assert plan.storage.host_buffer_bytes == usual.storage.host_buffer_bytes == 0
    assert plan.placement == usual.placement


INT4_ONLY = "the host computes 16-bit layers, and INT4 of linear layers in groups of 32 to 256 inputs"


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        ("opt-30b", {"ranks": 2}, "the host computes layers with one GPU only"),
        ("opt-30b", {"offload": "nvme"}, "the host computes layers from host memory only, not from disk"),
        ("opt-30b", {"quant": "int8"}, INT4_ONLY),
        ("bloom-7b1", {"quant": "int4", "group_dim": 0}, INT4_ONLY),
        ("mixtral-8x7b", {"quant": "int4", "batch_size": 32}, INT4_ONLY),
    ],
)
@pytest.mark.parametrize("compute", [0.5, "auto"])
def test_the_plan_says_why_the_host_computes_nothing(plan_stream, model, settings, why, compute):
    plan = plan_stream(model, compute=compute, **settings)

    assert plan.storage.host_layers == ()
    assert f"all layers compute on the GPU: {why}" in plan.notes


# --- experts that the host computes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "compute", "part"),
    [("mixtral-8x7b", 0.5, 1 / 2), ("mixtral-8x7b", 0.2, 0), ("qwen3-30b-a3b", 0.4, 3 / 8), ("qwen3-30b-a3b", 1, 1)],
)
def test_experts_on_the_host_do_not_cross(plan_stream, model, compute, part):
    """Of the 2 and of the 8 that a token needs in a layer, so many that copies and host end together."""
    usual, plan = (plan_stream(model, "int4", compute=share, batch_size=1) for share in ("gpu", compute))

    assert plan.storage.host_experts == (compute if part else 0)
    assert plan.storage.host_bytes_per_step == pytest.approx(part * usual.streamed_bytes_per_step)
    assert plan.streamed_bytes_per_step == pytest.approx((1 - part) * usual.streamed_bytes_per_step)
    assert plan.streamed_bytes_per_pass == usual.streamed_bytes_per_pass, "the GPU computes prompts"
    assert plan.storage.gpu_buffer_bytes == usual.storage.gpu_buffer_bytes
    note = f"{100 * compute:.0f} % of those not on the GPU" if part else "less than one of those that a layer brings"
    assert note in " ".join(plan.notes)


@pytest.mark.parametrize("quant", ["int4", "fp16"])
def test_experts_on_the_host_are_multiplied_from_the_slabs(plan_stream, quant):
    storage = plan_stream("mixtral-8x7b", quant, compute=0.5, batch_size=1).storage

    assert storage.host_experts == 0.5
    assert storage.host_buffer_bytes == 0


NOT_TRANSPOSED = "the host computes 16-bit experts, and INT4 in groups of 32 to 256 inputs that are not transposed"


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        (
            "mixtral-8x7b",
            {"quant": "int4", "offload": "nvme"},
            "the host computes experts from host memory only, not from disk",
        ),
        ("mixtral-8x7b", {"quant": "int8"}, NOT_TRANSPOSED),
        ("gpt-oss-20b", {"quant": "int4"}, NOT_TRANSPOSED),
    ],
)
@pytest.mark.parametrize("compute", [0.5, "auto"])
def test_the_plan_says_why_the_host_computes_no_experts(plan_stream, model, settings, why, compute):
    plan = plan_stream(model, compute=compute, batch_size=1, **settings)

    assert plan.storage.host_experts == 0
    assert f"all experts compute on the GPU: {why}" in plan.notes
