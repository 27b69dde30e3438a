"""The least memory that is predicted, against the peak that is measured; and what is done with the prediction."""

import gc
import math
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import QUICK

from mlx_blockskip import generate, train
from mlx_blockskip.engine import files, kept, limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.limits import Machine
from mlx_blockskip.events import Phase, PhaseEnd
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import GenerateSettings, TrainSettings
from mlx_blockskip.tasks.defaults import draw_config, train_config
from mlx_blockskip.tasks.memory import check, predict
from mlx_blockskip.tasks.memory.limit import MARGIN, budget_of
from support.compare import assert_same_adapter
from support.models import likely_plan

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


def training(model, tmp_path, **options):
    fixed = {**QUICK, "model": str(model), "train_resolution": 32, "resolution": 64, "batch_size": 2}
    return TrainSettings(**{**fixed, "adapter_path": str(tmp_path / "a"), **options})


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


def without_images(monkeypatch):
    """Trace blocks alone."""
    monkeypatch.setattr(predict, "images", lambda *a, **b: predict.Phase("images", 1000))


UNDER, OVER = 1 / MARGIN, 1.2
"""Bounds of predicted over measured (seen: 0.89 to 1.05). One trace of a block, and one run, may be an operation's
output off by chance, which is a tenth of what a tiny model takes; what is below is covered by MARGIN.
"""
CHANCE = 256 << 10
"""The same in bytes, for the smallest models, whose whole peak is a few operations' outputs."""


def assert_predicted(phases, measured, names):
    for phase in phases:
        if phase.name in names:
            peak = measured[phase.name]
            shown = f"{phase.name}: predicted {phase.peak / 2**20:.2f} MiB, measured {peak / 2**20:.2f}"
            assert UNDER * peak - CHANCE <= phase.peak <= OVER * peak + CHANCE, shown


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny_klein" if i in (3, 6) else "tiny_flux", options) for i, options in enumerate(SETTINGS)]
    + [("tiny_sana", SETTINGS[i]) for i in (1, 3, 4, 6, 7)]
    + [("tiny_z_image", SETTINGS[i]) for i in (0, 4)],
)
def test_training_takes_what_is_predicted(request, tmp_path, monkeypatch, name, options):
    model_path = request.getfixturevalue(name)
    without_images(monkeypatch)
    settings = training(model_path, tmp_path, iters=3, memory_budget="0", patch_mode="resize", **options)

    measured = peaks(train, settings=settings)
    model = open_model(model_path, 0)
    phases = check.training_phases(train_config(settings, model), model, likely_plan(settings, model))
    assert_predicted(phases, measured, ("precompute", "train"))


def test_the_adapter_lies_beside_images_that_are_encoded_for_training(tiny_flux, tmp_path, monkeypatch):
    without_images(monkeypatch)
    """But for a small budget, with which it waits on disk: the base model's features need no LoRA."""
    settings = training(tiny_flux, tmp_path, iters=1, skip_first=1, skip_last=2)
    small = open_model(tiny_flux, 0)
    found = check.training_phases(train_config(settings, small), small, likely_plan(settings, small))
    assert found[0].peak == 1000
    model = open_model(tiny_flux)
    phases = check.training_phases(train_config(settings, model), model, likely_plan(settings, model))
    header = files.read_header(train(settings=settings).adapter_path / "adapters.safetensors")
    assert phases[0].peak == 1000 + sum(4 * math.prod(entry.shape) for entry in header.entries.values())


@pytest.mark.parametrize(
    ("name", "width", "height", "count", "steps"),
    [
        ("tiny_flux", 128, 128, 1, 2),
        ("tiny_flux", 64, 96, 1, 4),
        ("tiny_flux", 96, 64, 3, 2),
        ("tiny_flux", 64, 128, 2, 2),
        ("tiny_flux", 256, 256, 1, 1),
        ("tiny_sana", 256, 192, 2, 1),
        ("tiny_sana", 256, 256, 1, 1),
        ("tiny_sana", 128, 64, 1, 4),
        ("tiny_sana", 128, 64, 2, 1),
    ],
)
def test_generation_takes_what_is_predicted(request, tmp_path, monkeypatch, name, width, height, count, steps):
    model_path = request.getfixturevalue(name)
    without_images(monkeypatch)
    settings = GenerateSettings(
        model=str(model_path), prompt=["a cat"], width=width, height=height, n_images=count, steps=steps,
        memory_budget="0", output=str(tmp_path / "o.png"),
    )  # fmt: skip

    measured = peaks(generate, settings=settings)
    model = open_model(model_path, 0)
    config = replace(draw_config(settings, model), n_images=settings.n_images)
    assert_predicted(check.generation_phases(config, model, count), measured, ("generate",))


@pytest.mark.parametrize("in_strips", [False, True])
def test_images_beyond_the_traced_sizes_follow_the_line(tiny_flux, monkeypatch, in_strips):
    traced = []

    def image(model, width, height, decoding):
        traced.append((width, height))
        taken = predict.Phase("decode", 1000 + 3 * width * height, seconds=2e-6 * width * height)
        return taken, in_strips

    monkeypatch.setattr(predict, "_image", image)
    model = open_model(tiny_flux, 0)
    least = (model.size_multiple, model.size_multiple)
    sides = predict.TRACED_STRIPS if in_strips else predict.TRACED_SIDES
    width, height = sides[1], sides[1] // 2
    assert predict.images(model, width, height, decoding=True).peak == 1000 + 3 * width * height
    asked = [least] if in_strips else []  # which kind of VAE it is matters beyond TRACED_SIDES alone
    assert traced == [*asked, (width, height)], "an image of a size that can be traced is traced as it is"
    traced.clear()
    large = predict.images(model, 2048, 1536, decoding=True)
    assert traced == [least, *((side, side) for side in sides)]
    assert large.peak == pytest.approx(1000 + 3 * 2048 * 1536, abs=1)
    assert large.seconds == pytest.approx(2e-6 * 2048 * 1536)


