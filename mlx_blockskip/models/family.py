"""What a model family offers to the rest of the project. Tasks use this and never name a family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import Context, Modulation, Stack
from mlx_blockskip.models.defaults import ModelDefaults
from mlx_blockskip.models.flow import Fresh, Sampler
from mlx_blockskip.models.schedulers import SchedulerConfig

Prompt = Mapping[str, mx.array]
"""An encoded prompt: arrays with a leading batch axis, under names that the family chooses."""

Configs = Mapping[str, Mapping[str, Any]]
"""The content of each component's config.json, by folder."""

Size = tuple[int, int]
"""Height and width of the latents."""


class Tokens(NamedTuple):
    """What flows through a diffusion transformer, split at every boundary.

    image: (B, image tokens, D); text: (B, text tokens, D) in joint attention, None where text is in the context.
    """

    image: mx.array
    text: mx.array | None = None


class Encoded(NamedTuple):
    """Encoded prompts (each with a batch axis of 1), and for each whether it was cut off.

    partial: for each the room of an encoder that had less and saw its beginning only, such as "CLIP's 77 tokens"; ""
    for the others. Empty where there is no such encoder.
    """

    prompts: list[Prompt]
    truncated: list[bool]
    partial: Sequence[str] = ()


Posterior = tuple[mx.array, ...]
"""What a VAE says of images, before anything is drawn from it: mean and log variance, or the latents themselves."""


class DiffusionModel(Protocol):
    """An opened model directory: a stack of blocks, and what is before and after it.

    Latents are (B, h, w, C), sigma is (B,) in (0, 1], pixels are (B, H, W, 3) in [-1, 1], sizes of images are in
    pixels. identity: a checksum of config and weights. size_multiple: what the sides of an image are multiples of.
    scheduler: the checkpoint's own.
    """

    path: Path
    identity: str
    defaults: ModelDefaults
    stack: Stack
    reader: BlockReader
    size_multiple: int
    scheduler: SchedulerConfig

    @property
    def dtype(self) -> mx.Dtype:
        """Of the transformer's weights that are not quantized, and so of its activations."""
        ...

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        """The prompts and after them the negatives, each with a batch axis of 1, in one sweep over the text
        encoders.
        """
        ...

    def blank_prompt(self, max_length: int) -> Prompt:
        """Zeros in the shapes and dtypes of an encoded prompt of the greatest length, made without an encoder."""
        ...

    def encode_images(self, pixels: mx.array) -> Posterior:
        """What the VAE says of images (B, H, W, 3)."""
        ...

    def draw_latents(self, posterior: Posterior, noise: mx.array) -> mx.array:
        """Scaled latents x0 (B, h, w, C) from a posterior and standard normal noise of that shape."""
        ...

    def decode(self, latents: mx.array) -> mx.array:
        """Pixels (B, H, W, 3) in about [-1, 1], float32, of scaled latents (B, h, w, C)."""
        ...

    def native_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in which an image of this size is drawn, before it is scaled and cut to what was asked."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image."""
        ...

    def sampler(self, steps: int, size: Size, fresh: Fresh | None = None) -> Sampler:
        """What carries the latents of one image from noise in `steps` steps. fresh: noise for samplers that add
        some.
        """
        ...

    def guide(self, conditional: mx.array, unconditional: mx.array, scale: float) -> mx.array:
        """The velocity (B, h, w, C) under classifier-free guidance."""
        ...

    def embed(self, latents: mx.array, prompt: Prompt) -> Tokens:
        """The tokens before the first block."""
        ...

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context:
        """What blocks and final layer take beside the tokens; the same over one forward pass."""
        ...

    def prompt_conditioning(self, prompt: Prompt) -> dict[str, mx.array]:
        """What of a context depends on the prompt alone, by names of the family's own."""
        ...

    def conditioning(self, context: Context) -> dict[str, mx.array]:
        """What blocks and final layer take from this context beside modulation and what depends on the prompt alone."""
        ...

    def context_from(self, size: Size, conditioning: Mapping[str, mx.array]) -> Context:
        """A context from both kinds of conditioning, for blocks whose modulation was computed ahead."""
        ...

    def final_modulation(self, context: Context) -> Modulation:
        """The modulation of the final layer."""
        ...

    def final_layer(self, tokens: Tokens, context: Context, modulation: Modulation) -> mx.array:
        """The velocity (B, h, w, C) from the tokens after the last block."""
        ...

    @property
    def scarce(self) -> bool:
        """Whether the memory budget is so small that what is not at work is better on disk."""
        ...

    def make_room(self) -> None:
        """Say that a sweep over blocks comes: where memory is scarce, the weights outside of them are let go of."""
        ...

    def release(self) -> None:
        """Let go of all weights, and of what was measured for the memory budget: other work comes."""
        ...


@dataclass(frozen=True)
class Family:
    """A model family: how to recognise, open and train it.

    detect: whether a Hugging Face `model_index.json` is of this family.
    open: `(model directory, budget in bytes of MLX memory or None) -> DiffusionModel`.
    defaults: `(the transformer's Config) -> settings` that a model directory's own `defaults` override.
    siblings: whether an adapter of one model is meant for the others of its size too, as for those distilled from it.
    variant: `(model_index.json, the scheduler's config) -> settings` of a checkpoint that the configs of its networks
    do not tell from another, as a distilled one; conversion makes them the model directory's own, below those of a
    `defaults.json`.
    lora_targets: modules by the name of a choice ("attention", "all") and by block kind.
    shallow: `(configs) -> configs` of the same model with one block of each kind in every stack.
    bundled: the model in the package whose tokenizers stand in for those of a preset.
    """

    name: str
    detect: Callable[[Mapping[str, Any]], bool]
    open: Callable[[Path, int | None], DiffusionModel]
    defaults: Callable[[Any], dict[str, Any]]
    lora_targets: Mapping[str, Mapping[str, tuple[str, ...]]]
    shallow: Callable[[Configs], Configs]
    bundled: str | None = None
    siblings: bool = False
    variant: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda index, scheduler: {}
