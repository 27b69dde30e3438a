"""`evaluate`: how like the subject and how true to the prompts an adapter's images are, and how far the rest drifts.

DreamBooth's protocol (arXiv 2208.12242, section 4): 25 prompts, 4 images each, compared by `scores`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_blockskip import lora
from mlx_blockskip.data import Dataset, load_dataset, load_image
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.verify import json_of
from mlx_blockskip.events import Note, Saved, Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.vision.encoder import Encoder
from mlx_blockskip.options import to_mapping
from mlx_blockskip.settings import EvaluateSettings
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint import encoders
from mlx_blockskip.tasks.checkpoint.adapters import here, load_adapters, recorded
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.defaults import DrawConfig, check_seeds, draw_config
from mlx_blockskip.tasks.evaluate.scores import Picture, Rows, drift, similarity, tables, write_sheet
from mlx_blockskip.tasks.evaluate.subject import PLACE, Prompts, Subject, complete_prompts, given_prompts, subject_of
from mlx_blockskip.tasks.memory.check import budget_of, check_generation, images_at_once
from mlx_blockskip.tasks.memory.trace import traced
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.denoise import seeded_noise
from mlx_blockskip.tasks.sampling.pictures import Shot, draw, whole
from mlx_blockskip.tasks.targets import check_writable

REPORT, SHEET = "evaluation.json", "evaluation.png"
FREE_TO_CHANGE = (
    *("output", "overwrite", "memory_budget", "trace_memory", "adapter_path", "model", "data"),
    *("vision_model", "clip_model", "prompts", "drift_prompts"),
)
"""Settings that do not change what is found, or whose meaning is compared."""
WAITING = 32
"""Images that are made in one sweep, at most; what is written so far is not made again by a run that goes on."""
TOGETHER = 16
"""Images that are read from disk to be embedded."""


@dataclass(frozen=True)
class Evaluation:
    """Means over all images, and where the report and the contact sheet are. drift: of the prompts without the subject,
    the mean cosine of DINO between an image of the base model and one of the adapted model; None where not asked for.
    """

    dino: float
    clip_i: float
    clip_t: float
    drift: float | None
    report: Path
    sheet: Path


@traced
def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Generate images with an adapter, compare them, and write what is found beside them. See `EvaluateSettings`."""
    place = here(settings.adapter_path)
    check(settings, place)
    said = recorded(place)
    settings = from_adapter(settings, said)
    dataset = load_dataset(Path(settings.data or "").expanduser(), "")
    for text in dataset.warnings:
        emit(Warning(text))
    captions = said.get("captions") or [example.caption for example in dataset.examples]
    subject = subject_of(captions, settings.subject, settings.class_noun)
    given = given_prompts(settings)

    model = open_named(settings.model or "", budget_of(settings.memory_budget))
    settings, prompts = complete_prompts(settings, given, model)
    how = draw_config(settings, model)
    vision = encoders.vision_encoder(settings.vision_model, model.path)
    clip = encoders.clip_encoder(settings.clip_model, model.path)
    adapter = load_adapters(model, [str(place)], [settings.lora_scale])
    with lora.worn(model, adapter):
        check_generation(how, model, 1)
    emit(Note(f'the subject is called "{subject.phrase}", and "{subject.noun}" where texts are compared'))
    identities = {
        "model": model.identity, "adapter": adapter.checksum(), "data": dataset.identity,
        "vision": vision.identity, "clip": clip.identity,
    }  # fmt: skip
    output = Path(settings.output).expanduser() if settings.output else evaluation_directory(settings.adapter_path)
    plan = Plan(settings, how, subject, output, identities)
    with alone(output / ".lock"):
        by_adapted, by_base = (plan.pictures(prompts, adapted=adapted) for adapted in (True, False))
        check_report(plan, by_adapted, settings.overwrite)
        kept = {"adapter_path": [settings.adapter_path], "lora_scale": [settings.lora_scale]}
        with lora.worn(model, adapter) as tree:
            make(model, how, [*by_adapted.subject, *by_adapted.others], tree, {"model": settings.model, **kept})
        del adapter, tree
        make(model, how, [*by_base.subject, *by_base.others], {}, {"model": settings.model})
        found = compare(dataset, by_adapted, by_base, vision, clip)
        report = {**plan.report(), **found}
        files.write_json(output / REPORT, report)
        write_sheet(output / SHEET, dataset, report, output)
    tables(report, dataset)
    emit(Saved(output / REPORT, "evaluation"))
    emit(Saved(output / SHEET, "contact sheet"))
    means, drifted = report["means"], report["drift"]["means"]["dino"] if report["drift"] else None
    return Evaluation(means["dino"], means["clip_i"], means["clip_t"], drifted, output / REPORT, output / SHEET)