def test_training_that_cannot_fit_is_refused_before_it_begins_and_what_it_names_fits(tiny_flux, tmp_path):
    events = []
    options = {"batch_size": 16, "train_resolution": 64, "resolution": 64, "memory_budget": "8MB", "rank": 4}
    with pytest.raises(UserError, match=r"--memory-budget 8MB: too small, '.+' takes (\d+)MB at least") as refused:
        train(settings=training(tiny_flux, tmp_path, **options), on_event=events.append)
    assert not [event for event in events if isinstance(event, Phase)]
    assert not list((tmp_path / "a").glob("*"))
    need = re.search(r"give --memory-budget (\d+MB)", str(refused.value))[1]
    named = str(refused.value).split("the nearest that fits: ")[1]
    change = {name.replace("-", "_"): int(value) for name, value in re.findall(r"--(\S+) (\d+)", named)}
    assert change
    for fitting in ({"memory_budget": need}, change):
        directory = tmp_path / next(iter(fitting))
        found = peaks(train, settings=training(tiny_flux, directory, **{**options, **fitting, "iters": 2}))
        limit = budget_of(fitting.get("memory_budget", "8MB"))
        assert max(found[name] for name in ("encode images", "precompute", "train")) <= 1.05 * limit  # one operation


def test_what_is_proposed_instead_is_always_possible(tiny_flux, tmp_path):
    settings = training(tiny_flux, tmp_path, batch_size=2, train_resolution=48, patch_mode="resize", iters=1)
    model = open_model(tiny_flux, 0)
    plan, settings = likely_plan(settings, model), train_config(settings, model)
    found = list(check._smaller_training(settings, model, plan, 1 << 30))
    assert found == [*["--batch-size 1"] * 2, *["--train-resolution 16 --batch-size 1"] * 2]
    assert list(check._smaller_training(settings, model, plan, 1)) == []


@pytest.mark.parametrize("name", ["tiny_flux", "tiny_sana"])
def test_nothing_of_a_prediction_stays_in_memory(request, tmp_path, name):
    model_path = request.getfixturevalue(name)
    options = {"class_prompt": ["an animal"], "class_images": 2, "steps_per_sample": 1, "iters": 1}
    settings = training(model_path, tmp_path, **options)
    model = open_model(model_path, 0)
    plan, settings = likely_plan(settings, model), train_config(settings, model)
    gc.collect()
    gc.disable()  # a cycle would be left over
    try:
        check.training_phases(settings, model, plan)
        left = mx.get_active_memory()
        gc.collect()
        assert mx.get_active_memory() == left
    finally:
        gc.enable()


def test_images_that_cannot_fit_are_refused_and_what_is_named_fits(tiny_flux, tmp_path):
    options = {"model": str(tiny_flux), "prompt": ["a cat"], "steps": 1, "output": str(tmp_path / "o.png")}
    options |= {"memory_budget": "24MB", "width": 160, "height": 160}
    with pytest.raises(UserError, match="too small, 'decode' takes .* the nearest that fits: --width") as refused:
        generate(**options)
    width, height = re.search(r"--width (\d+) --height (\d+)", str(refused.value)).groups()
    options |= {"width": int(width), "height": int(height)}
    assert max(peaks(generate, **options).values()) <= 24 << 20


def test_a_budget_of_zero_is_the_least_and_never_refused(tiny_flux, tmp_path):
    settings = training(tiny_flux, tmp_path, iters=1, memory_budget="0", batch_size=4)
    model = open_model(tiny_flux, 0)
    assert check.check_training(train_config(settings, model), model, None) is False


@pytest.mark.parametrize(("text", "ample"), [(None, True), ("auto", True), ("8GB", True), ("8MB", False)])
def test_activations_are_kept_where_they_fit_and_the_adapter_is_the_same(tiny_flux, tmp_path, text, ample, monkeypatch):
    used = []
    backward = kept.backward
    monkeypatch.setattr(kept, "backward", lambda *a, **k: (used.append(True), backward(*a, **k))[1])
    path = train(settings=training(tiny_flux, tmp_path / "own", memory_budget=text, iters=3)).adapter_path
    assert bool(used) == ample
    least = train(settings=training(tiny_flux, tmp_path / "least", memory_budget="0", iters=3)).adapter_path
    assert_same_adapter(path, least)


@pytest.mark.parametrize(
    ("machine", "budget"),
    [(Machine(16 << 30, 10 << 30), 8 << 30), (Machine(16 << 30), 12 << 30)],
)
def test_auto_leaves_the_system_its_share(machine, budget):
    assert budget_of("auto", machine) == budget
    assert budget_of("2GB", machine) == 2 << 30
    assert budget_of(None, machine) is None


def test_auto_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(limits, "machine", lambda: Machine(4000))
    assert budget_of("auto") == 3000
