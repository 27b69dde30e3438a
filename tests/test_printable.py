"""What is printed of others' text: it does not steer the terminal, and it is not taken for markup."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_blockskip import cli
from mlx_blockskip.display import Plain, drawn_by
from mlx_blockskip.display_rich import Bars
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Image, Note, Phase, Saved, Step, Table, Warning, emit
from mlx_blockskip.printable import one_line, printable

HOSTILE = "a\x1b[2J\x07\x9b31m\u202egnp.exe\x00\r[/b] [bold]x[/] \udcff"
SHOWN = "a\\x1b[2J\\x07\\x9b31m\\u202egnp.exe\\x00\\r[/b] [bold]x[/] \\udcff"
EVENTS = [
    Phase(HOSTILE, 2),
    Step(HOSTILE, 1, 0.5),
    Image(HOSTILE, HOSTILE),
    Saved(HOSTILE, HOSTILE),
    Note(HOSTILE),
    Warning(HOSTILE),
    Table(HOSTILE, (HOSTILE, "[/b]"), ((HOSTILE, "[/b]"), ("[red]", "x"))),
]


def test_what_cannot_be_seen_is_printed_as_its_escape():
    assert printable(HOSTILE) == one_line(HOSTILE) == SHOWN
    assert printable("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert one_line("two\nlines") == "two\\nlines"
    for kept in ("Würfel", "犬", "👩\u200d🔬", "नमस्ते", "e\u0301"):
        assert printable(kept) == one_line(kept) == kept


@pytest.mark.parametrize("terminal", [True, False])
def test_every_event_is_drawn_as_it_is(terminal, capsys):
    out = io.StringIO()
    drawer = Bars(Console(file=out, width=400, force_terminal=terminal, color_system=None)) if terminal else Plain()
    for event in EVENTS:
        drawer.draw(event)
    drawer.close()
    text = out.getvalue() if terminal else "".join(capsys.readouterr())
    assert text.count(SHOWN) >= 8
    assert "[/b]" in text
    assert not any(wrong in text for wrong in ("\x1b[2J", "\x07", "\x9b", "\u202e", "\x00", "\udcff"))


def test_an_error_is_one_line_that_steers_nothing(monkeypatch):
    def fails(chosen):
        raise UserError(f"{HOSTILE}\nmlx-blockskip: all is well")

    monkeypatch.setattr(cli, "function_of", lambda name: fails)
    result = CliRunner().invoke(cli.app, ["train"])
    assert (result.exit_code, result.output) == (1, f"mlx-blockskip: {SHOWN}\\nmlx-blockskip: all is well\n")


def test_a_warning_is_drawn_once(capsys):
    with drawn_by(Plain()):
        for _ in range(3):
            emit(Warning("careful"))
            emit(Note("again"))
    assert [text.count(word) for text, word in zip(capsys.readouterr(), ("again", "careful"), strict=True)] == [3, 1]
