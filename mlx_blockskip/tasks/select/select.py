"""`select`: which blocks to skip, by what masked attention from image to text changes (Eq. 2, Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip import masking, selection
from mlx_blockskip.blockskip.plan import budget
from mlx_blockskip.blockskip.selection import FULL, Distances
from mlx_blockskip.data import Dataset, load_dataset
from mlx_blockskip.engine import files, sealed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Saved, Table, Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.vision.encoder import Encoder
from mlx_blockskip.options import to_mapping
from mlx_blockskip.settings import SelectSettings
from mlx_blockskip.tasks.checkpoint.adapters import here, load_adapters, recorded
from mlx_blockskip.tasks.checkpoint.encoders import clip_encoder, vision_encoder
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.defaults import check_seeds, check_size, draw_config
from mlx_blockskip.tasks.memory.check import budget_of, check_generation
from mlx_blockskip.tasks.memory.trace import trace_paths, traced
from mlx_blockskip.tasks.select import plot
from mlx_blockskip.tasks.select.masked import Masks, Series, distances, make
from mlx_blockskip.tasks.skipping.choice import FILE
from mlx_blockskip.tasks.skipping.probe import ProbeSettings, probe_subject
from mlx_blockskip.tasks.targets import chosen

SHOWN_RATIOS = (0.3, 0.4, 0.5)
"""The paper's skip ratios."""


@dataclass(frozen=True)
class Selection:
    """Where the plans are, and the table that they come from; None for sliding windows, which make no plan."""

    path: Path
    distances: Distances | None


@dataclass(frozen=True)
class Subjects:
    """What is measured: a model with each of these adapters (an empty one is the base model). k: the most to skip."""

    settings: SelectSettings
    model: DiffusionModel
    adapters: Sequence[lora.Adapter]
    dataset: Dataset | None
    k: int
    images: Path


Measured = tuple[Distances | None, dict[str, Any]]
"""The table, if there is one, and what else is recorded."""


@traced
def select(settings: SelectSettings) -> Selection:
    """Measure what masking does and write the plan for every number of blocks. See `SelectSettings`."""
    target, picture = output_paths(settings)
    dataset = load_dataset(Path(settings.data).expanduser(), _only(settings.prompt)) if settings.data else None
    if dataset is None and settings.method == "probe":
        raise UserError("--data: give a directory of the subject's images to probe with, or another --method")
    for text in dataset.warnings if dataset else ():
        emit(Warning(text))
    model = open_named(settings.model, budget_of(settings.memory_budget))
    depth = model.stack.depth
    k = largest(settings.skip_ratio, depth)
    adapters = [load_adapters(model, [path], []) for path in settings.adapter_path]
    images = target.with_name(f"{target.stem}_images")
    measure = {"probe": by_probe, "generate": by_images, "sliding": by_windows}[settings.method]
    table, measured = measure(Subjects(settings, model, adapters or [lora.Adapter()], dataset, k, images))
    record = {
        "format": 1,
        "method": settings.method,
        "model": settings.model,
        "model_identity": model.identity,
        "adapters": [adapter.checksum() for adapter in adapters],
        "data": dataset.identity if dataset else None,
        "settings": {key: value for key, value in to_mapping(settings).items() if key not in LEFT_OUT},
        "depth": depth,
        **(selection.as_json(table, depth) if table else {}),
        **measured,
    }
    files.write_json(target, sealed.seal(record))
    emit(summary(record, table, depth))
    emit(Saved(target, "block selection"))
    drawn = plot.write(picture, record, model.stack.kinds)
    emit(Saved(picture, "picture of it") if drawn else Note(plot.ABSENT))
    return Selection(target, table)


def by_probe(subjects: Subjects) -> Measured:
    """Distances of predicted velocities; nothing is generated."""
    assert subjects.dataset is not None
    probe = probe_settings(subjects.settings, subjects.model, subjects.k)
    tables, (done, alone) = probe_subject(subjects.model, subjects.dataset, probe, subjects.adapters)
    emit(Note(f"{done} block evaluations; {alone} without sharing what variants have in common"))
    measurements = [_curves(table, {"adapter": number}) for number, table in enumerate(tables)]
    counts = {"evaluations": done, "evaluations_without_sharing": alone}
    return selection.mean(tables), {"measurements": measurements, **counts}


def by_images(subjects: Subjects) -> Measured:
    """Algorithm 1: distances of images with the first n, and with the last m blocks masked."""
    depth = subjects.model.stack.depth
    variants = {f"{end}-{count:02d}": (end, count) for end, count in selection.variants(subjects.k)}
    masks = {name: selection.masks_of(variant, depth) for name, variant in variants.items()}
    found, how = masked_images(subjects, masks)
    tables = [selection.collect({variants[name]: d for name, d in one.items()}, subjects.k) for _, one in found]
    measurements = [_curves(table, where) for (where, _), table in zip(found, tables, strict=True)]
    return selection.mean(tables), {"measurements": measurements, "encoder": how}


def by_windows(subjects: Subjects) -> Measured:
    """The paper's Figure 3: distances of images with a window of consecutive blocks masked."""
    depth, width = subjects.model.stack.depth, subjects.settings.window
    if width > depth:
        raise UserError(f"--window {width}: the model has {depth} blocks")
    spans = {f"window-{start:02d}": (start, stop) for start, stop in selection.windows(depth, width)}
    masks: Masks = {f"{FULL}-00": {}} | {name: masking.image_to_text(range(*span)) for name, span in spans.items()}
    found, how = masked_images(subjects, masks)
    means = {name: sum(one[name] for _, one in found) / len(found) for name in spans}
    windows = [{"start": start, "stop": stop, "distance": means[name]} for name, (start, stop) in spans.items()]
    measurements = [{**where, "windows": list(one.values())} for where, one in found]
    return None, {"windows": windows, "measurements": measurements, "encoder": how}


