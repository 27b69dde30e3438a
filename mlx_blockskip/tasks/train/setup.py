"""Setting a training run up: what was left open is filled, the plan chosen, captions encoded, chunks measured."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip.patches import PatchSettings
from mlx_blockskip.blockskip.plan import DEFAULT_RATIO, SkipPlan
from mlx_blockskip.blockskip.residuals import Layout
from mlx_blockskip.data import Dataset, load_dataset
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.settings import TrainSettings, parse_size, required, to_mapping
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.previews import class_images
from mlx_blockskip.tasks.train.precompute import layout
from mlx_blockskip.tasks.train.recipe import Recipe

FALLBACK: dict[str, Any] = {
    "skip_ratio": DEFAULT_RATIO,
    "patch_mode": "dynamic",
    "rank": 16,
    "learning_rate": 1e-4,
    "iters": 1000,
    "batch_size": 1,
    "class_images": 100,
    "prior_weight": 1.0,
}
"""Where neither the model nor its family records a default."""

CACHE_FILES = ("prompts.safetensors", "latents.safetensors", "chunk-*.safetensors", "moments")
"""What the cache in an adapter directory holds while a run is under way."""

FREE_TO_CHANGE = (
    *("model", "data", "adapter_path", "resume", "memory_budget", "trace_memory", "cache_limit", "plan"),
    *("skip_ratio", "skip_first", "skip_last", "steps_per_save", "steps_per_sample", "sample_prompt"),
    *("class_prompt", "class_images", "class_data"),
)
"""Settings that a resumed run may give differently; those that matter are in the fingerprint by what they mean."""


@dataclass
class Job:
    """A run under way. ample: weights, activations and moments all stay in memory."""

    settings: TrainSettings
    directory: Path
    model: DiffusionModel
    recipe: Recipe
    layout: Layout
    chunk_length: int  # micro-batches
    identity: dict[str, Any]
    ample: bool

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Inside, blocks that are read stay in memory, where it is ample."""
        reader = self.model.reader
        budget, reader.budget = reader.budget, None if self.ample else reader.budget
        try:
            yield
        finally:
            reader.budget = budget


def complete(settings: TrainSettings, model: DiffusionModel) -> TrainSettings:
    """Fill what was left open: from the model, then the family, then FALLBACK. Raises UserError for wrong values."""
    if settings.class_data and settings.class_images:
        raise UserError("--class-data and --class-images: give one of them")
    known = {**FALLBACK, **model.defaults}
    known["guidance"] = model.defaults.get("train_guidance")
    names = [name for name, value in to_mapping(settings).items() if value in (None, []) and name in known]
    ratio_left_open = settings.plan or settings.skip_first is not None or settings.skip_last is not None
    filled = replace(settings, **{n: known[n] for n in names if n != "skip_ratio" or not ratio_left_open})
    least = {"iters": 1, "batch_size": 1, "grad_accumulation": 1, "rank": 1, "warmup": 0, "steps_per_save": 0}
    least |= {"steps_per_sample": 0, "seed": 0, "class_images": 0, "prior_weight": 0}
    for name, value in least.items():
        if not value <= getattr(filled, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(filled, name)}: must be at least {value}")
    return _complete_prior(settings, filled)


def _complete_prior(given: TrainSettings, filled: TrainSettings) -> TrainSettings:
    """No images to make where there is nothing to make them of. Raises UserError for options that then mean nothing."""
    if filled.class_prompt and not filled.class_data:
        return filled
    if given.class_images:
        raise UserError(f"--class-images {given.class_images}: say of what with --class-prompt, or give --class-data")
    if given.prior_weight is not None and given.class_images is None and not given.class_data:
        raise UserError(
            f"--prior-weight {given.prior_weight:g}: there are no class images to weigh; "
            "give --class-prompt or --class-data"
        )
    return replace(filled, class_images=0)