def check(settings: EvaluateSettings, adapter: Path) -> None:
    """Raise UserError for what is wrong whatever the model is."""
    check_seeds(settings.seed, max(settings.n_images, settings.drift_images))
    if not adapter.exists():
        raise UserError(f"{adapter}: no such adapter; --adapter-path takes an adapter directory or a LoRA file")
    if settings.output and Path(settings.output).expanduser().is_file():
        raise UserError(f"{settings.output}: is a file; --output takes a directory")
    if settings.prompts and settings.subject_kind:
        raise UserError("--prompts and --subject-kind: both say which prompts; give one of them")


@dataclass(frozen=True)
class Pictures:
    """Of the prompts that name the subject, and of the others, by one model."""

    subject: list[Picture]
    others: list[Picture]


def compare(dataset: Dataset, adapted: Pictures, base: Pictures, vision: Encoder, clip: Encoder) -> dict[str, Any]:
    """Embed everything once, and say how like it is."""
    real = [example.path for example in dataset.examples]
    made = [*adapted.subject, *adapted.others, *base.subject, *base.others]
    dino = embed(vision, "DINO", [*real, *(picture.path for picture in made)])
    clip_i = embed(clip, "CLIP", [*real, *(picture.path for picture in made)])
    clip_t = embed_prompts(clip, [picture.about for picture in made])
    names = [str(path) for path in real]
    report = similarity(adapted.subject, names, dino, clip_i, clip_t)
    report["baseline"] = similarity(base.subject, names, dino, clip_i, clip_t) if base.subject else None
    report["drift"] = drift(base.others, adapted.others, dino, clip_i, clip_t) if base.others else None
    return report


def from_adapter(settings: EvaluateSettings, recorded: Mapping[str, Any]) -> EvaluateSettings:
    """Model and images as the adapter records them, where they were left open. Raises UserError where it does not."""
    model = settings.model or recorded.get("base_model")
    data = settings.data or recorded.get("settings", {}).get("data")
    for name, value in (("model", model), ("data", data)):
        if not value:
            raise UserError(f"--{name}: {settings.adapter_path} is no adapter directory that records it; give it")
    return replace(settings, model=model, data=data)


