"""Sweeps: whatever happens to one run, the others go on; and run again, a sweep does what it has not done."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from cli import wait_for, workers
from reliability import Faulty, fill

from zi_experiments.config.folders import slug, sweep_name
from zi_experiments.config.resolvers import register
from zi_experiments.config.schema import conf_dir
from zi_experiments.execution import sweep
from zi_experiments.results import fingerprints
from zi_experiments.results.record import Record, RunInfo
from zi_experiments.runtime.locks import FolderLock

MODEL = """
name: small
path: null
architecture:
  model_type: llama
  num_hidden_layers: 2
  hidden_size: 64
  intermediate_size: 128
  num_attention_heads: 4
  vocab_size: 128
  max_position_embeddings: 128
"""
QUICK = ("model=small", "engine=stream", "quant=fp16", "tracking=none", "verify=off")
LONG = {"workload": {"repeats": 150}}  # a second or two, in which something may happen


@pytest.fixture
def cli(tmp_path):
    cli = Faulty(tmp_path)
    (tmp_path / "choices" / "model" / "small.yaml").write_text(MODEL)
    return cli


def by_number(cli):
    """The records of a sweep by the numbers of its runs."""
    numbered = {int(result["folder"].name.split("-")[0]): result for result in cli.results()}
    return dict(sorted(numbered.items()))


# --- 16 runs, 8 failures ----------------------------------------------------------------------------------------------


def signalled(number):
    return lambda cli, worker: worker.send_signal(number)


def cut_off(cli, worker):
    (file,) = cli.folder.rglob("zi-*/rank0")
    os.truncate(file, 0)


def fill_the_disk(cli, worker):
    fill(cli.folder / "disk")


RUNS = 16
# name of the run: its number, settings, when and what happens to it, and its status then
FAULTS = {
    "groups": (1, {"quant": {"bits": 4, "group_size": 48, "group_dim": 1}}, None, None, "refused"),
    "sigkill": (3, LONG, "measure:", signalled(signal.SIGKILL), "killed"),
    "abort": (4, LONG, "measure:", signalled(signal.SIGABRT), "error"),
    "hang": (6, LONG | {"launch": {"timeout_s": 15}}, "measure:", signalled(signal.SIGSTOP), "killed"),
    "python": (8, LONG | {"offload": {"device": "nvme"}}, "measure:", cut_off, "error"),
    "memory": (
        10,
        {
            "model": {"architecture": {"vocab_size": 1 << 25}},
            "engine": {"name": "accelerate"},
            "offload": {"device": "none"},
            "hardware": {"host_memory_gib": 64},
        },
        None,
        None,
        "oom",
    ),
    "disk": (12, {"offload": {"device": "nvme", "path": "disk"}}, "disk: needs", fill_the_disk, "error"),
    "sigterm": (14, LONG, "measure:", signalled(signal.SIGTERM), "killed"),
}


def write_experiments(cli):
    """Sixteen choices of the group `experiment`, in their order."""
    folder = cli.folder / "choices" / "experiment"
    folder.mkdir()
    numbers = {number: (name, settings) for name, (number, settings, *_) in FAULTS.items()}
    for number in range(RUNS):
        name, settings = numbers.get(number, (f"run{number}", {}))
        text = json.dumps({"name": name, "workload": {"prompt_len": 4 + number}} | settings)
        (folder / f"e{number:02}.yaml").write_text(f"# @package _global_\n{text}\n")
    return "experiment=" + ",".join(f"e{number:02}" for number in range(RUNS))


def limited():
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))


def run_with_faults(cli, *arguments):
    """Run a sweep and do to each run what `FAULTS` says, once."""
    process = cli.start_executed(*arguments, preexec_fn=limited)
    lines, name = [], ""
    for line in process.stdout:
        lines.append(line)
        if "parameters" in line and "layers of" in line:
            name = line.partition(":")[0]
        _, _, when, act, _ = FAULTS.get(name, (None,) * 5)
        if when and line.startswith(when):
            worker = workers(process)[0] if when == "measure:" else None
            act(cli, worker)
    process.wait()
    return process.returncode, "".join(lines)


@pytest.mark.timeout(1800)  # five minutes where nothing else runs
def test_sixteen_runs_with_eight_failures(cli, page, small_disk):
    with (small_disk / "ballast").open("wb") as file:  # so that the rest is filled before the run has come to write
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (16 << 20))
    experiments = write_experiments(cli)
    code, output = run_with_faults(cli, "-m", *QUICK, experiments)

    results = by_number(cli)
    planted = {number: status for number, _, _, _, status in FAULTS.values()}
    assert {number: result["status"] for number, result in results.items()} == {
        number: planted.get(number, "ok") for number in range(RUNS)
    }, output
    assert code == 1
    for name, (number, *_) in FAULTS.items():
        assert results[number]["error"]["message"] in output, name
    table = output[output.index("16 runs") :]
    assert Counter(word for word in table.split() if word in ("ok", "refused", "killed", "error", "oom")) == Counter(
        {"ok": 8, "killed": 3, "error": 3, "refused": 1, "oom": 1}
    )
    page.check(
        "a sweep of 16 runs, 8 of which fail in all these ways",
        "`ok` × 8, and 8 others",
        "each failure in its place, a table of all at the end, exit code 1",
        cli.left(small_disk),
    )

    (small_disk / "somebody-else").unlink()
    done = cli.run("-m", *QUICK, experiments, data_bytes=3 << 30)
    assert done.returncode == 1
    again = by_number(cli)
    kept = [number for number in range(RUNS) if again[number]["run"]["id"] == results[number]["run"]["id"]]
    assert kept == [number for number in range(RUNS) if number not in planted]
    assert done.stdout.count("kept run") == 8
    assert [number for number, result in again.items() if result["status"] != "ok"] == [1, 10]
    assert len(list(cli.folder.rglob("result-*.json"))) == 8, "what failed before is still there"
    assert cli.left(small_disk) == "nothing"


def test_an_interrupted_sweep_goes_on_where_it_stopped(cli, page):
    arguments = ("-m", *QUICK, "workload.prompt_len=4,5,6")
    process = cli.start(*arguments)
    wait_for(process, "record: ")
    wait_for(process, "load:")
    process.terminate()
    output = process.communicate()[0]

    assert process.returncode in (130, -signal.SIGINT)  # a shell calls both 130
    assert "2 runs" in output
    assert {number: result["status"] for number, result in by_number(cli).items()} == {0: "ok", 1: "killed"}
    first = by_number(cli)[0]["run"]["id"]

    done = cli.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [result["status"] for result in by_number(cli).values()] == ["ok"] * 3
    assert by_number(cli)[0]["run"]["id"] == first
    assert {result["run"]["group"] for result in cli.results()} == {cli.results()[0]["folder"].parent.name}
    page.check(
        "SIGTERM during a sweep, which is then run again",
        "`killed`, then `ok`",
        "`kept small-cpu-fp16: … is ok (force=true runs it again)`, and the rest is run",
        cli.left(),
    )

    done = cli.run(*arguments, "force=true", "tracking.tags=[second]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert by_number(cli)[0]["run"]["id"] != first
    assert len(list(cli.folder.rglob("result-*.json"))) == 4


def test_a_sweep_runs_once_at_a_time(cli, page):
    arguments = ("-m", *QUICK, "workload.prompt_len=4,5", "workload.repeats=100000")
    process = cli.start(*arguments)
    wait_for(process, "measure:")
    done = cli.run(*arguments)
    process.terminate()
    process.communicate()

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    page.check("the same sweep twice at once", "none", f"`{done.stderr.strip()}`", cli.left())


def test_jobs_in_other_processes_take_turns_and_are_stopped(cli):
    """joblib itself would kill them, and their weights would stay."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launched = ("-m", *QUICK, "offload=nvme", "workload.prompt_len=4,5", "workload.repeats=100000")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = cli.start_executed(*launched, *joblib)
    wait_for_both(cli)
    same = cli.run(*launched)
    process.terminate()
    output = process.communicate()[0]

    assert "refused: another process runs this sweep" in same.stderr
    assert process.returncode in (130, -signal.SIGINT)
    assert "waiting for the processor: other runs of this sweep have it" in output
    assert "2 runs" in output
    assert [result["error"]["message"] for result in by_number(cli).values()] == ["stopped by SIGTERM"] * 2
    assert cli.left() == "nothing"


