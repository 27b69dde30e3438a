"""Images made with attention from image to text masked in some blocks, and how far each is from the unmasked one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip import lora, metrics
from mlx_blockskip.data import load_image
from mlx_blockskip.engine import owned
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.vision.encoder import Encoder
from mlx_blockskip.tasks.defaults import DrawConfig
from mlx_blockskip.tasks.memory.check import images_at_once
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.denoise import seeded_noise
from mlx_blockskip.tasks.sampling.pictures import Shot, draw, whole

IMAGES = ("prompt*-seed*-*.png",)
"""What a directory of masked images holds."""

WAITING = 64
"""Images that wait in one sweep at most."""

Masks = Mapping[str, Mapping[int, str]]
"""Masks by block, under a name for each image."""


@dataclass(frozen=True)
class Series:
    """For each prompt and seed an image by each of `masks`. directory: where the images are kept."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    masks: Masks
    how: DrawConfig
    directory: Path

    @property
    def places(self) -> list[tuple[int, int]]:
        """Which prompt and which seed, by their numbers."""
        return [(prompt, seed) for prompt in range(len(self.prompts)) for seed in self.seeds]

    def path(self, prompt: int, seed: int, mask: str) -> Path:
        return self.directory / f"prompt{prompt}-seed{seed}-{mask}.png"


def make(model: DiffusionModel, series: Series, adapter: lora.Adapter) -> None:
    """Write the images that are not there yet; those made from something else are removed first."""
    made_from: dict[str, Any] = series.how.recorded()
    made_from |= {"model": model.identity, "adapter": adapter.checksum(), "prompts": list(series.prompts)}
    owned.begin(series.directory, IMAGES, made_from)
    width, height = series.how.width, series.how.height
    missing = [
        Shot(series.prompts[prompt], seeded_noise(model, seed, width, height), path, masks=masks)
        for prompt, seed in series.places
        for name, masks in series.masks.items()
        if not whole(path := series.path(prompt, seed, name))
    ]
    size = images_at_once(series.how, model, min(WAITING, len(missing))) if missing else 1
    with lora.worn(model, adapter) as tree:
        for start in range(0, len(missing), size):
            draw(model, series.how, missing[start : start + size], tree, shown=False)


def distances(series: Series, encoder: Encoder, full: str) -> list[dict[str, float]]:
    """D between the image under the name `full` and each other, by name: one dictionary for each place."""
    found = []
    with phase("embed images", len(series.places) * len(series.masks), "image", release=encoder.release) as track:
        for done, (prompt, seed) in enumerate(series.places, 1):
            images = [load_image(series.path(prompt, seed, name)) for name in series.masks]
            rows = dict(zip(series.masks, encoder.embed_images(images), strict=True))
            whole = rows.pop(full)[None]
            found.append({name: float(metrics.distance(whole, row[None])[0]) for name, row in rows.items()})
            track.step(done * len(series.masks))
    return found