def prepare(
    settings: TrainSettings, directory: Path, model: DiffusionModel, dataset: Dataset, plan: SkipPlan, ample: bool
) -> Job:
    """Make the class images, encode the captions and set up what the records are made from."""
    s_max, s_min, length, batch_size = required(
        settings, "resolution", "train_resolution", "max_sequence_length", "batch_size"
    )
    assert settings.prior_weight is not None
    patch = PatchSettings(settings.patch_mode or "dynamic", s_min, s_max, model.granularity)
    if small := sum(side < s_max for side in dataset.short_sides):
        emit(
            Warning(
                f"{small} of {len(dataset.examples)} images have a side of less than {s_max} pixels and are enlarged; "
                f"larger photos, or a smaller --resolution, keep what is learned sharp"
            )
        )
    prior = prior_dataset(settings, directory, model)
    examples = dataset.examples + (prior.examples if prior else ())
    captions = list(dict.fromkeys(example.caption for example in examples))
    with phase("encode prompts", len(captions), "prompt") as track:
        encoded = model.encode_prompts(captions, length)
        store = directory / "cache" / "prompts.safetensors"
        named = {f"{i}.{key}": v for i, prompt in enumerate(encoded.prompts) for key, v in prompt.items()}
        files.save_tensors(store, named)
        track.step(len(captions))
    for caption, cut in zip(captions, encoded.truncated, strict=True):
        if cut:
            emit(Warning(f"the caption is longer than {length} tokens and was cut: {caption}"))
    del encoded, named
    recipe = Recipe(
        model=model,
        stack=lora.attach(model.stack, settings.scale),
        plan=plan,
        dataset=dataset,
        patch=patch,
        mode=settings.residuals,
        seed=settings.seed,
        batch_size=batch_size,
        mean=settings.timestep_mean,
        std=settings.timestep_std,
        guidance=settings.guidance,
        prompts=files.MappedTensors(store),
        prompt_of=[captions.index(example.caption) for example in examples],
        prior=prior,
        prior_weight=settings.prior_weight,
    )
    kept = {k: v for k, v in to_mapping(settings).items() if k not in FREE_TO_CHANGE}
    if settings.lr_schedule == "constant":
        kept.pop("iters")
    identity = {**kept, "model": model.identity, "data": dataset.identity, "plan": plan.to_json()["runs"]}
    identity["prior"] = prior.identity if prior else None
    shape = layout(recipe)
    job = Job(settings, directory, model, recipe, shape, chunk_length(settings, shape), identity, ample)
    job.identity["chunk_length"] = job.chunk_length
    return job


def prior_dataset(settings: TrainSettings, directory: Path, model: DiffusionModel) -> Dataset | None:
    """The class images: the user's own, or made once by the model as it is; None without prior preservation."""
    (side, count) = required(settings, "resolution", "class_images")
    if settings.class_data:
        caption = settings.class_prompt[0] if len(settings.class_prompt) == 1 else None
        prior = load_dataset(
            Path(settings.class_data).expanduser(), caption, option="--class-data", prompt_option="--class-prompt"
        )
    elif settings.class_prompt and count:
        prior = class_images(model, settings.class_prompt, count, side, directory / "class_images", settings.seed)
    else:
        return None
    for text in prior.warnings:
        emit(Warning(text))
    return prior


def chunk_length(settings: TrainSettings, shape: Layout) -> int:
    """Micro-batches a chunk: as many whole optimizer steps as the cache limit holds. Raises UserError for none."""
    limit = parse_size(settings.cache_limit, "--cache-limit")
    assert limit is not None
    step = shape.nbytes * settings.grad_accumulation
    steps = limit // step
    if steps < 1:
        raise UserError(
            f"--cache-limit {settings.cache_limit}: one step's records take {step / 2**20:.0f} MiB; raise it"
        )
    if settings.residuals == "fresh":
        if settings.refresh < 1:
            raise UserError(f"--refresh {settings.refresh}: at least one step is needed")
        steps = min(steps, settings.refresh)
    return int(steps * settings.grad_accumulation)
