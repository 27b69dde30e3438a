"""A file's checksum while it is written: whatever the order of its pieces, that of the whole file."""

import hashlib
import itertools
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import files
from mlx_blockskip.engine.hashing import WrittenHash

PIECES = [b"header", b"a" * 3_000_000, b"", b"tail"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("said", [{0, 1, 2, 3}, {0, 3}])
def test_any_order_gives_the_checksum_of_the_file(tmp_path, order, said):
    """said: the pieces that the hash is told of; the others are read at the end."""
    starts = [0, *itertools.accumulate(len(piece) for piece in PIECES)]
    path = tmp_path / "x"
    with path.open("w+b") as file:
        hashed = WrittenHash(path, file)
        for i in order:
            file.seek(starts[i])
            file.write(PIECES[i])
            if i in said:
                hashed.wrote(starts[i], PIECES[i])
        found = hashed.hexdigest(starts[-1])
        hashed.close()
    assert found == hashlib.sha256(b"".join(PIECES)).hexdigest()


def test_what_comes_in_order_is_not_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(WrittenHash, "_read", lambda self, start, end: read.append(end - start))
    entries = [files.TensorEntry("a", (4, 1000), "F32"), files.TensorEntry("b", (4, 2), "F32")]
    with files.SafetensorsWriter(tmp_path / "x.safetensors", entries, hashed=True) as writer:
        for start in range(4):
            writer.write("a", np.zeros((1, 1000), np.float32), start)
            writer.write("b", np.zeros((1, 2), np.float32), start)
    assert read[:3] == [8, 8, 8], "of b, what was written before its turn"
    assert sum(read) == 24


def test_a_writers_checksum_is_the_files_and_no_thread_is_left(tmp_path):
    before = threading.active_count()
    entries = [
        files.TensorEntry("a", (3, 2), "BF16"),
        files.TensorEntry("s", (), "F32"),
        files.TensorEntry("e", (0,), "F32"),
    ]
    tensors = {"s": mx.array(2.0), "a": mx.ones((3, 2), mx.bfloat16), "e": mx.zeros((0,))}
    with files.SafetensorsWriter(tmp_path / "x.safetensors", entries, hashed=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert writer.checksum == files.sha256(tmp_path / "x.safetensors")
    incomplete = files.SafetensorsWriter(tmp_path / "y.safetensors", entries, hashed=True)
    with pytest.raises(ValueError, match="not written: s"), incomplete:
        incomplete.write("a", tensors["a"])
    assert threading.active_count() == before
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def test_bytes_go_to_their_rows_and_no_further(tmp_path):
    entries = [files.TensorEntry("a", (3, 2), "BF16")]
    data = memoryview(np.arange(6, dtype=np.uint16).tobytes())
    with files.SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
        writer.write_bytes("a", data[8:], 2)
        writer.write_bytes("a", data[:8])
        with pytest.raises(ValueError, match="too many"):
            writer.write_bytes("a", data[:8], 2)
    written = files.load_lazily(tmp_path / "x.safetensors")["a"].view(mx.uint16)
    assert written.tolist() == [[0, 1], [2, 3], [4, 5]]
