"""What the operating system says of the machine, and where nothing can run."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mlx_blockskip import api, doctor
from mlx_blockskip.cli import app
from mlx_blockskip.commands import COMMANDS
from mlx_blockskip.engine import system
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.tasks.doctor import checks, fits

REASON = "macOS 13.6 is too old"


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (("Darwin", "arm64", False, "14.0"), None),
        (("Darwin", "arm64", False, "26.1"), None),
        (("Darwin", "arm64", False, "10.16"), None),
        (("Darwin", "arm64", False, ""), None),
        (("Linux", "x86_64", False, ""), None),
        (("Linux", "aarch64", False, ""), None),
        (("Darwin", "arm64", False, "13.6.1"), "macOS 13.6.1 is too old: MLX needs macOS 14 or later"),
        (("Darwin", "x86_64", False, "15.5"), "this Mac's processor is x86_64: MLX needs Apple silicon"),
        (("Darwin", "x86_64", True, "15.5"), "translated by Rosetta, and MLX needs a native one"),
    ],
)
def test_only_apple_silicon_with_macos_14_and_a_native_python_will_do_on_a_mac(machine, says):
    found = system.unsupported(*machine)
    assert found is None if says is None else says in found


def test_rosetta_is_told_from_an_intel_processor(monkeypatch):
    monkeypatch.setattr(system.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(system.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(system, "is_mac", lambda: True)
    for answer, word in (("1", "Rosetta"), ("0", "processor"), (None, "processor")):
        monkeypatch.setattr(system, "asked", lambda *command, answer=answer: answer)
        assert word in system.obstacle()


def test_power_is_read_from_what_the_system_says():
    assert system.source_of("Now drawing from 'Battery Power'\n -InternalBattery-0 80%") == "battery"
    assert system.source_of("Now drawing from 'AC Power'\n") == "mains"
    assert system.source_of("") == "unknown"


def test_a_command_that_is_not_there_or_fails_says_nothing():
    assert system.asked("no-such-command-here") is None
    assert system.asked("false") is None


@pytest.fixture
def too_old(monkeypatch):
    monkeypatch.setattr(system, "obstacle", lambda: REASON)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"doctor"}))
def test_every_command_refuses_a_machine_where_nothing_runs(name, too_old):
    result = CliRunner().invoke(app, [name])
    assert (result.exit_code, result.output.strip()) == (1, f"mlx-blockskip: {REASON}")
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    with pytest.raises(UserError, match=REASON):
        getattr(api, name)()


def test_a_model_is_not_opened_there_either(too_old):
    with pytest.raises(UserError, match=REASON):
        api.load("tiny-flux")


def test_doctor_runs_there_and_says_why(too_old, monkeypatch, tmp_path):
    monkeypatch.setattr("mlx_blockskip.tasks.doctor.machine.obstacle", system.obstacle)
    monkeypatch.setattr(checks, "TRIALS", ())
    monkeypatch.setattr(fits, "path", lambda: tmp_path / "none.json")
    assert doctor(quick=True).machine.unsupported == REASON
    assert REASON in CliRunner().invoke(app, ["doctor", "--quick"]).output


def test_where_mlx_cannot_even_be_imported_the_reason_is_said():
    """In a process of its own, from the command line and from Python."""
    broken = "import sys; sys.modules['mlx'] = None; from mlx_blockskip.engine import system"
    broken += f"; system.obstacle = lambda: {REASON!r}; import mlx_blockskip"
    ask = "sys.argv = ['mlx-blockskip', 'doctor']; from mlx_blockskip.cli import main; main()"
    for use in (ask, "mlx_blockskip.train()", "mlx_blockskip.doctor()", "mlx_blockskip.load()"):
        done = subprocess.run([sys.executable, "-c", f"{broken}; {use}"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip().endswith(REASON), done.stderr
