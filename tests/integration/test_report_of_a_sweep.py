"""A sweep ends with the command that makes its report."""

import os
import shlex

import cli


def test_the_last_line_of_a_sweep_makes_its_report(tmp_path):
    """Of runs that are refused, which takes no time."""
    small = ("hardware=cpu", "hardware.host_memory_gib=8", "tracking=none", "hydra.sweep.dir=out/two runs")
    sweep = run(tmp_path, "zi_experiments", "-m", "model=opt-66b", "quant=int4,fp16", *small)

    said = sweep.stdout.splitlines()[-1]
    assert said == "report: python -m zi_experiments.report 'out/two runs' --output 'out/two runs/report'"
    python, *words = shlex.split(said.partition(": ")[2])
    assert python == "python"
    report = run(tmp_path, *words[1:])

    assert report.returncode == 0, report.stderr
    table = (tmp_path / "out" / "two runs" / "report" / "report.md").read_text()
    assert "| opt-66b-cpu-int4 | refused |" in table
    assert "opt-66b-cpu-fp16: refused, opt-66b needs" in table


def run(folder, module, *arguments):
    return cli.run(["-m", module, *arguments], folder, dict(os.environ))
