"""The picture of a report: which runs it has, and that what it shows is theirs."""

import re
from xml.etree import ElementTree

import made_up

from zi_experiments.report import picture, runs


def drawn(*records):
    made = picture.draw([runs.from_record(record, "x/result.json") for record in records])
    assert made is None or ElementTree.fromstring(made).tag.endswith("svg")
    return made


def bars(made):
    """Of each bar its label, its width, and its value."""
    found = re.findall(r'"right".*>(.*)</text>\n<rect .* width="(.*?)".*\n<text .*>(.*)</text>', made)
    return [(label, float(width), value) for label, width, value in found]


def test_a_bar_is_as_long_as_its_share_of_the_fastest():
    made = bars(drawn(made_up.record(engine="fsdp", step_s=0.4), made_up.record(engine="stream", step_s=0.1)))

    assert [label for label, _, _ in made] == ["stream", "fsdp"]
    assert made[1][1] == made[0][1] / 4
    assert made[0][2].startswith("20.0 tok/s, ")


def test_runs_of_other_work_are_not_compared():
    fp16, int4 = (
        made_up.record(quant=quant, engine=engine) for quant, engine in (("fp16", "stream"), ("int4", "fsdp"))
    )
    made = drawn(fp16, int4, made_up.record(quant="int4"))

    assert made.count('class="title"') == 1, "a single run is left out where others are compared"
    assert "fp16" not in made
    assert "opt-125m, int4, offload=cpu, 2 sequences" in made
    assert drawn(fp16, int4).count('class="title"') == 2


def test_names_stay_text():
    assert "&lt;b&gt;" in drawn(made_up.record(engine="<b>"))


def test_without_a_throughput_there_is_no_picture(tmp_path):
    failed = made_up.record(status="oom")

    assert drawn(failed) is None
    assert picture.write([runs.from_record(failed, "x")], tmp_path) == []
