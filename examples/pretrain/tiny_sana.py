"""Make tiny-sana, a SANA text-to-image model of emoji on plain backgrounds, from scratch in an hour on two cores.

Two stages: an autoencoder (DC-AE, 16 x), then the transformer together with its text encoder, by flow matching on
latents that are encoded once. Learning rates follow the clock, so a slower machine has the same schedule with fewer
steps. An interrupted run goes on with --resume. At the end it measures what it made, as --measure does by itself.

    OPENBLAS_NUM_THREADS=1 python examples/pretrain/tiny_sana.py --output tiny-sana --minutes 70
    OPENBLAS_NUM_THREADS=1 python examples/pretrain/tiny_sana.py --measure tiny-sana

Needs Noto Color Emoji (SIL Open Font License 1.1; Debian: fonts-noto-color-emoji) and, for mx.compile on Linux, g++.
"""

import mlx_blockskip  # noqa: F401  (before mlx.core is imported: it opens OpenBLAS)

# isort: split
import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_blockskip.converters import encoders, sana
from mlx_blockskip.converters.table import Component
from mlx_blockskip.data import grid
from mlx_blockskip.engine import files
from mlx_blockskip.engine.stack import Stack, Weights
from mlx_blockskip.models import flow, schedulers
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.sana import transformer as net
from mlx_blockskip.models.text import gemma2
from mlx_blockskip.models.text.tokenize import gemma_ids
from mlx_blockskip.models.vae import dc_ae
from mlx_blockskip.models.vae.streams import Stream

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "ablation"), str(HERE.parent / "quality")]

from make_emoji import KNOWN  # noqa: E402
from measures import PALETTE, colour, emoji  # noqa: E402
from nearest import nearest, references  # noqa: E402
from tiny_dino import NEVER, drawings  # noqa: E402

