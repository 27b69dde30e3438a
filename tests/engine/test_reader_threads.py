"""MLX keeps a thread of its own for every thread that ever evaluated, so walks must not bring new ones."""

import threading

from engine.test_sweep import make

from mlx_blockskip.engine.reader import BlockReader


def test_walks_share_their_reading_thread(tmp_path):
    stack, shards = make(tmp_path / "m", 3)
    reader = BlockReader(shards, stack, 0)
    for _ in reader.walk(range(3)):
        pass
    before = {thread.ident for thread in threading.enumerate()}
    for _ in range(5):
        for _ in reader.walk(range(3)):
            pass
        next(iter(reader.walk(range(3))))  # one that is left on its way
    assert {thread.ident for thread in threading.enumerate()} == before


def test_a_walk_inside_a_walk_has_a_thread_of_its_own(tmp_path):
    """It must not wait behind what the outer one reads ahead."""
    stack, shards = make(tmp_path / "m", 3)
    outer, inner = BlockReader(shards, stack, 0), BlockReader(shards, stack, 0)
    seen = [(a, b) for a, _ in outer.walk(range(3)) for b, _ in inner.walk(range(3))]
    assert seen == [(a, b) for a in range(3) for b in range(3)]