def _curves(table: Distances, where: dict[str, Any]) -> dict[str, Any]:
    return {**where, "first": list(table.first), "last": list(table.last)}


LEFT_OUT = ("output", "overwrite", "memory_budget", "trace_memory", "model", "adapter_path", "data")
"""Settings that do not change what is measured, or that are recorded by what they mean."""


def with_picture(path: Path) -> list[Path]:
    """The JSON file and the picture beside it."""
    return [path, path.with_suffix(".png")]


def output_paths(settings: SelectSettings) -> tuple[Path, Path]:
    """The JSON file and the picture beside it. Raises UserError for settings that are wrong by themselves."""
    if settings.output is not None and Path(settings.output).suffix != ".json":
        raise UserError(f"{settings.output}: the selection is written as JSON; let --output end in .json")
    check_seeds(settings.seed, settings.n_images)
    target = chosen(settings.output, FILE, "--output", settings.overwrite, with_picture)
    picture = target.with_suffix(".png")
    if picture in trace_paths(settings.trace_memory) or target in trace_paths(settings.trace_memory):
        raise UserError(f"--trace-memory {settings.trace_memory}: is what this run writes; choose another name")
    return target, picture


def largest(ratio: float, depth: int) -> int:
    """k of the largest ratio that plans are wanted for. Raises UserError."""
    k = budget(ratio, depth)
    if k < 1:
        raise UserError(f"--skip-ratio {ratio:g}: skips none of {depth} blocks; {1 / depth:.2f} is the least")
    return k


def probe_settings(settings: SelectSettings, model: DiffusionModel, k: int) -> ProbeSettings:
    """How to probe, with what was left open from the model's defaults."""
    defaults = model.defaults
    side = settings.resolution
    if side is None:
        side = defaults.resolution if defaults.patch_mode == "none" else defaults.train_resolution
    check_size(model, side, side)
    length = settings.max_sequence_length or defaults.max_sequence_length
    guidance = defaults.guidance if settings.guidance is None else settings.guidance
    return ProbeSettings(
        k, settings.probe_images, settings.noise_levels, settings.stride, side, length, guidance, settings.seed
    )


def encoder_of(settings: SelectSettings, model: DiffusionModel) -> Encoder:
    """The encoder whose distance is D."""
    if settings.distance == "clip":
        return clip_encoder(settings.clip_model, model.path)
    return vision_encoder(settings.vision_model, model.path)


def masked_images(
    subjects: Subjects, masks: Masks
) -> tuple[list[tuple[dict[str, Any], dict[str, float]]], dict[str, str]]:
    """Make the images of every adapter, prompt and seed, and measure them: (which one, distances by mask); and how."""
    settings, model = subjects.settings, subjects.model
    encoder = encoder_of(settings, model)
    full = next(iter(masks))
    seeds = range(settings.seed, settings.seed + settings.n_images)
    found: list[tuple[dict[str, Any], dict[str, float]]] = []
    for number, adapter in enumerate(subjects.adapters):
        prompts = prompts_of(settings, number, subjects.dataset)
        how = draw_config(settings, model)
        check_generation(how, model, 1)
        series = Series(prompts, seeds, masks, how, subjects.images / f"adapter{number}")
        make(model, series, adapter)
        measured = distances(series, encoder, full)
        for (prompt, seed), one in zip(series.places, measured, strict=True):
            found.append(({"adapter": number, "prompt": prompts[prompt], "seed": seed}, one))
    return found, {"distance": settings.distance, "identity": encoder.identity}


def prompts_of(settings: SelectSettings, number: int, dataset: Dataset | None) -> list[str]:
    """What is given; else the captions that an adapter was trained on; else those of the images. Raises UserError."""
    prompts = list(settings.prompt)
    if not prompts and settings.adapter_path:
        prompts = list(recorded(here(settings.adapter_path[number])).get("captions", []))
    if not prompts and dataset is not None:
        prompts = list(dict.fromkeys(example.caption for example in dataset.examples))
    if not prompts:
        raise UserError("--prompt: say what to show; the adapter records no captions")
    return prompts


def summary(record: dict[str, Any], table: Distances | None, depth: int) -> Table:
    """The plans for the paper's ratios, or the windows that matter most."""
    if table is None:
        windows = sorted(record["windows"], key=lambda window: -window["distance"])
        shown = tuple((f"{w['start']}-{w['stop'] - 1}", f"{w['distance']:.4f}") for w in windows[:5])
        return Table("Windows that change most", ("blocks", "distance"), shown)
    rows: list[tuple[str, ...]] = []
    for k in dict.fromkeys([*(budget(ratio, depth) for ratio in SHOWN_RATIOS), table.k]):
        if 0 < k <= table.k:
            n, m = table.best(k)
            rows.append((f"{k / depth:.0%}", str(k), str(n), str(m), f"{table.first[n] + table.last[m]:.4f}"))
    return Table("Blocks to skip", ("ratio", "k", "n (first)", "m (last)", "distance"), tuple(rows))


def _only(prompts: Sequence[str]) -> str | None:
    return prompts[0] if len(prompts) == 1 else None
