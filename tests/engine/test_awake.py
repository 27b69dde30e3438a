"""A Mac is kept awake while a long command runs: `caffeinate` and `pmset` are stand-ins on the PATH."""

import os
import subprocess
import time

import pytest
from typer.testing import CliRunner

from mlx_blockskip import api
from mlx_blockskip.cli import app
from mlx_blockskip.engine import awake, system
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.running import LONG, running
from support.metal import FAILED
from support.tasks import drive


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def until(said, seconds=20.0):
    """What `said` returns, as soon as that is true."""
    last = time.monotonic() + seconds
    while not (found := said()) and time.monotonic() < last:
        time.sleep(0.01)
    return found


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """A Mac on battery, as far as this is concerned; the file where its caffeinate writes its process and arguments."""
    told = tmp_path / "told"
    executable(tmp_path / "caffeinate", f'echo "$$ $*" > {told}.part; mv {told}.part {told}; exec sleep 60')
    executable(tmp_path / "pmset", "echo \"Now drawing from 'Battery Power'\"")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(awake.VARIABLE, "1")
    monkeypatch.setattr(system, "is_mac", lambda: True)
    monkeypatch.setattr(system, "obstacle", lambda: None)
    return told


def kept(told):
    """(the process of caffeinate, its arguments)."""
    assert until(told.exists)
    pid, _, arguments = told.read_text().strip().partition(" ")
    return int(pid), arguments


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt])
def test_inside_caffeinate_runs_for_this_process_and_no_longer(mac, end):
    try:
        with awake.kept_awake():
            pid, arguments = kept(mac)
            assert arguments == f"-i -w {os.getpid()}"
            assert os.getpgid(pid) != os.getpgid(0), "a Ctrl-C of the terminal does not reach it"
            assert is_alive(pid)
            if end is not None:
                raise end
    except (ValueError, KeyboardInterrupt):
        pass
    assert not is_alive(pid)


@pytest.mark.parametrize("why", ["turned off", "not a Mac", "not found", "cannot be started"])
def test_elsewhere_nothing_is_started_and_nothing_is_wrong(mac, monkeypatch, why):
    if why == "turned off":
        monkeypatch.setenv(awake.VARIABLE, "0")
    elif why == "not a Mac":
        monkeypatch.setattr(system, "is_mac", lambda: False)
    elif why == "not found":
        monkeypatch.setenv("PATH", "")
    else:
        mac.with_name("caffeinate").write_bytes(b"\x7fELF nonsense")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(awake.subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    with awake.kept_awake():
        assert len(started) == (why == "cannot be started")
    assert not mac.exists()


@pytest.mark.parametrize("name", sorted([*LONG, "export", "doctor"]))
def test_long_commands_keep_it_awake_and_say_that_it_runs_on_battery(mac, name):
    def run():
        with running(name):
            return name in LONG and is_alive(kept(mac)[0])

    alive, events = drive(run)
    assert alive == (name in LONG)
    assert mac.exists() == alive
    assert [("battery" in event.message) for event in events if isinstance(event, Note)] == [True] * alive


def test_turned_off_nothing_is_said_of_the_battery_either(mac, monkeypatch):
    monkeypatch.setenv(awake.VARIABLE, "0")

    def run():
        with running("train"):
            pass

    assert drive(run)[1] == []


def test_nothing_is_said_on_mains(mac):
    executable(mac.with_name("pmset"), "echo \"Now drawing from 'AC Power'\"")

    def run():
        with running("train"):
            pass

    assert drive(run)[1] == []


class TestEveryCommandRunsSo:
    """The command line and Python alike."""

    @pytest.fixture
    def seen(self, mac, monkeypatch):
        """What caffeinate was told when the task of `train` ran."""
        got = []
        monkeypatch.setattr("mlx_blockskip.tasks.train.train.train", lambda settings: got.append(kept(mac)))
        return got

    def test_from_the_command_line(self, seen):
        result = CliRunner().invoke(app, ["train"])
        assert result.exit_code == 0, result.output
        assert "runs on battery" in result.output
        assert len(seen) == 1
        assert not is_alive(seen[0][0])

    def test_from_python(self, seen):
        events = []
        api.train(TrainSettings(), on_event=events.append)
        assert len(events) == len(seen) == 1
        assert not is_alive(seen[0][0])


@pytest.mark.parametrize("message", [FAILED, "out of cheese"])
def test_an_error_of_the_device_is_a_sentence_in_every_command(monkeypatch, message):
    def task(settings):
        raise RuntimeError(message)

    monkeypatch.setattr("mlx_blockskip.tasks.generate.generate", task)
    kind, exit_of = (UserError, SystemExit) if message == FAILED else (RuntimeError, RuntimeError)
    with pytest.raises(kind, match=r"Insufficient Memory.*; close other programs|^out of cheese$"):
        api.generate()
    result = CliRunner().invoke(app, ["generate"])
    assert result.exit_code == 1
    assert isinstance(result.exception, exit_of)
