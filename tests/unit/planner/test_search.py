"""Runs near a run: what is said to be faster is so by plan and can be typed, and a search begins with the best."""

from dataclasses import replace
from math import log

import pytest

from zi_experiments.config.schema import Ceilings, ConfigError
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.prediction import predict
from zi_experiments.planner import planning, search

GIB = 1 << 30
WORK = ("model=opt-13b", "quant=fp16", "workload=zero-inference")
# to plan for many runs takes a moment for each layer
FEW = (*WORK, "model.architecture.num_hidden_layers=6", "workload.prompt_len=64", "workload.gen_len=64")
NOTICEABLE = 1.03
UNKNOWN = {"ceilings": Ceilings(**dict.fromkeys(Ceilings.__dataclass_fields__)), "calibration": None}


@pytest.fixture(autouse=True)
def _nothing_ranked_before():
    search._candidates.cache_clear()  # a process has one machine, and these tests several


@pytest.fixture
def better(make_plan, machine):
    """`better(*overrides, **changes)` → the plan of OPT-13B, and what would be faster."""

    def better(*overrides, **changes):
        plan = make_plan(*WORK, *overrides, on=machine("measured", **changes))
        return plan, search.improvements(plan)

    return better


@pytest.fixture
def ranked(compose_run, describe, machine):
    """`ranked(*overrides, name="measured", **changes)` → the candidates for the best throughput of a few layers of OPT-13B."""

    def ranked(*overrides, name="measured", **changes):
        run = compose_run(*FEW, *overrides)
        return search.candidates(run, describe(run), machine(name, **changes))

    return ranked


def texts(candidates):
    return [each.text for each in candidates]


# --- the change that helps most -------------------------------------------------------------------------------------

ASKED = [
    ("offload=cpu",),
    ("engine.profile=reference",),
    ("offload=nvme", "kv_cache=cpu"),
    ("engine=stream", "offload.pin_memory=false"),
    ("engine=accelerate",),
    ("engine=stream", "offload=none", "hardware.num_gpus=2"),
]


@pytest.mark.parametrize("overrides", ASKED, ids=str)
def test_what_is_faster_can_be_typed_and_fits_and_is_faster(better, compose_run, describe, overrides):
    plan, found = better(*overrides, gpu_memory_bytes=48 * GIB)
    now = predict(plan).total_tok_per_s

    assert found
    assert [each.tok_per_s for each in found] == sorted((each.tok_per_s for each in found), reverse=True)
    for each in found:
        typed = compose_run(*WORK, *overrides, *each.text.split())
        assert replace(each.run, name=typed.name) == typed
        there = planning.build(typed, describe(typed), plan.machine)
        assert predict(there).total_tok_per_s == each.tok_per_s > NOTICEABLE * now


def test_whole_layers_are_faster_than_modules(better):
    assert "engine=stream" in texts(better("engine=accelerate", gpu_memory_bytes=24 * GIB)[1])
    assert "engine=stream" in texts(better("offload=cpu", gpu_memory_bytes=24 * GIB)[1])
    assert "engine=stream" not in texts(better("engine=stream")[1])


def test_the_settings_that_help_are_named(better):
    assert "engine.profile=tuned" in texts(better("engine.profile=reference")[1])
    found = texts(better("engine=stream", "offload.pin_memory=false", gpu_memory_bytes=24 * GIB)[1])
    assert "offload.resident=auto" in found
    assert "offload.pin_memory=true" in [text.lower() for text in found]


