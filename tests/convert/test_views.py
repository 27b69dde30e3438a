"""Tensors as pieces of stored ones: any rows of any arrangement, in every dtype that is read."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters import float8
from mlx_blockskip.converters.source import stored_in
from mlx_blockskip.converters.views import Piece, View, stacked, whole
from mlx_blockskip.engine import files
from support.compare import same_bits
from support.stored import write


@pytest.fixture
def stored(tmp_path):
    tensors = {
        "a": mx.arange(24).reshape(8, 3).astype(mx.bfloat16),
        "b": -mx.arange(6.0).reshape(2, 3),
        "s": mx.array(3.0),
    }
    files.save_tensors(tmp_path / "a.safetensors", tensors)
    return tensors, stored_in(tmp_path / "a.safetensors")


def test_rows_of_pieces_are_read_where_they_lie(stored):
    tensors, found = stored
    a = tensors["a"]
    swapped = stacked(whole(found["a"]).rows(4, 4), whole(found["a"]).rows(0, 4))
    assert swapped.shape == (8, 3)
    both = mx.concatenate([a[4:], a[:4]])
    for start in range(8):
        for stop in range(start + 1, 9):
            assert same_bits(swapped.read(start, stop), both[start:stop])
    assert same_bits(swapped.rows(3, 3).read(1), both[4:6])
    assert same_bits(whole(found["s"]).read(), tensors["s"])
    assert whole(found["s"]).shape == ()


def test_only_what_is_asked_for_is_read(stored, monkeypatch):
    sizes = []
    real = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: sizes.append(k["count"]) or real(*a, **k))
    view = stacked(whole(stored[1]["a"]).rows(4, 4), whole(stored[1]["a"]).rows(0, 4))
    view.read(3, 5)
    assert sizes == [6, 6]


@pytest.mark.parametrize(("dtype", "kind"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_all_codes_of_float8_are_those_of_torch(dtype, kind):
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).to(torch.float32).numpy()
    ours = float8.VALUES[dtype]
    np.testing.assert_array_equal(ours, theirs)
    known = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours)[known], np.signbit(theirs)[known])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1)])
def test_a_scale_is_for_all_rows_or_for_each(tmp_path, shape):
    codes = np.arange(40, 60, dtype=np.uint8).reshape(4, 5)
    scale = np.array(np.float32(0.3) + np.arange(np.prod(shape, dtype=int)).reshape(shape), np.float32)
    found = write(tmp_path / "x.safetensors", w=("F8_E4M3", codes), s=("F32", scale))
    view = View((Piece(found["w"], 2, 2, found["s"]), Piece(found["w"], 0, 1, found["s"])))
    expected = float8.VALUES["F8_E4M3"][codes] * np.broadcast_to(scale.reshape(-1, 1), (4, 1))
    np.testing.assert_array_equal(np.array(view.read()), expected[[2, 3, 0]])
    np.testing.assert_array_equal(np.array(view.read(1, 3)), expected[[3, 0]])


def test_float64_is_read_as_float32(tmp_path):
    values = np.array([[1 / 3, 2.0], [1e300, -0.0]])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    found = whole(write(tmp_path / "x.safetensors", w=("F64", values))["w"])
    assert found.dtype == "F64"
    np.testing.assert_array_equal(np.array(found.read()), expected)


def test_bytes_are_those_of_the_file_where_reading_changes_nothing(stored, tmp_path):
    view = stacked(whole(stored[1]["a"]).rows(4, 4), whole(stored[1]["a"]).rows(0, 4))
    assert view.stored_as == "BF16"
    assert bytes(view.bytes(3, 6)) == bytes(memoryview(np.array(view.read(3, 6).view(mx.uint16))))
    other = write(tmp_path / "x.safetensors", w=("F8_E4M3", np.zeros((4, 3), np.uint8)), s=("F32", np.ones((), "f4")))
    assert whole(other["w"]).stored_as == "F8_E4M3"
    assert whole(other["w"], other["s"]).stored_as is None
    assert stacked(whole(other["w"]), whole(stored[1]["a"])).stored_as is None
