"""The skip plan of a training run: what the user gave, what the model records, or what a probe of the subject finds."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip import plan as plans
from mlx_blockskip.blockskip import selection
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.data import Dataset
from mlx_blockskip.engine import files, listing, sealed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.defaults import TrainConfig
from mlx_blockskip.tasks.skipping.probe import ProbeSettings, probe_subject
from mlx_blockskip.tasks.targets import free

AUTO, EVEN = "auto", "even"
IMAGES, LEVELS, LOOKS = 2, 2, 8
"""A probe before training: images and noise levels of the subject, and about how many n and m it looks at."""

FILE = "selection.json"


def known_plan(settings: TrainSettings, model: DiffusionModel) -> SkipPlan | None:
    """The plan where it is known without a probe. Raises UserError for one that is wrong."""
    depth, recorded = model.stack.depth, model.defaults.plans
    ends = settings.skip_first is not None or settings.skip_last is not None
    ratio = _ratio(settings, model)
    if ends or settings.plan not in (None, AUTO, EVEN):
        return plans.choose(
            depth, ratio=settings.skip_ratio, first=settings.skip_first, last=settings.skip_last, file=settings.plan
        )
    if settings.plan == EVEN or plans.budget(ratio, depth) == 0:
        return even_plan(settings, model)
    if settings.plan == AUTO or f"{ratio:g}" not in recorded:
        return None
    return plans.choose(depth, ratio=ratio, recorded=recorded)


def even_plan(settings: TrainSettings, model: DiffusionModel) -> SkipPlan:
    """As many blocks at the start as at the end."""
    return SkipPlan.from_ratio(_ratio(settings, model), model.stack.depth)


def probed_plan(
    settings: TrainSettings, config: TrainConfig, model: DiffusionModel, dataset: Dataset, directory: Path
) -> SkipPlan:
    """Probe the base model on the subject's images; what was found is kept in the adapter directory."""
    ratio, depth = _ratio(settings, model), model.stack.depth
    k = plans.budget(ratio, depth)
    probe = ProbeSettings(
        k, IMAGES, LEVELS, math.ceil(k / LOOKS), config.patch.output_side, config.max_sequence_length,
        model.defaults.guidance, config.seed,
    )  # fmt: skip
    made_from = {"model_identity": model.identity, "data": dataset.identity, "probe": asdict(probe)}
    path = directory / FILE
    found = _probed_before(directory, made_from)
    if found is None:
        emit(Note(f"Probing which blocks to skip at a ratio of {ratio:g}; --plan even takes both ends alike instead"))
        (table,), _ = probe_subject(model, dataset, probe, [lora.Adapter()])
        found = {"format": 1, "method": "probe", **made_from, **selection.as_json(table, depth)}
        path = free(path)
        files.write_json(path, sealed.seal(found))
    return plans.from_selection(found, ratio, depth, path)


def _probed_before(directory: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run has found by the same probe, whatever its file is called; another's is left alone."""
    for path in listing.visible(directory, f"{Path(FILE).stem}*.json"):
        try:
            found = sealed.opened(path, files.read_json(path), "it is passed over")
        except UserError:  # another's, or damaged
            continue
        if all(found.get(key) == value for key, value in made_from.items()):
            return found
    return None


def _ratio(settings: TrainSettings, model: DiffusionModel) -> float:
    return model.defaults.skip_ratio if settings.skip_ratio is None else settings.skip_ratio
