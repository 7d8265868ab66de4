"""Under Slurm itself, where Debian's packages slurm-wlm and munge are installed: two machines that are this one twice."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import cli as commands
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
# root: Slurm starts jobs as any user
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)), reason="needs root, and slurm-wlm and munge installed"
)
pytestmark = [pytest.mark.integration, pytest.mark.release, needs_slurm]
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=one,two Default=YES State=UP PriorityTier=1
PartitionName=high Nodes=one,two State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture
def cli(tmp_path):
    return commands.Cli(tmp_path)


@pytest.fixture
def cluster(monkeypatch):
    """A queue of two machines: what Slurm's commands in this process talk to."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))  # short: it has a socket
        for name in ("state", "spool-one", "spool-two"):
            (folder / name).mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        settings = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        settings.write_text(SETTINGS.format(host=host, folder=folder, ports=free_ports(3), cpus=os.cpu_count()))
        monkeypatch.setenv("SLURM_CONF", str(settings))

        files = {"key-file": "key", "socket": "munge", "pid-file": "munge.pid", "log-file": "munge.log"}
        files |= {"seed-file": "seed"}
        munge = [f"--{option}={folder / name}" for option, name in files.items()]
        daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
        daemons += [["slurmd", "-D", "-N", node] for node in ("one", "two")]
        log = stack.enter_context((folder / "log").open("w"))
        for daemon in daemons:
            process = subprocess.Popen(daemon, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if daemon[0] == "munged":
                until(lambda: (folder / "munge").exists(), folder)
        until(lambda: slurm("sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"], folder)
        yield
        slurm("scancel", "--user=root")
        until(lambda: not slurm("squeue", "-h"), folder)


def slurm(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def until(done, folder, seconds=300):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.5)


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def srun(cli, *arguments):
    (port,) = free_ports(1)
    words = ["hardware=cpu", "engine=stream", "tracking=none", "workload.batch_size=2", *arguments]
    run = cli.command(*words, "hardware.num_gpus=2", f"launch.rdzv_endpoint=127.0.0.1:{port}")
    return subprocess.Popen(
        ["srun", "--nodes=2", "--ntasks-per-node=1", *run],
        cwd=cli.folder,
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_tasks_of_a_step_are_one_run(cli, cluster):
    process = srun(cli)
    output = process.communicate()[0]

    assert process.returncode == 0, output
    (result,) = cli.results()
    assert (result["status"], result["verification"]["tokens_equal"]) == ("ok", True)
    assert result["config"]["launch"]["nnodes"] == 2
    assert len(result["samples"]["ranks"]) == 2


def test_a_step_that_is_cancelled_leaves_its_record(cli, cluster):
    process = srun(cli, "workload.repeats=600")
    commands.wait_for(process, "measure:")
    slurm("scancel", *slurm("squeue", "-h", "-o", "%i").split())
    process.communicate()

    (result,) = cli.results()
    assert (result["status"], result["error"]["message"]) == ("killed", "stopped by SIGTERM")


def test_a_sweep_survives_preemption(cli, cluster):
    """A job of a partition that goes first takes the machine; the run has a record, and begins anew afterwards."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurms = ("hydra/launcher=slurm", "hydra.launcher.mem_gb=null", "hydra.launcher.partition=low")
    # long enough to be met at work
    sweep = ("-m", *slurms, "hardware=cpu", "engine=stream", "tracking=none", "workload.repeats=300")
    process = cli.start_executed(*sweep, "workload.gen_len=3,4")
    until(lambda: any("measure:" in path.read_text() for path in cli.folder.rglob("*_0_log.out")), cli.folder)
    node = slurm("squeue", "-h", "-t", "R", "-o", "%i %N").splitlines()[0].split()[1]
    slurm("sbatch", "--partition=high", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 5")
    output = process.communicate(timeout=550)[0]

    assert process.returncode == 0, output
    results = cli.results()
    kept = [path for result in results for path in result["folder"].glob("result-*.json")]
    assert [result["status"] for result in results] == ["ok", "ok"]
    assert len(kept) == 1
    assert '"killed"' in kept[0].read_text()
