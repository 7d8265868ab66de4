"""W&B from one end to the other: real clients, a server of its protocol on the loopback, and what both kinds of runs leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import wandb_file
import wandb_server
import yaml
from cli import Cli, wait_for, workers
from places import ROOT

from zi_experiments.report.charts import CHARTS

SHORT = ("engine=stream", "quant=fp16", "verify=off", "workload.gen_len=4", "workload.repeats=2")
SWEEP = ("-m", *SHORT, "workload.prompt_len=8,600")  # the second is refused: the model has 512 positions
OWN = ("_timestamp", "_runtime", "_wandb", "samples")  # of W&B and of the moment, and a file in two forms
WANDB = [sys.executable, "-m", "wandb"]


@pytest.fixture(scope="module")
def server():
    with wandb_server.serve() as seen:
        yield seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture(scope="module")
def online(server, folder):
    """The runs of a sweep as the server has them, by status."""
    done = Cli(folder / "online").run(*SWEEP, **server.login)
    assert done.returncode == 1, done.stdout + done.stderr
    return new(server, set())


@pytest.fixture(scope="module")
def offline(server, folder, online):
    """The same of a sweep without a login, once `wandb sync` has sent it; and the files that it has read."""
    cli = Cli(folder / "offline")
    before = set(server.runs)
    done = cli.run(*SWEEP)
    assert done.returncode == 1, done.stdout + done.stderr
    folders = [str(path) for path in cli.folder.glob("outputs/sweeps/*/*/wandb")]
    command = [*WANDB, "sync", *folders]
    subprocess.run(command, cwd=cli.folder, env=os.environ | server.login, check=True, capture_output=True)
    files = [wandb_file.read(result["folder"]) | {"figures": result["metrics"]} for result in cli.results()]
    return new(server, before), {run["summary"]["status"]: run for run in files}


def new(server, before):
    """The runs that the server knows besides those before, by status."""
    return {run.summary["status"]: run for name, run in server.runs.items() if name not in before}


def test_runs_that_were_synced_are_those_that_were_online(online, offline):
    assert set(online) == set(offline[0]) == {"ok", "refused"}
    for status, live in online.items():
        synced = offline[0][status]
        assert (synced.name, synced.group, synced.job_type) == (live.name, live.group, live.job_type)
        assert live.group is not None
        assert synced.tags == live.tags
        assert synced.exit_code == live.exit_code == int(status != "ok")
        assert set(synced.summary) == set(live.summary)
        assert [set(row) for row in synced.rows()] == [set(row) for row in live.rows()]
        assert [steps(row) for row in synced.rows()] == [steps(row) for row in live.rows()]
        assert set(flat(plain(synced.config))) == set(flat(plain(live.config)))


def steps(row):
    return {key: row.get(key) for key in ("_step", "step/index", "pass/index", "timeline/step")}


def plain(values):
    return {key: value for key, value in values.items() if not key.startswith(OWN)}


def test_what_was_synced_is_what_the_file_has(offline):
    at_server, in_file = offline
    for status, synced in at_server.items():
        assert list(map(plain, synced.rows())) == list(map(plain, in_file[status]["history"]))
        assert plain(in_file[status]["summary"]).items() <= synced.summary.items()


def test_a_refused_run_says_why(online):
    run = online["refused"]

    assert "512 positions" in run.summary["error"]
    assert run.summary["error_type"] == "ConfigError"
    assert run.config["outcome"] == "refused: ConfigError"
    assert run.summary["failed"] == 1
    assert online["ok"].summary["failed"] == 0


# --- the saved view ---------------------------------------------------------------------------------------------------


def dashboard(*arguments, folder, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "zi_experiments.dashboard", *arguments],
        cwd=folder,
        env=kept | {"NETRC": str(folder / "netrc"), "HOME": str(folder)} | variables,
        capture_output=True,
        text=True,
    )


def test_a_view_is_made_once_and_then_replaced(server, online, folder):
    specs = []
    for _ in range(2):
        done = dashboard(folder=folder, **server.login)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{server.url}/me/zi_experiments?nw=zidashboard\n"
        (view,) = server.views.values()
        specs.append(without_ids(json.loads(view["spec"])))

    assert specs[0] == specs[1]
    assert (view["projectName"], view["entityName"], view["displayName"]) == ("zi_experiments", "me", "zi_experiments")
    assert server.unknown == []


def without_ids(spec):
    return json.loads(json.dumps(spec), object_hook=lambda node: {k: v for k, v in node.items() if k != "__id__"})


def test_a_project_without_runs_is_refused_with_one_line(server, folder):
    done = dashboard("--project", "nothing", folder=folder, **server.login)

    assert done.returncode == 1
    assert done.stderr == (
        "refused: W&B has not taken the view: me has no project nothing: pass --project and --entity of one that has runs\n"
    )


@pytest.fixture(scope="module")
def written(folder):
    """The view as a command without a login writes it, in W&B's form."""
    done = dashboard(folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "outputs/dashboard.json has the view, since nobody is logged in to W&B: wandb login, or"
    )
    assert done.stdout.count("\n") == 1
    return json.loads((folder / "outputs" / "dashboard.json").read_text())


