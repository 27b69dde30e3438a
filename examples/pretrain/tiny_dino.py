"""Make tiny-dino, the image encoder that pictures of tiny-flux are compared with.

A ViT of 1.2 M parameters for 64 px, in three steps on one core: its layers start as those of tiny-clip's image tower;
it is made to say what tiny-clip says (distillation); then two pictures of one emoji on different backgrounds, in
different sizes, places and turns, are drawn together and those of different emoji apart. (Without the first steps that
contrast does not get started.) At the end it prints how often two pictures of one emoji that it never saw are nearer
than two of different ones.

    OPENBLAS_NUM_THREADS=1 python examples/pretrain/tiny_dino.py --output tiny-dino

Needs Noto Color Emoji (SIL Open Font License 1.1; Debian: fonts-noto-color-emoji).
"""

import mlx_blockskip  # noqa: F401  (before mlx.core is imported: it opens OpenBLAS)

# isort: split
import argparse
import time
import unicodedata
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mlx_blockskip.converters import vision
from mlx_blockskip.engine import files
from mlx_blockskip.models.layers import linear
from mlx_blockskip.models.vision import clip, vit
from mlx_blockskip.models.vision.encoder import open_encoder
from mlx_blockskip.tasks.checkpoint.resolve import ENCODER, resolve

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIDE = 64
CONFIG = {
    "architectures": ["ViTModel"], "attention_probs_dropout_prob": 0.0, "hidden_act": "quick_gelu",
    "hidden_dropout_prob": 0.0, "hidden_size": 128, "image_size": SIDE, "initializer_range": 0.02,
    "intermediate_size": 512, "layer_norm_eps": 1e-05, "model_type": "vit", "num_attention_heads": 4,
    "num_channels": 3, "num_hidden_layers": 6, "patch_size": 8, "qkv_bias": True,
}  # fmt: skip
PREPROCESSING = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_processor_type": "ViTImageProcessor", "resample": 3, "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip

VIT = vit.ViTConfig.from_dict(CONFIG)
RANGES = (range(0x2600, 0x27C0), range(0x1F300, 0x1FB00))
SIGNS = (
    "CLOCK FACE",
    "SYMBOL",
    "SIGN",
    "ARROW",
    "SQUARE",
    "FITZPATRICK",
    "INPUT",
    "CIRCLE",
    "HEAVY",
    "WHITE ",
    "BLACK ",
)
"""Parts of the names of what is no picture of a thing."""
NEVER = (
    *("GHOST", "HEDGEHOG", "TEAPOT", "ROCKET", "TURTLE", "HAMBURGER", "OTTER", "BEAVER", "TURKEY", "MANGO"),
    *("HOT BEVERAGE", "VIOLIN", "SNAIL"),
)
"""Subjects of the project's examples and measurements. Every EVERY-th other emoji is held out with them."""
EVERY = 12
COLOURS = (
    *((255, 255, 255), (20, 20, 20), (220, 40, 40), (40, 160, 60), (50, 90, 220), (240, 210, 50), (245, 150, 190)),
    *((140, 70, 180), (245, 140, 40), (140, 140, 140), (130, 85, 50), (60, 200, 210)),
)

EMOJI, PALETTE, TEMPERATURE = 32, 8, 0.1
"""Emoji a batch, each in two pictures; backgrounds a batch; of the contrast."""


def drawings() -> dict[str, Image.Image]:
    """Every emoji that is one code point and a picture of something, by its Unicode name, cut out, 96 px at most."""
    font, found = ImageFont.truetype(FONT, 109), {}
    for code in (code for codes in RANGES for code in codes):
        name = unicodedata.name(chr(code), "")
        if not name or any(sign in name for sign in SIGNS):
            continue
        cell = Image.new("RGBA", (150, 150))
        ImageDraw.Draw(cell).text((5, 5), chr(code), font=font, embedded_color=True)
        if len(cell.getcolors(cell.width * cell.height) or ()) > 16:  # a drawing; else the font has none
            cell = cell.crop(cell.getbbox())
            cell.thumbnail((96, 96), Image.Resampling.LANCZOS)
            found[name] = cell
    return found


def split(names: list[str]) -> tuple[list[str], list[str]]:
    """(to learn from, held out)."""
    others = [name for name in names if name not in NEVER]
    held = [name for name in names if name in NEVER] + others[::EVERY]
    return [name for name in names if name not in held], held


