"""An opened FLUX.1 model directory: the transformer's stack, its text encoders and its VAE, each read when needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import Encoded, Prompt, Size, Tokens
from mlx_blockskip.models.flow import Fresh, Sampler
from mlx_blockskip.models.flux1 import transformer as net
from mlx_blockskip.models.flux1.config import CONFIGS
from mlx_blockskip.models.flux1.transformer import Context, FluxTransformer2DConfig
from mlx_blockskip.models.layers import linear
from mlx_blockskip.models.opened import Defaults
from mlx_blockskip.models.text import clip, t5, tokenize
from mlx_blockskip.models.vae import kl
from mlx_blockskip.models.vae.images import ImagesByKL

CLIP_LENGTH = 77


class Flux1(ImagesByKL):
    """See `mlx_blockskip.models.family.DiffusionModel` for the methods' contract."""

    def __init__(self, path: Path, budget: int | None, defaults: Defaults):
        super().__init__(path, budget, defaults, CONFIGS, net.stack, kl.factor)
        self.config: FluxTransformer2DConfig = self.configs["transformer"]
        self.size_multiple = 2 * self.vae_factor
        self._rope: dict[tuple[int, Size], tuple[mx.array, mx.array]] = {}

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        """`prompt_embeds` (1, max_length, T5 width) and `pooled` (1, CLIP width) for each prompt.

        The token length is part of the model: FLUX.1 attends to padding.
        """
        prompts = [*prompts, *negatives]
        clip_ids, over = tokenize.clip_ids(self.path / "tokenizer", prompts, CLIP_LENGTH)
        t5_ids, truncated = tokenize.t5_ids(self.path / "tokenizer_2", prompts, max_length)
        pooled = self._sweep_text(clip.pooled, "text_encoder", clip_ids)
        embeds = self._sweep_text(t5.hidden, "text_encoder_2", t5_ids)
        found: list[Prompt] = [
            {"prompt_embeds": e.astype(self.dtype), "pooled": p.astype(self.dtype)} for e, p in zip(embeds, pooled)
        ]
        room = f"CLIP's {CLIP_LENGTH} tokens"
        return Encoded(found, list(truncated), [room if one else "" for one in over])

    def blank_prompt(self, max_length: int) -> Prompt:
        return {
            "prompt_embeds": mx.zeros((1, max_length, self.config.joint_attention_dim), self.dtype),
            "pooled": mx.zeros((1, self.config.pooled_projection_dim), self.dtype),
        }

    def _sweep_text(self, encode: Any, component: str, ids: Any) -> list[mx.array]:
        """One sweep for all prompts, each a sample of its own, so that its features do not depend on the others."""
        return encode(Shards(self.path / component), [row[None] for row in ids], self.budget)

    def native_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def sampler(self, steps: int, size: Size, fresh: Fresh | None = None) -> Sampler:
        return flow.sampler(self.scheduler, steps, size[0] * size[1] // 4, fresh)

    def embed(self, latents: mx.array, prompt: Prompt) -> Tokens:
        w = self.weights("x_embedder", "context_embedder")
        image = linear(w, "x_embedder", net.pack(latents).astype(self.dtype))
        return Tokens(image, linear(w, "context_embedder", prompt["prompt_embeds"]))

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context:
        scale = None
        if self.config.guidance_embeds:
            scale = mx.full(sigma.shape, guidance, mx.float32)
        temb = net.time_text_embedding(self.weights("time_text_embed"), sigma, prompt["pooled"], scale)
        return self._context(prompt["prompt_embeds"].shape[1], size, temb)

    def _context(self, text_length: int, size: Size, temb: mx.array | None) -> Context:
        key = text_length, (size[0], size[1])
        if key not in self._rope:
            cos, sin = net.rope_tables(self.config.axes_dims_rope, text_length, key[1])
            self._rope = {key: (mx.array(cos), mx.array(sin))}
        return Context(*self._rope[key], temb, size)

    def prompt_conditioning(self, prompt: Prompt) -> dict[str, mx.array]:
        return {"text_length": mx.array([prompt["prompt_embeds"].shape[1]])}

    def conditioning(self, context: Context) -> dict[str, mx.array]:
        return {}

    def context_from(self, size: Size, conditioning: Mapping[str, mx.array]) -> Context:
        return self._context(int(conditioning["text_length"][0]), size, None)

    def final_modulation(self, context: Context) -> tuple[mx.array, mx.array]:
        assert context.temb is not None
        return net.output_modulation(self.weights("norm_out"), context.temb)

    def final_layer(self, tokens: Tokens, context: Context, modulation: tuple[mx.array, mx.array]) -> mx.array:
        return net.unpack(net.output(self.weights("proj_out"), tokens.image, modulation), context.size)
