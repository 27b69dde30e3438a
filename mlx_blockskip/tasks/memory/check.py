"""Whether a run fits its memory budget, before it begins; and, where it does not, the nearest setting that does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import family_named, read_config
from mlx_blockskip.options import parse_size
from mlx_blockskip.tasks.defaults import ANY, DrawConfig, TrainConfig, model_draws
from mlx_blockskip.tasks.memory import predict
from mlx_blockskip.tasks.memory.predict import Phase, Shape, Tracer
from mlx_blockskip.tasks.sampling.previews import WAITING as CLASS_WAITING

AUTO = "auto"
MARGIN = 1.2
"""A phase that did not fit has to fit with this much to spare in what is proposed: a peak differs by an operation's
output from run to run.
"""

ROOM = 2
"""Where a budget is so many times what one trace of a block says, no other is made."""

LEAST = 0
"""A budget of 0 asks for the least that is possible, whatever that is; nothing is refused then."""


def budget_of(text: str | None) -> int | None:
    """Bytes of a --memory-budget: a size, or "auto" for what this machine has. None: any. Raises UserError."""
    if text in (None, ANY):
        return None
    return limits.machine() if text == AUTO else parse_size(text, "--memory-budget")


def check_training(settings: TrainConfig, model: DiffusionModel, plan: SkipPlan) -> bool:
    """Whether weights and activations can all stay in memory. Raises UserError where the run cannot fit at all."""
    budget = budget_of(settings.memory_budget)
    if budget is None or budget == LEAST:
        return budget is None
    phases = _check(
        settings.memory_budget, budget,
        lambda once: training_phases(settings, model, plan, once),
        lambda too_large: _smaller_training(settings, model, plan, budget, too_large),
    )  # fmt: skip
    return next(phase for phase in phases if phase.name == "train").ample <= budget


def check_generation(settings: DrawConfig, model: DiffusionModel, images: int) -> None:
    """Raise UserError where `images` images cannot be made within the budget."""
    budget = budget_of(settings.memory_budget)
    if budget is None or budget == LEAST:
        return
    _check(
        settings.memory_budget, budget,
        lambda once: generation_phases(settings, model, images, once),
        lambda too_large: _smaller_generation(settings, model, budget, too_large),
    )  # fmt: skip


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
    while most > 1 and step(most).peak > budget:
        most //= 2
    return most


def training_phases(settings: TrainConfig, model: DiffusionModel, plan: SkipPlan, once: bool = False) -> list[Phase]:
    """What the phases of a training run take, but for prompts, whose encoders were not opened. once: see Tracer."""
    s_max, length, batch, rank = settings.resolution, settings.max_sequence_length, settings.batch_size, settings.rank
    side = settings.patch.output_side
    family = family_named(read_config(model.path)["family"])
    modules = lora.targets(family.lora_targets, settings.lora_targets)
    tracer = Tracer(model, Shape(side, side, length, batch, settings.guidance), rank, modules, once=once)
    images = predict.images(model, side, side, decoding=False, once=once)
    phases = [tracer.beside_adapter(images, plan)]
    phases += [
        tracer.precompute(plan, settings.residuals, tracer.together(settings.batches)),
        tracer.train(plan.retained, settings.grad_accumulation, settings.residuals == "fresh"),
    ]
    if settings.class_prompt and settings.class_images:
        phases += _drawing(model, s_max, s_max, CLASS_WAITING, len(settings.class_prompt), once)
    if settings.steps_per_sample:
        prompts = max(1, len(settings.sample_prompt))
        phases += _drawing(model, model.defaults.width, model.defaults.height, prompts, prompts, once)
    return phases


def generation_phases(settings: DrawConfig, model: DiffusionModel, images: int, once: bool = False) -> list[Phase]:
    """What a step of all images takes, and decoding one."""
    width, height = model.native_size(settings.width, settings.height)
    decoding = predict.images(model, width, height, decoding=True, once=once)
    return [_generating(settings, model, once)(images), decoding]


def _generating(settings: DrawConfig, model: DiffusionModel, once: bool = False) -> Callable[[int], Phase]:
    """Says what a step of so many images takes."""
    branches, steps = 2 if settings.guided else 1, settings.steps
    size = model.native_size(settings.width, settings.height)
    shape = Shape(*size, settings.max_sequence_length, guidance=settings.guidance)
    tracer = Tracer(model, shape, once=once)

    def step(images: int) -> Phase:
        prompts = images // settings.n_images + branches - 1
        return tracer.generate(steps, images * branches, prompts)

    return step


def _drawing(model: DiffusionModel, width: int, height: int, images: int, prompts: int, once: bool) -> list[Phase]:
    settings = replace(model_draws(model, width, height), n_images=max(1, images // max(1, prompts)))
    return generation_phases(settings, model, images, once)


def _check(
    text: str | None,
    budget: int,
    trace: Callable[[bool], list[Phase]],
    smaller: Callable[[Sequence[Phase]], Iterator[str]],
) -> list[Phase]:
    """The phases, traced once, and with more care unless there is ROOM. Raises UserError where some do not fit."""
    phases = trace(True)
    if ROOM * max(phase.peak for phase in phases) > budget:
        phases = trace(False)
    if too_large := [phase for phase in phases if phase.peak > budget]:
        _refuse(text, too_large, smaller(too_large))
    return phases


def _fit(phases: Sequence[Phase], budget: int, too_large: Sequence[Phase]) -> bool:
    """Whether all do, those that were too large with MARGIN."""
    names = {phase.name for phase in too_large}
    return all((MARGIN if phase.name in names else 1) * phase.peak <= budget for phase in phases)


def _refuse(budget: str | None, too_large: Sequence[Phase], fitting: Iterator[str]) -> None:
    worst = max(too_large, key=lambda phase: phase.peak)
    need = f"{1.05 * worst.peak / 2**20 + 1:.0f}MB"  # predictions are held to 5 % under what is measured
    found = next(fitting, None)
    raise UserError(
        f"--memory-budget {budget}: too small, {worst.name!r} takes {need} at least; give --memory-budget {need}"
        + (f"; the nearest that fits: {found}" if found else "")
    )


def _smaller_training(
    settings: TrainConfig, model: DiffusionModel, plan: SkipPlan, budget: int, too_large: Sequence[Phase] = ()
) -> Iterator[str]:
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
        if changed != settings and _fit(training_phases(changed, model, plan), budget, too_large):
            yield " ".join(
                f"--{name.replace('_', '-')} {value}"
                for name, value in change.items()
                if value != getattr(settings, name)
            )


def _smaller_generation(
    settings: DrawConfig, model: DiffusionModel, budget: int, too_large: Sequence[Phase]
) -> Iterator[str]:
    """Changes that make the images fit: one at a time, then smaller ones."""
    width, height = settings.width, settings.height
    g = model.size_multiple
    for share, count in ((1, 1), (0.75, 1), (0.5, 1), (0.25, 1)):
        w, h = (max(g, int(side * share) // g * g) for side in (width, height))
        changed = replace(settings, width=w, height=h, n_images=1)
        if _fit(generation_phases(changed, model, count), budget, too_large):
            yield "one image at a time" if share == 1 else f"--width {w} --height {h}"
