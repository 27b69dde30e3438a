"""Eq. 3, and where its tokens are kept."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import philox
from mlx_blockskip.models.family import Tokens
from support.compare import relative_error, same_bits


def tokens(number):
    return Tokens(*(mx.array(philox.normal(2, number, part, shape=(2, 3, 4))) for part in range(2)))


def test_equation_three_is_exact_while_nothing_has_changed():
    first, last = (
        Tokens(mx.array(philox.normal(0, i, shape=(2, 3))), mx.array(philox.normal(1, i, shape=(2, 3)))) for i in (0, 1)
    )
    crossed = residuals.cross(first, last, first)
    assert same_bits(crossed.image, last.image)
    assert same_bits(crossed.text, last.text)
    moved = residuals.cross(first, last, Tokens(first.image + 1, first.text))
    assert np.allclose(np.array(moved.image), np.array(last.image + 1), atol=1e-6)
    text_dropped = residuals.cross(Tokens(first.image), Tokens(last.image), first)
    assert same_bits(text_dropped.text, first.text)


def test_equation_three_adds_what_training_changed_to_image_and_text_alike():
    at_start, at_stop, own = (tokens(i) for i in range(3))
    crossed = residuals.cross(at_start, at_stop, own)
    for name in ("image", "text"):
        start, stop, now = (np.array(getattr(t, name), np.float64) for t in (at_start, at_stop, own))
        assert relative_error(getattr(crossed, name), now + (stop - start)) <= 1e-6


def test_a_bridge_crosses_with_the_record_of_the_sample_s_own_micro_batch():
    kept = {(n, f"run4.{end}"): tokens(10 * n + i) for n in (5, 6) for i, end in enumerate(("start", "stop"))}
    own = tokens(99)
    over = residuals.bridge(lambda number, name: kept[number, name], [6, 5], "base")
    for place, number in enumerate((6, 5)):
        crossed = over(place, 4, 7, own)
        expected = residuals.cross(kept[number, "run4.start"], kept[number, "run4.stop"], own)
        assert same_bits(crossed.image, expected.image)
        assert same_bits(crossed.text, expected.text)
    passed = residuals.bridge(lambda number, name: kept[number, name], [6, 5], "none")(0, 4, 7, own)
    assert same_bits(passed.image, own.image)
    assert same_bits(passed.text, own.text)


def test_the_trailing_run_keeps_image_tokens_only():
    plan = SkipPlan(12, ((0, 2), (4, 6), (10, 12)))
    assert residuals.boundaries(plan, "base") == {
        2: ["entry"], 4: ["run4.start"], 6: ["run4.stop"], 10: ["run10.start"], 12: ["run10.stop"],
    }  # fmt: skip
    assert residuals.boundaries(plan, "none") == {0: ["entry"]}
    assert [residuals.keeps_text(plan, b) for b in (2, 4, 6, 10, 12)] == [True, True, True, False, False]
