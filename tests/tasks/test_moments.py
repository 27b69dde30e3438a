"""Where the optimizer's moments are kept, and when they move."""

import os
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.tasks.train.moments import Moments
from support.compare import same_bits

SHAPES = {"attn.to_q.lora_a": (6, 2), "ff/0.lora_b": (2, 5)}
TREE = {block: {name: mx.zeros(shape) for name, shape in SHAPES.items()} for block in (1, 3)}
INPUTS = 1000
SIZE = INPUTS + 3 * 2 * 4 * (12 + 10)
"""Bytes of inputs, of both moments of the tree and of its gradients."""


def drawn(block):
    return {
        name: {kind: mx.array(philox.normal(1, block, i, j, shape=shape)) for j, kind in enumerate("mv")}
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def filled(directory=None):
    moments = Moments(directory)
    for block in (3, 1):
        moments.put(block, drawn(block))
    return moments


def assert_as_drawn(moments):
    assert moments.blocks == [1, 3]
    for block in moments.blocks:
        found, expected = moments.get(block), drawn(block)
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name][kind], expected[name][kind]) for name in SHAPES for kind in "mv")


def reader(spare, measured=True):
    """One that has so many bytes to spare; what is reserved of them."""
    taken = []
    overhead = {"body": 5} if measured else {"modulation": 5}
    return SimpleNamespace(spare=lambda: spare, overhead=overhead, reserve=taken.append, taken=taken)


@pytest.mark.parametrize("in_files", [False, True])
def test_what_is_put_is_got_by_block_and_nothing_before(tmp_path, in_files):
    moments = filled(tmp_path / "m" if in_files else None)
    assert_as_drawn(moments)
    assert moments.get(2) == {}
    assert Moments().blocks == []
    assert len(list(tmp_path.glob("m/*"))) == (2 if in_files else 0)


def test_those_of_an_earlier_run_are_removed(tmp_path):
    filled(tmp_path / "m")
    moments = Moments(tmp_path / "m")
    assert moments.get(1) == {}
    assert not (tmp_path / "m").exists()


def test_moved_into_memory_they_are_the_same_and_their_files_gone(tmp_path):
    moments = filled(tmp_path / "m")
    moments.into_memory()
    assert not (tmp_path / "m").exists()
    assert_as_drawn(moments)
    moments.put(1, drawn(1))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("spare", "measured", "moves"),
    [(SIZE, True, True), (SIZE - 1, True, False), (10**9, False, False), (None, False, True), (None, True, True)],
)
def test_they_move_where_a_step_has_been_measured_and_both_of_each_factor_fit(tmp_path, spare, measured, moves):
    moments, room = filled(tmp_path / "m"), reader(spare, measured)
    moments.settle(room, TREE, INPUTS)
    assert (moments.directory is None) == moves
    assert room.taken == ([SIZE] if moves else [])
    assert_as_drawn(moments)
    moments.settle(room, TREE, INPUTS)
    assert len(room.taken) == int(moves), "once"


def test_they_may_move_before_the_first_update(tmp_path):
    """After a step that was skipped there is nothing on disk yet."""
    moments = Moments(tmp_path / "m")
    moments.settle(reader(None), TREE, INPUTS)
    assert (moments.directory, moments.blocks) == (None, [])


def test_files_of_moments_are_scratch_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", None)
    assert_as_drawn(filled(tmp_path / "m"))