def test_the_command_knows_of_jobs_in_other_processes(cli):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    submitit = ("-m", *QUICK, "quant.group_size=null,48", "hydra/launcher=submitit_local")
    first, second = cli.run(*submitit), cli.run(*submitit)

    assert (first.returncode, second.returncode) == (1, 1)
    for done, statuses in ((first, {"ok", "refused"}), (second, {"kept", "refused"})):
        table = done.stdout[done.stdout.index("2 runs") :]
        assert {word for word in table.split() if word in ("ok", "kept", "refused")} == statuses
    assert all(result["run"]["command"].startswith("python -m zi_experiments ") for result in cli.results())


def test_a_job_that_is_preempted_is_put_into_the_queue_again(cli):
    """It leaves the record of a run that was stopped, and the next try another."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    jobs = ("-m", *QUICK, "workload.repeats=600", "hydra/launcher=submitit_local")
    process = cli.start_executed(*jobs, SUBMITIT_PREEMPT_SIGNAL="USR1")
    first = job_at_work(cli)
    os.kill(first, signal.SIGUSR1)
    output = process.communicate(timeout=180)[0]

    (result,) = cli.results()
    (before,) = (json.loads(path.read_text()) for path in result["folder"].glob("result-*.json"))
    assert process.returncode == 0, output
    assert before["error"]["message"] == "stopped by SIGUSR1"
    assert (before["status"], result["status"]) == ("killed", "ok")
    assert cli.left() == "nothing"


def job_at_work(cli):
    """The number of the process whose job measures."""
    end = time.monotonic() + 180
    while not any("measure:" in path.read_text() for path in cli.folder.rglob("*_log.out")):
        assert time.monotonic() < end
        time.sleep(0.05)
    (mark,) = cli.temporary.glob("zi-*/jobs/*")
    return int(mark.name)


def test_a_run_waits_for_another_job_that_has_it(tmp_path, capsys, monkeypatch):
    """Jobs of an earlier command may still be in the queue."""
    monkeypatch.setattr(sweep, "_run_lock", None)
    held = FolderLock(tmp_path)
    assert held.acquire()
    waiting = threading.Thread(target=sweep._wait_for_run, args=[tmp_path])
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    held.release()
    waiting.join(30)
    assert not waiting.is_alive()
    sweep._run_lock.release()
    assert f"waiting: another job carries out the run in {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "nodes", "gpus"), [(["hardware.num_gpus=8", "launch.nnodes=2"], 2, 4), (["hardware=cpu"], 1, None)]
)
def test_the_settings_of_slurm_follow_from_those_of_the_run(typed, nodes, gpus):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    register()
    with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        composed = hydra.compose("config", overrides=["hydra/launcher=slurm", *typed], return_hydra_config=True)

    launcher = composed.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (nodes, 1, gpus)


def wait_for_both(cli):
    """Until one job is at work and the other has come to where it waits."""
    end = time.monotonic() + 180
    while len(cli.results()) < 2 or not any(cli.folder.rglob("offload/zi-*/rank0")):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_devices_are_had_by_one_job_at_a_time(tmp_path, monkeypatch):
    """Each has as many as it asks for: GPUs of its own while there are some."""
    monkeypatch.setenv("ZI_SWEEP", str(tmp_path))
    monkeypatch.setenv("ZI_SWEEP_PID", "1")  # of the command, in another process
    gpus = ["4", "GPU-8f3a", "6"]
    with sweep.turn(gpus, 1, print) as first, sweep.turn(gpus, 2, print) as second:
        assert (first, second) == (["4"], ["GPU-8f3a", "6"])
        said = []
        with pytest.raises(TimeoutError), sweep.turn(gpus, 1, lambda line: stop(said, line)):
            pytest.fail("there was none left")
    assert said == ["waiting for a GPU: other runs of this sweep have it"]
    with sweep.turn(gpus, 3, print) as third:
        assert third == gpus


def stop(said, line):
    said.append(line)
    raise TimeoutError


@pytest.mark.parametrize("key", ["text", "prompts"])
def test_what_makes_a_result_another(tmp_path, key):
    text = tmp_path / "text"
    text.write_text("one")
    record = Record(
        run=RunInfo(id="1", name="a", group=None, started_at="", finished_at=None, command="", git_revision=None),
        folder="",
        choices={},
        config={
            "workload": {"batch_size": 8, key: str(text)},
            "force": False,
            "tracking": {"mode": "auto"},
            "name": "a",
        },
        environment=dict.fromkeys(fingerprints.MACHINE, "same") | {"hostname": "a"},
    )
    same = replace(
        record,
        config=record.config | {"force": True, "tracking": {"mode": "online"}, "name": "b"},
        environment=record.environment | {"hostname": "b"},
    )
    others = [
        replace(record, config=record.config | {"workload": {"batch_size": 9, key: str(text)}}),
        replace(record, checkpoint={"path": "a", "files": {}}),
        *(replace(record, environment=record.environment | {key: "other"}) for key in fingerprints.MACHINE),
    ]

    assert fingerprints.fingerprint(same) == fingerprints.fingerprint(record)
    prints = {fingerprints.fingerprint(other) for other in (record, *others)}
    text.write_text("two")
    assert len(prints | {fingerprints.fingerprint(record)}) == len(others) + 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"status": "ok"}', '{"status": "ok", "run": {"fingerprint": "other"}}']
)
def test_a_record_that_does_not_say_so_is_not_finished(tmp_path, text):
    path = tmp_path / "result.json"
    assert fingerprints.finished(path, "f") is None

    path.write_text(text)
    assert fingerprints.finished(path, "f") is None

    path.write_text('{"status": "ok", "run": {"fingerprint": "f"}}')
    assert fingerprints.finished(path, "f") is not None


def test_the_folder_of_a_sweep():
    sweep = ["model=opt-125m", "offload=none,cpu", "quant=fp16,int4"]

    assert sweep_name(sweep).startswith("offload=none,cpu_quant=fp16,int4-")
    assert sweep_name([*sweep, "force=true", "tracking.mode=online", "launch.timeout_s=9"]) == sweep_name(sweep)
    assert sweep_name([*sweep, "launch.nnodes=2"]) != sweep_name(sweep)
    assert sweep_name([*sweep, "hydra.verbose=true", "hydra/launcher=joblib"]) == sweep_name(sweep)
    assert sweep_name([*sweep, "workload.batch_size=2"]) != sweep_name(sweep)
    assert sweep_name(["offload=none,cpu", "quant=fp16,int4"]) != sweep_name(sweep)
    assert len(sweep_name(["model=" + ",".join(map(str, range(1000)))])) < 80


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "..", ".", "", "a/b", "a\nb", "\0", "$(touch x)", "~"])
def test_a_name_is_one_folder(name):
    folder = Path("/outputs") / slug(name)

    assert folder.parent == Path("/outputs")
    assert Path(os.path.normpath(folder)).parent == Path("/outputs")
    assert not set(slug(name)) & set("/\0\n$()~")
