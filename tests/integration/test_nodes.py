"""One command on two hosts, which are network namespaces, and under torchrun: what is computed, what is left of a fault."""

import os
import re
import socket
import subprocess
from functools import cache

import namespaces
import pytest
from cli import Cli, run, wait_for, workers
from reliability import Faulty, shown

from zi_experiments import environment

STREAM, DEEPSPEED = ("engine=stream", "quant=fp16"), ("engine=deepspeed", "quant=int4")
SHORT = ("tracking=none", "hardware=cpu")
LONG = (*STREAM, *SHORT, "model=deep", "model.architecture.num_hidden_layers=6", "workload.repeats=2000", "verify=off")


@pytest.fixture
def cli(tmp_path):
    return Faulty(tmp_path)


@pytest.fixture
def hosts():
    """Two hosts with a cable between them."""
    prefix = f"zi{os.getpid()}"
    try:
        yield namespaces.make(prefix)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root, CAP_SYS_ADMIN and iproute2: {error}")
    finally:
        namespaces.remove(prefix)


@pytest.fixture
def start(cli, hosts):
    """`start(*overrides)` → the same command under way on both hosts, in the order of the hosts.

    One that is to be killed is executed: what it leaves in shared memory, a process goes on to watch.
    """
    started = []

    def start(*overrides, timeout_s=100, executed=None):
        together = (
            "hardware.num_gpus=2",
            "launch.nnodes=2",
            f"launch.rdzv_endpoint={hosts[0].address}:29400",
            f"launch.timeout_s={timeout_s}",
        )
        for number, host in enumerate(hosts):
            if number == executed:
                started.append(cli.start_executed(*overrides, *together, preexec_fn=host.enter))
            else:
                started.append(cli.start(*overrides, *together, enter=host.enter))
        return started

    yield start
    for process in started:
        process.kill()


