"""Images by an AutoencoderKL, as every family has them whose latents it makes: drawn from the posterior, and scaled."""

import mlx.core as mx

from mlx_blockskip.models.family import Posterior
from mlx_blockskip.models.opened import Opened
from mlx_blockskip.models.vae import kl


class ImagesByKL(Opened):
    """A model whose VAE is an AutoencoderKL."""

    @property
    def vae_config(self) -> kl.AutoencoderKLConfig:
        config: kl.AutoencoderKLConfig = self.configs["vae"]
        return config

    def encode_images(self, pixels: mx.array) -> Posterior:
        """Mean and log variance of the posterior, each (B, h, w, C): (B, H, W, 3) in [-1, 1]."""
        weights, dtype = self.vae_weights(("encoder.", "quant_conv."))
        return kl.encode(weights, self.vae_config, pixels.astype(dtype))

    def draw_latents(self, posterior: Posterior, noise: mx.array) -> mx.array:
        """A sample of the posterior, scaled: noise (B, h, w, C) -> (B, h, w, C)."""
        mean, logvar = posterior
        z = mean.astype(mx.float32) + mx.exp(0.5 * logvar.astype(mx.float32)) * noise.astype(mx.float32)
        return kl.scale(z, self.vae_config)

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, C) -> pixels (B, H, W, 3) in about [-1, 1], float32."""
        weights, dtype = self.vae_weights(("decoder.", "post_quant_conv."))
        z = kl.unscale(latents.astype(mx.float32), self.vae_config)
        return kl.decode(weights, self.vae_config, z.astype(dtype)).astype(mx.float32)
