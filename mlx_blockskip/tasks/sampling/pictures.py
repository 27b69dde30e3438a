"""Pictures as files: all of them wait in one sweep per denoising step, then each is decoded and written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from mlx_blockskip import lora
from mlx_blockskip.engine import files
from mlx_blockskip.engine.stack import Mask
from mlx_blockskip.events import Image, Warning, emit
from mlx_blockskip.models.family import DiffusionModel, Prompt
from mlx_blockskip.tasks.defaults import DrawConfig
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.prompts import warn_of_length, warn_of_syntax
from mlx_blockskip.tasks.sampling.denoise import Request, sample, to_image

PNG_KEY = "mlx-blockskip"


@dataclass(frozen=True)
class Shot:
    """One image to make: what it shows, its noise (1, h, w, C), the PNG file, the settings to keep in the file, and
    masks by block.
    """

    prompt: str
    noise: mx.array
    target: Path
    settings: Mapping[str, Any] | None = None
    masks: Mapping[int, Mask] = field(default_factory=dict)


def draw(model: DiffusionModel, config: DrawConfig, shots: Sequence[Shot], tree: lora.Tree, shown: bool = True) -> None:
    """Make all images in one sweep per step, then decode and write one after the other. shown: whether each is told of;
    not those that are there only to be compared.
    """
    encoded, negative = encode(model, list(dict.fromkeys(shot.prompt for shot in shots)), config)
    requests = [Request(encoded[shot.prompt], negative, shot.noise, shot.masks) for shot in shots]
    with phase("generate", config.steps, "step", release=model.release) as track:
        latents = [r.noise for r in requests]
        steps = sample(
            model, requests, steps=config.steps, cfg_scale=config.cfg_scale, guidance=config.guidance, trainable=tree
        )
        for done, latest in enumerate(steps, 1):
            latents = latest
            track.step(done)
    del steps, latest, encoded, negative, requests
    with phase("decode", len(latents), "image", release=model.release) as track:
        for done, (latent, shot) in enumerate(zip(latents, shots, strict=True), 1):
            write_png(shot.target, to_image(model, latent, config.width, config.height), shot.settings)
            track.step(done)
            if shown:
                emit(Image(shot.target, shot.prompt))


def encode(
    model: DiffusionModel, prompts: Sequence[str], config: DrawConfig
) -> tuple[dict[str, Prompt], Prompt | None]:
    """All prompts by their text, in one sweep, and the negative one where there is guidance."""
    negatives = [config.negative_prompt] if config.guided else []
    texts = [*prompts, *negatives]
    warn_of_syntax(texts)
    with phase("encode prompts", len(texts), "prompt") as track:
        encoded = model.encode_prompts(prompts, config.max_sequence_length, negatives)
        track.step(len(texts))
    warn_of_length(texts, encoded, config.max_sequence_length)
    return dict(zip(prompts, encoded.prompts, strict=False)), encoded.prompts[-1] if config.guided else None


def whole(path: Path) -> bool:
    """Whether an image is there, with the checksum of each of its parts; one that is damaged is removed, and said."""
    if not path.is_file():
        return False
    try:
        with PillowImage.open(path, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        emit(Warning(f"{path}: is damaged; it is made again"))
        path.unlink()
        return False
    return True


def write_png(path: Path, image: PillowImage.Image, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG atomically, whose text chunk holds the settings, where there are any."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
