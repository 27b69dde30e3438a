"""Files are whole or absent; safetensors are written and read a tensor at a time."""

import json
import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_blockskip.engine import dtypes, files, leftovers, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.files import SafetensorsWriter, TensorEntry
from support.compare import same_bits

TENSORS = {
    "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "half": mx.array([1.5, -2.0]).astype(mx.bfloat16),
    "packed": mx.array([[1, 2]], mx.uint32),
    "scalar": mx.array(3.0),
    "empty": mx.zeros((0, 4)),
    "turned": mx.arange(6, dtype=mx.float16).reshape(2, 3).T,
    "turned32": mx.arange(6, dtype=mx.float32).reshape(2, 3).T,
    "computed": mx.arange(6, dtype=mx.float32) * 2,
}


def test_what_is_written_is_what_others_read(tmp_path):
    files.save_tensors(tmp_path / "t.safetensors", TENSORS, {"who": "me"})
    loaded, metadata = mx.load(str(tmp_path / "t.safetensors"), return_metadata=True)
    assert metadata["who"] == "me"
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "t.safetensors", "numpy") as file:
        assert set(file.keys()) == set(TENSORS)
        np.testing.assert_array_equal(file.get_tensor("turned"), np.array(TENSORS["turned"]))
    mapped = files.MappedTensors(tmp_path / "t.safetensors")
    assert all(same_bits(mapped.read(name), TENSORS[name]) for name in TENSORS if name != "empty")
    assert mapped.under("ha") == ["half"]
    assert "nothing" not in mapped
    with pytest.raises(UserError, match="no tensor nothing"):
        mapped.read("nothing")


def test_what_outlives_a_power_loss_is_on_the_disk_before_it_has_its_name_and_scratch_is_not_waited_for(
    tmp_path, monkeypatch
):
    flushed, fsync, path = [], os.fsync, tmp_path / "t.safetensors"
    inode = tmp_path.stat().st_ino

    def seen(number):
        fsync(number)
        flushed.append(("directory" if os.fstat(number).st_ino == inode else "file", path.exists()))

    monkeypatch.setattr(sys, "platform", "linux")  # elsewhere it is not fsync that flushes
    monkeypatch.setattr(os, "fsync", seen)
    files.save_tensors(path, {"a": mx.ones((2,))})
    assert flushed == [("file", False), ("directory", True)]
    files.save_tensors(path, {"a": mx.zeros((2,))}, durable=False)
    assert len(flushed) == 2
    assert same_bits(files.MappedTensors(path).read("a"), mx.zeros((2,)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bytes_that_lie_there_are_taken_as_they_are(monkeypatch):
    array = mx.arange(6, dtype=mx.float32).reshape(2, 3)
    mx.eval(array)
    monkeypatch.setattr(mx, "eval", None)
    assert bytes(dtypes.raw_bytes(array)) == np.arange(6, dtype=np.float32).tobytes()


def test_tensors_may_be_written_in_any_order(tmp_path):
    entries = [TensorEntry(n, tuple(t.shape), dtypes.dtype_name(t.dtype)) for n, t in TENSORS.items()]
    with SafetensorsWriter(tmp_path / "t.safetensors", entries) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    loaded = mx.load(str(tmp_path / "t.safetensors"))
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_tensor_may_be_written_some_rows_at_a_time(tmp_path):
    whole = mx.arange(28, dtype=mx.float16).reshape(7, 2, 2)
    entries = [TensorEntry("a", (3,), "F32"), TensorEntry("rows", (7, 2, 2), "F16")]
    with SafetensorsWriter(tmp_path / "t.safetensors", entries) as writer:
        for start, stop in ((4, 7), (0, 3), (3, 4)):
            writer.write("rows", whole[start:stop], start)
        writer.write("a", mx.ones((3,)))
    loaded = mx.load(str(tmp_path / "t.safetensors"))
    assert same_bits(loaded["rows"], whole)
    assert same_bits(loaded["a"], mx.ones((3,)))


@pytest.mark.parametrize(("start", "shape"), [(6, (2, 2, 2)), (0, (3, 2, 1)), (0, (3, 2, 2))])
def test_rows_beyond_the_end_or_missing_leave_nothing(tmp_path, start, shape):
    with (
        pytest.raises(ValueError, match="rows"),
        SafetensorsWriter(tmp_path / "t.safetensors", [TensorEntry("rows", (7, 2, 2), "F16")]) as writer,
    ):
        writer.write("rows", mx.zeros(shape, mx.float16), start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"x": mx.zeros((2,))}, {"a": mx.zeros((3,))}, {"a": mx.zeros((2,), mx.int32)}, {}])
