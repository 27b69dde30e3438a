"""An opened SANA model directory: the transformer's stack, Gemma-2 and the DC-AE, each read when needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Weights
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import Encoded, Posterior, Prompt, Size, Tokens
from mlx_blockskip.models.flow import Fresh, Sampler
from mlx_blockskip.models.opened import Defaults, Opened
from mlx_blockskip.models.sana import transformer as net
from mlx_blockskip.models.sana.config import CONFIGS
from mlx_blockskip.models.sana.prompting import INSTRUCTION, cleaned
from mlx_blockskip.models.sana.sizes import binned
from mlx_blockskip.models.sana.transformer import Context, SanaTransformer2DConfig
from mlx_blockskip.models.text import gemma2, tokenize
from mlx_blockskip.models.vae import dc_ae
from mlx_blockskip.models.vae.dc_ae import AutoencoderDCConfig


class Sana(Opened):
    """See `mlx_blockskip.models.family.DiffusionModel` for the methods' contract.

    Of the defaults, `instruction` says whether prompts are put under SANA's instruction, and `resolution_binning`
    whether images are drawn only in the sizes that it was trained in.
    """

    def __init__(self, path: Path, budget: int | None, defaults: Defaults):
        super().__init__(path, budget, defaults, CONFIGS, net.stack, dc_ae.factor)
        self.config: SanaTransformer2DConfig = self.configs["transformer"]
        self.vae_config: AutoencoderDCConfig = self.configs["vae"]
        self.size_multiple = self.config.patch_size * self.vae_factor

    def encode_prompts(self, prompts: Sequence[str], max_length: int, negatives: Sequence[str] = ()) -> Encoded:
        """`text` (1, max_length, D) and `bias` (1, 1, 1, max_length) for each prompt, as every block takes them.

        Of a prompt's tokens the first and the last max_length - 1 are kept: those of the instruction go, all but the
        first. Negatives have no instruction. Source: SanaPipeline.encode_prompt.
        """
        tokenizer = self.path / "tokenizer"
        instruction = INSTRUCTION if self.defaults.own.get("instruction", True) else ""
        room = max_length
        if instruction:
            longest = len(instruction.encode()) + 1  # no token is shorter than a byte
            room += int(tokenize.gemma_ids(tokenizer, [instruction], longest)[1].sum()) - 2
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        truncated: list[bool] = []
        asked = [(instruction + cleaned(prompt), room) for prompt in prompts]
        for text, length in asked + [(cleaned(negative), max_length) for negative in negatives]:
            ids, mask, cut = tokenize.gemma_ids(tokenizer, [text], length)
            rows.append((ids, mask))
            truncated += cut
        shards = Shards(self.path / "text_encoder")
        found = gemma2.encode(shards, [ids for ids, _ in rows], [mask for _, mask in rows], self.budget)
        kept = [0, *range(1 - max_length, 0)]
        names = self.shards.under("caption_projection.") + self.shards.under("caption_norm.")
        weights = self.shards.load(names)  # nothing else needs them, so they do not stay
        return Encoded([self._prompt(weights, hidden[:, kept], mask[:, kept]) for hidden, mask in found], truncated)

    def _prompt(self, weights: Weights, hidden: mx.array, mask: mx.array) -> Prompt:
        text = net.caption(weights, hidden.astype(self.dtype))
        prompt = {"text": text, "bias": net.text_bias(mask, self.dtype)}
        mx.eval(prompt)
        return prompt

    def blank_prompt(self, max_length: int) -> Prompt:
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return {
            "text": mx.zeros((1, max_length, width), self.dtype),
            "bias": mx.zeros((1, 1, 1, max_length), self.dtype),
        }

    def encode_images(self, pixels: mx.array) -> Posterior:
        """The latents themselves, (B, h, w, C), of (B, H, W, 3) in [-1, 1]: a DC-AE has no posterior."""
        weights, dtype = self.vae_weights(("encoder.",))
        return (dc_ae.encode(weights, self.vae_config, pixels.astype(dtype)),)

    def draw_latents(self, posterior: Posterior, noise: mx.array) -> mx.array:
        """The latents, scaled: (B, h, w, C). There is nothing to draw."""
        return dc_ae.scale(posterior[0].astype(mx.float32), self.vae_config)

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, C) -> pixels (B, H, W, 3) in about [-1, 1], float32."""
        weights, dtype = self.vae_weights(("decoder.",))
        z = dc_ae.unscale(latents.astype(mx.float32), self.vae_config)
        return dc_ae.decode(weights, self.vae_config, z.astype(dtype)).astype(mx.float32)

    def native_size(self, width: int, height: int) -> tuple[int, int]:
        if not self.defaults.own.get("resolution_binning", True):
            return width, height
        return binned(width, height, self.config.sample_size)

    def sampler(self, steps: int, size: Size, fresh: Fresh | None = None) -> Sampler:
        """SanaPipeline leaves the spacing of the steps to the scheduler."""
        tokens = size[0] * size[1] // self.config.patch_size**2
        return flow.sampler(self.scheduler, steps, tokens, fresh, own_spacing=True)

    def embed(self, latents: mx.array, prompt: Prompt) -> Tokens:
        return Tokens(net.embed(self.weights("patch_embed"), self.config, latents))

    def context(self, sigma: mx.array, prompt: Prompt, size: Size, guidance: float) -> Context:
        scale = mx.full(sigma.shape, guidance, mx.float32)
        temb, embedded = net.time_embedding(self.weights("time_embed"), self.config, sigma, scale)
        return Context(prompt["text"], prompt["bias"], temb, embedded, size)

    def prompt_conditioning(self, prompt: Prompt) -> dict[str, mx.array]:
        return dict(prompt)

    def conditioning(self, context: Context) -> dict[str, mx.array]:
        return {"temb": context.temb}

    def context_from(self, size: Size, conditioning: Mapping[str, mx.array]) -> Context:
        return Context(conditioning["text"], conditioning["bias"], conditioning["temb"], None, size)

    def final_modulation(self, context: Context) -> tuple[mx.array]:
        assert context.embedded is not None
        return (context.embedded,)

    def final_layer(self, tokens: Tokens, context: Context, modulation: tuple[mx.array]) -> mx.array:
        """The velocity (B, h, w, C); what a transformer of twice the channels says of the variance is left out."""
        weights = self.weights("scale_shift_table", "proj_out")
        found = net.output(weights, self.config, tokens.image, modulation[0], context.size)
        channels = self.config.in_channels
        return found[..., :channels] if found.shape[-1] == 2 * channels else found
