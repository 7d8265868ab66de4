import io

import pytest
from rich.console import Console

from zi_experiments.lines import fit, say

FOX = "the quick brown fox jumps over the lazy dog and goes home"


@pytest.fixture
def columns(monkeypatch):
    """`columns(40)`: the width of the console, as somebody types it before a command."""
    monkeypatch.delenv("LINES", raising=False)
    return lambda count: monkeypatch.setenv("COLUMNS", str(count))


def test_a_line_is_wrapped_between_words(columns):
    columns(40)

    assert fit(FOX, io.StringIO()) == "the quick brown fox jumps over the lazy\n  dog and goes home"


@pytest.mark.parametrize(
    "kept", ["/a/path/" + "x" * 60, "python -m zi_experiments.hardware --path FOLDER k=v", "n " * 9]
)
def test_paths_and_commands_stay_whole(columns, kept):
    columns(40)

    assert kept.strip() in fit(f"measure it with {kept}", io.StringIO()).splitlines()[-1]


def test_a_file_has_whole_lines(columns):
    columns("")

    assert fit(FOX * 9, io.StringIO()) == FOX * 9


def test_what_readline_exports_is_not_the_width_of_a_file(columns, monkeypatch):
    columns(40)
    monkeypatch.setenv("LINES", "24")

    assert fit(FOX, io.StringIO()) == FOX


def test_several_lines_are_wrapped_one_by_one(columns):
    columns(40)

    assert fit(f"a\n  b {FOX}", io.StringIO()).splitlines()[:2] == ["a", "  b the quick brown fox jumps over the"]


def test_markup_of_what_is_said_stays_text(columns):
    columns(80)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    say(" [bold]x :smile:", console, head="refused", style="red")

    assert console.file.getvalue() == "\x1b[31mrefused\x1b[0m [bold]x :smile:\n"
