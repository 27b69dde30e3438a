"""What a model family offers to the rest of the project. Tasks use this and never name a family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_blockskip.engine.stack import Context, Modulation, Stack
from mlx_blockskip.engine.weights import BlockReader
from mlx_blockskip.models.defaults import ModelDefaults

Prompt = Mapping[str, mx.array]
"""An encoded prompt: arrays with a leading batch axis, under names that the family chooses."""

Configs = Mapping[str, Mapping[str, Any]]
"""The content of each component's config.json, by folder."""

Size = tuple[int, int]
"""Height and width of the latents."""

OWN_SPACING = "own_spacing"
"""In a model's `scheduler`, beside its own options: that the pipeline leaves the spacing of the steps to it."""


class Tokens(NamedTuple):
    """What flows through a diffusion transformer, split at every boundary.

    image: (B, image tokens, D); text: (B, text tokens, D) in joint attention, None where text is in the context.
    """

    image: mx.array
    text: mx.array | None = None


class Encoded(NamedTuple):
    """Encoded prompts (each with a batch axis of 1), and for each whether the encoder cut it off."""

    prompts: list[Prompt]
    truncated: list[bool]


Posterior = tuple[mx.array, ...]
"""What a VAE says of images, before anything is drawn from it: mean and log variance, or the latents themselves."""


class DiffusionModel(Protocol):
    """An opened model directory. Latents are (B, h, w, C), sigma is (B,) in (0, 1], pixels are (B, H, W, 3) in [-1, 1].

    `context` splits into what `restore` can make again: `record` names the arrays that the blocks and the head take
    from a context besides the modulation, and `prompt_record` those of them that depend on the prompt alone.
    `blank_prompt` is of the shapes and types of an encoded prompt, made without an encoder. `encode_prompts` gives
    the prompts and after them the negatives, in one sweep. An image of a size in pixels is drawn at its `drawn_size`.
    """

    path: Path
    identity: str
    defaults: ModelDefaults
    stack: Stack
    reader: BlockReader
    granularity: int
    scheduler: Mapping[str, Any]

    @property
    def dtype(self) -> mx.Dtype: ...

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded: ...

    def blank_prompt(self, max_length: int) -> Prompt: ...

    def encode_images(self, pixels: mx.array) -> Posterior: ...

    def draw_latents(self, posterior: Posterior, noise: mx.array) -> mx.array: ...

    def decode(self, latents: mx.array) -> mx.array: ...

    def drawn_size(self, width: int, height: int) -> tuple[int, int]: ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]: ...

    def token_count(self, size: Size) -> int: ...

    def tokens(self, latents: mx.array, prompt: Prompt) -> Tokens: ...

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context: ...

    def prompt_record(self, prompt: Prompt) -> dict[str, mx.array]: ...

    def record(self, context: Context) -> dict[str, mx.array]: ...

    def restore(self, size: Size, record: Mapping[str, mx.array]) -> Context: ...

    def head_modulation(self, context: Context) -> Modulation: ...

    def head(self, tokens: Tokens, context: Context, modulation: Modulation) -> mx.array: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Family:
    """A model family: how to recognise, open and train it.

    detect: whether a Hugging Face `model_index.json` is of this family.
    open: `(model directory, budget in bytes of MLX memory or None) -> DiffusionModel`.
    defaults: `(the transformer's Config) -> settings` that a model directory's own `defaults` override.
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
