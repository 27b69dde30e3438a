"""Which image encoder pictures are compared with: what a user names, or the default for the model at hand."""

from pathlib import Path

from mlx_blockskip.engine import listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.vision.encoder import Encoder, open_encoder
from mlx_blockskip.tasks.checkpoint.resolve import ENCODER, resolve

SMALL = 256 << 20
"""Bytes of weights below which a model's pictures are a toy's: encoders of photos say little of them."""

VISION = "tiny-dino", "facebook/dino-vits16"
CLIP = "tiny-clip", "openai/clip-vit-base-patch32"
"""The default for a small model, and for any other."""


def vision_encoder(name_or_path: str | None, model_path: Path) -> Encoder:
    """The encoder that images are compared with: by default DINO, for a small model the bundled tiny-dino.

    name_or_path: a bundled name, a directory of either layout, or a repo id, which is downloaded and converted into
    the cache; None for the default. model_path: the directory of the diffusion model. Raises UserError.
    """
    return open_encoder(resolve(name_or_path or default(VISION, model_path), ENCODER))


def clip_encoder(name_or_path: str | None, model_path: Path) -> Encoder:
    """The same for an encoder that embeds texts too. Raises UserError for one that does not."""
    encoder = open_encoder(resolve(name_or_path or default(CLIP, model_path), ENCODER))
    if not encoder.has_text:
        raise UserError(f"{name_or_path}: embeds images only; give a CLIP checkpoint, or leave it out for the default")
    return encoder


def default(choice: tuple[str, str], model_path: Path) -> str:
    """Of a small model's encoder and the others', the one for this model: it goes by the size of the weights."""
    small, other = choice
    weights = listing.visible(model_path, "**/*.safetensors")
    return small if sum(path.stat().st_size for path in weights) < SMALL else other
