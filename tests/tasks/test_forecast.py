"""The least memory that is predicted, against the peak that is measured: settings of two families."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_blockskip import generate, train
from mlx_blockskip.events import PhaseEnd
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks import budget, job
from mlx_blockskip.tasks.generate import complete

SETTINGS = [
    {"skip_first": 1, "skip_last": 0, "batch_size": 1, "rank": 2},
    {"skip_first": 0, "skip_last": 2, "batch_size": 2, "rank": 16},
    {"skip_first": 0, "skip_last": 0, "batch_size": 1, "rank": 64},
    {"skip_first": 2, "skip_last": 1, "batch_size": 4, "rank": 8, "residuals": "fresh"},
    {"skip_first": 1, "skip_last": 1, "batch_size": 1, "rank": 4, "grad_accumulation": 3},
    {"skip_first": 2, "skip_last": 0, "batch_size": 2, "rank": 4, "train_resolution": 128, "resolution": 128},
    {"skip_first": 1, "skip_last": 2, "batch_size": 2, "rank": 32, "lora_targets": "attention"},
    {"skip_first": 0, "skip_last": 1, "batch_size": 1, "rank": 4, "residuals": "none", "max_sequence_length": 24},
]


def peaks(run, **options):
    """Bytes by phase, beside what was there before."""
    gc.collect()
    mx.clear_cache()
    before, found = mx.get_active_memory(), {}

    def keep(event):
        if isinstance(event, PhaseEnd):
            found[event.phase] = max(found.get(event.phase, 0), event.peak_memory - before)

    run(on_event=keep, **options)
    return found


def assert_predicted(phases, measured):
    for phase in phases:
        share = phase.peak / measured[phase.name]
        shown = f"{phase.name}: predicted {phase.peak / 2**20:.2f} MiB, measured {measured[phase.name] / 2**20:.2f}"
        assert 0.95 <= share <= 1.10, shown


@pytest.mark.parametrize("options", SETTINGS)
def test_training_takes_what_is_predicted(quick, options):
    settings = quick(**{"iters": 3, "memory_budget": "0", "patch_mode": "resize", **options})
    measured = peaks(train, settings=settings)
    model = open_model(Path(settings.model), 0)
    settings = job.complete(settings, model)
    phases = budget.training_phases(settings, model, job.choose_plan(settings, model))
    assert_predicted([p for p in phases if p.name in ("precompute", "train")], measured)


@pytest.mark.parametrize(
    ("width", "height", "count", "steps"), [(128, 128, 1, 2), (64, 96, 1, 4), (96, 64, 3, 2), (256, 256, 1, 1)]
)
def test_generation_takes_what_is_predicted(tiny_flux, tmp_path, width, height, count, steps):
    settings = GenerateSettings(
        model=str(tiny_flux), prompt=["a cat"], width=width, height=height, n_images=count, steps=steps,
        memory_budget="0", output=str(tmp_path / "o.png"),
    )  # fmt: skip
    measured = peaks(generate, settings=settings)
    model = open_model(tiny_flux, 0)
    phases = budget.generation_phases(complete(settings, model), model, count)
    assert_predicted([phase for phase in phases if phase.name == "generate"], measured)
