"""The command line, its settings and its displays."""

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_blockskip import display, settings
from mlx_blockskip.cli import app
from mlx_blockskip.commands import TASKS
from mlx_blockskip.display_rich import Bars
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Image, Note, Phase, PhaseEnd, Saved, Step, Warning, emit
from mlx_blockskip.options import from_mapping, merge, parse_size, to_mapping
from mlx_blockskip.settings import GenerateSettings, TrainSettings

EVENTS = [
    Note("a note"),
    Phase("train", 10, "step"),
    Step("train", 5, 0.25, 1e-3, 3 << 20),
    Step("train", 10, 0.125, 1e-3, 2 << 30),
    PhaseEnd("train", 61.0, 2 << 30),
    Warning("careful"),
    Image(Path("a.png"), "a cat"),
    Saved(Path("out"), "adapter"),
]


@pytest.fixture
def seen(monkeypatch):
    """Runs a command with a stand-in for its task; holds the settings that it got."""
    got = []

    def task(chosen):
        got.append(chosen)
        for event in EVENTS:
            emit(event)

    for name in ("train", "generate"):
        monkeypatch.setattr(importlib.import_module(TASKS[name]), name, task)
    return got


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['mlx-blockskip', '--help']\nfrom mlx_blockskip.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('mlx.core', 'numpy', 'PIL', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "convert" in out
    assert out.strip().endswith("[]")


def test_every_field_is_an_option_with_help():
    for name, cls in (("train", TrainSettings), ("generate", GenerateSettings), ("convert", settings.ConvertSettings)):
        out = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for field in to_mapping(cls()):
            assert f"--{field.replace('_', '-')}" in out, field


def test_options_reach_the_task_and_win_over_the_file(seen, tmp_path):
    (tmp_path / "c.yaml").write_text("iters: 7\nlearning-rate: 1e-4\nsample_prompt: [a, b]\nrank: 4\n")
    result = invoke("train", "-c", str(tmp_path / "c.yaml"), "--rank", "8", "--skip-ratio", "0.3", "--resume")
    assert result.exit_code == 0, result.output
    (got,) = seen
    assert (got.iters, got.learning_rate, got.sample_prompt, got.rank) == (7, 1e-4, ["a", "b"], 8)
    assert (got.skip_ratio, got.resume, got.seed) == (0.3, True, 0)


def test_repeatable_options(seen):
    result = invoke("generate", "--prompt", "a", "--prompt", "b", "--lora-scale", "0.5", "--adapter-path", "x")
    assert result.exit_code == 0, result.output
    assert (seen[0].prompt, seen[0].lora_scale, seen[0].adapter_path) == (["a", "b"], [0.5], ["x"])


def test_plain_and_json_output(seen):
    out = invoke("train").output
    assert "a note" in out
    assert "train: 1:01, peak 2.00 GiB" in out
    assert "adapter: out" in out
    lines = [json.loads(line) for line in invoke("train", "--json").output.splitlines()]
    assert [line["event"] for line in lines] == [type(e).__name__.lower() for e in EVENTS]


def test_an_error_is_one_sentence_and_exit_code_one(monkeypatch):
    result = invoke("generate", "--width", "64")
    assert result.exit_code == 1
    assert result.output.strip() == "mlx-blockskip: --prompt: say what to show"
    assert isinstance(CliRunner().invoke(app, ["generate", "--debug"]).exception, UserError)
    assert invoke("train", "--nonsense").exit_code == 2
    assert invoke("train", "--iters", "many").exit_code == 2
    assert "--patch-mode" not in result.output


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"iters": "many"}, "iters: 'many' is not a whole number"),
        ({"iters": True}, "iters"),
        ({"resume": 1}, "resume"),
        ({"patch_mode": "spiral"}, "not one of dynamic"),
        ({"learning_rate": "fast"}, "--learning-rate: 'fast' is not a number"),
    ],
)
def test_settings_name_what_is_wrong(mapping, match):
    with pytest.raises(UserError, match=match):
        from_mapping(TrainSettings, mapping)


def test_settings_go_to_json_and_back():
    given = TrainSettings(data="x", rank=4, sample_prompt=["a"])
    assert from_mapping(TrainSettings, json.loads(json.dumps(to_mapping(given)))) == given


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "\x00"])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        merge(TrainSettings, str(tmp_path / "c.yaml"), {})
    with pytest.raises(UserError, match="no such file"):
        merge(TrainSettings, str(tmp_path / "d.yaml"), {})


def test_sizes():
    sizes = {"2GB": 2 << 30, "512 MB": 512 << 20, "1.5GiB": 3 << 29, "10": 10, "0": 0, "3k": 3072, "1tb": 1 << 40}
    assert {text: parse_size(text, "x") for text in sizes} == sizes
    for wrong in ("much", "2XB", "-1GB", "", "1.2.3GB"):
        with pytest.raises(UserError, match="--x"):
            parse_size(wrong, "--x")


@pytest.mark.parametrize("width", [10, 40, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_bars_draw_on_any_terminal(width, terminal):
    out = io.StringIO()
    bars = Bars(Console(file=out, width=width, force_terminal=terminal, color_system=None))
    for event in EVENTS:
        bars.draw(event)
    bars.close()
    assert "careful" in out.getvalue()


def test_a_download_is_one_bar_in_bytes(capsys, monkeypatch):
    out = io.StringIO()
    bars = Bars(Console(file=out, width=100, force_terminal=True, color_system=None))
    bars.draw(Phase("download", 32 << 30, "B"))
    bars.draw(Step("download", 3 << 29))
    bars.close()
    assert "1.50 GiB/32.00 GiB" in out.getvalue()
    monkeypatch.setattr(display, "SECONDS_BETWEEN", 0.0)
    plain = display.Plain()
    plain.draw(Phase("download", 32 << 30, "B"))
    plain.draw(Step("download", 3 << 29))
    assert re.match(r"download: 1.50 GiB/32.00 GiB, \d\S* [MG]iB/s, ", capsys.readouterr().out)


def test_a_ctrl_c_while_drawing_reaches_the_task():
    told = []

    def task():
        try:
            while True:
                emit(Note("working"))
        except KeyboardInterrupt:
            emit(Note("saved"))
            told.append("saved")
            raise

    class Presses:
        def draw(self, event):
            told.append(event.message)
            if event.message == "working":
                raise KeyboardInterrupt

        def close(self):
            told.append("closed")

    with pytest.raises(KeyboardInterrupt), display.drawn_by(Presses()):
        task()
    assert told == ["working", "saved", "saved", "closed"]
