"""DC-AE, channels last, as streams of rows. Source: diffusers AutoencoderDC.

Weights are a flat dictionary with diffusers' names; convolutions are OHWI, those of one pixel are linear layers, the
grouped ones of one pixel (groups x out, in). Only linear attention needs whole maps, which are small by then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveInt
from mlx_blockskip.models.layers import Weights, linear, rms_norm, silu, through
from mlx_blockskip.models.vae.streams import Stream, add, conv2d, each, source, whole, windows
from mlx_blockskip.models.vae.strips import Rows, strip_rows

EPS, ATTENTION_EPS = 1e-5, 1e-15
ACTIVATIONS: Mapping[str, Rows] = {
    "silu": silu,
    "swish": silu,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "mish": nn.mish,
}
Block = Annotated[str, OneOf("ResBlock", "EfficientViTBlock")]
Activation = Annotated[str, OneOf(*ACTIVATIONS)]
Norm = Annotated[str, OneOf("rms_norm")]


@dataclass(frozen=True)
class AutoencoderDCConfig(Config):
    """Source: diffusers AutoencoderDC. What is one for every level there may be one value or a list."""

    in_channels: PositiveInt = 3
    latent_channels: PositiveInt = 32
    attention_head_dim: PositiveInt = 32
    encoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    decoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    encoder_block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[NonNegativeInt, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[NonNegativeInt, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[PositiveInt, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[PositiveInt, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Annotated[str, OneOf("pixel_shuffle", "interpolate")] = "pixel_shuffle"
    downsample_block_type: Annotated[str, OneOf("pixel_unshuffle", "conv", "Conv")] = "pixel_unshuffle"
    decoder_norm_types: Norm | tuple[Norm, ...] = "rms_norm"
    decoder_act_fns: Activation | tuple[Activation, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Activation = "relu"
    scaling_factor: float = 1.0

    def contradiction(self) -> str | None:
        for half in ("encoder", "decoder"):
            kernels = getattr(self, f"{half}_qkv_multiscales")
            if any(kernel % 2 == 0 for level in kernels for kernel in level):
                return f"{half}_qkv_multiscales {kernels} has an even kernel, and only odd ones keep a map's size"
            count = len(getattr(self, f"{half}_block_out_channels"))
            names = [f"{half}_{name}" for name in ("block_types", "layers_per_block", "qkv_multiscales")]
            for name in [*names, "decoder_act_fns"] if half == "decoder" else names:
                option = getattr(self, name)
                if not isinstance(option, str) and len(option) != count:
                    return f"{name} is of {len(option)} levels, and {half}_block_out_channels of {count}"
        return None


class Level(NamedTuple):
    """The blocks of one resolution. kernels: of the scales that attention sees besides the map itself."""

    block: str
    width: int
    layers: int
    kernels: tuple[int, ...]
    activation: str


def levels(config: AutoencoderDCConfig, half: str) -> list[Level]:
    """The levels of the "encoder" or "decoder", the largest map first."""
    widths = getattr(config, f"{half}_block_out_channels")
    options = (
        getattr(config, f"{half}_block_types"),
        widths,
        getattr(config, f"{half}_layers_per_block"),
        getattr(config, f"{half}_qkv_multiscales"),
        config.decoder_act_fns if half == "decoder" else "silu",
    )
    return [Level(*of) for of in zip(*([o] * len(widths) if isinstance(o, str) else o for o in options))]


def factor(config: AutoencoderDCConfig) -> int:
    """Pixels a side of one latent."""
    return int(2 ** (len(config.encoder_block_out_channels) - 1))


def scale(z: mx.array, config: AutoencoderDCConfig) -> mx.array:
    """Latents as the transformer sees them."""
    return z * config.scaling_factor


def unscale(latents: mx.array, config: AutoencoderDCConfig) -> mx.array:
    """The inverse of `scale`."""
    return latents / config.scaling_factor


def encode(w: Weights, config: AutoencoderDCConfig, pixels: mx.array, rows: int | None = None) -> mx.array:
    """Pixels (B, H, W, 3) in [-1, 1] -> latents (B, h, w, C), not scaled; there is no posterior. rows: see streams.

    Raises UserError for sides that are no multiples of `factor`.
    """
    side = factor(config)
    if pixels.shape[1] % side or pixels.shape[2] % side:
        raise UserError(f"AutoencoderDC: {pixels.shape[2]} x {pixels.shape[1]} pixels; sides are multiples of {side}")
    found = levels(config, "encoder")
    unshuffle = config.downsample_block_type == "pixel_unshuffle"
    x, chain = source(pixels, rows), _Chain(w, config.attention_head_dim, rows)
    if found[0].layers:
        x = conv2d(w, "encoder.conv_in", x, rows=rows)
    else:
        x = _down(w, "encoder.conv_in", x, unshuffle, rows)
    for i, level in enumerate(found):
        for j in range(level.layers):
            x = chain.block(f"encoder.down_blocks.{i}.{j}", x, level)
        if i < len(found) - 1 and level.layers:
            x = _down(w, chain.layer(f"encoder.down_blocks.{i}.{level.layers}"), x, unshuffle, rows, shortcut=True)
    top = chain.whole(x)
    z = whole(conv2d(w, "encoder.conv_out", source(top, rows), rows=rows))
    return z + _averaged(top, z.shape[-1]) if config.encoder_out_shortcut else z


def decode(w: Weights, config: AutoencoderDCConfig, z: mx.array, rows: int | None = None) -> mx.array:
    """Latents (B, h, w, C), not scaled -> pixels (B, H, W, 3)."""
    found = levels(config, "decoder")
    shuffle = config.upsample_block_type == "pixel_shuffle"
    top = whole(conv2d(w, "decoder.conv_in", source(z, rows), rows=rows))
    if config.decoder_in_shortcut:
        top = top + mx.repeat(z, top.shape[-1] // z.shape[-1], axis=-1)
    x, chain = source(top, rows), _Chain(w, config.attention_head_dim, rows)
    for i, level in reversed(list(enumerate(found))):
        first = 0
        if i < len(found) - 1 and level.layers:
            x = _up(w, chain.layer(f"decoder.up_blocks.{i}.0"), x, shuffle, rows, shortcut=True)
            first = 1
        for j in range(level.layers):
            x = chain.block(f"decoder.up_blocks.{i}.{first + j}", x, level)
    activation = ACTIVATIONS[config.decoder_conv_act_fn]
    x = each(x, lambda part: activation(_norm(w, "decoder.norm_out", part)))
    if found[0].layers:
        return whole(conv2d(w, "decoder.conv_out", x, rows=rows))
    return whole(_up(w, "decoder.conv_out", x, shuffle, rows))


def _norm(w: Weights, name: str, x: mx.array) -> mx.array:
    return rms_norm(w, name, x, EPS) + w[f"{name}.bias"]


class _Chain:
    """The blocks of an encoder or decoder, and which of them still work on rows: those since the last whole map."""

    def __init__(self, w: Weights, head: int, rows: int | None):
        self.w, self.head, self.rows = w, head, rows
        self.working: list[str] = []

    def layer(self, name: str) -> str:
        """This layer joins the chain."""
        self.working.append(name)
        return name

    def whole(self, x: Stream) -> mx.array:
        """The map at the end of the chain, whose layers are through then."""
        made = whole(x)
        for name in self.working:
            through(self.w, f"{name}.")
        self.working.clear()
        return made

    def block(self, name: str, x: Stream, level: Level) -> Stream:
        if level.block == "ResBlock":
            return _residual(self.w, self.layer(name), x, ACTIVATIONS[level.activation], self.rows)
        x = _attention(self.w, f"{name}.attn", self.whole(x), self.head, level.kernels, self.rows)
        self.layer(name)
        return add(x, lambda x: _gated(self.w, f"{name}.conv_out", x, self.rows))


def _residual(w: Weights, name: str, x: Stream, activation: Rows, rows: int | None) -> Stream:
    def body(x: Stream) -> Stream:
        y = conv2d(w, f"{name}.conv1", x, after=activation, rows=rows)
        return conv2d(w, f"{name}.conv2", y, after=lambda part: _norm(w, f"{name}.norm", part), rows=rows)

    return add(x, body)


def _gated(w: Weights, name: str, x: Stream, rows: int | None) -> Stream:
    """A feed-forward whose middle is a depthwise convolution. Source: diffusers GLUMBConv."""
    inner = w[f"{name}.conv_depth.weight"].shape[0]
    step = strip_rows((*x.shape[:3], inner), w[f"{name}.conv_depth.weight"].dtype.size, rows)

    def ungated(part: mx.array) -> mx.array:
        y, gate = mx.split(part, 2, axis=-1)
        return _norm(w, f"{name}.norm", linear(w, f"{name}.conv_point", y * silu(gate)))

    x = each(_cut(x, step), lambda part: silu(linear(w, f"{name}.conv_inverted", part)), inner)
    y = conv2d(w, f"{name}.conv_depth", x, groups=inner, after=ungated, rows=step)
    return Stream((*y.shape[:3], w[f"{name}.conv_point.weight"].shape[0]), y.rows)


def _cut(x: Stream, step: int) -> Stream:
    """The same rows, at most `step` at a time."""
    rows = (part[:, at : at + step] for part in x.rows for at in range(0, part.shape[1], step))
    return Stream(x.shape, rows)


def _attention(w: Weights, name: str, x: mx.array, head: int, kernels: tuple[int, ...], rows: int | None) -> Stream:
    """ReLU linear attention over a map and its blurred copies, with a residual connection.

    relu(q) (sum of relu(k) v over all pixels) / (relu(q) sum of relu(k)): a first pass over the rows takes the sums, a
    second one applies them. At no more pixels than a head has channels the scores are taken as a matrix.
    Source: diffusers SanaMultiscaleLinearAttention.
    """
    b, height, width, c = x.shape

    def attended() -> Iterator[mx.array]:
        if height * width <= head:
            parts = list(_heads(w, name, x, head, kernels, rows))
            yield _by_scores(mx.concatenate(parts, axis=1))
            return
        sums: mx.array | None = None
        for part in _heads(w, name, x, head, kernels, rows):
            _, k, v = _tokens(part.astype(mx.float32))
            own = _with_one(v).swapaxes(-1, -2) @ k
            sums = own if sums is None else sums + own
            mx.eval(sums)
            del part, k, v
        assert sums is not None
        for part in _heads(w, name, x, head, kernels, rows):
            q, _, _ = _tokens(part.astype(mx.float32))
            found = q @ sums.swapaxes(-1, -2)
            found = found[..., :-1] / (found[..., -1:] + ATTENTION_EPS)
            yield _merged(found, part.shape).astype(x.dtype)

    def added() -> Iterator[mx.array]:
        at = 0
        for part in attended():
            y = _norm(w, f"{name}.norm_out", linear(w, f"{name}.to_out", part))
            y = y + x[:, at : at + part.shape[1]]
            mx.eval(y)
            at += part.shape[1]
            yield y

    return Stream((b, height, width, c), added())


def _heads(
    w: Weights, name: str, x: mx.array, head: int, kernels: tuple[int, ...], rows: int | None
) -> Iterator[mx.array]:
    """Some rows at a time (B, n, W, G, 3, head): query, key and value of every head of every scale.

    The reference cuts q, k and v, one after the other, into heads of three parts; so a head's parts are not of q, k, v.
    """
    inner = 3 * w[f"{name}.to_q.weight"].shape[0]
    reach = max(kernels, default=1) // 2
    step = strip_rows((*x.shape[:3], inner * (1 + len(kernels))), 4, rows)

    def projected(part: mx.array) -> mx.array:
        return mx.concatenate([linear(w, f"{name}.to_{n}", part) for n in "qkv"], axis=-1)

    for window in windows(each(source(x, step), projected, inner), 2 * reach + 1, 1, step):
        count = window.shape[1] - 2 * reach
        scales = [window[:, reach : reach + count]]
        for i, kernel in enumerate(kernels):
            scale = f"{name}.to_qkv_multiscale.{i}"
            off = reach - kernel // 2
            near = window[:, off : window.shape[1] - off]
            y = mx.conv2d(near, w[f"{scale}.proj_in.weight"], padding=(0, kernel // 2), groups=inner)
            scales.append(_grouped(w[f"{scale}.proj_out.weight"], y))
        found = mx.concatenate(scales, axis=-1)
        mx.eval(found)
        yield found.reshape(*found.shape[:3], -1, 3, head)


def _grouped(weight: mx.array, x: mx.array) -> mx.array:
    """A linear layer on each group of channels: weight (groups x out, in), x (..., groups x in)."""
    width = weight.shape[1]
    groups = x.shape[-1] // width
    y = x.reshape(-1, groups, width).swapaxes(0, 1) @ weight.reshape(groups, -1, width).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


def _tokens(part: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(B, n, W, G, 3, d) -> relu(q), relu(k) and v, each (B, G, n W, d)."""
    b, n, w, groups, _, d = part.shape
    q, k, v = part.reshape(b, n * w, groups, 3, d).transpose(3, 0, 2, 1, 4)
    return nn.relu(q), nn.relu(k), v