def evaluation_directory(adapter: str) -> Path:
    """Inside an adapter directory; beside a LoRA file; in the working directory for one of the Hub."""
    place = Path(adapter).expanduser()
    if place.is_dir():
        return place / "evaluation"
    stem = Path(adapter.rstrip("/").rpartition("/")[2]).stem
    return (place.parent if place.is_file() else Path()) / f"{stem}-evaluation"


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and with what."""

    settings: EvaluateSettings
    how: DrawConfig
    subject: Subject
    output: Path
    identities: Mapping[str, str]

    def pictures(self, prompts: Prompts, *, adapted: bool) -> Pictures:
        """By the adapted model or the base model. Image i of every prompt has the same seed, so noises are the same."""
        count = self.settings.n_images if adapted or self.settings.baseline else 0
        return Pictures(
            self._pictures(prompts.subject, count, adapted),
            self._pictures(prompts.others, self.settings.drift_images, adapted),
        )

    def _pictures(self, templates: Sequence[str], count: int, adapted: bool) -> list[Picture]:
        found = []
        for template in templates:
            prompt, about = (template.replace(PLACE, words) for words in (self.subject.phrase, self.subject.noun))
            for seed in range(self.settings.seed, self.settings.seed + count):
                side = "adapted" if adapted else "base"
                name = f"{side}-{slug(prompt)}-{seed}-{self.key(prompt, seed, adapted)}.png"
                found.append(Picture(prompt, about, seed, adapted, self.output / "images" / name))
        return found

    def key(self, prompt: str, seed: int, adapted: bool) -> str:
        """Of all that an image depends on. An image under its key is whole, and never needs to be made again."""
        parts: dict[str, Any] = {**self.how.recorded(), "negative_prompt": self.how.negative_prompt}
        parts |= {"model": self.identities["model"], "prompt": prompt, "seed": seed}
        parts["adapter"] = self.identities["adapter"] if adapted else None
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        """What the numbers are of."""
        completed = {**to_mapping(self.settings), **self.how.recorded()}
        return {
            "format": 1, "subject": asdict(self.subject), "identities": dict(self.identities), "settings": completed,
        }  # fmt: skip


def check_report(plan: Plan, adapted: Pictures, overwrite: bool) -> None:
    """Raise UserError where the directory has the report of another evaluation."""
    for path in (plan.output / REPORT, plan.output / SHEET):
        check_writable(path, "--output")
    held = [path for path in (plan.output / REPORT, plan.output / SHEET) if path.exists()]
    if held and not overwrite and compared(json_of(held[0])[0]) != compared(plan.report(), adapted):
        raise UserError(f"{held[0]}: is of other settings; give another --output, or --overwrite to replace it")


def compared(report: Mapping[str, Any], adapted: Pictures | None = None) -> dict[str, Any]:
    """What an evaluation has in common with one that it may replace. adapted: in place of the report's prompts."""
    made = report.get("prompts") if adapted is None else [{"prompt": one.prompt} for one in adapted.subject]
    prompts = [one.get("prompt") if isinstance(one, dict) else None for one in made or []]
    settings = report.get("settings")
    kept = settings.items() if isinstance(settings, dict) else ()
    return {
        "of": [report.get("subject"), report.get("identities")],
        "settings": {name: value for name, value in kept if name not in FREE_TO_CHANGE},
        "prompts": list(dict.fromkeys(prompts)),
    }


def slug(prompt: str) -> str:
    """The beginning of a prompt, as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")


def make(
    model: DiffusionModel,
    how: DrawConfig,
    pictures: Sequence[Picture],
    tree: lora.Tree,
    settings: Mapping[str, Any],
) -> None:
    """Make the images that are not there yet, as many in one sweep as the memory budget takes. settings: to keep in the
    files, beside how each is drawn.
    """
    missing = [picture for picture in pictures if not whole(picture.path)]
    if len(missing) < len(pictures):
        emit(Note(f"{len(pictures) - len(missing)} of {len(pictures)} images are there already"))
    size = images_at_once(how, model, min(WAITING, len(missing))) if missing else 1
    for start in range(0, len(missing), size):
        shots = [
            Shot(
                p.prompt,
                seeded_noise(model, p.seed, how.width, how.height),
                p.path,
                {**settings, **how.recorded(), "prompt": [p.prompt], "seed": p.seed},
            )
            for p in missing[start : start + size]
        ]
        draw(model, how, shots, tree)


def embed(encoder: Encoder, name: str, paths: Sequence[Path]) -> Rows:
    """The embedding of each image, by its path."""
    found: dict[str, np.ndarray] = {}
    with phase(f"embed images, {name}", len(paths), "image", release=encoder.release) as track:
        for start in range(0, len(paths), TOGETHER):
            some = paths[start : start + TOGETHER]
            rows = encoder.embed_images([load_image(path) for path in some])
            found |= zip(map(str, some), rows, strict=True)
            track.step(start + len(some))
    return found


def embed_prompts(encoder: Encoder, prompts: Sequence[str]) -> Rows:
    """The embedding of each prompt, by the prompt."""
    texts = list(dict.fromkeys(prompts))
    with phase("embed prompts, CLIP", len(texts), "prompt", release=encoder.release) as track:
        found = dict(zip(texts, encoder.embed_texts(texts), strict=True))
        track.step(len(texts))
    return found
