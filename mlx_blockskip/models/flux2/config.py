"""What a FLUX.2 checkpoint is made of, by folder, and the same checkpoint with the fewest blocks."""

from collections.abc import Mapping

from mlx_blockskip.models.config import Config
from mlx_blockskip.models.family import Configs
from mlx_blockskip.models.flux2.transformer import Flux2Transformer2DConfig
from mlx_blockskip.models.text.lm import Qwen3Config
from mlx_blockskip.models.vae.kl_flux2 import AutoencoderKLFlux2Config

CONFIGS: Mapping[str, type[Config]] = {
    "transformer": Flux2Transformer2DConfig,
    "text_encoder": Qwen3Config,
    "vae": AutoencoderKLFlux2Config,
}


def taps(text_encoder: Qwen3Config) -> tuple[int, int, int]:
    """The layers of the text encoder after which its states are taken: 9, 18 and 27 of Qwen3's 36."""
    depth = text_encoder.num_hidden_layers
    return depth // 4, depth // 2, 3 * depth // 4


def shallow(configs: Configs) -> Configs:
    """The same model with the fewest blocks that still hold one of each kind; of its two text layers one is read."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "num_layers": 1, "num_single_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 2},
    }
