"""Rows: what a tensor is called and shaped there, and how it becomes ours."""

import mlx.core as mx
import pytest

from mlx_blockskip.converters.table import Row, conv, linear, norm
from support.compare import same_bits


def test_a_convolution_is_turned_from_oihw_to_ohwi():
    weight, bias = conv("c", 2, 3, 5)
    theirs = mx.arange(2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    assert weight.their_shape() == (2, 3, 5, 5)
    assert weight.fits((2, 3, 5, 5))
    assert not weight.fits((2, 5, 5, 3))
    assert weight.read(theirs).shape == weight.shape == (2, 5, 5, 3)
    assert weight.read(theirs)[1, 2, 4, 0].item() == theirs[1, 0, 2, 4].item()
    assert same_bits(bias.read(mx.arange(2)), mx.arange(2))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1)])
def test_a_pointwise_convolution_is_a_linear_layer_in_either_shape(shape):
    row = linear("q", 4, 3, role="plain", fix="pointwise")[0]
    assert row.fits(shape)
    assert same_bits(row.read(mx.arange(12).reshape(shape)), mx.arange(12).reshape(4, 3))


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 2, 1), (3, 4), (12,)])
def test_another_shape_does_not_fit_although_it_may_hold_as_many_numbers(shape):
    assert not linear("q", 4, 3, role="plain", fix="pointwise")[0].fits(shape)
    assert not linear("q", 4, 3)[0].fits(shape)


def test_a_plain_row_takes_no_trailing_ones():
    assert not Row("w", (4, 3)).fits((4, 3, 1, 1))


def test_only_weights_of_linear_layers_may_be_quantized():
    rows = linear("q", 4, 3) + norm("n", 4) + conv("c", 4, 3, 3) + linear("m", 4, 3, role="modulation")
    roles = {row.name: row.role for row in rows if row.role != "plain"}
    assert roles == {"q.weight": "linear", "m.weight": "modulation"}


def test_aliases_are_modules_and_rows_are_tensors():
    weight, bias = linear("attn.to_q", 4, 4, fix="pointwise", aliases=("attn.query",))
    assert (weight.aliases, bias.aliases) == (("attn.query.weight",), ("attn.query.bias",))
    assert (weight.fix, bias.fix) == ("pointwise", "none")
