"""Images that training makes by the model's own defaults: samples on the way, and class images before it begins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image as PillowImage

from mlx_blockskip import data, lora
from mlx_blockskip.engine import files, owned, philox
from mlx_blockskip.events import Image, emit
from mlx_blockskip.models.family import DiffusionModel, Prompt
from mlx_blockskip.tasks.defaults import check_size, model_draws
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.denoise import Request, noise_shape, sample, seeded_noise, to_image
from mlx_blockskip.tasks.sampling.pictures import whole, write_png

CLASS_NOISE = 0xC1A
"""Keeps the noise of class images apart from other random streams of the same seed."""

CLASS_FILES = ("[0-9][0-9][0-9][0-9].png", "metadata.jsonl")
"""What the directory of class images holds."""

SAMPLES = "samples"
SAMPLE_FILES = "step-[0-9][0-9][0-9][0-9][0-9][0-9]-*.png"
"""The directory of sample images in that of a run, and what they are called."""

WAITING = 8
"""Class images that wait in one sweep."""


Encodings = tuple[Mapping[str, Prompt], Prompt]
"""Encoded prompts by their text, and the empty negative prompt."""


def encode(model: DiffusionModel, prompts: Sequence[str]) -> Encodings:
    """Each prompt once, and the negative one, in one sweep."""
    distinct = list(dict.fromkeys(prompts))
    *encoded, negative = model.encode_prompts(distinct, model.defaults.max_sequence_length, [""]).prompts
    return dict(zip(distinct, encoded, strict=True)), negative


def render(
    model: DiffusionModel,
    encodings: Encodings,
    prompts: Sequence[str],
    noises: Sequence[mx.array],
    size: tuple[int, int],
    tree: lora.Tree | None = None,
) -> Iterator[PillowImage.Image]:
    """One image per prompt, from its noise (1, h, w, C), by the model's own defaults.

    encodings: from `encode`. size: width and height in pixels.
    """
    config = model_draws(model, *size)
    encoded, empty = encodings
    negative = empty if config.guided else None
    requests = [Request(encoded[prompt], negative, noise) for prompt, noise in zip(prompts, noises, strict=True)]
    steps = sample(
        model, requests, steps=config.steps, cfg_scale=config.cfg_scale, guidance=config.guidance, trainable=tree
    )
    *_, latents = steps
    model.release()
    for latent in latents:
        yield to_image(model, latent, *size)
    model.release()


def missing_samples(prompts: Sequence[str], directory: Path, step: int) -> bool:
    """Whether not all sample images of a step are there."""
    return not all(path.is_file() for path in _sample_paths(prompts, directory, step))


def _sample_paths(prompts: Sequence[str], directory: Path, step: int) -> list[Path]:
    return [directory / f"step-{step:06d}-{i}.png" for i in range(1, len(prompts) + 1)]


def write_samples(
    model: DiffusionModel, prompts: Sequence[str], tree: lora.Tree, directory: Path, step: int, seed: int
) -> None:
    """One image per prompt, the same noise for all, as samples/step-000100-1.png."""
    size = model.defaults.width, model.defaults.height
    noise = seeded_noise(model, seed, *size)
    images = render(model, encode(model, prompts), prompts, [noise] * len(prompts), size, tree)
    for path, image, prompt in zip(_sample_paths(prompts, directory, step), images, prompts, strict=True):
        write_png(path, image)
        emit(Image(path, prompt))


def class_images(
    model: DiffusionModel, prompts: Sequence[str], count: int, side: int, directory: Path, seed: int
) -> data.Dataset:
    """`count` images of the prompts in turn by the model as it is, side x side, in `directory`.

    Image i is a pure function of what made_from.json holds and of i, so only those that are not there yet are made:
    a run that was stopped among them goes on, and more of them leave the first ones as they are.
    """
    check_size(model, side, side)
    made_from: dict[str, Any] = {
        "model": model.identity, "defaults": asdict(model.defaults), "prompts": prompts, "side": side, "seed": seed,
    }  # fmt: skip
    owned.begin(directory, CLASS_FILES, made_from)
    names = [f"{i:04d}.png" for i in range(count)]
    for surplus in {path.name for path in directory.glob(CLASS_FILES[0])} - set(names):
        (directory / surplus).unlink()
    texts = [prompts[i % len(prompts)] for i in range(count)]
    missing = [i for i, name in enumerate(names) if not whole(directory / name)]
    if missing:
        _write_class_images(model, texts, missing, side, [directory / name for name in names], seed)
    files.write_text(directory / "metadata.jsonl", "".join(map(data.metadata_line, names, texts)))
    return data.load_dataset(directory)


def _write_class_images(
    model: DiffusionModel, texts: Sequence[str], missing: Sequence[int], side: int, paths: Sequence[Path], seed: int
) -> None:
    with phase("class images", len(missing), "image") as track:
        encodings = encode(model, [texts[i] for i in missing])
        shape = noise_shape(model, side, side)
        for start in range(0, len(missing), WAITING):
            numbers = missing[start : start + WAITING]
            noises = [mx.array(philox.normal(seed, CLASS_NOISE, i, shape=shape)) for i in numbers]
            images = render(model, encodings, [texts[i] for i in numbers], noises, (side, side))
            for done, (i, image) in enumerate(zip(numbers, images, strict=True), start + 1):
                write_png(paths[i], image)
                track.step(done)