def end(process):
    return process.communicate(timeout=120)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`alone(*overrides)` → the hash of what one launcher with one rank generates."""
    cli = Cli(tmp_path_factory.mktemp("alone"))

    @cache
    def alone(*overrides):
        assert cli.run(*overrides, *SHORT, "verify=off").returncode == 0
        return cli.results()[-1]["generated"]["tokens_sha256"]

    return alone


@pytest.mark.parametrize(
    "engine", [DEEPSPEED, pytest.param(("engine=stream", "offload=nvme"), marks=pytest.mark.release)], ids=str
)
def test_two_hosts_compute_what_one_does(cli, start, alone, engine):
    outputs = [end(process) for process in start(*engine, *SHORT)]

    result = cli.result()
    assert result["status"] == "ok", outputs
    assert result["generated"]["tokens_sha256"] == alone(*engine)
    assert result["verification"]["passed"]
    assert result["environment"]["machines"] == ["node0", "node1"]
    assert cli.left() == "nothing"


def test_a_sweep_on_two_hosts_has_one_folder(cli, start, alone):
    """The second machine goes from run to run with the first: one is refused, one is ok."""
    started = start("-m", *STREAM, *SHORT, "workload.gen_len=0,3", "workload.repeats=3")
    outputs = [end(process) for process in started]

    refused, done = sorted(cli.results(), key=lambda result: result["folder"])
    assert (refused["status"], done["status"]) == ("refused", "ok"), outputs
    assert done["folder"].parent == refused["folder"].parent
    assert [process.returncode for process in started] == [1, 1]
    assert done["generated"]["tokens_sha256"] == alone(*STREAM)
    assert cli.left() == "nothing"
    samples = done["samples"]
    slowest = [max(times) for times in zip(*(rank["total_s"] for rank in samples["ranks"]), strict=True)]
    assert (len(samples["ranks"]), samples["total_s"]) == (2, slowest)


def kill_worker(number):
    def kill(started, hosts):
        (worker,) = workers(started[number])
        worker.kill()

    return kill


def kill_launcher(started, hosts):
    started[1].kill()


def unplug(started, hosts):
    hosts[1].unplug()


FAULTS = {
    "`kill -9` of a worker on the second of two machines": (kill_worker(1), "SIGKILL"),
    "`kill -9` of rank 0's worker, on two machines": (kill_worker(0), "SIGKILL"),
    "`kill -9` of the second machine's launcher": (kill_launcher, "Lost"),
    "the network between two machines is cut": (unplug, "Lost"),
}


RARE = {"`kill -9` of rank 0's worker, on two machines", "the network between two machines is cut"}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.release if fault in RARE else ()) for fault in FAULTS]
)
def test_a_fault_on_one_host_is_a_record(cli, page, start, hosts, fault):
    act, kind = FAULTS[fault]
    started = start(*LONG, timeout_s=25 if act is unplug else 100, executed=1 if act is kill_launcher else None)
    wait_for(started[0], "measure:")
    act(started, hosts)
    output, _ = (end(process) for process in started)

    result = cli.result()
    message = result["error"]["message"]
    assert (result["status"], result["error"]["type"]) == ("killed", kind)
    assert message in output
    assert [process.returncode != 0 for process in started] == [True, True]
    page.check(fault, f"`{result['status']}`", f"`{shown(message, cli.folder)}`", left(cli, act is kill_launcher))


@pytest.mark.release
def test_the_first_launcher_is_killed(cli, page, start):
    started = start(*LONG, executed=0)
    wait_for(started[0], "measure:")
    started[0].kill()
    _, output = (end(process) for process in started)

    message = cli.result()["error"]["message"]
    assert cli.result()["status"] == "killed"
    assert message in output
    fault = "`kill -9` of the first machine's launcher; the second writes the record"
    page.check(fault, "`killed`", f"`{message}`", left(cli, is_killed=True))


def test_a_machine_that_does_not_come_is_a_record(cli, page):
    alone = ("hardware.num_gpus=2", "launch.nnodes=2", f"launch.rdzv_endpoint=127.0.0.1:{free_port()}")
    done = cli.run(*STREAM, *SHORT, *alone, "launch.timeout_s=3")

    result = cli.result()
    message = result["error"]["message"]
    assert done.returncode == 1
    assert result["status"] == "killed"
    assert message in done.stdout
    text = re.sub(r":\d+$", ":29500", message)
    page.check("one of two machines does not come", "`killed`", f"`{text}`", cli.left())


@pytest.mark.release
def test_the_first_machine_does_not_come(cli, hosts):
    away = ("hardware.num_gpus=2", "launch.nnodes=2", f"launch.rdzv_endpoint={hosts[0].address}:29400")
    process = cli.start(*STREAM, *SHORT, *away, "launch.timeout_s=3", enter=hosts[1].enter)
    output = end(process)

    assert process.returncode == 1
    assert f"killed: nobody listens at {hosts[0].address}:29400" in output
    assert cli.results() == []


def test_what_one_machine_lacks_is_refused(cli, hosts):
    together = ("hardware.num_gpus=2", "launch.nnodes=2", f"launch.rdzv_endpoint={hosts[0].address}:29400")
    nvme = ("offload=nvme", "offload.path='~/weights'", *STREAM, *SHORT, *together)
    (cli.folder / "node0" / "weights").mkdir(parents=True)
    cache = {"XDG_CACHE_HOME": str(environment.cache_folder().parent)}
    started = [cli.start(*nvme, enter=host.enter, HOME=str(cli.folder / host.name), **cache) for host in hosts]
    outputs = [end(process) for process in started]

    result = cli.result()
    assert result["status"] == "refused", outputs
    assert result["error"]["message"].startswith("node1: offload.path=~/weights is no folder")
    assert result["error"]["message"] in outputs[0]
    assert cli.left() == "nothing"


@pytest.mark.release
def test_machines_that_were_started_with_other_settings_are_refused(cli, hosts):
    together = ("hardware.num_gpus=2", "launch.nnodes=2", f"launch.rdzv_endpoint={hosts[0].address}:29400")
    typed = ("workload.batch_size=2", "workload.batch_size=4")
    started = [
        cli.start(*STREAM, *SHORT, *together, size, enter=host.enter) for size, host in zip(typed, hosts, strict=True)
    ]
    outputs = [end(process) for process in started]

    assert cli.result()["status"] == "refused"
    assert "launcher 1 on node1 was started with" in cli.result()["error"]["message"]
    assert cli.result()["error"]["message"] in outputs[0]
    assert [process.returncode for process in started] == [1, 1]


def test_torchrun_starts_a_run(cli, alone):
    """Each process of torchrun's has a worker of its own, and the first writes the record."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", f"--log-dir={cli.folder}/torchrun"]
    done = run([*torchrun, "-m", "zi_experiments", *cli.arguments(*STREAM, *SHORT)], cli.folder, cli.environment())

    result = cli.result()
    assert done.returncode == 0, done.stderr
    assert result["generated"]["tokens_sha256"] == alone(*STREAM)
    assert result["config"]["hardware"]["num_gpus"] == 2
    assert result["config"]["launch"]["nnodes"] == 1
    assert cli.left() == "nothing"


def left(cli, is_killed):
    """What is left, in words; of a launcher that is killed, as on one machine, nothing but its temporary folder."""
    found = cli.left()
    if not is_killed:
        return found
    assert re.fullmatch(r"temporary zi-[0-9a-f]{12}", found)
    return "temporary files, which the next run removes"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
