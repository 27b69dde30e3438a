"""Temporaries of killed runs are known by the lock that nobody holds, and nothing else is removed."""

import errno
import fcntl
import os

import pytest

from mlx_blockskip.engine import files, leftovers


def sweep(directory):
    said = []
    leftovers.sweep(directory, lambda path, what: said.append((path.name, what)))
    return said


def test_what_nobody_holds_goes_and_what_is_being_written_or_a_users_stays(tmp_path):
    dead = tmp_path / ".model.abcdefgh.blockskip-tmp"
    (dead / "deep").mkdir(parents=True)
    (dead / "deep" / "weights").write_bytes(bytes(3 << 20))
    (tmp_path / ".x.png.abcdefgh.blockskip-tmp").touch()
    for name in (".mine.tmp", "model.blockskip-tmp", ".env"):
        (tmp_path / name).touch()
    (tmp_path / ".link.abcdefgh.blockskip-tmp").symlink_to(tmp_path / ".env")
    with files.atomic_file(tmp_path / "y") as file, files.atomic_directory(tmp_path / "z") as directory:
        assert dict(sweep(tmp_path)) == {
            dead.name: "removed, 3.0 MiB of a run that was killed",
            ".x.png.abcdefgh.blockskip-tmp": "removed, 0.0 MiB of a run that was killed",
        }
        assert file.exists()
        assert directory.exists()
    left = {".mine.tmp", "model.blockskip-tmp", ".env", ".link.abcdefgh.blockskip-tmp", "y", "z"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_directory_whose_place_was_being_taken_has_its_name_again(tmp_path):
    aside = tmp_path / ".step-000002.abcdefgh.blockskip-old"
    (aside / "state").mkdir(parents=True)
    ((_, said),) = sweep(tmp_path)
    assert "has its name again" in said
    assert (tmp_path / "step-000002" / "state").is_dir()
    (aside / "state").mkdir(parents=True)
    ((_, said),) = sweep(tmp_path)
    assert said.startswith("removed")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_directory_is_swept_once_a_run_before_something_is_written_in_it(tmp_path):
    said = []
    with leftovers.sweeping(lambda path, what: said.append(path.name)):
        for name in "ab":
            (tmp_path / f".{name}.abcdefgh.blockskip-tmp").touch()
            files.write_text(tmp_path / name, "x")
    assert said == [".a.abcdefgh.blockskip-tmp"]
    files.write_text(tmp_path / "c", "outside of a run")
    assert (tmp_path / ".b.abcdefgh.blockskip-tmp").exists()


def test_where_there_are_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    (tmp_path / ".a.abcdefgh.blockskip-tmp").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert sweep(tmp_path) == []
    files.write_text(tmp_path / "a", "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_temporary_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, met = leftovers._lock, []

    def late(descriptor):
        if not met:
            met.append(next(tmp_path.iterdir()))
            met[0].unlink()
        return lock(descriptor)

    monkeypatch.setattr(leftovers, "_lock", late)
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("length", [200, 250])
def test_a_name_as_long_as_a_disk_takes_has_room_for_its_temporary(tmp_path, length):
    name = "ü" * (length // 2)
    files.write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