def panels(spec, kind):
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"] if panel["viewType"] == kind]


def test_the_view_has_the_charts_of_the_report(written):
    sections = {section["name"]: section["panels"] for section in written["section"]["panelBankConfig"]["sections"]}
    assert list(sections) == [*(chart.title for chart in CHARTS), "Runs compared"]
    for chart in CHARTS:
        assert {"value": chart.definition} == sections[chart.title][-1]["config"]
    assert {panel["groupBy"] for panel in panels(written, "Bar Chart") if "groupBy" in panel} == {
        "model.value.name",
        "choices.value.engine",
        "choices.value.offload",
        "choices.value.quant",
        "outcome.value",
    }
    assert panels(written, "Run Comparer") == [{"diffOnly": "split"}]


@pytest.mark.parametrize("kind", ["online", "synced", "in the file"])
def test_every_series_of_the_view_is_in_what_a_run_logs(written, online, offline, kind):
    if kind == "in the file":
        run = offline[1]["ok"]
        history, summary, config = run["history"], run["summary"], run["config"]
    else:
        run = (online if kind == "online" else offline[0])["ok"]
        history, summary, config = run.rows(), run.summary, run.config
    settings = flat(config)

    wanted_settings = {panel["groupBy"] for panel in panels(written, "Bar Chart") if "groupBy" in panel}
    wanted_figures = {name for panel in panels(written, "Bar Chart") for name in panel["metrics"]}
    for panel in panels(written, "Scatter Plot"):
        for place, _, name in (panel[axis].partition(":") for axis in ("xAxis", "yAxis")):
            (wanted_settings if place == "config" else wanted_figures).add(name)
    wanted_figures |= {
        column.removeprefix("summary:")
        for column in written["section"]["runSets"][0]["runFeed"]["columnOrder"]
        if column not in ("run:displayName", "summary:error", "summary:error_type", "summary:hint")
    }
    assert len(wanted_figures) > 8
    assert {name.replace(".value", "", 1) for name in wanted_settings} <= set(settings)
    unknown = {name for name, value in offline[1]["ok"]["figures"].items() if value is None}  # on this machine
    assert wanted_figures <= set(summary) | unknown
    assert all(isinstance(summary[name], int | float | str) for name in wanted_figures - unknown)
    (line,) = panels(written, "Run History Line Plot")
    rows = [(row[line["xAxis"]], row[line["metrics"][0]]) for row in history if line["xAxis"] in row]
    assert [step for step, _ in rows] == [1, 2, 3]
    both = [row["step/tpot_s"] for row in history if "step/tpot_s" in row]
    assert [tpot_s for _, tpot_s in rows] == pytest.approx(
        [(a + b) / 2 for a, b in zip(both[:3], both[3:], strict=True)]
    )


