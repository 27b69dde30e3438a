"""AutoencoderDC against diffusers, and streams of rows against whole maps."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters.encoders import autoencoder_dc
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets
from mlx_blockskip.models.vae import dc_ae
from mlx_blockskip.models.vae.dc_ae import AutoencoderDCConfig
from support.autoencoder import random_autoencoder
from support.compare import assert_parity, relative_error

RES, VIT = "ResBlock", "EfficientViTBlock"


def both(**options):
    """The same option for the encoder and the decoder."""
    return {f"{half}_{name}": value for name, value in options.items() for half in ("encoder", "decoder")}


SMALL = {
    **both(block_types=(RES, RES, VIT), block_out_channels=(8, 16, 16), layers_per_block=(1, 1, 2)),
    **both(qkv_multiscales=((), (), (5,))),
    "latent_channels": 4,
    "attention_head_dim": 4,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.4,
}
SHUFFLED = {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}
BRANCHES = {
    "as SANA's": {},
    "shuffled": SHUFFLED,
    "no shortcuts": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "first level empty": both(layers_per_block=(0, 2, 1)),
    "first level empty, shuffled": {**both(layers_per_block=(0, 2, 1)), **SHUFFLED},
    "residual blocks only": {**both(block_types=RES), **SHUFFLED},
    "attention only": both(block_types=VIT, qkv_multiscales=((), (3,), (3, 7, 5))),
    "activations": {"decoder_act_fns": ("relu", "gelu", "silu"), "decoder_conv_act_fn": "mish"},
    "halves that differ": {"decoder_block_out_channels": (4, 8, 32), "encoder_layers_per_block": (2, 1, 1)},
    "heads that leave channels": {"attention_head_dim": 6},
}


def small(tmp_path, **changes):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderDC

    changed = {**SMALL, **changes}
    return torch, *random_autoencoder(tmp_path, AutoencoderDC, changed, autoencoder_dc, AutoencoderDCConfig)


def pictures(*shape):
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("changes", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 8, 8), (2, 4, 4)], ids=str)
def test_equals_diffusers_on_random_configs(tmp_path, changes, shape):
    """At 8 x 8 and 4 x 4 pixels the deepest maps have no more pixels than a head has channels."""
    torch, model, weights, config = small(tmp_path, **changes)
    pixels = pictures(*shape)
    with torch.no_grad():
        z = model.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent
        decoded = model.decode(z).sample
    ours = dc_ae.encode(weights, config, mx.array(pixels))
    assert_parity("AutoencoderDC encode", ours.transpose(0, 3, 1, 2), z.numpy())
    pixels = dc_ae.decode(weights, config, mx.array(z.numpy().transpose(0, 2, 3, 1)))
    assert_parity("AutoencoderDC decode", pixels.transpose(0, 3, 1, 2), decoded.numpy())
    assert relative_error(dc_ae.scale(ours, config), 0.4 * ours) <= 1e-6
    assert relative_error(dc_ae.unscale(dc_ae.scale(ours, config), config), ours) <= 1e-6


@pytest.mark.parametrize("changes", [{}, SHUFFLED, BRANCHES["attention only"]], ids=["conv", "shuffled", "attention"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_strips_of_every_size_give_the_same_as_none(tmp_path, rows, changes):
    _, _, weights, config = small(tmp_path, **changes)
    pixels = mx.array(pictures(2, 28, 20))
    whole = dc_ae.encode(weights, config, pixels, rows=1000)
    assert relative_error(dc_ae.encode(weights, config, pixels, rows=rows), whole) <= 1e-5
    decoded = dc_ae.decode(weights, config, whole, rows=1000)
    assert relative_error(dc_ae.decode(weights, config, whole, rows=rows), decoded) <= 1e-5


def test_no_map_of_a_residual_level_is_ever_whole(tmp_path):
    """Pixels go through several layers some rows at a time: less than one map of the first level is in memory."""
    _, _, weights, config = small(tmp_path)
    height, width, first_level = 1024, 64, 8
    pixels = mx.array(pictures(1, height, width))
    mx.eval(weights, pixels)
    z = dc_ae.encode(weights, config, pixels)
    peaks = {}
    for rows in (4, height):
        for half, work, x in (("encode", dc_ae.encode, pixels), ("decode", dc_ae.decode, z)):
            mx.reset_peak_memory()
            start = mx.get_active_memory()
            mx.eval(work(weights, config, x, rows))
            peaks[half, rows] = mx.get_peak_memory() - start
    for half in ("encode", "decode"):
        assert peaks[half, 4] <= height * width * first_level * 4 < peaks[half, height] / 2


def test_bfloat16_stays_bfloat16_and_is_near(tmp_path):
    _, _, weights, config = small(tmp_path)
    pixels = mx.array(pictures(1, 24, 24))
    exact = dc_ae.decode(weights, config, dc_ae.encode(weights, config, pixels))
    rounded = {name: tensor.astype(mx.bfloat16) for name, tensor in weights.items()}
    z = dc_ae.encode(rounded, config, pixels.astype(mx.bfloat16))
    decoded = dc_ae.decode(rounded, config, z)
    assert z.dtype == decoded.dtype == mx.bfloat16
    assert relative_error(decoded.astype(mx.float32), exact) <= 0.1


def test_the_rows_fit_the_published_size():
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderDC

    published = presets.configs(presets.folders()["sana-1.6b"])["vae"]
    with torch.device("meta"):
        reference = AutoencoderDC.from_config(published)
    left = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    config = AutoencoderDCConfig.from_dict(published)
    component = autoencoder_dc("vae", config)
    for row in component.rows:
        assert row.fits(left.pop(row.name)), row
    assert not left
    assert {component.block(row.name) for row in component.rows} == {"encoder.", "decoder."}
    assert dc_ae.factor(config) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_block_types": ("ResBlock", "ResBlock", "MBConv")},
        {"decoder_norm_types": ("batch_norm", "rms_norm", "rms_norm")},
        {"decoder_act_fns": "relu6"},
        {"decoder_conv_act_fn": "tanh"},
        {"downsample_block_type": "pool"},
        {"upsample_block_type": "bicubic"},
        {"decoder_qkv_multiscales": ((), (), (4,))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_options_that_are_not_implemented_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"^{next(iter(change))}"):
        AutoencoderDCConfig(**{**SMALL, **change})


@pytest.mark.parametrize("name", ["encoder_layers_per_block", "decoder_qkv_multiscales", "decoder_act_fns"])
def test_options_of_different_lengths_are_refused(name):
    changed = {**SMALL, name: getattr(AutoencoderDCConfig(), name)[:2] if "act" not in name else ("silu", "silu")}
    with pytest.raises(UserError, match=f"{name} is of 2 levels, and {name.split('_')[0]}_block_out_channels of 3"):
        AutoencoderDCConfig(**changed)


@pytest.mark.parametrize("size", [(30, 32), (32, 30)])
def test_sides_that_do_not_divide_are_refused(size):
    with pytest.raises(UserError, match="sides are multiples of 4"):
        dc_ae.encode({}, AutoencoderDCConfig(**SMALL), mx.zeros((1, *size, 3)))
