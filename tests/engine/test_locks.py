"""One process at a time in a directory, where the disk knows of that."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.locks import lock
from mlx_blockskip.events import Warning, listening
from mlx_blockskip.tasks.alone import alone


def test_a_lock_is_held_against_other_processes_and_says_by_whom(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mlx_blockskip.engine.locks import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "held"
    with pytest.raises(UserError, match=str(other.pid)), lock(tmp_path / ".lock"):
        pass
    other.communicate("")
    with lock(tmp_path / ".lock") as held:
        assert held
    with listening(pytest.fail), alone(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def refuse(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_worked_on_and_said(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    with lock(tmp_path / ".lock") as held:
        assert not held
    heard = []
    with listening(heard.append), alone(tmp_path / ".lock"):
        heard.append("inside")
    assert heard == [
        Warning(f"{tmp_path}: its disk has no locks; see to it that no other run works in this directory"), "inside",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EAGAIN, "in use by process unknown"), (errno.EIO, "cannot be locked")]
)
def test_whatever_else_keeps_a_lock_away_is_said(tmp_path, monkeypatch, number, said):
    refuse(monkeypatch, number)
    with pytest.raises(UserError, match=said), lock(tmp_path / ".lock"):
        pass
