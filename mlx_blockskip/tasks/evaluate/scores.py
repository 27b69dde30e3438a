"""What an evaluation finds, as numbers, tables and a picture.

DINO, CLIP-I: mean cosine over all pairs of a generated image and one of the subject's. CLIP-T: mean cosine of an image
and its prompt, the identifier left out. Source: DreamBooth (arXiv 2208.12242), section 4. Drift is our own: the cosine
of the base model's image and the adapted model's from the same noise, for prompts that do not name the subject.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from mlx_blockskip.data import Dataset, grid, load_image
from mlx_blockskip.engine import files
from mlx_blockskip.events import Table, emit
from mlx_blockskip.metrics import mean_among, mean_pairwise

THUMBNAIL = 192

Rows = Mapping[str, np.ndarray]
"""Embeddings by what was embedded: a text, or an image's path."""


@dataclass(frozen=True)
class Picture:
    """One generated image. about: the text that it is compared with."""

    prompt: str
    about: str
    seed: int
    adapted: bool
    path: Path


def similarity(
    pictures: Sequence[Picture], real: Sequence[str], dino: Rows, clip_i: Rows, clip_t: Rows
) -> dict[str, Any]:
    """Of each image, each prompt and all: DINO and CLIP-I to the subject's images, CLIP-T to the prompt.

    real: also how like each other the subject's own images are, which is the most that can be asked for.
    """
    images = {}
    for picture in pictures:
        path = str(picture.path)
        images[picture] = {
            "dino": mean_pairwise(dino[path][None], _rows(dino, real)),
            "clip_i": mean_pairwise(clip_i[path][None], _rows(clip_i, real)),
            "clip_t": mean_pairwise(clip_i[path][None], clip_t[picture.about][None]),
        }
    own = {"dino": mean_among(_rows(dino, real)), "clip_i": mean_among(_rows(clip_i, real))}
    return {"means": _means(list(images.values())), "real": own, "prompts": _by_prompt(images)}


def drift(
    base: Sequence[Picture], adapted: Sequence[Picture], dino: Rows, clip_i: Rows, clip_t: Rows
) -> dict[str, Any]:
    """Of prompts that do not name the subject: how like the adapted model's images are to the base model's of the same
    seed, and CLIP-T of both.
    """
    images = {}
    for before, after in zip(base, adapted, strict=True):
        b, a = str(before.path), str(after.path)
        images[after] = {
            "base": f"images/{before.path.name}",
            "dino": mean_pairwise(dino[b][None], dino[a][None]),
            "clip_i": mean_pairwise(clip_i[b][None], clip_i[a][None]),
            "clip_t_base": mean_pairwise(clip_i[b][None], clip_t[before.about][None]),
            "clip_t": mean_pairwise(clip_i[a][None], clip_t[after.about][None]),
        }
    return {"means": _means(list(images.values())), "prompts": _by_prompt(images)}


def _rows(by_name: Rows, names: Sequence[str]) -> np.ndarray:
    return np.stack([by_name[name] for name in names])


def _by_prompt(images: Mapping[Picture, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    about = {}
    for picture, scores in images.items():
        about[picture.prompt] = picture.about
        record = {"file": f"images/{picture.path.name}", "seed": picture.seed, **scores}
        found.setdefault(picture.prompt, []).append(record)
    return [
        {"prompt": prompt, "compared_with": about[prompt], **_means(records), "images": records}
        for prompt, records in found.items()
    ]


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every score."""
    names = [name for name, value in records[0].items() if isinstance(value, float)]
    return {name: float(np.mean([record[name] for record in records])) for name in names}


def tables(report: Mapping[str, Any], dataset: Dataset) -> None:
    """The result for a person."""
    means, real = report["means"], report["real"]
    rows = [_row(prompt["prompt"], prompt, ("dino", "clip_i", "clip_t")) for prompt in report["prompts"]]
    rows.append(_row("mean", means, ("dino", "clip_i", "clip_t")))
    if report["baseline"]:
        rows.append(_row("mean of the base model", report["baseline"]["means"], ("dino", "clip_i", "clip_t")))
    rows.append(_row("the subject's images among themselves", real, ("dino", "clip_i", "clip_t")))
    title = f"Similarity to the subject's images ({len(dataset.examples)}) and to the prompt"
    emit(Table(title, ("prompt", "DINO", "CLIP-I", "CLIP-T"), tuple(rows)))
    if report["drift"]:
        names = ("dino", "clip_i", "clip_t_base", "clip_t")
        rows = [_row(prompt["prompt"], prompt, names) for prompt in report["drift"]["prompts"]]
        rows.append(_row("mean", report["drift"]["means"], names))
        columns = ("prompt", "DINO", "CLIP-I", "CLIP-T before", "CLIP-T after")
        emit(Table("Drift: images without the subject, before and after, from the same noise", columns, tuple(rows)))


def _row(label: str, scores: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return label, *("-" if scores.get(name) is None else f"{scores[name]:.4f}" for name in names)


def write_sheet(path: Path, dataset: Dataset, report: Mapping[str, Any], output: Path) -> None:
    """The subject, then a row a prompt; of drift, each base image with the adapted one beside it."""
    rows, labels = [[example.path for example in dataset.examples]], ["the subject"]
    for prompt in report["prompts"]:
        rows.append([output / image["file"] for image in prompt["images"]])
        labels.append(f"{prompt['prompt']}: DINO {prompt['dino']:.2f}, CLIP-T {prompt['clip_t']:.2f}")
    for prompt in (report["drift"] or {"prompts": []})["prompts"]:
        rows.append([output / image[side] for image in prompt["images"] for side in ("base", "file")])
        labels.append(f"{prompt['prompt']}, before and after: DINO {prompt['dino']:.2f}")
    sheet = grid([[_thumbnail(image) for image in row] for row in rows], labels)
    with files.atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _thumbnail(path: Path) -> PillowImage.Image:
    """The image in a square, white beside it."""
    image = load_image(path)
    scale = THUMBNAIL / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    square = PillowImage.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(image, ((THUMBNAIL - image.width) // 2, (THUMBNAIL - image.height) // 2))
    return square