def test_a_larger_batch_is_named_once_and_no_larger_than_it_has_to_be(better):
    plan, found = better("offload=cpu")
    [size] = [int(text.partition("=")[2]) for text in texts(found) if text.startswith("workload.batch_size=")]

    def rate(batch_size):
        run = replace(plan.run, workload=replace(plan.run.workload, batch_size=batch_size))
        return predict(planning.build(run, plan.architecture, plan.machine)).total_tok_per_s

    assert size & (size - 1) == 0
    assert size <= search.MOST_TIMES * plan.run.workload.batch_size
    assert rate(size) * NOTICEABLE >= rate(search.MOST_TIMES * plan.run.workload.batch_size)
    assert rate(size // 2) * NOTICEABLE < rate(size), "half of it would be slower"


def test_a_larger_batch_is_one_that_a_person_would_take(make_plan, machine):
    """A power of two that fits, up to 16 times as large, though a thousand times as many sequences would fit."""

    def sizes(batch_size, *overrides):
        plan = make_plan("offload=cpu", f"workload.batch_size={batch_size}", *overrides, on=machine("measured"))
        found = search._larger_batches(plan.run, plan.architecture, plan.machine)
        return plan, [each.run.workload.batch_size for each in found]

    plan, larger = sizes(6)
    assert planning.largest_batch(plan.run, plan.architecture, plan.machine) > 6000
    assert larger == [8, 16, 32, 64]
    assert sizes(1)[1] == [2, 4, 8, 16]
    most = planning.largest_batch(plan.run, plan.architecture, plan.machine)
    assert sizes(most)[1] == []
    assert sizes(4, "hardware.num_gpus=2")[1] == [8, 16, 32, 64]


def test_a_gain_is_shown_with_the_latency_that_it_costs(better):
    """More sequences wait longer for their first token, and for each of the others."""
    plan, found = better("offload=none")
    larger = next(each for each in found if each.text.startswith("workload.batch_size="))
    now = search.paced(plan)

    assert now.is_predicted
    assert now.tok_per_s == predict(plan).total_tok_per_s
    assert (now.ttft_s, now.tpot_s) == (predict(plan).prefill_s, predict(plan).decode_step_s)
    assert larger.pace.ttft_s > now.ttft_s
    assert larger.pace.tpot_s > now.tpot_s
    assert larger.pace.tok_per_s > now.tok_per_s


def test_without_a_measurement_plans_are_compared_by_their_bounds(make_plan, machine):
    slow = make_plan("model=opt-13b", "quant=fp16", "offload=cpu", on=machine("h200"))
    found = search.improvements(slow)

    assert {"quant=int4", "offload=none"} <= set(texts(found))
    assert not any(each.pace.is_predicted for each in found)
    assert search.paced(slow).tpot_s == lower_bound(slow).decode_step_s


def test_nothing_is_advised_where_a_rate_is_not_known(make_plan, machine):
    """Nor is what depends on it: a disk of which nothing is known would seem endlessly fast."""
    on = machine("measured")
    without = replace(on, ceilings=replace(on.ceilings, disk_bytes_per_s=None))

    assert search.improvements(make_plan("model=opt-13b", "offload=nvme", on=without)) == []
    found = search.improvements(make_plan("model=opt-13b", "offload=cpu", "quant=fp16", on=without))
    assert found
    assert "offload=nvme" not in texts(found)


def test_what_does_not_fit_is_not_faster(better):
    """In 16 bits OPT-13B is larger than the GPU, and its INT4 weights are not."""
    _, found = better("offload=cpu", gpu_memory_bytes=20 * GIB)

    assert "offload=none" not in texts(found)
    assert "offload=none" in texts(better("offload=cpu", "quant=int4", gpu_memory_bytes=20 * GIB)[1])


def test_gpus_that_are_not_there_are_not_faster(better):
    assert "hardware.num_gpus=2" in texts(better("offload=cpu", gpus_visible=2)[1])
    assert "hardware.num_gpus=2" not in texts(better("offload=cpu", gpus_visible=1)[1])


@pytest.mark.parametrize(("layer_s", "is_named"), [(1e-4, True), (1e-6, False)])
def test_a_gain_that_nobody_would_notice_is_none(make_plan, machine, layer_s, is_named):
    """engine=stream stalls nowhere, which gains 3.6 % where launching a layer takes 0.1 ms, and less where it takes less."""
    on = machine("measured", gpus_visible=1)
    on = replace(on, calibration=replace(on.calibration, layer_s=layer_s))
    plan, stream = (make_plan(*WORK, "offload=cpu", *more, on=on) for more in ((), ("engine=stream",)))
    gain = predict(stream).total_tok_per_s / predict(plan).total_tok_per_s

    assert gain > 1
    assert (gain > NOTICEABLE) is is_named
    assert ("engine=stream" in texts(search.improvements(plan))) is is_named


def test_of_a_machine_that_is_not_known_nothing_is_faster(better):
    assert better("offload=cpu", **UNKNOWN)[1] == []


# --- candidates -----------------------------------------------------------------------------------------------------

CARD = {"gpu_memory_bytes": 5 * GIB, "host_memory_bytes": 8 * 10**9}  # 3.8 GB of layers and 0.5 GB beside them


def kind(candidate):
    run = candidate.run
    return run.kv_cache.device, run.offload.resident, run.workload.micro_batches


def batch(candidate):
    return candidate.run.workload.batch_size


@pytest.mark.parametrize("gpu_gib", [6, 8])
def test_a_search_begins_with_the_best_by_plan_and_goes_on_with_its_curve(ranked, gpu_gib):
    found = ranked("engine=stream", **CARD | {"gpu_memory_bytes": gpu_gib * GIB})
    best, *sizes = [each for each in found if kind(each) == kind(found[0])]
    others = [each for each in found if kind(each) != kind(found[0])]

    assert best is found[0]
    assert best.tok_per_s * NOTICEABLE >= max(each.tok_per_s for each in found)
    distances = [abs(log(batch(each) / batch(best))) for each in sizes]
    assert distances == sorted(distances), "the nearest sizes first"
    assert found == [best, *sizes[:4], *others, *sizes[4:]]
    assert len(sizes) >= 4
    assert len({kind(each) for each in others}) == len(others) == 2 * 2 * 5 - 1, "each other kind, once"
    assert [each.tok_per_s for each in others] == sorted((each.tok_per_s for each in others), reverse=True)


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ((1.0, 2.0, 3.0), 2),
        ((1.0, 2.95, 3.0), 1),  # within 3 %: the smallest batch that is about as fast
        ((1.0, 2.90, 3.0), 2),
        ((1.0, 3.0, 2.0), 1),
        ((2.98, 2.99, 3.0), 0),
    ],
)
def test_the_best_of_a_curve_is_the_smallest_batch_that_is_about_as_fast(compose_run, rates, best):
    paces = [search.Pace(ttft_s=1.0, tpot_s=1.0, tok_per_s=rate, is_predicted=True) for rate in rates]
    curve = [search.Candidate(text=str(n), run=compose_run(), pace=pace) for n, pace in enumerate(paces)]

    assert search._best(curve).text == str(best)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sizes_are_powers_of_two_on_each_rank_and_the_largest(ranked, compose_run, describe, machine, ranks):
    card = CARD | {"host_memory_bytes": 20 * 10**9}
    found = ranked("engine=stream", f"hardware.num_gpus={ranks}", **card)
    sizes = sorted(batch(each) for each in found if kind(each) == kind(found[0]))
    largest = planning.largest_batch(found[0].run, describe(found[0].run), machine("measured", **card))

    assert sizes[-1] == largest
    assert largest % ranks == 0
    assert sizes[:-1] == [size for size in (ranks << n for n in range(30)) if size < largest]


