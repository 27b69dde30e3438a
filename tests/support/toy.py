"""A family as unlike FLUX.1 as it can be small: cross-attention, text in the context."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Block, BlockKind, Stack
from mlx_blockskip.models import flow, registry, schedulers
from mlx_blockskip.models.attention import IMAGE_TO_TEXT, attention
from mlx_blockskip.models.defaults import ModelDefaults
from mlx_blockskip.models.family import Encoded, Family, Tokens
from mlx_blockskip.models.layers import by_rows, gelu_tanh, layer_norm, linear, merge_heads, silu, split_heads
from support.component import save_component

WIDTH, HEADS, CHANNELS, TEXT, FACTOR = 32, 2, 4, 12, 8


class Context(NamedTuple):
    text: mx.array
    text_mask: mx.array
    time: mx.array | None
    size: tuple[int, int]


def block(w, trainable, tokens, context, modulation, mask):
    shift, scale, gate = (modulation[0][:, i] for i in range(3))
    x = tokens.image
    normed = layer_norm(x, 1e-6) * (1 + scale) + shift
    q, k, v = (split_heads(linear(w, f"attn1.to_{n}", normed, trainable), HEADS) for n in "qkv")
    x = x + gate * linear(w, "attn1.to_out.0", merge_heads(attention(q, k, v, scale=0.25)), trainable)
    if mask != IMAGE_TO_TEXT:
        q = split_heads(linear(w, "attn2.to_q", x, trainable), HEADS)
        k, v = (split_heads(linear(w, f"attn2.to_{n}", context.text, trainable), HEADS) for n in "kv")
        crossed = attention(q, k, v, scale=0.25, bias=context.text_mask[:, None, None])
        x = x + linear(w, "attn2.to_out.0", merge_heads(crossed), trainable)
    return Tokens(x + by_rows(lambda x: linear(w, "ff.2", gelu_tanh(linear(w, "ff.0", x, trainable)), trainable), x))


def modulate(w, context):
    return ((linear(w, "time", silu(context.time)) + 0.1).reshape(-1, 3, 1, WIDTH),)


KIND = BlockKind("cross", block, modulate, ("time",))
MODULES = (
    *(f"attn1.to_{n}" for n in ("q", "k", "v", "out.0")),
    *(f"attn2.to_{n}" for n in ("q", "k", "v", "out.0")),
    *("ff.0", "ff.2"),
)


def stack(depth: int, prelude: int = 0) -> Stack:
    return Stack(
        tuple(Block(f"blocks.{i}.", KIND) for i in range(depth)),
        tuple(Block(f"refiner.{i}.", KIND) for i in range(prelude)),
    )


class Toy:
    size_multiple = FACTOR
    defaults = ModelDefaults(
        max_sequence_length=6, resolution=48, train_resolution=32, width=48, height=48, steps=3, cfg_scale=2.0, rank=2
    )
    scheduler = schedulers.parse({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.5})

    def __init__(self, path: Path, budget: int | None):
        self.path = path
        self.shards = Shards(path / "transformer")
        self.stack = stack(self.shards.config["depth"], self.shards.config["prelude"])
        self.varied = self.shards.config["varied"]
        self.reader = BlockReader(self.shards, self.stack, budget)
        self.identity = self.shards.identity

    @property
    def dtype(self):
        return mx.float32

    def _rest(self):
        return self.shards.load(self.shards.under("rest."))

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        found, prompts = [], [*prompts, *negatives]
        for prompt in prompts:
            codes = [ord(c) % 97 for c in prompt][:max_length]
            length = max(1, len(codes)) if self.varied else max_length
            table = philox.normal(7, shape=(97, TEXT))
            rows = np.zeros((1, length, TEXT), np.float32)
            rows[0, : len(codes)] = table[codes]
            mask = np.where(np.arange(length) < max(1, len(codes)), 0, -10000).astype(np.float32)
            found.append({"text": mx.array(rows), "mask": mx.array(mask[None])})
        return Encoded(found, [len(p) > max_length for p in prompts])

    def blank_prompt(self, max_length):
        return {"text": mx.zeros((1, max_length, TEXT)), "mask": mx.zeros((1, max_length))}

    def encode_images(self, pixels):
        b, h, w, _ = pixels.shape
        pooled = pixels.reshape(b, h // FACTOR, FACTOR, w // FACTOR, FACTOR, 3).mean(axis=(2, 4))
        return (mx.concatenate([pooled, pooled[..., :1]], axis=-1),)

    def draw_latents(self, posterior, noise):
        return posterior[0] + 0.01 * noise

    def decode(self, latents):
        return mx.repeat(mx.repeat(latents[..., :3], FACTOR, axis=1), FACTOR, axis=2)

    def native_size(self, width, height):
        return width, height

    def latent_shape(self, width, height):
        return height // FACTOR, width // FACTOR, CHANNELS

    def sampler(self, steps, size, fresh=None):
        return flow.sampler(self.scheduler, steps, size[0] * size[1], fresh)

    def guide(self, conditional, unconditional, scale):
        return flow.guided(conditional, unconditional, scale)

    def embed(self, latents, prompt):
        b, h, w, c = latents.shape
        return Tokens(linear(self._rest(), "rest.embed", latents.reshape(b, h * w, c)))

    def context(self, sigma, prompt, size, guidance):
        waves = mx.concatenate([mx.cos(sigma[:, None] * i) for i in range(8)], axis=1)
        text = linear(self._rest(), "rest.text", prompt["text"])
        return Context(text, prompt["mask"], linear(self._rest(), "rest.time", waves), size)

    def prompt_conditioning(self, prompt):
        return {"text": linear(self._rest(), "rest.text", prompt["text"]), "mask": prompt["mask"]}

    def conditioning(self, context):
        return {}

    def context_from(self, size, conditioning):
        return Context(conditioning["text"], conditioning["mask"], None, size)

    def final_modulation(self, context):
        return (linear(self._rest(), "rest.head_time", context.time)[:, None],)

    def final_layer(self, tokens, context, modulation):
        x = layer_norm(tokens.image, 1e-6) * (1 + modulation[0])
        return linear(self._rest(), "rest.head", x).reshape(x.shape[0], *context.size, CHANNELS)

    scarce = False

    def make_room(self):
        pass

    def release(self):
        self.reader.release()


FAMILY = Family(
    name="toy",
    detect=lambda index: index.get("_class_name") == "ToyPipeline",
    open=Toy,
    defaults=lambda config: {},
    lora_targets={"all": {"cross": MODULES}, "attention": {"cross": MODULES[:8]}},
    shallow=lambda configs: configs,
)


def make_toy(path: Path, depth: int = 5, prelude: int = 0, varied: bool = False) -> Path:
    """A random toy model directory, registered so that tasks find its family. prelude: blocks before block 0. varied:
    prompts are encoded to their own lengths.
    """
    registry.families()["toy"] = FAMILY
    shapes = {"rest.embed": (WIDTH, CHANNELS), "rest.text": (WIDTH, TEXT), "rest.time": (WIDTH, 8)}
    shapes |= {"rest.head_time": (WIDTH, WIDTH), "rest.head": (CHANNELS, WIDTH)}
    inner = {"time": (3 * WIDTH, WIDTH), "ff.0": (64, WIDTH), "ff.2": (WIDTH, 64)}
    inner |= dict.fromkeys(MODULES[:8], (WIDTH, WIDTH))
    for block in (*stack(depth).blocks, *stack(0, prelude).prelude):
        shapes |= {f"{block.prefix}{name}": shape for name, shape in inner.items()}
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        tensors[f"{name}.weight"] = mx.array(philox.normal(3, number, shape=shape) / shape[1] ** 0.5)
        tensors[f"{name}.bias"] = mx.array(philox.normal(4, number, shape=shape[:1]) * 0.1)
    path.mkdir(parents=True)
    config = {"depth": depth, "prelude": prelude, "varied": varied}
    save_component(path / "transformer", config, tensors, stack(depth, prelude))
    files.write_json(path / "config.json", {"format": 1, "family": "toy", "defaults": {}})
    return path
