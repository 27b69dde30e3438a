"""Samples whose states wait on disk, and samples that join a sweep on its way."""

import os
from dataclasses import replace

import mlx.core as mx
import pytest
from engine.test_sweep import Pair, factors, make, samples

from mlx_blockskip.engine import sweep
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.spill import Spilled, Trees, hold_in
from mlx_blockskip.engine.stack import arrays
from support.compare import same_bits


@pytest.mark.parametrize("with_b", [True, False])
def test_a_sample_on_disk_goes_the_same_way(tmp_path, with_b):
    stack, shards = make(tmp_path / "m", 4)
    own = samples(2, with_b=with_b)
    spilled = [Spilled(s, tmp_path / f"{i}.safetensors") for i, s in enumerate(samples(2, with_b=with_b))]
    for waiting in (own, spilled):
        sweep.forward(stack, BlockReader(shards, stack), waiting, trainable=factors(4))
    for a, b in zip(own, spilled, strict=True):
        assert isinstance(b.state, Pair)
        assert (b.state.b is None) is not with_b
        assert all(same_bits(x, y) for x, y in zip(arrays(a.state), arrays(b.state), strict=True))


def test_a_state_on_disk_is_not_in_memory_and_the_disk_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", None)
    state = Pair(mx.zeros((1, 1 << 20)) + 1.0)
    mx.eval(state)
    sample = Spilled(sweep.Batch(state), tmp_path / "a.safetensors")
    size = state.a.nbytes
    before = mx.get_active_memory()
    del state
    mx.clear_cache()
    assert mx.get_active_memory() <= before - size
    assert same_bits(sample.state.a, mx.ones((1, 1 << 20)))


def test_samples_may_join_and_leave_at_a_boundary(tmp_path):
    stack, shards = make(tmp_path / "m", 4)
    (sample,) = samples(1)
    begin = sample.state
    waiting, seen = [sample], []

    def join(boundary):
        seen.append((boundary, len(waiting)))
        if boundary == 2:
            waiting.append(replace(sample))
        if boundary == 3:
            del waiting[0]

    sweep.forward(stack, BlockReader(shards, stack), waiting, on_boundary=join)
    assert seen == [(0, 1), (1, 1), (2, 1), (3, 2)]
    sweep.forward(stack, BlockReader(shards, stack), [alone := replace(sample, state=begin)])
    assert same_bits(waiting[0].state.a, alone.state.a)
    assert not same_bits(sample.state.a, alone.state.a)


def test_a_held_state_is_not_in_memory_and_is_given_back_once(tmp_path):
    hold, state = hold_in(tmp_path), Pair(mx.arange(1 << 20).astype(mx.bfloat16), None)
    size = state.a.nbytes
    take = hold(3, 0, state)
    before = mx.get_active_memory()
    del state
    assert mx.get_active_memory() <= before - size
    found = take()
    assert found.b is None
    assert same_bits(found.a, mx.arange(1 << 20).astype(mx.bfloat16))
    with pytest.raises(Exception, match="no such file"):
        take()


def test_trees_on_disk_are_a_mapping_of_blocks_in_the_order_they_came(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "9.safetensors").write_bytes(b"of an earlier run")
    trees = Trees(tmp_path / "t")
    assert not list(tmp_path.iterdir())
    own = {5: {"a": mx.ones((2, 3)), "b/c": mx.arange(4)}, 2: {"a": mx.zeros((1,), mx.bfloat16)}}
    for block, tree in own.items():
        trees[block] = tree
    assert list(trees) == [5, 2]
    assert len(trees) == 2
    assert 9 not in trees
    for block, tree in own.items():
        assert trees[block].keys() == tree.keys()
        assert all(same_bits(trees[block][name], tree[name]) for name in tree)
    assert trees.pop(5).keys() == own[5].keys()
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["2.safetensors"]
    with pytest.raises(KeyError):
        trees[5]
    trees.clear()
    assert not len(trees)
    assert not (tmp_path / "t").exists()