def test_candidates_can_be_typed_and_fit(ranked, compose_run, describe, machine):
    overrides = (*FEW, "engine=stream")
    for each in ranked("engine=stream", **CARD):
        typed = compose_run(*overrides, *each.text.split())
        assert typed == each.run
        plan = planning.build(typed, describe(typed), machine("measured", **CARD))
        assert predict(plan).total_tok_per_s == each.tok_per_s
        assert each.sequences == typed.workload.batch_size * typed.workload.micro_batches


def test_only_the_engine_that_can_has_micro_batches_and_residents(ranked):
    found = ranked("engine=deepspeed", **CARD)

    assert {kind(each)[1:] for each in found} == {(0, 1)}
    assert {kind(each)[0].value for each in found} == {"gpu", "cpu"}
    assert all("resident" not in each.text and "micro_batches" not in each.text for each in found)


def test_without_offload_nothing_is_streamed_in_any_candidate(ranked):
    found = ranked("engine=stream", "offload=none", gpu_memory_bytes=8 * GIB)

    assert {each.run.offload.resident for each in found} == {0}
    assert {each.run.workload.micro_batches for each in found} == {1, 2, 4, 8, 16}


def test_on_a_cpu_keys_and_values_have_one_place(ranked, machine):
    known = machine("measured")
    found = ranked(
        "engine=stream", name="cpu", host_memory_bytes=64 * GIB, ceilings=known.ceilings, calibration=known.calibration
    )

    assert {kind(each)[0].value for each in found} == {"gpu"}
    assert all("kv_cache" not in each.text for each in found)


def test_a_search_where_nothing_fits_says_why(ranked):
    with pytest.raises(ConfigError, match=r"^opt-13b needs .* on each GPU .*: pass "):
        ranked("engine=stream", "offload=none", gpu_memory_bytes=5 * GIB)


def test_a_search_without_rates_says_what_finds_them(ranked):
    with pytest.raises(ConfigError, match=r"no rates of this machine are known, .*: pass hardware=auto$"):
        ranked("engine=stream", **UNKNOWN)


def test_a_rank_is_the_candidate_of_that_rank(compose_run, describe, machine, ranked):
    found, on = ranked("engine=stream", **CARD), machine("measured", **CARD)

    def settled(rank):
        run = compose_run(*FEW, "engine=stream", f"search.rank={rank}")
        return search.settle(run, describe(run), on)

    assert [settled(rank) for rank in (0, 3, len(found) - 1)] == [found[rank].run for rank in (0, 3, -1)]
    assert settled(len(found)) is None
    run = compose_run(*FEW)
    assert search.settle(run, describe(run), on) is run


def test_a_batch_that_is_left_open_makes_no_other_candidates(ranked):
    asked = texts(ranked("engine=stream", **CARD))

    assert texts(ranked("engine=stream", "workload.batch_size=auto", **CARD)) == asked


