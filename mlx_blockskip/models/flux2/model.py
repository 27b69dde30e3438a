"""An opened FLUX.2 model directory: the transformer's stack, its language model and its VAE, each read when needed.

Latents are the VAE's normalised patches, one for each image token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import Encoded, Posterior, Prompt, Size, Tokens
from mlx_blockskip.models.flow import Fresh, Sampler
from mlx_blockskip.models.flux2 import transformer as net
from mlx_blockskip.models.flux2.config import CONFIGS, taps
from mlx_blockskip.models.flux2.transformer import Context, Flux2Transformer2DConfig, Modulations
from mlx_blockskip.models.layers import linear
from mlx_blockskip.models.opened import Defaults, Opened
from mlx_blockskip.models.text import chat, lm
from mlx_blockskip.models.text.lm import Qwen3Config
from mlx_blockskip.models.vae import kl, kl_flux2
from mlx_blockskip.models.vae.kl_flux2 import AutoencoderKLFlux2Config


class Flux2(Opened):
    """See `mlx_blockskip.models.family.DiffusionModel` for the methods' contract."""

    def __init__(self, path: Path, budget: int | None, defaults: Defaults):
        super().__init__(path, budget, defaults, CONFIGS, net.stack, kl_flux2.factor)
        self.config: Flux2Transformer2DConfig = self.configs["transformer"]
        self.text_config: Qwen3Config = self.configs["text_encoder"]
        self.vae_config: AutoencoderKLFlux2Config = self.configs["vae"]
        self.size_multiple = self.vae_factor
        self._rope: dict[tuple[int, Size], tuple[mx.array, mx.array]] = {}

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        """`prompt_embeds` (1, max_length, 3 x the language model's width) for each prompt: states of three layers.

        The token length is part of the model: the transformer attends to padding. Source: Flux2KleinPipeline.
        """
        every = [*prompts, *negatives]
        asked = chat.asked(self.path / "tokenizer", every, max_length, thinking=False, padded=True)
        shards = Shards(self.path / "text_encoder")
        states = lm.hidden_states(shards, self.text_config, asked.ids, asked.masks, taps(self.text_config), self.budget)
        found: list[Prompt] = [{"prompt_embeds": mx.concatenate(s, axis=-1).astype(self.dtype)} for s in states]
        mx.eval(found)
        return Encoded(found, asked.truncated)

    def blank_prompt(self, max_length: int) -> Prompt:
        return {"prompt_embeds": mx.zeros((1, max_length, self.config.joint_attention_dim), self.dtype)}

    def encode_images(self, pixels: mx.array) -> Posterior:
        """Mean and log variance of the posterior, not in patches: (B, H, W, 3) in [-1, 1] -> (B, 2 h, 2 w, C) each."""
        weights, dtype = self.vae_weights(("encoder.", "quant_conv."))
        return kl.encode(weights, self.vae_config, pixels.astype(dtype))

    def draw_latents(self, posterior: Posterior, noise: mx.array) -> mx.array:
        """A sample of the posterior, in patches and normalised: noise (B, h, w, 4 C) -> (B, h, w, 4 C)."""
        mean, logvar = (kl_flux2.patchify(part.astype(mx.float32)) for part in posterior)
        drawn = mean + mx.exp(0.5 * logvar) * noise.astype(mx.float32)
        return kl_flux2.scale(drawn, self._statistics(), self.vae_config)

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, 4 C) -> pixels (B, H, W, 3) in about [-1, 1], float32."""
        weights, dtype = self.vae_weights(("decoder.", "post_quant_conv."))
        z = kl_flux2.unpatchify(kl_flux2.unscale(latents, self._statistics(), self.vae_config))
        return kl.decode(weights, self.vae_config, z.astype(dtype)).astype(mx.float32)

    def _statistics(self) -> dict[str, mx.array]:
        return self.vae.load(kl_flux2.STATISTICS)

    def native_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return height // self.vae_factor, width // self.vae_factor, self.config.in_channels

    def sampler(self, steps: int, size: Size, fresh: Fresh | None = None) -> Sampler:
        return flow.sampler(self.scheduler, steps, size[0] * size[1], fresh, mu=net.empirical_mu)

    def embed(self, latents: mx.array, prompt: Prompt) -> Tokens:
        w = self.weights("x_embedder", "context_embedder")
        b, rows, columns, channels = latents.shape
        image = linear(w, "x_embedder", latents.reshape(b, rows * columns, channels).astype(self.dtype))
        return Tokens(image, linear(w, "context_embedder", prompt["prompt_embeds"]))

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context:
        scale = mx.full(sigma.shape, guidance, mx.float32) if self.config.guidance_embeds else None
        temb = net.time_embedding(self.weights("time_guidance_embed"), self.config, sigma, scale, self.dtype)
        streams = self.weights(
            "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"
        )
        return self._context(prompt["prompt_embeds"].shape[1], size, net.modulations(streams, temb), temb)

    def _context(self, text_length: int, size: Size, modulations: Modulations, temb: mx.array | None) -> Context:
        key = text_length, (size[0], size[1])
        if key not in self._rope:
            cos, sin = net.rope_tables(self.config, text_length, key[1])
            self._rope = {key: (mx.array(cos), mx.array(sin))}
        return Context(*self._rope[key], modulations, temb, size)

    def prompt_conditioning(self, prompt: Prompt) -> dict[str, mx.array]:
        return {"text_length": mx.array([prompt["prompt_embeds"].shape[1]])}

    def conditioning(self, context: Context) -> dict[str, mx.array]:
        return {f"{name}_modulation": array for name, array in context.modulations._asdict().items()}

    def context_from(self, size: Size, conditioning: Mapping[str, mx.array]) -> Context:
        shared = Modulations(*(conditioning[f"{name}_modulation"] for name in Modulations._fields))
        return self._context(int(conditioning["text_length"][0]), size, shared, None)

    def final_modulation(self, context: Context) -> tuple[mx.array, mx.array]:
        assert context.temb is not None
        return net.output_modulation(self.weights("norm_out"), context.temb)

    def final_layer(self, tokens: Tokens, context: Context, modulation: tuple[mx.array, mx.array]) -> mx.array:
        found = net.output(self.weights("proj_out"), tokens.image, modulation, self.config.eps)
        return found.reshape(found.shape[0], *context.size, -1)
