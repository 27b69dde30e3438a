"""Eq. 3, and what a record keeps of the tokens."""

import mlx.core as mx
import numpy as np
from support.compare import same_bits

from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import philox
from mlx_blockskip.models.family import Tokens


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


def test_the_trailing_run_keeps_image_tokens_only():
    plan = SkipPlan(12, ((0, 2), (4, 6), (10, 12)))
    assert residuals.boundaries(plan, "base") == {
        2: ["entry"], 4: ["run4.start"], 6: ["run4.stop"], 10: ["run10.start"], 12: ["run10.stop"],
    }  # fmt: skip
    assert residuals.boundaries(plan, "none") == {0: ["entry"]}
    assert [residuals.keeps_text(plan, b) for b in (2, 4, 6, 10, 12)] == [True, True, True, False, False]
