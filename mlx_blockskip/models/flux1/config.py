"""What a FLUX.1 checkpoint is made of, by folder, and the same checkpoint with the fewest blocks."""

from collections.abc import Mapping

from mlx_blockskip.models.config import Config
from mlx_blockskip.models.family import Configs
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig
from mlx_blockskip.models.text.clip import CLIPTextConfig
from mlx_blockskip.models.text.t5 import T5Config
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig

CONFIGS: Mapping[str, type[Config]] = {
    "transformer": FluxTransformer2DConfig,
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": T5Config,
    "vae": AutoencoderKLConfig,
}


def shallow(configs: Configs) -> Configs:
    """The same model with the fewest blocks that still hold one of each kind."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "num_layers": 1, "num_single_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 1},
        "text_encoder_2": {**configs["text_encoder_2"], "num_layers": 1},
    }
