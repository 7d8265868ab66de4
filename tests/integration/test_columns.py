"""What commands print reads well at 80 columns, without a terminal too."""

import pytest
from cli import Cli
from widths import COLUMNS, too_wide


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    return Cli(tmp_path_factory.mktemp("columns"))


ASKED = {
    "help": ("--help",),
    "a plan": ("plan_only=true", "model=opt-66b", "hardware=a6000", "hardware.host_memory_gib=256"),
    "a plan that does not fit": ("plan_only=true", "model=opt-66b", "hardware=a6000", "offload=none", "quant=fp16"),
    "a wrong choice": ("model=opt-131b",),
    "a sweep with a run that is refused": ("-m", "engine=stream,accelerate", "quant=int4"),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_no_line_is_wider_than_the_console(cli, asked):
    done = cli.run(*asked, COLUMNS=str(COLUMNS), LINES="")
    text = done.stdout + done.stderr

    assert "Traceback" not in text
    assert len(text.splitlines()) > 1
    assert too_wide(text) == []


def test_a_file_has_each_message_in_one_line(cli):
    """Programs search it."""
    done = cli.run("plan_only=true", "model=opt-66b", "hardware=a6000", "offload=none", "quant=fp16", COLUMNS="")

    assert done.stdout.startswith("refused opt-66b needs ")
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stdout) > COLUMNS