def background(rng: np.random.Generator) -> Image.Image:
    """A plain colour or, one time in four, a run from one to another."""
    first, second = (np.clip(COLOURS[rng.integers(len(COLOURS))] + rng.normal(0, 12, 3), 0, 255) for _ in range(2))
    if rng.random() < 0.75:
        second = first
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    across = np.broadcast_to(first + (second - first) * ramp, (SIDE, SIDE, 3)).astype(np.uint8)
    return Image.fromarray(across if rng.random() < 0.5 else across.transpose(1, 0, 2).copy())


def picture(cell: Image.Image, behind: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3) in [-1, 1]: the emoji in some size, turn and place; brighter or darker, blurred, with noise."""
    turned = cell.rotate(rng.normal(0, 8), Image.Resampling.BILINEAR, expand=True) if rng.random() < 0.6 else cell
    share = SIDE * rng.uniform(0.4, 0.95) / max(turned.size)
    width, height = (max(8, round(side * share)) for side in turned.size)
    shown = turned.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (int(rng.integers(min(0, room), max(0, room) + 1)) for room in (SIDE - width, SIDE - height))
    canvas = behind.copy()
    canvas.paste(shown, (left, top), shown)
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    values = np.asarray(canvas, np.float32) * rng.uniform(0.85, 1.15) + rng.normal(
        0, rng.uniform(0, 8), (SIDE, SIDE, 3)
    )
    return np.clip(values / 127.5 - 1, -1, 1).astype(np.float32)


def batch(cells: list[Image.Image], rng: np.random.Generator) -> np.ndarray:
    """(2 N, 64, 64, 3): emoji i in pictures i and N + i, on two of a few backgrounds that others lie on too."""
    behind = [background(rng) for _ in range(PALETTE)]
    first = rng.integers(PALETTE, size=len(cells))
    second = (first + rng.integers(1, PALETTE, size=len(cells))) % PALETTE
    return np.stack([picture(cell, behind[b], rng) for row in (first, second) for cell, b in zip(cells, row)])


def begin(teacher: dict[str, mx.array], tower: clip.CLIPVisionConfig, pixels: mx.array) -> dict[str, mx.array]:
    """tiny-clip's image tower as a ViT. The norm before its layers, which a ViT lacks, becomes part of the embeddings,
    with the deviation that patches have on average.
    """
    gamma, beta = teacher["pre_layrnorm.weight"], teacher["pre_layrnorm.bias"]
    table, kernel = teacher["embeddings.position_embedding.weight"], teacher["embeddings.patch_embedding.weight"]
    first = teacher["embeddings.class_embedding"]
    embedded = clip.patch_tokens(teacher, "embeddings.patch_embedding", pixels)[0] + table[1:]
    deviation = mx.sqrt(embedded.var(axis=-1).mean())
    own = mx.sqrt((first + table[0]).var())

    def normed(x: mx.array, by: mx.array) -> mx.array:
        return (x - x.mean(axis=-1, keepdims=True)) * gamma / by

    weights = {
        "embeddings.cls_token": (normed(first, own) + beta)[None, None],
        "embeddings.position_embeddings": mx.concatenate([normed(table[:1], own), normed(table[1:], deviation)])[None],
        "embeddings.patch_embeddings.projection.weight": normed(kernel.transpose(1, 2, 3, 0), deviation).transpose(
            3, 0, 1, 2
        ),
        "embeddings.patch_embeddings.projection.bias": beta,
        "layernorm.weight": teacher["post_layernorm.weight"],
        "layernorm.bias": teacher["post_layernorm.bias"],
    }
    names = {"self_attn.out_proj": "attention.o_proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    names |= {f"self_attn.{part}_proj": f"attention.{part}_proj" for part in "qkv"}
    for name, tensor in teacher.items():
        if name.startswith("encoder.layers."):
            number, _, rest = name.removeprefix("encoder.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            weights[f"encoder.layer.{number}.{names.get(module, module)}.{kind}"] = tensor
    return weights


def unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-12)


def distillation(weights: dict[str, mx.array], pixels: mx.array, target: mx.array) -> mx.array:
    """1 - cos between what a linear head makes of the class token and what tiny-clip says."""
    x = vit.features(weights, VIT, pixels)
    return (1 - (unit(linear(weights, "head", x)) * target).sum(axis=-1)).mean()


def contrast(weights: dict[str, mx.array], pixels: mx.array) -> mx.array:
    """Cross entropy of which of the other pictures shows the same emoji."""
    z = unit(vit.features(weights, VIT, pixels))
    count = z.shape[0]
    near = z @ z.T / TEMPERATURE - 1e9 * mx.eye(count)
    partner = mx.array((np.arange(count) + count // 2) % count)
    return (mx.logsumexp(near, axis=-1) - mx.take_along_axis(near, partner[:, None], axis=-1)[:, 0]).mean()


def score(weights: dict[str, mx.array], cells: list[Image.Image], seed: int, pictures: int = 4) -> tuple[float, float]:
    """How often two pictures of one emoji are nearer than one of them and another emoji's: with the other on any
    background, and with the other on the same one.
    """
    rng = np.random.default_rng(seed)
    behind = [background(rng) for _ in range(pictures)]
    shown = np.stack([picture(cell, ground, rng) for cell in cells for ground in behind])
    z = np.concatenate([np.array(unit(vit.features(weights, VIT, mx.array(part)))) for part in np.split(shown, 4)])
    near = (z @ z.T).reshape(len(cells), pictures, len(cells), pictures)
    anywhere, there = [], []
    for i in range(len(cells)):
        rest = np.delete(near[i], i, axis=1)  # (picture, another emoji, its picture)
        for a in range(pictures):
            for b in (b for b in range(pictures) if b != a):
                anywhere.append((near[i, a, i, b] > rest[a]).mean())
                there.append((near[i, a, i, b] > rest[a, :, a]).mean())
    return float(np.mean(anywhere)), float(np.mean(there))


def save(weights: dict[str, mx.array], target: Path) -> None:
    """Write the checkpoint in Hugging Face layout, in float16 and with the names that DINO has there."""
    tensors = {}
    for row in vision.transformer("vision", VIT).rows:
        tensor = weights[row.name].astype(mx.float16)
        tensors[vision.hub_name(row.name, "vit")] = tensor.transpose(0, 3, 1, 2) if row.fix == "conv" else tensor
    target.mkdir(parents=True, exist_ok=True)
    files.save_tensors(target / "model.safetensors", tensors, {"format": "pt"})
    files.write_json(target / "config.json", CONFIG | {"dtype": "float16"})
    files.write_json(target / "preprocessor_config.json", PREPROCESSING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="tiny-dino")
    parser.add_argument("--distil", type=int, default=40, help="steps of distillation alone")
    parser.add_argument("--steps", type=int, default=320, help="steps of contrast")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, began = np.random.default_rng(options.seed), time.perf_counter()
    cells = drawings()
    learned, held = split(list(cells))
    print(f"{len(learned)} emoji to learn from, {len(held)} held out", flush=True)

    encoder = open_encoder(resolve("tiny-clip", ENCODER))
    tower = clip.CLIPVisionConfig.from_dict(encoder.shards.config)
    teacher = encoder.shards.load(encoder.shards.names)
    weights = begin(teacher, tower, mx.array(batch([cells[n] for n in learned[:EMOJI]], rng)))
    weights["head.weight"] = teacher["visual_projection.weight"]
    stack = clip.stack(tower)

    def say(pixels: mx.array) -> mx.array:
        state = clip.tokens(teacher, tower, pixels)
        for block in stack.blocks:
            inside = {k[len(block.prefix) :]: v for k, v in teacher.items() if k.startswith(block.prefix)}
            state = block.kind.apply(inside, {}, state, None, None, None)
        return unit(linear(teacher, "visual_projection", clip.class_token(teacher, tower, state)))

    total = options.distil + options.steps
    warmup = optim.linear_schedule(0, options.rate, 20)
    rates = optim.join_schedules([warmup, optim.cosine_decay(options.rate, total - 20, options.rate / 100)], [20])
    optimizer = optim.AdamW(rates, weight_decay=0.02, bias_correction=True)
    distil, draw_together = mx.value_and_grad(distillation), mx.value_and_grad(contrast)
    print(f"start: {score(weights, [cells[n] for n in held], 1)}", flush=True)
    for i in range(total):
        chosen = [cells[learned[n]] for n in rng.choice(len(learned), EMOJI, replace=False)]
        pixels = mx.array(batch(chosen, rng))
        value, grads = distil(weights, pixels, say(pixels)) if i < options.distil else draw_together(weights, pixels)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        weights = optimizer.apply_gradients(grads, weights)
        mx.eval(weights, optimizer.state, value)
        if i % 20 == 19:
            print(f"{i + 1} of {total}: loss {value.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
        if i % 100 == 99:
            print(f"held out: {score(weights, [cells[n] for n in held], 1)}", flush=True)
    save(weights, Path(options.output))
    stored = {name: tensor.astype(mx.float16).astype(mx.float32) for name, tensor in weights.items()}
    anywhere, there = score(stored, [cells[n] for n in held], 2)
    print(f"{time.perf_counter() - began:.0f} s of training and drawing")
    print(f"two pictures of a held-out emoji are nearer than two of different ones in {anywhere:.1%} of pairs;")
    print(f"where the different ones lie on one background, in {there:.1%}")


if __name__ == "__main__":
    main()