def test_a_tensor_that_was_not_announced_or_is_missing_leaves_nothing(tmp_path, wrong):
    with (
        pytest.raises(ValueError, match="t.safetensors"),
        SafetensorsWriter(tmp_path / "t.safetensors", [TensorEntry("a", (2,), "F32")]) as writer,
    ):
        for name, tensor in wrong.items():
            writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "d") as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_directory_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    with pytest.raises(UserError, match="already exists"), files.atomic_directory(tmp_path / "d"):
        pass
    with files.atomic_directory(tmp_path / "d", replace=True) as directory:
        (directory / "new").touch()
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]


def test_all_of_a_directory_is_on_the_disk_before_it_has_its_name_and_the_old_one_goes_when_the_new_one_has(
    tmp_path, monkeypatch
):
    flushed, fsync, target = [], os.fsync, tmp_path / "d"
    target.mkdir()
    old = target.stat().st_ino

    def seen(number):
        fsync(number)
        there = {p.stat().st_ino: p.name for p in (tmp_path, *tmp_path.rglob("*"))}
        name = there[os.fstat(number).st_ino]
        flushed.append(("new" if name.startswith(".d.") else name, target.stat().st_ino != old, old in there))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "fsync", seen)
    with files.atomic_directory(target, replace=True) as directory:
        (directory / "part").mkdir()
        (directory / "part" / "copied").touch()
    assert set(flushed[:-1]) == {("copied", False, True), ("part", False, True), ("new", False, True)}
    assert flushed[-1] == (tmp_path.name, True, True)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    flushed.clear()
    with files.atomic_directory(target, replace=True, durable=False) as directory:
        (directory / "scratch").touch()
    assert not flushed


def test_a_tree_is_removed_though_companions_go_by_themselves_and_links_go_without_what_they_point_to(
    tmp_path, monkeypatch
):
    tree, kept = tmp_path / "tree", tmp_path / "kept"
    for folder in (tree / "a", tree / "a" / "b", kept):
        folder.mkdir(parents=True)
        for name in ("x", "._x", "y"):
            (folder / name).touch()
    (tree / "._a").touch()
    (tree / "link").symlink_to(kept)
    unlink = Path.unlink

    def with_companion(path, missing_ok=False):
        unlink(path, missing_ok)
        unlink(path.with_name(f"._{path.name}"), True)

    monkeypatch.setattr(Path, "unlink", with_companion)
    leftovers.remove_tree(tree)
    assert not tree.exists()
    assert len(list(kept.iterdir())) == 3
    with pytest.raises(FileNotFoundError):
        leftovers.remove_tree(tree)


def good_bytes():
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def with_header(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        good_bytes()[:-1],
        good_bytes()[:20],
        (5).to_bytes(8, "little") + b"{bad}" + bytes(8),
        with_header([]),
        with_header({"a": {"dtype": "F32", "shape": [2]}}),
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        with_header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
        with_header({"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}),
    ],
)
def test_a_broken_header_is_one_sentence_with_the_path(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="t.safetensors"):
        files.read_header(tmp_path / "t.safetensors")


def test_memory_stays_at_one_tensor_while_writing_many(tmp_path):
    one = 1 << 20
    entries = [TensorEntry(str(i), (one // 4,), "F32") for i in range(32)]
    mx.set_cache_limit(0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with SafetensorsWriter(tmp_path / "t.safetensors", entries) as writer:
        for i in range(32):
            writer.write(str(i), mx.full((one // 4,), float(i)))
    assert mx.get_peak_memory() - before <= 3 * one


def test_philox_is_a_function_of_seed_and_place():
    a = philox.normal(1, 2, shape=(4,))
    assert np.array_equal(a, philox.normal(1, 2, shape=(4,)))
    others = [philox.normal(*key, shape=(4,)) for key in ((1, 3), (2, 2), (1,), (1, 2, 0), (12,))]
    assert not any(np.array_equal(a, other) for other in others)
    assert a.dtype == np.float32


@pytest.mark.parametrize("read", [files.read_json, files.read_any_json, files.read_header])
def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path, read):
    for name in ("a\0b.json", "\ud800.json"):
        with pytest.raises(UserError, match="no file can have this name"):
            read(tmp_path / name)
