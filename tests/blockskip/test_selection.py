"""Eq. 2 on tables made by hand, and the probe against every variant run by itself."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from contract.test_family import start

from mlx_blockskip.blockskip import selection
from mlx_blockskip.blockskip.selection import FIRST, FULL, LAST, Distances
from mlx_blockskip.engine import sweep
from mlx_blockskip.engine.spill import Spilled
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.registry import open_model
from support.compare import relative_error, same_bits
from support.models import random_tree

TABLE = Distances((0.0, 0.1, 0.2, 0.9), (0.0, 0.3, 0.35, 0.5))


def test_every_budget_gets_its_best_pair():
    assert TABLE.plans(9) == {1: (1, 0), 2: (2, 0), 3: (1, 2)}
    assert TABLE.best(0) == (0, 0)
    for k in range(4):
        sums = {(n, k - n): TABLE.first[n] + TABLE.last[k - n] for n in range(k + 1)}
        assert sums[TABLE.best(k)] == min(sums.values())
    assert np.allclose(TABLE.table, np.add.outer(TABLE.first, TABLE.last))


@pytest.mark.parametrize("n", range(6))
def test_the_best_pair_is_found_wherever_it_lies(n):
    """Of 5 blocks, the sum is least at n of them at the start."""
    table = Distances(tuple((i - n) ** 2 / 10 for i in range(6)), (0.0,) * 6)
    assert table.best(5) == (n, 5 - n)


def test_of_equal_pairs_the_one_that_is_exact_wins():
    assert Distances((0.0, 0.5, 1.0), (0.0, 0.5, 1.0)).best(2) == (2, 0)


def test_plans_leave_a_block_to_train():
    assert max(TABLE.plans(3)) == 2


@pytest.mark.parametrize("k", [-1, 4])
def test_a_budget_beyond_the_table_is_refused(k):
    with pytest.raises(ValueError, match="at most 3"):
        TABLE.best(k)


def test_the_mean_is_over_subjects():
    other = Distances((0.0, 0.3, 0.2, 0.1), (0.0, 0.1, 0.15, 0.5))
    assert np.allclose(selection.mean([TABLE, other]).first, (0, 0.2, 0.2, 0.5))
    assert np.allclose(selection.mean([TABLE, other]).last, (0, 0.2, 0.25, 0.5))


def test_what_was_not_looked_at_is_interpolated():
    table = selection.collect({(FIRST, 2): 0.4, (FIRST, 3): 0.5, (LAST, 3): 0.9}, 3)
    assert np.allclose(table.first, (0, 0.2, 0.4, 0.5))
    assert np.allclose(table.last, (0, 0.3, 0.6, 0.9))


@pytest.mark.parametrize(
    ("k", "stride", "expected"), [(5, 1, [1, 2, 3, 4, 5]), (5, 2, [2, 4, 5]), (4, 9, [4]), (0, 1, [])]
)
def test_every_stride_th_and_the_last_are_looked_at(k, stride, expected):
    assert selection.probed(k, stride) == expected


def test_algorithm_one_masks_every_number_of_blocks_at_either_end():
    assert selection.variants(0) == [(FULL, 0)]
    assert selection.variants(2) == [(FULL, 0), (FIRST, 1), (FIRST, 2), (LAST, 1), (LAST, 2)]
    masked = [sorted(selection.masks_of(variant, 5)) for variant in selection.variants(2)]
    assert masked == [[], [0], [0, 1], [4], [3, 4]]


def test_windows_cover_the_stack():
    assert list(selection.windows(4, 2)) == [(0, 2), (1, 3), (2, 4)]
    assert list(selection.windows(4, 4)) == [(0, 4)]


def probe_of(model, k, stride=1, tree=None, wait=lambda sample: sample):
    started = [start(model, number, batch=1)[:2] for number in range(2)]
    ahead = sweep.modulations(model.stack, model.reader, [sample.context for sample, _ in started])
    waiting = [Batch(s.state, s.context, by_block.__getitem__) for (s, _), by_block in zip(started, ahead, strict=True)]

    def velocity(i, state):
        return model.final_layer(state, started[i][0].context, started[i][1])

    return selection.probe(
        model.stack, model.reader, waiting, k, stride=stride, trainable=tree, velocity=velocity, wait=wait
    )


@pytest.mark.parametrize(("depth", "k"), [(6, 3), (9, 1), (9, 8), (4, 0)])
def test_how_often_blocks_are_evaluated_follows_from_depth_and_budget(depth, k):
    """Shared: the full pass, the masked start and its way on, and of each other n and each m its own blocks."""
    shared = depth + depth * (k > 0) + sum(depth - n for n in range(1, k)) + sum(range(1, k + 1))
    assert selection.evaluations(depth, k) == (shared, depth + 2 * k * depth)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_probe_finds_what_every_variant_by_itself_shows(open_family, stride):
    model = open_family()
    depth = model.stack.depth
    k = 3
    tree = random_tree(model, range(depth))
    found = probe_of(model, k, stride, tree)
    looked_at = selection.probed(k, stride)
    for number in range(2):
        outputs = {}
        for variant in [(FULL, 0), *itertools.product((FIRST, LAST), looked_at)]:
            sample, modulation, *_ = start(model, number, batch=1)
            sample.masks = selection.masks_of(variant, depth)
            sweep.forward(model.stack, model.reader, [sample], trainable=tree)
            outputs[variant] = model.final_layer(sample.state, sample.context, modulation)
        full = outputs.pop((FULL, 0))
        assert set(found.distances[number]) == set(outputs)
        for variant, output in outputs.items():
            expected = float(mx.sum(mx.square(full - output)) / mx.sum(mx.square(full)))
            assert found.distances[number][variant] == pytest.approx(expected, rel=1e-5), variant
    assert found.evaluations == 2 * selection.evaluations(depth, k, stride)[0]


def test_the_probe_reads_every_block_once(open_family):
    model = open_family()
    probe_of(model, 2)
    assert model.reader.bytes_read == sum(model.reader.nbytes(block) for block in model.stack.path)


def test_variants_on_disk_and_a_small_budget_change_nothing(open_family, tmp_path):
    plain = probe_of(open_family(), 3)
    count = itertools.count()
    spilled = probe_of(open_family(0), 3, wait=lambda sample: Spilled(sample, tmp_path / f"{next(count)}.safetensors"))
    assert spilled.distances == plain.distances
    assert next(count) == 2 * 5, "all but the full and the longest masked start"


def masked_and_not(model):
    """The states after the first block, with full attention and with image-to-text attention masked in it."""
    states = []
    for masks in ({}, selection.masks_of((FIRST, 1), model.stack.depth)):
        sample = start(model)[0]
        sample.masks = masks
        sweep.forward(model.stack, model.reader, [sample], range(1), bridge=lambda i, a, b, state: state)
        states.append(sample.state)
    return states


def test_images_notice_the_mask(open_family):
    full, masked = masked_and_not(open_family())
    assert relative_error(masked.image, full.image) > 1e-4


def test_text_does_not_notice_the_mask(tiny_flux):
    """In the block itself: later blocks' text sees image tokens that changed. Only joint attention carries text on."""
    full, masked = masked_and_not(open_model(tiny_flux))
    assert relative_error(masked.text, full.text) <= 1e-6


def test_masked_sweeps_stream_and_chunk_like_any_other(open_family, monkeypatch):
    from mlx_blockskip.models import attention

    def run(budget):
        model = open_family(budget)
        sample = start(model)[0]
        sample.masks = selection.masks_of((LAST, 2), model.stack.depth)
        sweep.forward(model.stack, model.reader, [sample])
        return sample.state.image

    whole = run(None)
    assert same_bits(run(0), whole)
    monkeypatch.setattr(attention, "SCORE_BYTES", 4096)
    assert relative_error(run(None), whole) <= 1e-5
