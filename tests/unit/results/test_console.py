import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from zi_experiments.config.schema import Ceilings
from zi_experiments.cost_model.prediction import predict
from zi_experiments.engines.deepspeed import placement
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.results import explanation, metrics
from zi_experiments.results.record import Record, RunInfo
from zi_experiments.results.sinks.console import ConsoleSink, show_plan, show_sweep


def test_a_plan_says_what_limits_a_step_and_what_it_will_take(make_plan, machine):
    """25.7 GB of OPT-13B over 50 GB/s; they fit on the GPU, which reads 4 TB/s beside the host's 150 GB/s."""
    asked = ("model=opt-13b", "quant=fp16", "engine=stream")
    # the embeddings stay on the GPU: 25.7 GB less 0.5
    limits = "at least 503.4 ms, limited by PCIe, over all placements 6.1 ms; predicted 503.4 ms\n"
    assert f"a decode step takes {limits}" in shown(make_plan(*asked, on=machine("measured")))
    only_bound = shown(make_plan(*asked, on=machine("cpu")))
    assert "decode step" not in only_bound
    assert "predicted" not in only_bound


def test_a_bound_of_the_machine_that_is_the_placement_s_own_is_not_said_again(make_plan, machine):
    """A processor has one memory."""
    rates = Ceilings(None, 1e11, 1e12, 1e9, None, "by hand")
    plan = make_plan("model=opt-13b", "quant=fp16", "engine=stream", on=machine("cpu", ceilings=rates))

    said = shown(plan)

    assert "a decode step takes at least" in said
    assert "placements" not in said


@pytest.mark.parametrize(
    ("setting", "split"),
    [
        (("offload=cpu",), "0.54 GB GPU, 25.17 GB pinned host"),
        (("offload=cpu", "offload.pin_memory=false"), "0.54 GB GPU, 25.17 GB host"),
        (("offload=cpu", "offload.resident=1"), "25.71 GB GPU"),
        (("offload=nvme",), "0.54 GB GPU, 25.17 GB disk"),
    ],
)
def test_what_is_pinned_is_in_host_memory(make_plan, setting, split):
    assert f"weights 25.71 GB ({split})," in shown(make_plan("model=opt-13b", "quant=fp16", "engine=stream", *setting))


def test_a_skipped_run_of_a_sweep_is_no_failure(capsys):
    show_sweep([([f"a={status}"], record("ok") | {"status": status}) for status in ("ok", "kept", "skipped", "oom")])

    assert "skipped" in capsys.readouterr().out


def test_a_table_has_the_errors_of_the_prediction_and_a_sentence_after_it(make_plan, machine):
    price = "hardware.price_per_hour=3.6"
    plan = make_plan("model=opt-13b", "quant=fp16", "workload.gen_len=2", price, on=machine("measured"))
    predicted = predict(plan)
    counted = {"gpu:a": (1.0, 33.0), "cpu:package-0": None}
    one = Pass(ttft_s=predicted.prefill_s * 2, total_s=9.0, step_s=[predicted.decode_step_s / 1.1], joules=counted)
    samples = Samples(load_s=1.0, warmup=[], measured=[one])
    peaks = {"gpu_peak_bytes": 0, "host_peak_bytes": 0, "disk_peak_bytes": 0}
    figures = metrics.derive(samples, plan, predict(plan), perplexity=None, **peaks)
    run = RunInfo(id="1", name="one", group=None, started_at="", finished_at="", command="", git_revision=None)
    console = Console(file=io.StringIO(), width=200)

    whole = Record(run=run, folder="", choices={}, config={}, status="ok")
    whole = replace(whole, plan=plan, prediction=predict(plan), samples=samples, metrics=figures)
    ConsoleSink(console).write(whole)

    text = console.file.getvalue()
    assert re.search(r"time to first token .*\n.*  predicted +│ +\S+ m?s \(50 % too low\)", text)
    assert re.search(r"GPU energy per token +│ +4.00 J ", text), "32 J for 8 tokens"
    assert "CPU energy" not in text
    assert re.search(r"cost per million tokens +│ +1,125.00 ", text), "8 tokens in 9 s"
    assert re.search(r"time per token, .*\n.*  predicted +│ +\S+ m?s \(10 % too high\)", text)
    assert text.splitlines()[-1] == explanation.sentence(plan, predict(plan), figures)


def record(status):
    run = RunInfo(id="1", name="one", group=None, started_at="", finished_at="", command="", git_revision=None)
    return Record(run=run, folder="", choices={}, config={}, status=status).to_dict()


def test_a_sweep_shows_what_differs_and_brackets_as_they_were_typed(capsys):
    common = "tracking.tags=[same]"

    show_sweep([([common, "tracking.tags=[a,b]"], record("ok")), ([common, "name=[/x]"], record("oom"))])

    shown = capsys.readouterr().out
    assert "tracking.tags=[a,b]" in shown
    assert "name=[/x]" in shown
    assert "oom" in shown
    assert "same" not in shown


def test_a_plan_shows_a_name_as_it_was_typed(make_plan, machine):
    console = Console(file=io.StringIO(), width=200)

    plan = make_plan("model=opt-125m", on=machine("cpu"))
    show_plan("[/mine]", plan, predict(plan), console)

    assert console.file.getvalue().startswith("[/mine]: 125.2 M parameters")


def shown(plan):
    """What is shown of a plan on a terminal, with its colours."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    show_plan("run", plan, predict(plan), console)
    return console.file.getvalue()


YELLOW, RESET = "\x1b[33m", "\x1b[0m"


def with_fewer_quantizable(plan, keep):
    """The plan of a model of which only parameters that `keep` accepts can be quantized."""
    parameters = tuple(replace(p, quantizable=p.quantizable and keep(p)) for p in plan.architecture.parameters)
    changed = replace(plan, architecture=replace(plan.architecture, parameters=parameters))
    return replace(changed, storage=placement.storage(changed))


def test_a_plan_says_how_much_is_quantized_and_what_it_takes(make_plan):
    text = shown(make_plan("model=opt-125m", "quant=int4"))

    assert "99 % of the parameters quantized to 4 bits; 4.66 bits per parameter as stored\n" in text
    assert "warning" not in text
    assert YELLOW not in text


def test_a_plan_warns_where_much_stays_16_bit(make_plan):
    plan = with_fewer_quantizable(make_plan("model=opt-125m", "quant=int4"), lambda p: p.layer is not None)

    # 12·12·768² of 125.2 M
    expected = "warning: only 68 % of the parameters quantized to 4 bits; 8.20 bits per parameter as stored"
    assert f"{YELLOW}{expected}{RESET}\n" in shown(plan)


@pytest.mark.parametrize(("left_alone", "warns"), [(3, False), (4, True)])  # layers of 40: 90.6 % and 88.1 %
def test_it_warns_below_nine_tenths(make_plan, left_alone, warns):
    plan = with_fewer_quantizable(
        make_plan("model=opt-13b", "quant=int8"), lambda p: p.layer is not None and p.layer >= left_alone
    )

    assert ("warning: only" in shown(plan)) is warns


def test_a_16_bit_plan_says_nothing_of_quantization(make_plan):
    text = shown(make_plan("model=opt-125m", "quant=fp16"))

    assert "quantized" not in text
    assert "bits a parameter" not in text
