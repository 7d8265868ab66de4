"""Consoles that fail, as a shell makes them."""

import os
import subprocess
import sys

import pytest

SPEAK = """
import subprocess, sys
from zi_experiments.runtime import stdio
stdio.install()
for _ in range(3):
    print("2 × 3", flush=True)
    print("é" * (1 << 17), file=sys.stderr)
with open(sys.executable, "rb") as file:
    assert file.fileno() > 2, "what is written to the console would be in a file of the run's"
assert subprocess.run([sys.executable, "-c", "import sys; sys.stdout.fileno(), sys.stderr.fileno()"]).returncode == 0
sys.exit(7)
"""


def speak(shell, **variables):
    """Run what speaks as `"$@"` in a line of shell."""
    command = ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}", "bash", sys.executable, "-c", SPEAK]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@" >/dev/full',
        '"$@" 2>/dev/full',
        '"$@" | head -1',
        '"$@" 2>&1 >/dev/null | head -c 2',
    ],
)
def test_a_console_that_fails_does_not_end_what_speaks(shell):
    done = speak(shell)

    assert done.returncode == 7
    assert "Error" not in done.stdout + done.stderr


def test_characters_that_a_console_lacks_are_written_otherwise():
    done = speak('"$@"', PYTHONIOENCODING="ascii")

    assert done.returncode == 7
    assert done.stdout == "2 \\xd7 3\n" * 3


def test_what_can_be_written_is_written_as_it_is():
    done = speak('"$@"', PYTHONIOENCODING="utf-8")

    assert done.stdout == "2 × 3\n" * 3
    assert done.stderr.count("é") == 3 << 17
