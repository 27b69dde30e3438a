"""Images that training makes by the model's own defaults: samples on the way, and class images before it begins."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image as PillowImage

from mlx_blockskip import data, lora
from mlx_blockskip.engine import files, philox
from mlx_blockskip.events import Event, Image
from mlx_blockskip.models.family import DiffusionModel, Prompt
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling import Request, check_size, sample, seeded_noise, to_images

CLASS_NOISE = 0xC1A
"""Keeps the noise of class images apart from other random streams of the same seed."""

WAITING = 8
"""Class images that wait in one sweep."""


def encode(model: DiffusionModel, prompts: Sequence[str]) -> dict[str, Prompt]:
    """Each prompt once, and the empty one, in one sweep."""
    distinct = list(dict.fromkeys([*prompts, ""]))
    length = model.defaults["max_sequence_length"]
    return dict(zip(distinct, model.encode_prompts(distinct, length).prompts, strict=True))


def render(
    model: DiffusionModel,
    encoded: Mapping[str, Prompt],
    prompts: Sequence[str],
    noises: Sequence[mx.array],
    tree: lora.Tree | None = None,
) -> Iterator[PillowImage.Image]:
    """One image a prompt, from its noise (1, h, w, C), by the model's own defaults. encoded: from `encode`."""
    d = model.defaults
    cfg = d.get("cfg_scale", 1.0)
    negative = encoded[""] if cfg > 1 else None
    requests = [Request(encoded[prompt], negative, noise) for prompt, noise in zip(prompts, noises, strict=True)]
    steps = sample(model, requests, steps=d["steps"], cfg_scale=cfg, guidance=d.get("guidance"), trainable=tree)
    *_, latents = steps
    model.release()
    for latent in latents:
        yield to_images(model.decode(latent))[0]
    model.release()


def write_samples(
    model: DiffusionModel, prompts: Sequence[str], tree: lora.Tree, directory: Path, step: int, seed: int
) -> Generator[Event, None, None]:
    """One image a prompt, the same noise for all, as samples/step-000100-1.png."""
    noise = seeded_noise(model, seed, model.defaults["width"], model.defaults["height"])
    images = render(model, encode(model, prompts), prompts, [noise] * len(prompts), tree)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1):
        path = directory / f"step-{step:06d}-{i}.png"
        with files.atomic_file(path) as temporary:
            image.save(temporary, format="PNG")
        yield Image(path, prompt)


def class_images(
    model: DiffusionModel, prompts: Sequence[str], count: int, side: int, directory: Path, seed: int
) -> Generator[Event, None, data.Dataset]:
    """`count` images of the prompts in turn by the model as it is, side x side, made once into `directory`."""
    check_size(model, side, side)
    made_from: dict[str, Any] = {
        "model": model.identity, "defaults": model.defaults, "prompts": list(prompts), "count": count, "side": side,
        "seed": seed,
    }  # fmt: skip
    record = directory / "made_from.json"
    if not record.is_file() or files.read_json(record) != made_from:
        with files.atomic_directory(directory, replace=True) as temporary:
            yield from _write_class_images(model, prompts, count, side, temporary, seed)
            files.write_json(temporary / record.name, made_from)
    return data.load_dataset(directory)


def _write_class_images(
    model: DiffusionModel, prompts: Sequence[str], count: int, side: int, directory: Path, seed: int
) -> Generator[Event, None, None]:
    lines = []
    with phase("class images", count, "image") as track:
        yield track.begin
        encoded = encode(model, prompts)
        for start in range(0, count, WAITING):
            numbers = range(start, min(count, start + WAITING))
            texts = [prompts[i % len(prompts)] for i in numbers]
            shape = (1, *model.latent_shape(side, side))
            noises = [mx.array(philox.normal(seed, CLASS_NOISE, i, shape=shape)) for i in numbers]
            for i, text, image in zip(numbers, texts, render(model, encoded, texts, noises), strict=True):
                image.save(directory / f"{i:04d}.png")
                lines.append(data.metadata_line(f"{i:04d}.png", text))
                yield track.step(i + 1)
        files.write_text(directory / "metadata.jsonl", "".join(lines))
    yield track.end
