"""What the command writes, says and returns."""

import csv
import json
import subprocess
import sys
import tomllib

import made_up
import polars
import pytest
from places import ROOT

from zi_experiments.report import command


@pytest.fixture
def folder(tmp_path):
    """Three runs: two that are ok, and one that was refused and has no figure."""
    made_up.write(tmp_path / "0", made_up.record(step_s=1 / 3))
    made_up.write(tmp_path / "1", made_up.record(engine="fsdp"))
    refused = made_up.record(offload="none", status="refused")
    refused["run"]["name"] = "none|refused"
    refused["error"]["message"] = "a|b <script>x</script>\n*c*"
    made_up.write(tmp_path / "2", refused)
    return tmp_path


def report(folder, *arguments):
    return command.main([str(folder), "--output", str(folder / "out"), *arguments])


def data_of(page):
    """The data of the page, as its scripts read it."""
    text = page.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def column(data, name):
    coded = data["rows"][name]
    count = len(data["labels"])
    if len(coded["values"]) == 1:
        return coded["values"] * count
    return [coded["values"][code] for code in coded.get("codes", range(count))]


def test_the_files_are_written_and_named(folder, capsys):
    assert report(folder) == 0

    names = [f"report.{kind}" for kind in ("html", "svg", "csv", "parquet", "md")]
    names += ["llama-bench.md", "llama-bench.jsonl", "optimum-benchmark.json"]
    assert capsys.readouterr().out.split() == [str(folder / "out" / name) for name in names]
    assert sorted(names) == sorted(path.name for path in (folder / "out").iterdir())


def test_tables_have_every_digit_and_nothing_for_what_is_absent(folder):
    report(folder)
    rows = list(csv.DictReader((folder / "out" / "report.csv").open()))
    frame = polars.read_parquet(folder / "out" / "report.parquet")

    decode = json.loads((folder / "0" / "result.json").read_text())["metrics"]["decode_tok_per_s"]
    assert [row["decode_tok_per_s"] for row in rows] == [str(decode), "20.0", ""]
    assert frame["decode_tok_per_s"].to_list() == [decode, pytest.approx(20), None]
    assert frame["gpu_peak_bytes"].to_list() == [0, 0, None]
    assert frame["gpu_peak_bytes"].dtype == polars.Int64
    assert frame["verified"].to_list() == [True, True, None]
    assert [row["status"] for row in rows] == ["ok", "ok", "refused"]
    assert rows[2]["error"] == "a|b <script>x</script>\n*c*"


def test_markdown_is_a_table_and_text_in_it_stays_text(folder):
    report(folder)
    lines = (folder / "out" / "report.md").read_text().splitlines()

    header, _, *rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3
    assert {line.replace(r"\|", "").count("|") for line in (header, *rows)} == {header.count("|")}
    assert rows[2].startswith(r"| none\|refused | refused | opt-125m |")
    assert rows[2].split(" | ")[header.split(" | ").index("decode tok/s")] == "–"
    assert r"a\|b \<script\>x\</script\> \*c\*" in lines[-1]


def test_the_page_is_one_file_with_the_values_of_the_records(folder):
    report(folder)
    page = folder / "out" / "report.html"
    data = data_of(page)

    assert data["labels"] == ["opt-125m-cpu-fp16 stream", "opt-125m-cpu-fp16 fsdp", "none|refused"]
    assert column(data, "decode_tok_per_s") == [pytest.approx(6), pytest.approx(20), None]
    assert column(data, "error_type") == [None, None, "ConfigError"]
    assert [len(points) for points in data["timelines"].values()] == [2, 2]
    assert "a|b \\u003cscript" in page.read_text()
    assert "<script>x" not in page.read_text()


def test_a_value_that_is_true_is_not_one(tmp_path):
    """Python takes True and 1 for the same key of a dictionary."""
    for number, value in enumerate((True, 1, 1, True, True, 1)):
        record = made_up.record()
        record["config"]["launch_check"] = value
        made_up.write(tmp_path / str(number), record)
    report(tmp_path)

    coded = data_of(tmp_path / "out" / "report.html")["settings"]["launch_check"]
    assert [coded["values"][code] for code in coded["codes"]] == [True, 1, 1, True, True, 1]
    assert [type(value) for value in coded["values"]] == [bool, int]


def test_long_timelines_are_thinned_and_only_200_are_kept(tmp_path):
    for number in range(203):
        record = made_up.record(seed=number)
        if number == 3:
            made_up.measured(record, [[0.1 * (1 + step // 2) for step in range(1000)]])
        made_up.write(tmp_path / str(number), record)
    report(tmp_path)
    timelines = data_of(tmp_path / "out" / "report.html")["timelines"]

    assert list(timelines) == [str(number) for number in range(200)]
    assert len(timelines["3"]) == 500
    assert timelines["3"][:2] == [[2, *[pytest.approx(0.1)] * 3], [4, *[pytest.approx(0.2)] * 3]]


def test_a_broken_record_is_one_line_and_the_others_are_reported(folder, capsys):
    made_up.write(folder / "3", {})
    (folder / "3" / "result.json").write_text('{"schema_version": 1, "sta')

    assert report(folder) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped {folder / '3' / 'result.json'}: it is not JSON, or not all of it")


def test_no_runs_are_one_line_and_code_1(tmp_path, capsys):
    assert report(tmp_path) == 1
    assert (
        capsys.readouterr().err
        == f"refused: no runs in {tmp_path}: name a folder that has a result.json or a plan.json\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(folder, capsys):
    (folder / "file").write_text("")

    assert command.main([str(folder), "--output", str(folder / "file" / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pass --output /another/folder" in line


@pytest.mark.parametrize("missing", ["polars", "plotly", "jinja2", "orjson"])
def test_a_missing_package_is_one_line_that_says_what_to_install(folder, missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom zi_experiments.report.command import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main([{str(folder)!r}]))"], capture_output=True, text=True, cwd=folder
    )

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    said, _, packages = line.partition(" is not installed: pip install ")
    assert said == f"refused: {missing}"
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["report"]
    assert packages.split() == [name.partition(">=")[0] for name in extra]


def test_a_thousand_made_up_records_fit_into_a_small_page(tmp_path):
    """The page of 10,000 has to be below 15 MB, with 5 MB for the charts' library."""
    for number, record in enumerate(made_up.records(1000)):
        made_up.write(tmp_path / str(number), record)
    report(tmp_path)

    assert (tmp_path / "out" / "report.html").stat().st_size < 5e6 + 1e6
    assert sum(status != "ok" for status in column(data_of(tmp_path / "out" / "report.html"), "status")) == 50