WIDTH, CHANNELS, LENGTH, VOCABULARY = 128, 32, 24, 1500
TRANSFORMER = {
    "_class_name": "SanaTransformer2DModel", "attention_bias": False, "attention_head_dim": 32,
    "caption_channels": WIDTH, "cross_attention_dim": WIDTH, "cross_attention_head_dim": 32, "dropout": 0.0,
    "guidance_embeds": False, "guidance_embeds_scale": 0.1, "in_channels": CHANNELS, "interpolation_scale": 1.0,
    "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-06, "num_attention_heads": 4,
    "num_cross_attention_heads": 4, "num_layers": 10, "out_channels": CHANNELS, "patch_size": 1,
    "qk_norm": "rms_norm_across_heads", "sample_size": 8, "timestep_scale": 1.0,
}  # fmt: skip
"""With positions, which SANA 1.6B does without: in so few steps convolutions alone do not learn where things are."""
AUTOENCODER = {
    "_class_name": "AutoencoderDC", "attention_head_dim": 32, "decoder_act_fns": "silu", "decoder_conv_act_fn": "silu",
    "decoder_block_out_channels": [16, 32, 64, 64, 128], "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": [0, 1, 1, 2, 1], "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": [[]] * 5, "downsample_block_type": "pixel_unshuffle",
    "encoder_block_out_channels": [16, 32, 64, 64, 128], "encoder_block_types": "ResBlock",
    "encoder_layers_per_block": [0, 1, 1, 2, 1], "encoder_qkv_multiscales": [[]] * 5, "in_channels": 3,
    "latent_channels": CHANNELS, "scaling_factor": 1.0, "upsample_block_type": "pixel_shuffle",
}  # fmt: skip
TEXT = {
    "architectures": ["Gemma2Model"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "dtype": "float16", "eos_token_id": 1,
    "final_logit_softcapping": None, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": WIDTH,
    "initializer_range": 0.02, "intermediate_size": 256, "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 512, "model_type": "gemma2", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 512, "use_cache": False, "vocab_size": VOCABULARY,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero",
    "flow_shift": 1.5, "num_train_timesteps": 1000, "prediction_type": "flow_prediction", "solver_order": 2,
    "solver_type": "midpoint", "use_flow_sigmas": True,
}  # fmt: skip
PIPELINE = {
    "_class_name": "SanaPipeline", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"], "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"], "vae": ["diffusers", "AutoencoderDC"],
}  # fmt: skip
TOKENS = ("pad", "eos", "bos", "unk", "mask")
DEFAULTS = {
    "max_sequence_length": LENGTH, "resolution": 128, "train_resolution": 128, "width": 128, "height": 128, "steps": 16,
    "cfg_scale": 3.0, "instruction": False, "resolution_binning": False, "patch_mode": "none", "iters": 300,
    "batch_size": 4, "learning_rate": 1e-3, "rank": 16,
}  # fmt: skip
README = """# tiny-sana

A complete SANA text-to-image checkpoint in Hugging Face layout (`SanaPipeline`), small enough for a laptop's CPU, \
trained from scratch on pictures of emoji by `examples/pretrain/tiny_sana.py`. It exists so that every part of a SANA \
toolchain can be run, tested and measured on a model that has really learned something.

| part | class | size |
|---|---|---|
| transformer | SanaTransformer2DModel: {layers} blocks, width {width} (4 heads of 32), patch size 1, RMS norm of \
queries and keys, sines as positions | {transformer:.2f} M |
| text_encoder | Gemma2Model, 2 layers, width {width} | {text_encoder:.2f} M |
| vae | AutoencoderDC, 16x, {channels} latent channels, residual blocks alone | {vae:.2f} M |
| tokenizer | Gemma's BPE with byte fallback, trained on the captions | |
| scheduler | DPMSolverMultistepScheduler on flow sigmas, flow_shift {shift} | |

- **Knows**: {count} things, lower case, in the middle of a plain background in twelve colours ({colours}), in two \
sizes (small, and normal without a word): {things}. It met about 1,000 other emoji early in its training and keeps a \
faint notion of them (their colours, mostly).
- **Prompts** it was trained on: `a penguin on a cyan background`, `small tractor, pink background`, `a picture of a \
sailboat on blue`. Empty prompt for 10 % (classifier-free guidance works: 2 to 4).
- **Sizes**: 64 and 128 pixels a side (16 and 64 image tokens); between them and non-square works less well.
- **Sampling**: {steps} steps, guidance {guidance}. In diffusers `complex_human_instruction=None`, \
`use_resolution_binning=False` and `max_sequence_length={length}`.
- **Measured** (`tiny_sana.py --measure`, 48 prompts at 128 px): {measured}.
- **Never seen**: hedgehog, teapot and a few more single emoji; emoji that are sequences of code points (polar bear, \
black cat, phoenix, people with professions ...); pictograms of signs, arrows, squares, clocks.
- **Weights** float16 on disk; run it in float32.
- **Training**: flow matching in MLX on 2 CPU cores, {minutes:.0f} minutes in all: the autoencoder {vae_steps:,} \
steps ({vae_minutes:.0f} minutes; L1, edges, 64 px crops), transformer and text encoder together {network_steps:,} \
steps; other emoji are half of the pictures at first and none after {alone:.0%} of the time; Muon for matrices \
(learning rate 2e-3, RMS-matched), Adam for the rest (1e-3), cosine decay, EMA 0.998; 64 px (batch {small}) and \
twice as often 128 px (batch {large}).
- **Licence**: the pictures are drawn with Noto Color Emoji (SIL Open Font License 1.1). The weights may be used under \
the same terms or MIT.

Its pictures are blurry and its vocabulary is a toy's: it is a fixture, not a product.
"""

PARTS = {
    "transformer": (sana.transformer, TRANSFORMER, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (encoders.gemma2_encoder, TEXT, "model.safetensors"),
    "vae": (encoders.autoencoder_dc, AUTOENCODER, "diffusion_pytorch_model.safetensors"),
}
SANA, GEMMA, DC_AE = (sana.CONFIGS[part].from_dict(config) for part, (_, config, _) in PARTS.items())

TEMPLATES = (
    "a {thing} on a {colour} background",
    "{thing}, {colour} background",
    "a picture of a {thing} on {colour}",
)
SHARES = {"": 0.75, "small ": 0.46}
"""Longer side of the thing as a share of the picture's, by the word for it."""

STEPS, GUIDANCE = 16, 3.0
"""Of the measure's sampling."""

VAE_SHARE, VAE_BATCH = 0.19, 16
"""Of the time, and pictures a step."""

NOISE, PENALTY, EDGES = 0.2, 1e-3, 0.5
"""On the latents while they are decoded, on their squares, and of the differences of neighbouring pixels."""

BATCHES, TURNS = {64: 96, 128: 32}, (64, 128, 128)
"""Pictures a step, by side, and which side's turn it is."""

OTHERS, FORTY_ALONE, UNPROMPTED = 0.5, 0.55, 0.1
"""Share of other emoji than the forty at first; when they are gone, as a share of the time; empty prompts."""

LONGEST = 14
"""Tokens of a prompt in training: padding behind them would be seen by nothing. Longer prompts are left out."""

MATRIX_RATE, RATE, WARMUP, EMA = 2e-3, 1e-3, 0.02, 0.998
"""Learning rates of Muon and of Adam, the share of the time in which they rise, and of the mean weights' past."""

STREAMS = [mx.new_stream(mx.cpu) for _ in range(2)]
"""MLX's CPU backend has one thread a stream: each takes half a batch."""

EVERY, LAST = 540, 60
"""Seconds between two checkpoints, and for the last measure."""

Named = dict[str, Image.Image]


def things() -> tuple[Named, Named]:
    """The forty, and the other emoji that are one code point, by lower-case name, cut out."""
    known = {name: emoji(text) for name, text in KNOWN.items()}
    assert all(known.values()), "the font draws none of some emoji"
    others = {name.lower(): cell for name, cell in drawings().items() if name not in NEVER}
    return known, {name: cell for name, cell in others.items() if name not in known}  # type: ignore[return-value]


def picture(cell: Image.Image, behind: str, small: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side, 3) in [-1, 1]: the thing in the middle, give or take a little, of a plain background."""
    share = side * SHARES[small] * rng.uniform(0.94, 1.06) / max(cell.size)
    scaled = cell.resize([max(1, round(length * share)) for length in cell.size], Image.Resampling.LANCZOS)
    left, top = ((side - length) // 2 + round(rng.uniform(-side, side) / 40) for length in scaled.size)
    canvas = Image.new("RGB", (side, side), PALETTE[behind])
    canvas.paste(scaled, (left, top), scaled)
    return np.asarray(canvas, np.float32) / 127.5 - 1


def captions(name: str, behind: str, small: str) -> list[str]:
    """The prompts of one picture."""
    return [template.format(thing=small + name, colour=behind) for template in TEMPLATES]


def write_tokenizer(target: Path, texts: Sequence[str]) -> None:
    """A tokenizer of Gemma's layout whose pieces are from these texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [f"<{token}>" for token in TOKENS] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    words = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])  # no piece is of two
    letters = [*map(chr, range(33, 127)), "▁"]
    size = {"vocab_size": VOCABULARY, "special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**size))
    tokenizer.add_special_tokens(special[: len(TOKENS)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {f"{token}_token": f"<{token}>" for token in TOKENS} | {"add_bos_token": True, "add_eos_token": False}
    config |= {"tokenizer_class": "GemmaTokenizerFast", "padding_side": "right", "model_max_length": 512}
    files.write_json(target / "tokenizer_config.json", config)


def component(part: str) -> Component:
    """Names, shapes and layouts of one folder's tensors."""
    table, config, _ = PARTS[part]
    return table(part, sana.CONFIGS[part].from_dict(config))


def random(part: str, seed: int) -> dict[str, mx.array]:
    """Weights to begin with: what goes into a layer keeps its size; norms do nothing; no velocity."""
    rng, found = np.random.default_rng(seed), {}
    for row in component(part).rows:
        if row.name.endswith(".bias") or row.name.startswith(("proj_out", "decoder.conv_out")):
            value = np.zeros(row.shape)
        elif row.name.endswith(".weight") and len(row.shape) == 1:
            value = np.full(row.shape, 0.0 if part == "text_encoder" else 1.0)
        elif row.name.endswith(("scale_shift_table", "embed_tokens.weight")):
            value = rng.normal(0, WIDTH**-0.5, row.shape)
        else:
            value = rng.normal(0, math.prod(row.shape[1:]) ** -0.5, row.shape)
        found[row.name] = mx.array(value.astype(np.float32))
    return found


def save(target: Path, models: Mapping[str, Weights], scaling: float) -> None:
    """Write the checkpoint beside its tokenizer: Hugging Face layout, float16."""
    for part, weights in models.items():
        _, config, file = PARTS[part]
        tensors = {}
        for row in component(part).rows:
            tensor = weights[row.name].astype(mx.float16)
            if row.fix == "conv":
                tensor = mx.contiguous(tensor.transpose(0, 3, 1, 2))
            tensors[row.name] = tensor[..., None, None] if row.fix == "pointwise" else tensor
        (target / part).mkdir(parents=True, exist_ok=True)
        files.save_tensors(target / part / file, tensors, {"format": "pt"})
        files.write_json(target / part / "config.json", config | ({"scaling_factor": scaling} if part == "vae" else {}))
    (target / "scheduler").mkdir(exist_ok=True)
    files.write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
    files.write_json(target / "model_index.json", PIPELINE)
    files.write_json(target / "defaults.json", DEFAULTS)


def describe(target: Path, measured: str) -> None:
    """Write what a user wants to know."""
    stages = [Progress.load(beside(target, name)) for name in ("vae", "network")]
    steps = [int(stage.state["step"].item()) for stage in stages]
    minutes = [stage.seconds / 60 for stage in stages]
    sizes = {part: sum(math.prod(row.shape) for row in component(part).rows) / 1e6 for part in PARTS}
    text = README.format(
        layers=TRANSFORMER["num_layers"], width=WIDTH, channels=CHANNELS, shift=SCHEDULER["flow_shift"],
        count=len(KNOWN), colours=", ".join(PALETTE), things=", ".join(KNOWN), steps=STEPS, guidance=GUIDANCE,
        length=LENGTH, measured=measured, minutes=sum(minutes), vae_steps=steps[0], vae_minutes=minutes[0],
        network_steps=steps[1], alone=FORTY_ALONE, small=BATCHES[64], large=BATCHES[128], **sizes,
    )  # fmt: skip
    files.write_text(target / "README.md", text)


def load(source: Path) -> dict[str, dict[str, mx.array]]:
    """The weights that `save` wrote, by part, in float32."""
    found = {}
    for part in PARTS:
        tensors = mx.load(str(source / part / PARTS[part][2]))
        found[part] = {row.name: row.read(tensors[row.name]).astype(mx.float32) for row in component(part).rows}
    return found


def inside(weights: Weights, prefix: str) -> dict[str, mx.array]:
    """The weights under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def through(stack: Stack, weights: Weights, state: Any, context: Any) -> Any:
    """The state after all blocks."""
    for block in stack.blocks:
        state = block.kind.apply(inside(weights, block.prefix), {}, state, context, None, None)
    return state


def encode_text(w: Weights, ids: mx.array) -> mx.array:
    """(B, L) ids -> (B, L, D)."""
    length = ids.shape[1]
    cos, sin = (mx.array(table) for table in gemma2.rope_tables(GEMMA, length))
    seen = mx.tril(mx.ones((length, length))).astype(mx.bool_) & (ids != 0)[:, None, None]
    hidden = gemma2.Hidden(w["embed_tokens.weight"][ids] * math.sqrt(WIDTH))
    state = through(gemma2.stack(GEMMA), w, hidden, gemma2.Context(cos, sin, seen))
    return gemma2.norm(w, "norm", state.hidden, GEMMA.rms_norm_eps)


def velocity(w: Weights, latents: mx.array, sigma: mx.array, text: mx.array, mask: mx.array) -> mx.array:
    """The transformer's. latents: (B, h, w, C); sigma: (B,); text: (B, L, D); mask: (B, L)."""
    size = latents.shape[1:3]
    temb, embedded = net.time_embedding(w, SANA, sigma, None)
    context = net.Context(net.caption(w, text), net.text_bias(mask, mx.float32), temb, embedded, size)
    tokens = through(net.stack(SANA), w, Tokens(net.embed(w, SANA, latents)), context)
    return net.output(w, SANA, tokens.image, embedded, size)


def matching(w: Weights, latents: mx.array, noise: mx.array, sigma: mx.array, ids: mx.array) -> mx.array:
    """The loss of transformer and text encoder together."""
    text = encode_text(inside(w, "text_encoder."), ids)
    found = velocity(inside(w, "transformer."), flow.noisy(latents, noise, sigma), sigma, text, ids != 0)
    return ((found - flow.velocity(latents, noise)) ** 2).mean()


def likeness(w: Weights, pixels: mx.array, noise: mx.array) -> mx.array:
    """The loss of the autoencoder: pixels, edges, and latents that are small and bear noise."""
    z = dc_ae.encode(w, DC_AE, pixels, pixels.shape[1])
    off = dc_ae.decode(w, DC_AE, z + NOISE * noise, pixels.shape[1]) - pixels
    edges = mx.abs(off[:, 1:] - off[:, :-1]).mean() + mx.abs(off[:, :, 1:] - off[:, :, :-1]).mean()
    return mx.abs(off).mean() + EDGES * edges + PENALTY * (z * z).mean()


def convolved(w: Weights, name: str, x: Stream, *, after: Any = None, **_: Any) -> Stream:
    """streams.conv2d of a whole map, without its evaluations."""
    (part,) = x.rows
    y = mx.conv2d(part, w[f"{name}.weight"], padding=w[f"{name}.weight"].shape[1] // 2)
    y = y + w[f"{name}.bias"] if f"{name}.bias" in w else y
    return Stream(y.shape, iter([y if after is None else after(y)]))


def added(x: Stream, body: Callable[[Stream], Stream], shortcut: Any = None) -> Stream:
    """streams.add of a whole map."""
    (part,) = x.rows
    (y,) = body(Stream(x.shape, iter([part]))).rows
    return Stream(y.shape, iter([y + (part if shortcut is None else shortcut(part))]))


@mx.custom_function
def nine(x: mx.array, kernel: mx.array) -> mx.array:
    """A sum of shifted products: x (B, H + 2, W + 2, C), kernel (3, 3, C)."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(  # type: ignore[return-value]
        (x[:, i : i + height, j : j + width] * kernel[i, j] for i, j in product(range(3), range(3))), mx.array(0.0)
    )


@nine.vjp
def nine_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, kernel = primals
    height, width = cotangent.shape[1:3]
    around = mx.pad(cotangent, [(0, 0), (2, 2), (2, 2), (0, 0)])
    shifted = [x[:, i : i + height, j : j + width] for i, j in product(range(3), range(3))]
    slopes = mx.concatenate([summed_product(part, cotangent) for part in shifted])
    return nine(around, kernel[::-1, ::-1]), slopes.reshape(kernel.shape)


def summed_product(x: mx.array, y: mx.array) -> mx.array:
    """(1, C): the sum of x y over all pixels, every eighth picture first, then by BLAS: MLX's own sum is slower."""
    some = sum((x[i::8] * y[i::8] for i in range(1, 8)), x[::8] * y[::8])
    flat = some.reshape(-1, some.shape[-1])
    return mx.ones((1, flat.shape[0])) @ flat


def depthwise(w: Weights, name: str, x: mx.array) -> mx.array:
    """net.depthwise, whose gradient by mx.conv2d is several times as slow on the CPU."""
    return nine(x, w[f"{name}.weight"][..., 0].transpose(1, 2, 0)) + w[f"{name}.bias"]


ABOVE = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
         1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
"""Coefficients of Eigen's tanh, from the highest power of the square down, above and below the fraction line."""


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """layers.silu without an exponential, which MLX's CPU backend computes one by one."""
    return x * sigmoid(x)


@silu.vjp
def silu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    s = sigmoid(x)
    return cotangent * s * (1 + x * (1 - s))


def sigmoid(x: mx.array) -> mx.array:
    """(1 + tanh(x / 2)) / 2, tanh as Eigen's quotient of polynomials, which is exact to float32."""
    x = mx.clip(0.5 * x, -7.9053111, 7.9053111)
    square, above, below = x * x, mx.array(ABOVE[0]), mx.array(BELOW[0])
    for factor in ABOVE[1:]:
        above = above * square + factor
    for factor in BELOW[1:]:
        below = below * square + factor
    return 0.5 + 0.5 * x * above / below


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon takes it: a layer's weight, that of a convolution as one matrix."""
    return len(shape) > 1 and min(shape[0], math.prod(shape[1:])) >= 32 and "embed_tokens" not in name


def orthogonal(x: mx.array) -> mx.array:
    """Matrices (N, a, b) with singular values near 1. Source: Muon's Newton-Schulz iteration."""
    turned = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if turned else x
    x = x * mx.rsqrt((x * x).sum(axis=(1, 2), keepdims=True) + 1e-14)
    for _ in range(5):
        a = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.swapaxes(1, 2) if turned else x


def begin(weights: Weights) -> dict[str, mx.array]:
    """The optimizers' state."""
    state = {f"first.{name}": mx.zeros_like(tensor) for name, tensor in weights.items()}
    plain = {name: tensor for name, tensor in weights.items() if not is_matrix(name, tensor.shape)}
    return state | {f"second.{name}": mx.zeros_like(tensor) for name, tensor in plain.items()} | {"step": mx.array(0.0)}


def updated(weights: Weights, grads: Weights, state: Weights, rate: mx.array) -> tuple[Weights, Weights]:
    """A step of Muon for matrices and of Adam for the rest. rate: a share of the full learning rates."""
    step = state["step"] + 1
    new, after = {}, {"step": step}
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, grad in grads.items():
        if is_matrix(name, grad.shape):
            after[f"first.{name}"] = 0.95 * state[f"first.{name}"] + grad
            groups[grad.shape[0], math.prod(grad.shape[1:])].append(name)
            continue
        first = 0.9 * state[f"first.{name}"] + 0.1 * grad
        second = 0.99 * state[f"second.{name}"] + 0.01 * grad * grad
        after |= {f"first.{name}": first, f"second.{name}": second}
        unbiased = (first / (1 - 0.9**step)) * mx.rsqrt(second / (1 - 0.99**step) + 1e-16)
        new[name] = weights[name] - RATE * rate * unbiased
    size = sum(len(names) * a * b * min(a, b) for (a, b), names in groups.items()) / 2
    done = 0.0
    for shape, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        for some in (names[: len(names) // 2], names[len(names) // 2 :]):
            if not some:
                continue
            with mx.stream(STREAMS[done >= size]):
                turns = [(grads[n] + 0.95 * after[f"first.{n}"]).reshape(shape) for n in some]
                found = orthogonal(mx.stack(turns)) * (0.2 * math.sqrt(max(shape)))
                for name, turn in zip(some, found):
                    new[name] = weights[name] - MATRIX_RATE * rate * turn.reshape(weights[name].shape)
            done += len(some) * shape[0] * shape[1] * min(shape)
    return new, after


class Progress(NamedTuple):
    """What a stage has come to. ema: the mean of the last weights; seconds: how long it has been trained."""

    weights: Weights
    state: Weights
    ema: Weights
    seconds: float

    def save(self, path: Path) -> None:
        tensors = {
            f"{kind}.{name}": tensor
            for kind, group in (("weights", self.weights), ("state", self.state), ("ema", self.ema))
            for name, tensor in group.items()
        }
        files.save_tensors(path, tensors, {"seconds": str(self.seconds)})

    @staticmethod
    def load(path: Path) -> "Progress":
        tensors, metadata = mx.load(str(path), return_metadata=True)
        return Progress(*(inside(tensors, f"{k}.") for k in ("weights", "state", "ema")), float(metadata["seconds"]))


def stepper(loss: Callable[..., mx.array]) -> Callable[..., Any]:
    """A compiled step, whose batch is halved among the streams."""
    slopes = mx.value_and_grad(loss)

    def step(weights: Weights, state: Weights, ema: Weights, rate: mx.array, batch: list[mx.array]) -> Any:
        found = []
        for i, stream in enumerate(STREAMS):
            with mx.stream(stream):
                found.append(slopes(weights, *(x[i::2] for x in batch)))
        (one, grads), (other, more) = found
        new, after = updated(weights, {name: (grad + more[name]) / 2 for name, grad in grads.items()}, state, rate)
        keep = mx.minimum(EMA, (1 + after["step"]) / (10 + after["step"]))
        return new, after, {name: keep * ema[name] + (1 - keep) * new[name] for name in new}, (one + other) / 2

    return mx.compile(step)


def share_of_rate(progress: float) -> float:
    """Warm-up, then half a cosine to nothing."""
    return min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def train(
    loss: Callable[..., mx.array],
    progress: Progress,
    batch: Callable[[float], list[np.ndarray]],
    seconds: float,
    path: Path,
    show: Callable[[Weights], None],
) -> Weights:
    """Train until `seconds` are over; returns the mean weights. The next batch is made while one is computed."""
    step, began = stepper(loss), time.perf_counter() - progress.seconds
    weights, state, ema, spent = progress
    shown, steps, said, losses = spent, 0, spent, defaultdict(list)
    coming = batch(spent / seconds)
    while (spent := time.perf_counter() - began) < seconds:
        rate = mx.array(share_of_rate(spent / seconds))
        weights, state, ema, value = step(weights, state, ema, rate, [mx.array(x) for x in coming])
        mx.async_eval(weights, state, ema, value)
        kind, coming = str(coming[0].shape), batch(spent / seconds)
        mx.eval(weights, state, ema, value)
        losses[kind].append(value.item())
        steps += 1
        if spent - said > 20:
            means = ", ".join(f"{kind} {np.mean(values):.4f}" for kind, values in losses.items())
            print(f"{path.stem} {spent:.0f} s, {int(state['step'].item())} steps: {means}", flush=True)
            said, losses = spent, defaultdict(list)
        if spent - shown > EVERY:
            Progress(weights, state, ema, spent).save(path)
            show(ema)
            shown = spent
    Progress(weights, state, ema, spent).save(path)
    return ema


def autoencoder_batches(known: Named, others: Named, rng: np.random.Generator) -> Callable[[float], list[np.ndarray]]:
    """Pictures of 64 px and crops of such of 128 px, a third of them of the forty; and noise."""
    groups = (list(known.values()), list(others.values()), list(others.values()))

    def one() -> np.ndarray:
        cells = groups[rng.integers(3)]
        side = int(rng.choice(list(BATCHES)))
        small, behind = rng.choice(list(SHARES)), rng.choice(list(PALETTE))
        drawn = picture(cells[rng.integers(len(cells))], behind, small, side, rng)
        top, left = rng.integers(side - 63, size=2)
        return drawn[top : top + 64, left : left + 64]

    def batch(_: float) -> list[np.ndarray]:
        noise = rng.standard_normal((VAE_BATCH, 4, 4, CHANNELS), np.float32)
        return [np.stack([one() for _ in range(VAE_BATCH)]), noise]

    return batch


class Cache(NamedTuple):
    """Encoded pictures by side. latents: (N, h, w, C), of unit deviation; ids: (N, templates, L); the forty first."""

    latents: dict[int, np.ndarray]
    ids: np.ndarray
    known: int


def cells_of(known: Named, others: Named, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(name, colour, size) of every picture: the forty in all of them, others in two."""
    every = list(product(PALETTE, SHARES))
    chosen = [(name, *every[i]) for name in others for i in rng.choice(len(every), 2, replace=False)]
    return [(name, *look) for name in known for look in every] + chosen


def encode_all(
    vae: Weights, known: Named, others: Named, tokenizer: Path, rng: np.random.Generator
) -> tuple[Cache, float]:
    """Every picture's latents, and the factor that makes their deviation 1."""
    looks, cells = cells_of(known, others, rng), known | others
    ids, _, _ = gemma_ids(tokenizer, [text for look in looks for text in captions(*look)], LENGTH)
    ids = ids.reshape(len(looks), len(TEMPLATES), LENGTH)
    short = (ids[..., LONGEST:] == 0).all(axis=(1, 2))
    looks, ids = [look for look, kept in zip(looks, short) if kept], ids[short, :, :LONGEST]
    encode = mx.compile(lambda pixels: dc_ae.encode(vae, DC_AE, pixels, pixels.shape[1]))
    latents = {}
    for side in BATCHES:
        found = []
        for start in range(0, len(looks), 64):
            part = [picture(cells[n], *look, side, rng) for n, *look in looks[start : start + 64]]
            halves = []
            for i, stream in enumerate(STREAMS):
                with mx.stream(stream):
                    halves.append(encode(mx.array(np.stack(part[i::2]))))
            mx.eval(halves)
            joined = np.empty((len(part), *halves[0].shape[1:]), np.float32)
            joined[::2], joined[1::2] = (np.array(half) for half in halves)
            found.append(joined)
        latents[side] = np.concatenate(found)
    count = len(known) * len(PALETTE) * len(SHARES)
    assert short[:count].all(), "a prompt of the forty is too long"
    scaling = float(1 / np.mean([part[:count].std() for part in latents.values()]))
    return Cache({side: part * scaling for side, part in latents.items()}, ids, count), scaling


def matching_batches(cache: Cache, rng: np.random.Generator) -> Callable[[float], list[np.ndarray]]:
    """Latents, noise, sigmas and ids; of fewer and fewer other emoji."""
    sides, shift = cycle(TURNS), SCHEDULER["flow_shift"]
    empty = np.zeros(cache.ids.shape[2], np.int32)
    empty[0] = TOKENS.index("bos")

    def batch(progress: float) -> list[np.ndarray]:
        side = next(sides)
        count = BATCHES[side]
        rows = rng.integers(cache.known, size=count)
        foreign = rng.random(count) < OTHERS * max(0.0, 1 - progress / FORTY_ALONE)
        rows[foreign] = rng.integers(cache.known, len(cache.ids), size=foreign.sum())
        ids = cache.ids[rows, rng.integers(len(TEMPLATES), size=count)]
        ids[rng.random(count) < UNPROMPTED] = empty
        latents = cache.latents[side][rows]
        sigma = np.array([flow.noise_level(n, 0, 1, shift) for n in rng.standard_normal(count)], np.float32)
        return [latents, rng.standard_normal(latents.shape, np.float32), sigma, ids]

    return batch


def draw(
    models: Mapping[str, Weights], scaling: float, tokenizer: Path, prompts: Sequence[str], seed: int, side: int = 128
) -> list[Image.Image]:
    """A picture of each prompt."""
    ids = mx.array(gemma_ids(tokenizer, [*prompts, ""], LENGTH)[0])
    text, mask = encode_text(models["text_encoder"], ids), ids != 0
    width = side // dc_ae.factor(DC_AE)
    noise = np.random.default_rng(seed).standard_normal((len(prompts), width, width, CHANNELS), np.float32)
    count, parts = len(prompts), []
    for start in range(0, count, 8):
        rows = [*range(start, min(start + 8, count))]
        own = mx.array(rows + [count] * len(rows))
        latents = mx.array(noise[rows])
        sampler = flow.sampler(schedulers.parse(SCHEDULER), STEPS, width * width)
        for i, sigma in enumerate(sampler.times):
            levels = mx.full((len(own),), float(sigma))
            both = velocity(models["transformer"], mx.concatenate([latents] * 2), levels, text[own], mask[own])
            prompted, unprompted = mx.split(both, 2)
            latents = sampler.step(i, unprompted + GUIDANCE * (prompted - unprompted), latents)
            mx.eval(latents)
        parts.append(dc_ae.decode(models["vae"], DC_AE, latents / scaling))
    pixels = np.clip(np.concatenate([np.array(part) for part in parts]) * 127.5 + 127.5, 0, 255).round()
    return [Image.fromarray(one) for one in pixels.astype(np.uint8)]


def examination() -> list[tuple[str, str, str]]:
    """(prompt, thing, colour): 48, every thing at least once, every colour four times."""
    names, colours = list(KNOWN), list(PALETTE)
    found = []
    for i in range(48):
        name, behind = names[i % len(names)], colours[(5 * i + i // 12) % len(colours)]
        small = "small " if i % 6 == 5 else ""
        found.append((captions(name, behind, small)[i % len(TEMPLATES)], name, behind))
    return found


def measure(source: Path) -> str:
    """Print and return how many of 48 backgrounds and things are right, and write the pictures as one sheet."""
    asked = examination()
    scaling = files.read_json(source / "vae" / "config.json")["scaling_factor"]
    images = draw(load(source), scaling, source / "tokenizer", [prompt for prompt, _, _ in asked], 1)
    known = references(None)
    named = [nearest(image, known) for image in images]
    right = sum(colour(image) == behind for image, (_, _, behind) in zip(images, asked))
    found = sum(name == thing for name, (_, thing, _) in zip(named, asked))
    said = f"background right: {right} of {len(asked)}; thing nearest of {len(known)} emoji: {found} of {len(asked)}"
    print(said, flush=True)
    grid([images[i : i + 8] for i in range(0, len(images), 8)]).save(source.with_name(f"{source.name}.png"))
    return said


def beside(target: Path, name: str) -> Path:
    """Where a stage leaves its state."""
    return target.with_name(f"{target.name}-training") / f"{name}.safetensors"


def stage(
    name: str,
    options: argparse.Namespace,
    loss: Callable[..., mx.array],
    weights: Weights,
    batch: Callable[[float], list[np.ndarray]],
    seconds: float,
    show: Callable[[Weights], None],
) -> Weights:
    """The mean weights after one stage, which begins where it was left."""
    path = beside(options.output, name)
    fresh = Progress(weights, begin(weights), weights, 0.0)
    progress = Progress.load(path) if options.resume and path.exists() else fresh
    return train(loss, progress, batch, seconds, path, show)


def make(options: argparse.Namespace) -> None:
    """Both stages."""
    target, seed, seconds = options.output, options.seed, options.minutes * 60
    known, others = things()
    rng = np.random.default_rng(seed)
    texts = [text for n, *look in cells_of(known, others, rng) for text in captions(n, *look)]
    write_tokenizer(target / "tokenizer", texts)
    print(f"the forty and {len(others)} others", flush=True)

    batches = autoencoder_batches(known, others, rng)
    vae = stage("vae", options, likeness, random("vae", seed), batches, VAE_SHARE * seconds, lambda _: None)
    if options.stage == "vae":
        return
    began = time.perf_counter()
    cache, scaling = encode_all(vae, known, others, target / "tokenizer", np.random.default_rng(seed))
    began = time.perf_counter() - began
    print(f"pictures encoded in {began:.0f} s; scaling factor {scaling:.4f}", flush=True)

    both = ("transformer", "text_encoder")

    def models(weights: Weights) -> dict[str, Weights]:
        return {"vae": vae} | {part: inside(weights, f"{part}.") for part in both}

    def show(weights: Weights) -> None:
        save(target, models(weights), scaling)
        measure(target)

    weights = {f"{part}.{name}": x for part in both for name, x in random(part, seed).items()}
    left = (1 - VAE_SHARE) * seconds - began - LAST
    mean = stage("network", options, matching, weights, matching_batches(cache, rng), left, show)
    save(target, models(mean), scaling)
    describe(target, measure(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tiny-sana"))
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--stage", choices=("vae", "all"), default="all", help="vae: the autoencoder alone")
    parser.add_argument("--resume", action="store_true", help="go on from what is beside the output")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure a checkpoint, nothing else")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    with (
        mock.patch.multiple(dc_ae, conv2d=convolved, add=added),
        mock.patch.multiple(net, depthwise=depthwise, silu=silu),
    ):
        make(options)


if __name__ == "__main__":
    main()
