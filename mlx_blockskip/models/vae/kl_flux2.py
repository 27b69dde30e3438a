"""AutoencoderKLFlux2: an AutoencoderKL whose latents are normalised in patches. Source: diffusers AutoencoderKLFlux2.

The network is that of `kl`. Its latents (B, 2 h, 2 w, C) become patches (B, h, w, 4 C), of which each channel is
normalised by a mean and a variance that lie in the file: a batch norm's, which no longer change.
"""

from dataclasses import dataclass
from typing import Annotated

import mlx.core as mx

from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import Weights
from mlx_blockskip.models.vae import kl

STATISTICS = ("bn.running_mean", "bn.running_var")
PATCH = 2
"""Latents a side of a patch."""

Down = Annotated[str, OneOf("DownEncoderBlock2D")]
Up = Annotated[str, OneOf("UpDecoderBlock2D")]


@dataclass(frozen=True)
class AutoencoderKLFlux2Config(Config):
    """Source: diffusers AutoencoderKLFlux2. decoder_block_out_channels: where the decoder is narrower."""

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    down_block_types: tuple[Down, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[Up, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[PositiveInt, ...] | None = None
    layers_per_block: NonNegativeInt = 2
    act_fn: Annotated[str, OneOf("silu")] = "silu"
    latent_channels: PositiveInt = 32
    norm_num_groups: PositiveInt = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: PositiveFloat = 1e-4
    patch_size: Annotated[tuple[int, int], OneOf((PATCH, PATCH))] = (PATCH, PATCH)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    def contradiction(self) -> str | None:
        if len(self.decoder_widths) != len(self.block_out_channels):
            levels = len(self.decoder_widths)
            return f"decoder_block_out_channels is of {levels} levels, and block_out_channels of another number"
        return kl.uneven(self)


def factor(config: AutoencoderKLFlux2Config) -> int:
    """Pixels a side of one patch."""
    return PATCH * kl.factor(config)


def patchify(z: mx.array) -> mx.array:
    """(B, 2 h, 2 w, C) -> (B, h, w, 4 C): channels outermost, then the patch's rows and columns."""
    b, h, w, c = z.shape
    return z.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def unpatchify(patches: mx.array) -> mx.array:
    """The inverse of `patchify`."""
    b, h, w, c = patches.shape
    return patches.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def scale(patches: mx.array, statistics: Weights, config: AutoencoderKLFlux2Config) -> mx.array:
    """Patches (B, h, w, 4 C) as the transformer sees them, float32. statistics: by the names of STATISTICS."""
    mean, deviation = _moments(statistics, config)
    return (patches.astype(mx.float32) - mean) / deviation


def unscale(latents: mx.array, statistics: Weights, config: AutoencoderKLFlux2Config) -> mx.array:
    """The inverse of `scale`."""
    mean, deviation = _moments(statistics, config)
    return latents.astype(mx.float32) * deviation + mean


def _moments(statistics: Weights, config: AutoencoderKLFlux2Config) -> tuple[mx.array, mx.array]:
    mean, variance = (statistics[name].astype(mx.float32) for name in STATISTICS)
    return mean, mx.sqrt(variance + config.batch_norm_eps)
