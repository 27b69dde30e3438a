"""An opened Z-Image model directory: the transformer's stack, its language model and its VAE, each read when needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import Encoded, Prompt, Size, Tokens
from mlx_blockskip.models.flow import Fresh, Sampler
from mlx_blockskip.models.layers import linear, rms_norm
from mlx_blockskip.models.opened import Defaults
from mlx_blockskip.models.text import chat, lm
from mlx_blockskip.models.text.lm import Qwen3Config
from mlx_blockskip.models.vae import kl
from mlx_blockskip.models.vae.images import ImagesByKL
from mlx_blockskip.models.z_image import transformer as net
from mlx_blockskip.models.z_image.config import CONFIGS
from mlx_blockskip.models.z_image.transformer import Context, Rotations, Text, ZImageTransformer2DConfig

TAP = -2
"""The language model's last layer is not used."""


class ZImage(ImagesByKL):
    """See `mlx_blockskip.models.family.DiffusionModel` for the methods' contract."""

    def __init__(self, path: Path, budget: int | None, defaults: Defaults):
        super().__init__(path, budget, defaults, CONFIGS, net.stack, kl.factor)
        self.config: ZImageTransformer2DConfig = self.configs["transformer"]
        self.text_config: Qwen3Config = self.configs["text_encoder"]
        self.size_multiple = net.PATCH * self.vae_factor
        self._rope: dict[tuple[int, Size], Rotations] = {}

    @property
    def dtype(self) -> mx.Dtype:
        return self.weights("x_pad_token")["x_pad_token"].dtype

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        """`prompt_embeds` (1, L, D) for each prompt, as the main blocks take them: L is a multiple of 32 that depends
        on the prompt. The noise level does not reach what refines them. Source: ZImagePipeline.
        """
        every = [*prompts, *negatives]
        asked = chat.asked(self.path / "tokenizer", every, max_length, thinking=True, padded=False)
        shards = Shards(self.path / "text_encoder")
        states = lm.hidden_states(shards, self.text_config, asked.ids, asked.masks, [TAP], self.budget)
        found: list[Prompt] = [{"prompt_embeds": text} for text in self._refined([hidden for (hidden,) in states])]
        return Encoded(found, asked.truncated)

    def _refined(self, states: Sequence[mx.array]) -> list[mx.array]:
        """The language model's states (1, tokens, its width) each -> (1, L, D)."""
        w = self.shards.load([*self.shards.under("cap_embedder."), "cap_pad_token"])  # nothing else needs them
        waiting = []
        for state in states:
            normed = rms_norm(w, "cap_embedder.0", state.astype(self.dtype), self.config.norm_eps)
            text = net.filled(linear(w, "cap_embedder.1", normed), w["cap_pad_token"])
            waiting.append(Batch(Text(text), net.text_rotations(self.config, text.shape[1])))
        stack = net.text_stack(self.config)
        forward(stack, BlockReader(self.shards, stack, self.budget), waiting)
        return [batch.state.text for batch in waiting]

    def blank_prompt(self, max_length: int) -> Prompt:
        return {"prompt_embeds": mx.zeros((1, net.padded_length(max_length), self.config.dim), self.dtype)}

    def native_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def sampler(self, steps: int, size: Size, fresh: Fresh | None = None) -> Sampler:
        return flow.sampler(self.scheduler, steps, size[0] * size[1] // net.PATCH**2, fresh)

    def embed(self, latents: mx.array, prompt: Prompt) -> Tokens:
        w = self.weights(net.EMBEDDER, "x_pad_token")
        image = linear(w, net.EMBEDDER, net.patchify(latents).astype(self.dtype))
        return Tokens(net.filled(image, w["x_pad_token"]), prompt["prompt_embeds"])

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context:
        temb = net.time_embedding(self.weights("t_embedder"), self.config, sigma, self.dtype)
        return self._context(prompt["prompt_embeds"].shape[1], size, temb)

    def _context(self, text_length: int, size: Size, temb: mx.array) -> Context:
        key = text_length, (size[0], size[1])
        if key not in self._rope:
            same_size = {known: table for known, table in self._rope.items() if known[1] == key[1]}
            self._rope = {**same_size, key: net.rotations(self.config, *key)}
        return Context(*self._rope[key], temb, size)

    def prompt_conditioning(self, prompt: Prompt) -> dict[str, mx.array]:
        return {"text_length": mx.array([prompt["prompt_embeds"].shape[1]])}

    def conditioning(self, context: Context) -> dict[str, mx.array]:
        return {"temb": context.temb}

    def context_from(self, size: Size, conditioning: Mapping[str, mx.array]) -> Context:
        return self._context(int(conditioning["text_length"][0]), size, conditioning["temb"])

    def final_modulation(self, context: Context) -> tuple[mx.array]:
        return (net.output_scale(self.weights(net.FINAL), context.temb),)

    def final_layer(self, tokens: Tokens, context: Context, modulation: tuple[mx.array]) -> mx.array:
        return net.output(self.weights(net.FINAL), tokens.image, modulation[0], context.size)
