"""Answers to the questions of experiments: which runs answer together, ratios, and what is published beside them."""

import io

import made_up
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from zi_experiments.config.schema import conf_dir
from zi_experiments.report import answer_page, answer_table, answers, runs

QUESTION = {"text": "Which engine?", "figures": ["decode_tok_per_s", "total_tok_per_s"]}
TABLE = {
    "title": "A table",
    "machine": "a machine",
    "source": "https://example.org",
    "about": "",
    "figure": "total_tok_per_s",
    "run": ["offload=cpu", "quant=fp16", "model=opt-13b"],
    "systems": {"Theirs": "engine=stream", "Other": "engine=deepspeed quant=int4"},
    "rows": [
        {"system": "Theirs", "value": 7.5, "batch": 60, "run": "workload.micro_batches=2", "kv": "host"},
        {"system": "Other", "value": 3, "batch": 4, "run": ""},
        {"system": "Other", "value": 2, "batch": 4, "run": "quant=fp16", "note": "16 bits"},
    ],
}


def run(*overrides, folder="sweep/0", question=QUESTION, published=TABLE, **figures):
    made = made_up.record(**({"model": "opt-13b", "step_s": 0.1} | figures), question=question, published=published)
    made["run"]["overrides"] = ["tracking=none", "offload=cpu", *overrides]
    return runs.from_record(made, f"{folder}/result.json")


def sweep():
    return [
        run("engine=deepspeed", engine="deepspeed", step_s=0.2),
        run("engine=stream", folder="sweep/1", engine="stream", step_s=0.1),
        run("engine=fsdp", folder="sweep/2", engine="fsdp", status="oom"),
    ]


def text(answer, width=80):
    console = Console(file=io.StringIO(), width=width)
    answer_table.show(answer, console)
    return console.file.getvalue()


def test_the_first_figure_of_each_run_is_compared_with_that_of_the_first():
    (answer,) = answers.of(sweep())

    assert [line.varied for line in answer.lines] == [{"engine": name} for name in ("deepspeed", "stream", "fsdp")]
    assert [line.ratio for line in answer.lines] == [1, pytest.approx(2), None]
    assert [column.name for column in answer.figures] == QUESTION["figures"]
    assert answer.lines[1].values[0] == pytest.approx(20)


def test_a_first_run_that_failed_is_no_base():
    failed, *rest = (
        run(f"workload.batch_size={size}", batch_size=size, status=status)
        for size, status in ((1, "oom"), (2, "ok"), (4, "ok"))
    )
    (answer,) = answers.of([failed, *rest])

    assert [line.ratio for line in answer.lines] == [None, 1, pytest.approx(2)]


def test_each_sweep_has_its_own_answer_and_runs_without_a_question_have_none():
    found = answers.of([*sweep(), run(folder="another/0"), run(folder="sweep/3", question=None)])

    assert [len(answer.lines) for answer in found] == [3, 1]


def test_published_figures_are_beside_runs_of_the_same_kind():
    """An override of a row has priority over one of its system, and that over one of the table."""
    (answer,) = answers.of(sweep())

    assert [[row.value for row in line.published] for line in answer.lines] == [[2], [7.5], []]
    assert answers.text_of(answer.lines[0].published[0]) == "Other, batch 4, 16 bits"
    assert answers.text_of(answer.lines[1].published[0]) == "Theirs, batch 60, KV cache: host"


def test_a_published_figure_is_beside_the_nearest_batch_alone():
    sizes = (8, 64, 512)
    (answer,) = answers.of([run(f"workload.batch_size={size}", batch_size=size) for size in sizes])

    assert [[row.value for row in line.published] for line in answer.lines] == [[], [7.5], []]


def test_candidates_of_a_search_are_told_apart_by_what_was_decided():
    members = [run(f"search.rank={rank}", batch_size=size) for rank, size in enumerate((16, 4))]
    for member, size in zip(members, (16, 4), strict=True):
        member.settings.update({"search.rank": 0, "workload.batch_size": size, "kv_cache.device": "gpu"})
    (answer,) = answers.of(members)

    assert [line.varied for line in answer.lines] == [{"workload.batch_size": "16"}, {"workload.batch_size": "4"}]


@pytest.mark.parametrize(
    ("key", "said"), [("workload.batch_size", "batch_size"), ("kv_cache.device", "kv_cache"), ("engine", "engine")]
)
def test_a_setting_is_named_by_the_part_that_tells(key, said):
    assert answers.short(key) == said


def test_a_table_fits_80_columns_and_says_where_figures_are_from():
    shown = text(answers.of(sweep())[0])

    assert max(map(len, shown.splitlines())) <= 80
    assert "Which engine?" in shown
    assert "│ stream    │        20.00 │    2.00 │" in shown
    assert "│ fsdp      │          oom │" in shown
    assert shown.endswith(
        "published 2: Other, batch 4, 16 bits\npublished 7.5: Theirs, batch 60, KV cache: host\n"
        "published in A table, on a machine: https://example.org\n"
    )


def test_where_nothing_comparable_is_published_nothing_is_beside():
    assert "published" not in text(answers.of([run(model="opt-66b")])[0], width=200)


def test_a_page_has_bars_of_published_figures_among_those_of_runs():
    others = [run(folder="before/0", question=None)]
    (section,) = answer_page.sections([*others, *sweep()])

    decode, total = section.charts
    assert [(bar.name, bar.run) for bar in decode.bars] == [("deepspeed", 1), ("stream", 2), ("fsdp", 3)]
    assert [bar.value for bar in total.bars] == [None, 2, None, 7.5, None]
    assert section.rows[2][:3] == ["fsdp", "oom", "–"]
    assert section.rows[0][-1] == "2 Other, batch 4, 16 bits"
    assert len({len(row) for row in section.rows} | {len(section.headers)}) == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"question": "why"},
        {"question": {"text": "why", "figures": "???"}},
        {"question": {"text": None, "figures": ["ttft_s"]}},
        {"published": {"rows": [3]}},
        {"published": ["${nowhere}"]},
        {"published": {"rows": [], "systems": {}, "run": []}},
        {"published": TABLE | {"rows": [{"system": "Theirs"}]}},
    ],
    ids=str,
)
def test_what_a_refused_run_may_have_asked_does_no_harm(odd):
    found = answers.of([run(**odd)])

    assert [line.published for answer in found for line in answer.lines] == ([()] if "published" in odd else [])
    assert [text(answer) for answer in found] or "question" in odd


@pytest.mark.parametrize("path", sorted((conf_dir() / "published").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_rows_of_each_published_table_say_of_what_kind_they_are(path):
    table = OmegaConf.to_container(OmegaConf.load(path))
    for row in answers.published.rows(table):
        assert {"model", "engine", "offload", "quant"} <= set(row.settings), row
