"""What a SANA checkpoint is made of, by folder, and the same checkpoint with the fewest blocks."""

from collections.abc import Mapping

from mlx_blockskip.models.config import Config
from mlx_blockskip.models.family import Configs
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig
from mlx_blockskip.models.text.gemma2 import Gemma2Config
from mlx_blockskip.models.vae.dc_ae import AutoencoderDCConfig

CONFIGS: Mapping[str, type[Config]] = {
    "transformer": SanaTransformer2DConfig,
    "text_encoder": Gemma2Config,
    "vae": AutoencoderDCConfig,
}


def shallow(configs: Configs) -> Configs:
    """The same model with one block in every stack."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "num_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 1},
    }
