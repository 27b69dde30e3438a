"""What a Z-Image checkpoint is made of, by folder, and the same checkpoint with the fewest blocks."""

from collections.abc import Mapping

from mlx_blockskip.models.config import Config
from mlx_blockskip.models.family import Configs
from mlx_blockskip.models.text.lm import Qwen3Config
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from mlx_blockskip.models.z_image.transformer import ZImageTransformer2DConfig

CONFIGS: Mapping[str, type[Config]] = {
    "transformer": ZImageTransformer2DConfig,
    "text_encoder": Qwen3Config,
    "vae": AutoencoderKLConfig,
}


def shallow(configs: Configs) -> Configs:
    """The same model with the fewest blocks that still hold one of each kind; of its two text layers one is read."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "n_layers": 1, "n_refiner_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 2},
    }