def _merged(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """(B, G, n W, d) -> (B, n, W, G d)."""
    return x.swapaxes(1, 2).reshape(*shape[:3], -1)


def _with_one(v: mx.array) -> mx.array:
    """v with one channel of ones more, whose sums are the denominators."""
    return mx.concatenate([v, mx.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def _by_scores(part: mx.array) -> mx.array:
    """The same attention from a matrix of scores, for few pixels."""
    q, k, v = _tokens(part)
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32)
    scores = scores / (scores.sum(axis=-1, keepdims=True) + ATTENTION_EPS)
    return _merged(scores.astype(v.dtype) @ v, part.shape)


def _down(w: Weights, name: str, x: Stream, unshuffle: bool, rows: int | None, shortcut: bool = False) -> Stream:
    """Half as high and wide. The shortcut puts four pixels into channels and averages groups of channels."""

    def body(x: Stream) -> Stream:
        if not unshuffle:
            return conv2d(w, f"{name}.conv", x, stride=2, rows=rows)
        y = conv2d(w, f"{name}.conv", x, even=True, rows=rows)
        b, h, wd, c = y.shape
        return Stream((b, h // 2, wd // 2, 4 * c), map(_unshuffled, y.rows))

    if not shortcut:
        return body(x)
    channels = w[f"{name}.conv.weight"].shape[0] * (4 if unshuffle else 1)
    return add(x, body, lambda part: _averaged(_unshuffled(part), channels))


def _up(w: Weights, name: str, x: Stream, shuffle: bool, rows: int | None, shortcut: bool = False) -> Stream:
    """Twice as high and wide. The shortcut repeats channels and spreads four of them over four pixels."""

    def body(x: Stream) -> Stream:
        if not shuffle:
            return conv2d(w, f"{name}.conv", x, upsample=True, even=True, rows=rows)
        y = conv2d(w, f"{name}.conv", x, rows=rows)
        b, h, wd, c = y.shape
        return Stream((b, 2 * h, 2 * wd, c // 4), map(_shuffled, y.rows))

    if not shortcut:
        return body(x)
    channels = w[f"{name}.conv.weight"].shape[0] // (4 if shuffle else 1)
    repeats = 4 * channels // x.shape[-1]
    return add(x, body, lambda part: _shuffled(mx.repeat(part, repeats, axis=-1)))


def _unshuffled(x: mx.array) -> mx.array:
    """(B, 2 h, 2 w, C) -> (B, h, w, 4 C): torch's pixel_unshuffle."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def _shuffled(x: mx.array) -> mx.array:
    """(B, h, w, 4 C) -> (B, 2 h, 2 w, C): torch's pixel_shuffle."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def _averaged(x: mx.array, channels: int) -> mx.array:
    """(..., C) -> (..., channels): means of neighbouring channels."""
    return x.reshape(*x.shape[:-1], channels, -1).mean(axis=-1)
