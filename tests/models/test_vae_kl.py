"""AutoencoderKL against diffusers, and strips against none."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters.encoders import autoencoder_kl
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.vae import kl
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from support.autoencoder import random_autoencoder
from support.compare import assert_parity, relative_error
from support.flux import checkpoint
from support.golden import GOLDEN
from support.models import convert

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
}


def small(tmp_path, **changes):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    changed = {**SMALL, **changes}
    return torch, *random_autoencoder(tmp_path, AutoencoderKL, changed, autoencoder_kl, AutoencoderKLConfig)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "shift_factor": 0.1},
        {"layers_per_block": 2, "block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
         "up_block_types": ("UpDecoderBlock2D",) * 3},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "latent_channels": 3},
        {"use_post_quant_conv": False, "block_out_channels": (16, 8)},
        {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",),
         "up_block_types": ("UpDecoderBlock2D",)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(24, 40), (25, 39)])
def test_equals_diffusers_on_random_configs(tmp_path, changes, size):
    torch, model, weights, config = small(tmp_path, **changes)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        z = posterior.mean
        decoded = model.decode(z).sample
    mean, logvar = kl.encode(weights, config, mx.array(pixels))
    assert_parity("AutoencoderKL encode", mean.transpose(0, 3, 1, 2), posterior.mean.numpy())
    assert_parity("AutoencoderKL encode", logvar.transpose(0, 3, 1, 2), posterior.logvar.numpy())
    ours = kl.decode(weights, config, mx.array(z.numpy().transpose(0, 2, 3, 1)))
    assert_parity("AutoencoderKL decode", ours.transpose(0, 3, 1, 2), decoded.numpy())
    assert relative_error(kl.unscale(kl.scale(mean, config), config), mean) <= 1e-5


def test_latents_are_drawn_as_diffusers_draws_them(tmp_path, monkeypatch):
    """From pixels through FLUX.1's own calls to scaled latents, the noise given; also where log variances are cut."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders import vae as reference

    torch.manual_seed(0)
    theirs = AutoencoderKL(**SMALL, scaling_factor=0.7, shift_factor=0.2).eval()
    logvars = (-60.0, -3.0, 1.0, 50.0)
    with torch.no_grad():
        theirs.quant_conv.bias[4:] = torch.tensor(logvars)
    model = open_model(convert(checkpoint(tmp_path / "hf", vae=theirs), tmp_path / "mlx"))
    pixels = philox.normal(0, shape=(2, 24, 40, 3)) / 2
    noise = philox.normal(1, shape=(2, 12, 20, 4))
    monkeypatch.setattr(reference, "randn_tensor", lambda shape, **_: torch.from_numpy(noise.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        z = posterior.sample()
        wanted = ((z - theirs.config.shift_factor) * theirs.config.scaling_factor).numpy().transpose(0, 2, 3, 1)
    assert (posterior.logvar[:, 0] == -30).all(), "the reference cuts below"
    assert (posterior.logvar[:, 3] == 20).all(), "and above"
    encoded = model.encode_images(mx.array(pixels))
    assert_parity("AutoencoderKL encode", encoded[1].transpose(0, 3, 1, 2), posterior.logvar.numpy())
    ours = np.array(model.draw_latents(encoded, mx.array(noise)))
    for channel in range(4):  # their sizes lie far apart
        assert_parity("FLUX.1's latents, drawn", ours[..., channel], wanted[..., channel])
    still = np.array(model.draw_latents(encoded, mx.zeros(noise.shape)))
    mean = posterior.mean.numpy().transpose(0, 2, 3, 1)
    assert_parity("FLUX.1's latents, drawn", still, (mean - 0.2) * 0.7)


@pytest.mark.parametrize("size", [(26, 18), (27, 19)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 100])
def test_strips_of_every_size_give_the_same_as_none(tmp_path, rows, size):
    _, _, weights, config = small(tmp_path)
    pixels = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32))
    whole, _ = kl.encode(weights, config, pixels, rows=1000)
    stripped, _ = kl.encode(weights, config, pixels, rows=rows)
    assert relative_error(stripped, whole) <= 1e-5
    assert (
        relative_error(kl.decode(weights, config, whole, rows=rows), kl.decode(weights, config, whole, rows=1000))
        <= 1e-5
    )


def test_attention_over_a_large_map_never_holds_all_its_scores():
    """Chunks must be evaluated one by one: waiting for one evaluation they hold their scores all at once."""
    side, width = 80, 16
    w = {"a.group_norm.weight": mx.ones((width,)), "a.group_norm.bias": mx.zeros((width,))}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        w |= {f"a.{part}.weight": mx.eye(width), f"a.{part}.bias": mx.zeros((width,))}
    x = mx.array(np.random.default_rng(0).standard_normal((1, side, side, width), np.float32))
    mx.eval(w, x)
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    kl._attention(w, "a", x, 4, 4)
    assert mx.get_peak_memory() - start <= 4 * side**4 / 4, "a twentieth of the scores are at work"


def test_tiny_flux_gives_the_stored_values(tiny_flux):
    model = open_model(tiny_flux)
    weights = model.vae.load(model.vae.names)
    mean, _ = kl.encode(weights, model.vae_config, GOLDEN["vae.pixels"].transpose(0, 2, 3, 1))
    assert_parity("AutoencoderKL encode, tiny-flux", mean.transpose(0, 3, 1, 2), GOLDEN["vae.mean"])
    decoded = kl.decode(weights, model.vae_config, GOLDEN["vae.z"].transpose(0, 2, 3, 1))
    assert_parity("AutoencoderKL decode, tiny-flux", decoded.transpose(0, 3, 1, 2), GOLDEN["vae.decoded"])


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"latents_mean": [0.0]},
        {"down_block_types": ["AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"]},
    ],
)
def test_options_that_are_not_implemented_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        AutoencoderKLConfig(**{**SMALL, **change})
