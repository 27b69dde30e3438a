"""AutoencoderKL, layer by layer, channels last. Source: diffusers AutoencoderKL.

Weights are a flat dictionary with diffusers' names; convolutions are OHWI, the 1x1 quant convs are linear layers.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

import mlx.core as mx

from mlx_blockskip.engine.sampled import passes
from mlx_blockskip.models.attention import SCORE_BYTES, attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveInt, Unset
from mlx_blockskip.models.layers import Weights, linear, silu, through
from mlx_blockskip.models.vae.strips import Rows, conv2d, done, group_norm

EPS = 1e-6


class Layers(Protocol):
    """What the layers take of a configuration. The widths are those of the weights."""

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def up_block_types(self) -> tuple[str, ...]: ...
    @property
    def down_block_types(self) -> tuple[str, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def norm_num_groups(self) -> int: ...
    @property
    def use_quant_conv(self) -> bool: ...
    @property
    def use_post_quant_conv(self) -> bool: ...
    @property
    def mid_block_add_attention(self) -> bool: ...


def uneven(config: Layers) -> str | None:
    """That there are not as many blocks as widths; None where there are."""
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(getattr(config, name)) != levels:
            return f"{name} is of {len(getattr(config, name))} levels, and block_out_channels of {levels}"
    return None


@dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """Source: diffusers AutoencoderKL."""

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    down_block_types: tuple[Annotated[str, OneOf("DownEncoderBlock2D")], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Annotated[str, OneOf("UpDecoderBlock2D")], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[PositiveInt, ...] = (64,)
    layers_per_block: NonNegativeInt = 1
    act_fn: Annotated[str, OneOf("silu")] = "silu"
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: Unset = None
    latents_std: Unset = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def contradiction(self) -> str | None:
        return uneven(self)


def factor(config: Layers) -> int:
    """Pixels a side of one latent."""
    return int(2 ** (len(config.block_out_channels) - 1))


def scale(z: mx.array, config: AutoencoderKLConfig) -> mx.array:
    """Latents as the transformer sees them: (z - shift) x scale."""
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale(latents: mx.array, config: AutoencoderKLConfig) -> mx.array:
    """The inverse of `scale`."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def encode(w: Weights, config: Layers, pixels: mx.array, rows: int | None = None) -> tuple[mx.array, mx.array]:
    """Pixels (B, H, W, 3) in [-1, 1] -> mean and log variance, each (B, h, w, C), not scaled. rows: see strips."""
    groups = config.norm_num_groups
    x = conv2d(w, "encoder.conv_in", pixels, rows=rows)
    levels = len(config.block_out_channels)
    for i in range(levels):
        for j in range(config.layers_per_block):
            x = _resnet(w, f"encoder.down_blocks.{i}.resnets.{j}", x, groups, rows)
        if i < levels - 1:
            name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            x = conv2d(w, name, x, stride=2, padding=(0, 1), rows=rows)
        through(w, f"encoder.down_blocks.{i}.")
    x = _middle(w, "encoder.mid_block", x, config, rows)
    last = _normed_silu(w, "encoder.conv_norm_out", x, groups, rows)
    x = conv2d(w, "encoder.conv_out", x, rows=rows, before=last)
    if config.use_quant_conv:
        x = linear(w, "quant_conv", x)
    mean, logvar = mx.split(x, 2, axis=-1)
    return mean, mx.clip(logvar, -30.0, 20.0)


def decode(w: Weights, config: Layers, z: mx.array, rows: int | None = None) -> mx.array:
    """Latents (B, h, w, C), not scaled -> pixels (B, H, W, 3)."""
    groups = config.norm_num_groups
    if config.use_post_quant_conv:
        z = linear(w, "post_quant_conv", z)
    x = conv2d(w, "decoder.conv_in", z, rows=rows)
    x = _middle(w, "decoder.mid_block", x, config, rows)
    levels = len(config.block_out_channels)
    for i in range(levels):
        for j in range(config.layers_per_block + 1):
            x = _resnet(w, f"decoder.up_blocks.{i}.resnets.{j}", x, groups, rows)
        if i < levels - 1:
            x = conv2d(w, f"decoder.up_blocks.{i}.upsamplers.0.conv", x, upsample=2, rows=rows)
        through(w, f"decoder.up_blocks.{i}.")
    last = _normed_silu(w, "decoder.conv_norm_out", x, groups, rows)
    return conv2d(w, "decoder.conv_out", x, rows=rows, before=last)


def _resnet(w: Weights, name: str, x: mx.array, groups: int, rows: int | None) -> mx.array:
    first = _normed_silu(w, f"{name}.norm1", x, groups, rows)
    y = conv2d(w, f"{name}.conv1", x, rows=rows, before=first)
    second = _normed_silu(w, f"{name}.norm2", y, groups, rows)

    def shortcut(start: int, stop: int) -> mx.array:
        if f"{name}.conv_shortcut.weight" not in w:
            return x[:, start:stop]
        return conv2d(w, f"{name}.conv_shortcut", x[:, start:stop], padding=(0, 0), rows=stop - start)

    y = conv2d(w, f"{name}.conv2", y, rows=rows, before=second, add=shortcut, in_place=True)
    through(w, f"{name}.")
    return y


def _normed_silu(w: Weights, name: str, x: mx.array, groups: int, rows: int | None) -> Rows:
    norm = group_norm(w, name, x, groups, EPS, rows)
    return lambda part: silu(norm(part))


def _middle(w: Weights, name: str, x: mx.array, config: Layers, rows: int | None) -> mx.array:
    groups = config.norm_num_groups
    x = _resnet(w, f"{name}.resnets.0", x, groups, rows)
    if config.mid_block_add_attention:
        x = _attention(w, f"{name}.attentions.0", x, groups, rows)
    return _resnet(w, f"{name}.resnets.1", x, groups, rows)


def _attention(w: Weights, name: str, x: mx.array, groups: int, rows: int | None) -> mx.array:
    """One head over all positions, in chunks of query rows, each evaluated: scores grow with the fourth power of size.

    Chunks that wait for one evaluation would keep all their scores at once. A chunk's result takes its queries' place.
    """
    b, h, width, c = x.shape
    normed = group_norm(w, f"{name}.group_norm", x, groups, EPS, rows)(x).reshape(b, 1, h * width, c)
    q, k, v = (linear(w, f"{name}.to_{part}", normed) for part in "qkv")
    chunk = max(1, SCORE_BYTES // (4 * b * h * width)) if rows is None else rows * width
    for start in passes(range(0, h * width, chunk), q.shape):
        part = done(attention(q[:, :, start : start + chunk], k, v, scale=1 / math.sqrt(c), query_chunk=chunk))
        q[:, :, start : start + chunk] = part
        del part
        mx.eval(q)
    x = done(x + linear(w, f"{name}.to_out.0", q).reshape(b, h, width, c))
    through(w, f"{name}.")
    return x
