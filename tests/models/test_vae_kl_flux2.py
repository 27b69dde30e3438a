"""AutoencoderKLFlux2 against diffusers: both halves in every branch, and the normalised patches."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters.encoders import autoencoder_kl_flux2
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.vae import kl, kl_flux2
from mlx_blockskip.models.vae.kl_flux2 import AutoencoderKLFlux2Config
from support.autoencoder import random_autoencoder
from support.compare import assert_parity, relative_error, same_bits

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "layers_per_block": 1,
}


def small(tmp_path, **changes):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKLFlux2

    given = {**SMALL, **changes}
    model, weights, config = random_autoencoder(
        tmp_path, AutoencoderKLFlux2, given, autoencoder_kl_flux2, AutoencoderKLFlux2Config
    )
    return torch, model, weights, config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_block_out_channels": (4, 8)},
        {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
        {"layers_per_block": 2, "block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
         "up_block_types": ("UpDecoderBlock2D",) * 3, "decoder_block_out_channels": (8, 4, 8)},
    ],
)  # fmt: skip
def test_equals_diffusers_on_random_configs(tmp_path, changes):
    torch, model, weights, config = small(tmp_path, **changes)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, logvar = kl.encode(weights, config, mx.array(pixels))
    assert_parity("AutoencoderKLFlux2 encode", mean.transpose(0, 3, 1, 2), posterior.mean.numpy())
    assert_parity("AutoencoderKLFlux2 encode", logvar.transpose(0, 3, 1, 2), posterior.logvar.numpy())
    ours = kl.decode(weights, config, mx.array(posterior.mean.numpy().transpose(0, 2, 3, 1)))
    assert_parity("AutoencoderKLFlux2 decode", ours.transpose(0, 3, 1, 2), decoded.numpy())


def test_patches_are_those_of_the_pipeline(tmp_path):
    """Patched and normalised as it does with reference images, and back again as before its decoder."""
    torch, model, _, config = small(tmp_path, batch_norm_eps=0.01)
    from diffusers import Flux2KleinPipeline as Pipeline

    rng = np.random.default_rng(1)
    with torch.no_grad():
        model.bn.running_mean.copy_(torch.from_numpy(rng.standard_normal(24).astype(np.float32)))
        model.bn.running_var.copy_(torch.from_numpy(rng.uniform(0.1, 3, 24).astype(np.float32)))
    pixels = rng.uniform(-1, 1, (1, 3, 24, 40)).astype(np.float32)
    pipe = SimpleNamespace(vae=model, _patchify_latents=Pipeline._patchify_latents)
    wanted = Pipeline._encode_vae_image(pipe, torch.from_numpy(pixels), None)
    with torch.no_grad():
        z = mx.array(model.encode(torch.from_numpy(pixels)).latent_dist.mode().numpy().transpose(0, 2, 3, 1))
    statistics = {name: mx.array(model.state_dict()[name].numpy()) for name in kl_flux2.STATISTICS}
    ours = kl_flux2.scale(kl_flux2.patchify(z), statistics, config)
    assert ours.shape == (1, 6, 10, 24)
    assert_parity("FLUX.2's latents", ours.transpose(0, 3, 1, 2), wanted.detach().numpy())
    assert same_bits(kl_flux2.unpatchify(kl_flux2.patchify(z)), z)
    assert relative_error(kl_flux2.unpatchify(kl_flux2.unscale(ours, statistics, config)), z) <= 1e-5
    assert kl_flux2.factor(config) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"patch_size": (1, 1)}, "patch_size"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"decoder_block_out_channels": [8]}, "decoder_block_out_channels"),
    ],
)
def test_options_that_are_not_implemented_are_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        AutoencoderKLFlux2Config(**{**SMALL, **change})
