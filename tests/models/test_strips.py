"""Strips of large maps: in place, layer by layer, and a sample of them that says what all would take."""

import mlx.core as mx
import pytest

from mlx_blockskip.engine import philox, planner
from mlx_blockskip.engine.sampled import sampled
from mlx_blockskip.models.layers import UsedOnce
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.vae import kl, strips
from support.compare import same_bits


def normal(*shape, seed=0):
    return mx.array(philox.normal(seed, shape=shape))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
def test_a_convolution_in_place_gives_the_bits_of_one_beside_it(rows, kernel):
    x, other = normal(2, 11, 7, 4), normal(2, 11, 7, 4, seed=1)
    w = {"c.weight": normal(4, kernel, kernel, 4, seed=2), "c.bias": normal(4, seed=3)}
    reach = kernel // 2
    options = {"padding": (reach, reach), "rows": max(rows, reach), "add": lambda start, stop: other[:, start:stop]}
    beside = strips.conv2d(w, "c", x, before=mx.tanh, **options)
    copy = x + 0
    assert same_bits(strips.conv2d(w, "c", copy, before=mx.tanh, **options, in_place=True), beside)


def test_a_convolution_in_place_takes_a_strip_and_no_second_map():
    x = normal(1, 512, 64, 16)
    w = {"c.weight": normal(16, 3, 3, 16)}
    mx.eval(x, w)

    def taken(in_place):
        return planner.measured(lambda: strips.conv2d(w, "c", x + 0, rows=8, in_place=in_place))[0]

    assert taken(True) < taken(False) - 0.8 * x.nbytes


def test_in_place_is_refused_where_the_shape_changes():
    with pytest.raises(AssertionError, match="keeps the shape"):
        strips.conv2d({"c.weight": normal(8, 3, 3, 4)}, "c", normal(1, 8, 8, 4), rows=2, in_place=True)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_weights_that_are_used_once_are_let_go_of(tiny_flux, half):
    model = open_model(tiny_flux)
    config, weights = model.vae_config, model.vae.load(model.vae.names)
    once = UsedOnce(weights)
    if half == "encoder":
        x = normal(1, 32, 32, 3)
        assert same_bits(kl.encode(once, config, x)[0], kl.encode(weights, config, x)[0])
    else:
        z = normal(1, 8, 8, config.latent_channels)
        assert same_bits(kl.decode(once, config, z), kl.decode(weights, config, z))
    left = {name for name in once if name.startswith(f"{half}.")}
    assert {name.split(".")[1] for name in left} == {"conv_in", "conv_norm_out", "conv_out"}
    assert len(weights) == len(model.vae.names), "a plain dictionary is left as it is"


@pytest.mark.parametrize("decoding", [True, False])
def test_a_sample_of_strips_takes_what_all_of_them_take(tiny_flux, monkeypatch, decoding):
    """Bytes of a whole run, in a part of its passes; the maps have their sizes."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 64 << 10)
    model = open_model(tiny_flux)
    side = 256
    latents, pixels = mx.zeros((1, *model.latent_shape(side, side))), mx.zeros((1, side, side, 3))
    mx.eval(latents, pixels)
    shapes = []

    def run():
        found = model.decode(latents) if decoding else model.encode_images(pixels)[0]
        mx.eval(found)
        shapes.append(found.shape)

    whole, _ = planner.measured(run)
    with sampled() as sample:
        peak, _ = planner.measured(run)
    assert shapes[0] == shapes[1]
    assert sample.left_out > 50
    assert sample.seconds > 0
    assert peak == pytest.approx(whole, rel=0.1)
