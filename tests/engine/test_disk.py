import errno
import fcntl
import os
import sys
import threading

import pytest

from mlx_blockskip.engine import disk


@pytest.mark.parametrize("nbytes", [1000, disk.PIECE + 1])
def test_all_of_a_sample_is_read_and_nothing_is_left(tmp_path, monkeypatch, nbytes):
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *more: (found := pread(*more), read.append(found))[0])
    assert disk.read_speed(tmp_path, nbytes) > 0
    assert sum(len(found) for found in read) == nbytes
    assert len(set(b"".join(read)[:1000])) > 100, "holes and repeated bytes are read faster than data"
    assert not list(tmp_path.iterdir())


def test_the_sample_is_removed_where_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "flush", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        disk.read_speed(tmp_path, 10)
    assert not list(tmp_path.iterdir())


def test_on_a_mac_the_system_keeps_neither_what_is_written_nor_what_is_read(tmp_path, monkeypatch):
    told = []

    def tell(descriptor, what, value=0):
        mode = fcntl_of(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        told.append((mode, what, value, os.fstat(descriptor).st_size))

    fcntl_of = fcntl.fcntl
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", tell)
    disk.read_speed(tmp_path, 1000)
    assert [told[0], told[-1]] == [(os.O_WRONLY, 48, 1, 0), (os.O_RDONLY, 48, 1, 1000)], "before a byte is handled"
    assert told[1:-1] == [(os.O_WRONLY, 51, 0, 1000)], "and it is on the disk itself before it is read"


def refuse(number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("refused", [None, errno.ENOTSUP, errno.ENOTTY, errno.EINVAL, errno.EIO])
def test_on_a_mac_the_drive_is_flushed_too_and_fsync_has_to_do_where_it_cannot_be(tmp_path, monkeypatch, refused):
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse(refused) if refused else lambda _, what: calls.append(what))
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    (tmp_path / "a").touch()
    if refused == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush_file(tmp_path / "a")
        return
    disk.flush_file(tmp_path / "a")
    disk.flush_directory(tmp_path)
    assert calls == 2 * [51 if refused is None else "fsync"]


def test_a_tree_goes_to_the_drive_file_by_file_and_the_drive_is_flushed_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda _, what: calls.append(what))
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").touch()
    (tmp_path / "b").touch()
    disk.flush_tree(tmp_path)
    assert calls == 4 * ["fsync"] + [51]


def test_a_file_system_that_flushes_no_directories_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    disk.flush_tree(tmp_path)
    disk.flush_directory(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        disk.flush_tree(tmp_path)


def test_files_are_sent_to_the_drive_beside_and_all_are_when_the_block_ends(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: sent.append(threading.current_thread().name))
    with disk.flushing() as flush:
        for name in "abc":
            (tmp_path / name).write_text(name)
            flush(tmp_path / name)
    assert len(sent) == 3
    assert all(name.startswith("flush") for name in sent)
