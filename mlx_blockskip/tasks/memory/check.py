"""Whether a run fits its memory budget, before it begins; and, where it does not, the nearest setting that does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import family_named, read_config
from mlx_blockskip.tasks.defaults import DrawConfig, TrainConfig, model_draws
from mlx_blockskip.tasks.memory import predict
from mlx_blockskip.tasks.memory.limit import LEAST, MARGIN, budget_of, fits
from mlx_blockskip.tasks.memory.predict import Phase, Shape, Tracer
from mlx_blockskip.tasks.sampling.previews import WAITING as CLASS_WAITING


def check_training(settings: TrainConfig, model: DiffusionModel, plan: SkipPlan) -> bool:
    """Whether weights and activations can all stay in memory. Raises UserError where the run cannot fit at all."""
    budget = budget_of(settings.memory_budget)
    if budget is None or budget == LEAST:
        return budget is None
    check_blocks(settings.memory_budget, budget, model)
    phases = training_phases(settings, model, plan)
    _check(settings.memory_budget, budget, phases, _smaller_training(settings, model, plan, budget))
    return fits(next(phase for phase in phases if phase.name == "train").ample, budget)


def check_generation(settings: DrawConfig, model: DiffusionModel, images: int) -> None:
    """Raise UserError where `images` images cannot be made within the budget."""
    budget = budget_of(settings.memory_budget)
    if budget is None or budget == LEAST:
        return
    check_blocks(settings.memory_budget, budget, model)
    phases = generation_phases(settings, model, images)
    _check(settings.memory_budget, budget, phases, _smaller_generation(settings, model, budget))


def check_blocks(text: str, budget: int, model: DiffusionModel) -> None:
    """Raise UserError where the largest block alone is over the budget, which is known without tracing anything: then
    no other setting helps.
    """
    largest = max(model.reader.nbytes(index, "body") for index in model.stack.path)
    if largest > budget:
        raise UserError(
            f"--memory-budget {text}: too small, the largest block alone takes {_megabytes(largest)}; give more, "
            "or 0 for the least that is possible"
        )


def images_at_once(settings: DrawConfig, model: DiffusionModel, most: int) -> int:
    """How many images, each of a prompt of its own, can be made in one sweep within the budget: `most`, or its halves
    down to one.
    """
    budget = budget_of(settings.memory_budget)
    if most <= 1 or budget is None:
        return most
    if budget == LEAST:
        return 1
    step = _generating(replace(settings, n_images=1), model)
    while most > 1 and not fits(step(most).peak, budget):
        most //= 2
    return most


def training_phases(settings: TrainConfig, model: DiffusionModel, plan: SkipPlan) -> list[Phase]:
    """What the phases of a training run take, but for prompts, whose encoders were not opened."""
    s_max, length, batch, rank = settings.resolution, settings.max_sequence_length, settings.batch_size, settings.rank
    side = settings.patch.output_side
    family = family_named(read_config(model.path)["family"])
    modules = lora.targets(family.lora_targets, settings.lora_targets)
    tracer = Tracer(model, Shape(side, side, length, batch), rank, modules)
    images = predict.images(model, side, side, decoding=False)
    phases = [
        tracer.beside_adapter(images, plan, settings.residuals),
        tracer.precompute(plan, settings.residuals, tracer.together(settings.batches)),
        tracer.train(plan.retained, settings.grad_accumulation, settings.residuals == "fresh"),
    ]
    if settings.init_adapter:  # it stays as it was, since the features of base residuals are those with it
        phases = [replace(phase, peak=phase.peak + tracer.adapter(plan)) for phase in phases]
    if settings.class_prompt and settings.class_images:
        phases += _drawing(model, s_max, s_max, CLASS_WAITING, len(settings.class_prompt))
    if settings.steps_per_sample:
        prompts = max(1, len(settings.sample_prompt))
        phases += _drawing(model, model.defaults.width, model.defaults.height, prompts, prompts)
    return phases


def generation_phases(settings: DrawConfig, model: DiffusionModel, images: int) -> list[Phase]:
    """What a step of all images takes, and decoding one."""
    width, height = model.native_size(settings.width, settings.height)
    decoding = predict.images(model, width, height, decoding=True)
    return [_generating(settings, model)(images), decoding]


def _generating(settings: DrawConfig, model: DiffusionModel) -> Callable[[int], Phase]:
    """Says what a step of so many images takes."""
    branches = 2 if settings.guided else 1
    size = model.native_size(settings.width, settings.height)
    tracer = Tracer(model, Shape(*size, settings.max_sequence_length))

    def step(images: int) -> Phase:
        prompts = images // settings.n_images + branches - 1
        return tracer.generate(settings.steps, images * branches, prompts)

    return step


def _drawing(model: DiffusionModel, width: int, height: int, images: int, prompts: int) -> list[Phase]:
    settings = replace(model_draws(model, width, height), n_images=max(1, images // max(1, prompts)))
    return generation_phases(settings, model, images)


def _check(text: str, budget: int, phases: Sequence[Phase], smaller: Iterator[str]) -> None:
    """Raise UserError where a phase does not fit. smaller: settings that do, lazily.

    What a user asks for is refused only where the peak that was traced is over the budget. What we choose ourselves
    (what is proposed instead, how many images at once, whether activations are kept) has to fit with MARGIN.
    """
    worst = max(phases, key=lambda phase: phase.peak)
    if worst.peak <= budget:
        return
    least, enough = (_megabytes(share * worst.peak) for share in (1, MARGIN))
    nearest = next(smaller, None)
    raise UserError(
        f"--memory-budget {text}: too small, {worst.name!r} takes {least} at least; give --memory-budget {enough}"
        + (f"; the nearest that fits: {nearest}" if nearest else "")
    )


def _megabytes(count: float) -> str:
    return f"{count / 2**20 + 1:.0f}MB"


def _fit(phases: Sequence[Phase], budget: int) -> bool:
    return all(fits(phase.peak, budget) for phase in phases)


def _smaller_training(settings: TrainConfig, model: DiffusionModel, plan: SkipPlan, budget: int) -> Iterator[str]:
    """Changes that make a training run fit, the mildest first."""
    batch, side, rank = settings.batch_size, settings.train_resolution, settings.rank
    smaller = max(model.size_multiple, side // 2 // model.size_multiple * model.size_multiple)
    single = {"batch_size": 1, "grad_accumulation": 1}
    milder: list[dict[str, Any]] = [
        {"grad_accumulation": 1},
        {"batch_size": max(1, batch // 2), "grad_accumulation": 1},
        single,
        {"train_resolution": smaller, **single},
        {"train_resolution": smaller, **single, "rank": min(4, rank)},
    ]
    for change in milder:
        changed = replace(settings, **change)
        if changed != settings and _fit(training_phases(changed, model, plan), budget):
            yield " ".join(
                f"--{name.replace('_', '-')} {value}"
                for name, value in change.items()
                if value != getattr(settings, name)
            )


def _smaller_generation(settings: DrawConfig, model: DiffusionModel, budget: int) -> Iterator[str]:
    """Changes that make the images fit: one at a time, then smaller ones."""
    width, height = settings.width, settings.height
    g = model.size_multiple
    for share, count in ((1, 1), (0.75, 1), (0.5, 1), (0.25, 1)):
        w, h = (max(g, int(side * share) // g * g) for side in (width, height))
        changed = replace(settings, width=w, height=h, n_images=1)
        if _fit(generation_phases(changed, model, count), budget):
            yield "one image at a time" if share == 1 else f"--width {w} --height {h}"