def test_a_ranking_holds_while_the_memory_that_is_available_wavers(compose_run, describe, machine, ranked):
    """The runs of a sweep are planned one after the other, and each must be another candidate."""

    def settled(rank, host_memory_bytes, *more):
        run = compose_run(*FEW, "engine=stream", f"search.rank={rank}", *more)
        on = machine("measured", **CARD | {"host_memory_bytes": host_memory_bytes})
        return search.settle(run, describe(run), on)

    first, later = 8_000_000_000, 9_000_000_000
    expected = ranked("engine=stream", **CARD | {"host_memory_bytes": first})
    assert [settled(rank, later) for rank in range(len(expected))] == [each.run for each in expected]
    search._candidates.cache_clear()
    alone = ranked("engine=stream", **CARD | {"host_memory_bytes": later})
    assert [each.run for each in alone] != [each.run for each in expected], "of themselves they would be others"
    # of another run the ranking is another
    assert settled(0, later, "workload.gen_len=33").workload.gen_len == 33


# --- the largest batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "overrides",
    [
        ("offload=cpu",),
        ("offload=none", "quant=int4"),
        ("offload=cpu", "kv_cache=cpu"),
        ("engine=stream", "offload=cpu", "offload.resident=auto"),
        ("engine=stream", "offload=cpu", "workload.micro_batches=3"),
        ("engine=stream", "offload=nvme", "kv_cache=cpu", "verify=off"),
    ],
    ids=str,
)
def test_auto_is_the_largest_batch_that_fits(make_plan, machine, overrides, ranks):
    on = machine("measured", gpu_memory_bytes=24 * GIB, host_memory_bytes=100 * 10**9)
    asked = (*WORK, *overrides, f"hardware.num_gpus={ranks}")
    plan = make_plan(*asked, "workload.batch_size=auto", on=on)
    size = plan.run.workload.batch_size

    assert size >= ranks
    assert size % ranks == 0
    assert make_plan(*asked, f"workload.batch_size={size}", on=on) == plan
    with pytest.raises(ConfigError, match=" needs "):
        make_plan(*asked, f"workload.batch_size={size + ranks}", on=on)


def test_auto_on_a_cpu_fills_host_memory(make_plan, machine):
    """OPT-125M: weights of 250 MB, 36 864 bytes of keys and values a token, and what a pass takes."""
    on = machine("cpu", host_memory_bytes=GIB)
    overrides = ("model=opt-125m", "quant=fp16", "workload.prompt_len=32", "workload.gen_len=8", "verify=off")
    plan = make_plan(*overrides, "workload.batch_size=auto", on=on)

    a_sequence = 40 * 36_864 + 2 * (32 * (3 * 3072 + 6 * 768) + 3 * 32 * 768 + 5 * 50272)
    assert plan.run.workload.batch_size == (GIB - plan.weight_bytes) // a_sequence


@pytest.mark.parametrize(("model", "ranks"), [("opt-13b", 1), ("opt-30b", 2)])
def test_auto_where_not_one_sequence_fits_is_refused_with_what_does(refusal, machine, model, ranks):
    overrides = (f"model={model}", "quant=fp16", "offload=none", f"hardware.num_gpus={ranks}")
    message = refusal(*overrides, "workload.batch_size=auto", on=machine(gpu_memory_bytes=20 * GIB, gpus_visible=ranks))

    assert message.startswith(f"{model} needs ")
    assert "batch_size" not in message.partition(": pass ")[2]


def test_a_run_is_told_of_the_best_change_that_keeps_its_workload(better):
    plan, found = better("offload=cpu", gpus_visible=1)
    told = search.faster(plan)
    same = [each for each in found if each.run.workload == plan.run.workload]

    assert told == max(same, key=lambda each: each.tok_per_s)
    assert told.tok_per_s >= search.MUCH * search.paced(plan).tok_per_s


def test_a_run_is_told_nothing_of_a_larger_batch(better):
    few = ("engine=stream", "offload=none", "quant=int4", "workload.batch_size=1")
    plan, found = better(*few, gpus_visible=1)

    assert "workload.batch_size" in found[0].text
    assert search.faster(plan) is None


def test_a_run_is_told_nothing_by_bounds(make_plan, machine):
    slow = make_plan(*WORK, "offload=cpu", on=machine("h200"))

    assert search.improvements(slow)
    assert search.faster(slow) is None


def test_what_is_typed_is_not_varied(ranked):
    typed = ["workload.batch_size=2", "kv_cache=cpu", "workload.micro_batches=2", "offload.resident=0.5"]
    few = ("engine=stream", "offload=cpu", *typed)
    [only] = ranked(*few, f"search.typed=[{','.join(map(repr, typed))}]")

    assert len(ranked(*few)) > 1
    assert (only.run.workload.batch_size, only.run.workload.micro_batches) == (2, 2)
    assert (only.run.kv_cache.device.value, only.run.offload.resident) == ("cpu", 0.5)