def flat(config, prefix=""):
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# --- while a run is under way, and after it was killed ----------------------------------------------------------------


@pytest.fixture
def under_way(server, tmp_path):
    """A run that measures for long, and the server's view of it."""
    before = set(server.runs)
    process = Cli(tmp_path).start(*SHORT[:-1], "workload.repeats=50000", **server.login)
    wait_for(process, "measure:")
    (run,) = (run for name, run in server.runs.items() if name not in before)
    yield process, run
    process.kill()


@pytest.mark.release
def test_a_run_under_way_shows_its_phase(server, under_way):
    """W&B sends what is new every 15 s."""
    process, run = under_way
    workers(process)[0].suspend()  # it need not work meanwhile
    server.wait_for(lambda: run.summary.get("phase") == "measure")

    assert 0 <= run.summary["phase_done"] < 1
    assert run.exit_code is None
    assert "status" not in run.summary
    workers(process)[0].kill()
    process.communicate(timeout=120)


def test_a_killed_run_says_where_it_was_and_why_it_ended(under_way):
    process, run = under_way
    workers(process)[0].kill()
    process.communicate(timeout=120)

    assert run.exit_code == 1
    assert run.summary["phase"] == "measure"
    assert 0 <= run.summary["phase_done"] < 1
    assert run.summary["status"] == "killed"
    assert run.summary["error_type"] == "SIGKILL"
    assert "during measure" in run.summary["error"]
    assert "the logs are in" in run.summary["hint"]
    assert run.config["outcome"] == "killed: SIGKILL"


@pytest.mark.release
def test_a_service_of_wandb_that_hangs_costs_half_a_minute_and_no_result(server, tmp_path):
    cli = Cli(tmp_path)
    process = cli.start(*SHORT[:-1], "workload.repeats=200", **server.login)
    wait_for(process, "measure:")
    (service,) = (each for each in psutil.Process(process.pid).children() if each.name() == "wandb-core")
    service.suspend()
    output = process.communicate(timeout=180)[0]

    assert process.returncode == 0
    (result,) = cli.results()
    assert result["status"] == "ok"
    assert "W&B: its service no longer answers, and the figures are in result.json" in output
    assert "Traceback" not in output


# --- wandb agent ------------------------------------------------------------------------------------------------------


def test_an_agent_of_wandb_works_on_the_example(server, tmp_path):
    example = ROOT / "examples" / "wandb-sweep.yaml"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where the example finds python
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT)} | server.login
    subprocess.run([*WANDB, "sweep", str(example)], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (name,) = server.sweeps
    parameters = yaml.safe_load(server.sweeps[name]["config"])["parameters"]
    chosen = {key: values["values"][0] for key, values in parameters.items()}
    brief = {"workload.gen_len": 2, "workload.prompt_len": 4, "workload.repeats": 1, "verify": "off"}
    brief |= {"model.architecture.num_hidden_layers": 2, "workload.warmup": 0}
    arguments = {key: {"value": value} for key, value in (chosen | brief).items()}
    server.queue.append({"type": "run", "run_id": "first", "program": "zi_experiments", "args": arguments})
    code = f"from wandb import wandb_agent as a; a.Agent.POLL_INTERVAL = 0.1; a.run_agent('me/zi_experiments/{name}')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )

    run = server.runs["first"]
    assert run.exit_code == 0, done.stdout + done.stderr
    assert run.sweep == name
    assert run.summary["decode_tok_per_s"] > 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("outputs/**/result.json"))
    assert result["status"] == "ok"
    assert f"engine={chosen['engine']}" in result["run"]["command"]
    assert result["plan"]["sequences"] == chosen["workload.batch_size"]
    assert server.unknown == []
