"""What is there stays, and what cannot be written is refused before work begins."""

import os
import signal

import pytest
from conftest import on_toy
from PIL import Image

from mlx_blockskip import export, generate, select, train
from mlx_blockskip.display import Silent, Stopped, drawn_by, message
from mlx_blockskip.engine import oserrors
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, PhaseEnd, emit
from mlx_blockskip.printable import printable
from mlx_blockskip.tasks import targets
from mlx_blockskip.tasks.running import running
from support.models import HEDGEHOG

DRAWN = {"prompt": ["a cat"], "steps": 1, "width": 32, "height": 32, "memory_budget": "any"}


def test_names_that_are_not_given_count_on_and_given_ones_are_refused(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [generate(model=str(toy), **DRAWN, seed=seed)[0].name for seed in range(3)]
    assert made == ["out.png", "out-2.png", "out-3.png"]
    assert [p.name for p in generate(model=str(toy), **DRAWN, n_images=2)] == ["out-01.png", "out-02.png"]
    assert [p.name for p in generate(model=str(toy), **DRAWN, n_images=2)] == ["out-2-01.png", "out-2-02.png"]
    before, heard = (tmp_path / "out.png").read_bytes(), []
    with pytest.raises(UserError, match=r"--output out.png: already exists; choose another name, or give --overwrite"):
        generate(model=str(toy), **DRAWN, seed=7, output="out.png", on_event=heard.append)
    assert heard == []
    assert (tmp_path / "out.png").read_bytes() == before
    generate(model=str(toy), **DRAWN, seed=7, output="out.png", overwrite=True)
    assert (tmp_path / "out.png").read_bytes() != before


def test_a_selection_and_its_picture_stay(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("selection.png")
    how = {"model": str(toy), "data": str(HEDGEHOG), "memory_budget": "any", "noise_levels": 1, "probe_images": 1}
    assert select(**how).path.name == "selection-2.json"
    with pytest.raises(UserError, match=r"--output selection.png|selection.png: already exists"):
        select(**how, output="selection.json")


@on_toy
def test_a_trace_never_takes_the_place_of_what_the_run_or_anyone_else_wrote(quick, tmp_path):
    (tmp_path / "m.json").write_text("mine")
    heard = []
    made = train(quick(iters=1, trace_memory=str(tmp_path / "m")), on_event=heard.append).adapter_path
    assert (tmp_path / "m.json").read_text() == "mine"
    assert (tmp_path / "m-2.json").is_file()
    train(quick("b", iters=1, trace_memory=str(tmp_path / "b" / "adapter_config")))
    assert '"lora_parameters"' in (tmp_path / "b" / "adapter_config.json").read_text()
    with pytest.raises(UserError, match="already exists"):
        export(adapter_path=str(made), output=str(tmp_path / "m.json"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a-file/x.png", "a-file/x.png: is in a path in which a file stands"),
        (f"{'x' * 300}.png", "the name is too long"),
        (f"new/{'x' * 300}/x.png", "the name is too long"),
        ("taken.png", "is a directory"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work_begins(toy, tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    (tmp_path / "taken.png").mkdir()
    heard = []
    with pytest.raises(UserError, match=said):
        generate(model=str(toy), **DRAWN, output=path, overwrite=True, on_event=heard.append)
    assert not any(isinstance(event, PhaseEnd) for event in heard)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-file", "taken.png"]


def test_a_place_without_permission_or_room_is_said(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied", "/t/xyz")

    monkeypatch.setattr(targets.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"--output .*/x: permission denied; choose another place"):
        targets.check_writable(tmp_path / "x", "--output")
    monkeypatch.setattr(targets.files, "free_space", lambda path: 1 << 30)
    with pytest.raises(UserError, match="2.00 GiB are needed and 1.00 GiB are free"):
        targets.check_room(tmp_path, 2 << 30)


@on_toy
def test_the_room_of_the_residual_cache_is_asked_for(quick, monkeypatch):
    monkeypatch.setattr(targets.files, "free_space", lambda path: 1000)
    with pytest.raises(UserError, match=r"the residual cache takes .* lower --cache-limit \(now 8GB\)"):
        train(quick(iters=9))


def test_codes_that_a_terminal_obeys_are_spelled_out():
    assert printable("a\x1b[31mb\ud800 ü 猫\n") == "a\\x1b[31mb\\ud800 ü 猫\n"
    assert message(Note("\x07")) == "\\x07"


@pytest.mark.parametrize("number", [*oserrors.SENTENCES, 99999])
def test_every_error_of_the_system_is_a_sentence_with_path_and_way_out(number):
    with pytest.raises(UserError, match=r"^/a/x\.png: .*; "), running("generate"):
        raise OSError(number, "odd", "/a/.x.png.abcdefgh.blockskip-tmp")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_a_run_is_raised_where_it_speaks_next(number, capsys):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as stopped, drawn_by(Silent()):
            os.kill(os.getpid(), number)
            whole = True
            emit(Note("between two steps"))
        assert (stopped.value.number, whole) == (number, True)
        assert "stopping after the step" in capsys.readouterr().err
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # nohup
            with drawn_by(Silent()):
                os.kill(os.getpid(), number)
                emit(Note("goes on"))
    finally:
        signal.signal(number, before)


def test_a_run_goes_on_where_nobody_reads_it(capfd):
    class Gone(Silent):
        drawn = 0

        def draw(self, event):
            self.drawn += 1
            raise BrokenPipeError(32, "Broken pipe")

    drawer = Gone()
    with drawn_by(drawer):
        emit(Note("one"))
        emit(Note("two"))
    assert drawer.drawn == 1
