"""Training as a user meets it: what it writes, how it stops and goes on, what invalidates its cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUICK, on_every, on_toy
from PIL import Image

from mlx_blockskip import generate, train
from mlx_blockskip.blockskip import patches
from mlx_blockskip.data import to_pixels
from mlx_blockskip.engine import files, interrupt, locks
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.locks import lock
from mlx_blockskip.events import Note, PhaseEnd, Step, Warning
from mlx_blockskip.models import flow
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train import optimizer, precompute
from mlx_blockskip.tasks.train import train as train_task
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.moments import Moments
from support.compare import assert_same_adapter, factors, same_bits
from support.models import HEDGEHOG, prepared


@pytest.fixture(scope="module", params=["tiny_flux", "tiny_sana", "toy"])
def family_model(request):
    return request.getfixturevalue(request.param)


def test_writes_an_adapter_directory_that_says_what_it_is(quick):
    events = []
    result = train(quick(iters=4, steps_per_sample=2, sample_prompt=["a sks toy"]), on_event=events.append)
    directory = result.adapter_path
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["plan"]["runs"]
    assert config["settings"]["iters"] == 4
    assert config["rank"] == 2
    tensors = factors(directory)
    assert any(name.endswith("lora_b") and float(mx.abs(t).max()) > 0 for name, t in tensors.items())
    assert all(t.dtype == mx.float32 for t in tensors.values())
    assert sorted(p.name for p in (directory / "samples").iterdir()) == ["step-000002-1.png", "step-000004-1.png"]
    assert not (directory / "cache").exists()
    assert not list(directory.glob(".*"))
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert sum(record["event"] == "step" and "loss" in record for record in log) == 4
    phases = {e.phase: e.peak_memory for e in events if isinstance(e, PhaseEnd)}
    assert {"encode prompts", "encode images", "precompute", "train"} <= phases.keys()
    assert all(peak > 0 for peak in phases.values())


@on_toy
def test_another_runs_work_is_not_mixed_with_a_new_run(quick, tmp_path):
    """A finished adapter and a stopped run's checkpoints stay, unless the run goes on or may replace them; then the
    checkpoints are of the new run alone.
    """
    train(quick(iters=6, steps_per_save=2, steps_per_sample=6))
    with pytest.raises(UserError, match="already holds an adapter; go on with --resume, begin again with --overwrite"):
        train(quick(iters=2))
    adapter = tmp_path / "a" / "adapters.safetensors"
    before = adapter.read_bytes()
    adapter.unlink()
    with pytest.raises(UserError, match="already holds step-000006 of another run"):
        train(quick(iters=2))
    (tmp_path / "a" / "checkpoints" / "step-000006" / "notes.txt").write_text("mine")
    train(quick(iters=2, steps_per_save=1, seed=1, overwrite=True))
    held = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a" / "checkpoints").rglob("*.*"))
    assert [name for name in held if "000006" in name] == ["checkpoints/step-000006/notes.txt"]
    assert {name.split("/")[1] for name in held} == {"step-000001", "step-000002", "step-000006"}
    assert adapter.read_bytes() != before
    assert not (tmp_path / "a" / "samples").exists()
    assert not list((tmp_path / "a").glob(".*"))


@on_toy
def test_an_adapter_that_another_process_finishes_meanwhile_is_not_trained_over(quick, tmp_path, monkeypatch):
    """The lock is free again, and what lies there is looked at only then."""
    train(quick("done", iters=1))
    take = locks._take

    def after_another(path, descriptor):
        shutil.copy(tmp_path / "done" / "adapters.safetensors", path.parent)
        return take(path, descriptor)

    monkeypatch.setattr(locks, "_take", after_another)
    with pytest.raises(UserError, match="already holds an adapter"):
        train(quick("a", iters=1))


@on_toy
def test_a_selection_that_another_command_wrote_stays_beside_what_is_probed(quick, tmp_path):
    theirs = tmp_path / "a" / "selection.json"
    theirs.parent.mkdir()
    theirs.write_text('{"format": 1, "method": "generate"}')
    train(quick(iters=1, plan="auto", skip_ratio=0.4))
    assert theirs.read_text() == '{"format": 1, "method": "generate"}'
    assert files.read_json(tmp_path / "a" / "selection-2.json")["method"] == "probe"
    train(quick(iters=2, plan="auto", skip_ratio=0.4, resume=True))
    assert not (tmp_path / "a" / "selection-3.json").exists()


@pytest.mark.parametrize("name", ["cache", "class_images"])
def test_a_directory_of_the_users_in_the_adapter_directory_is_refused_and_kept(quick, tmp_path, name):
    theirs = tmp_path / "a" / name
    theirs.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(theirs / "0001.png")
    with pytest.raises(UserError, match=f"{name}: holds 0001.png, which mlx-blockskip did not make"):
        train(quick(iters=1, class_prompt=["a dog"], class_images=1))
    assert [p.name for p in theirs.iterdir()] == ["0001.png"]


@pytest.mark.parametrize("name", ["adapter_path", "data", "model", "plan", "trace_memory"])
def test_an_empty_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: is empty"):
        train(**{"data": str(HEDGEHOG), name: ""})
    assert (tmp_path / "cache").is_dir()


def test_what_stops_a_run_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "mlx_blockskip", "train", "--data", str(HEDGEHOG), "--rank", "2"]
    command += [
        "--class-images",
        "0",
        "--adapter-path",
        str(tmp_path / "a"),
        "--iters",
        "5000",
        "--batch-size",
        "1",
        "--cache-limit",
        "4MB",
        "--steps-per-save",
        "0",
        "--train-resolution",
        "64",
        "--resolution",
        "64",
    ]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["phase"] == "train" and event["done"] >= 3:
            process.send_signal(signal.SIGTERM)  # as Ctrl-C
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in out
    assert "Traceback" not in err
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize("residuals", ["base", "fresh", "none"])
def test_chunks_of_any_length_and_micro_batches_wait_in_one_sweep(quick, residuals):
    result = train(quick(residuals=residuals, grad_accumulation=2, iters=3))
    assert result.steps == 3
    assert result.skipped == 0


def test_base_residuals_do_not_depend_on_the_chunk_length(quick):
    """One chunk for all, against a chunk a step: the records are the same, so the adapters are."""
    one = train(quick("one", iters=2)).adapter_path
    many = train(quick("many", iters=2, cache_limit=str(record_bytes(quick) + 100))).adapter_path
    assert_same_adapter(one, many)


@on_toy
def test_fresh_residuals_follow_the_adapter_from_the_second_chunk_on(quick):
    """A first chunk starts from an adapter that changes nothing, so one chunk is the same in both modes."""
    options = {"skip_first": 1, "skip_last": 1, "iters": 2}
    few = {**options, "cache_limit": str(record_bytes(quick, **options) + 100)}
    said = []
    made = {
        (mode, name): train(quick(f"{mode}-{name}", residuals=mode, **more), on_event=said.append).adapter_path
        for mode in ("base", "fresh")
        for name, more in (("one", options), ("many", few), ("often", {**options, "refresh": 1}))
    }
    assert_same_adapter(made["base", "one"], made["fresh", "one"])
    assert sum("fits into one chunk" in e.message for e in said if isinstance(e, Warning)) == 1
    assert_same_adapter(made["base", "one"], made["base", "many"])
    assert_same_adapter(made["fresh", "often"], made["fresh", "many"])
    first, second = factors(made["base", "many"]), factors(made["fresh", "many"])
    assert not all(same_bits(first[name], second[name]) for name in first)


def test_photos_that_are_enlarged_are_said(quick, tmp_path):
    for name, size in (("a", (90, 40)), ("b", (64, 64))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / "photos" / f"{name}.png")
    said = []
    train(quick(data=str(tmp_path / "photos"), prompt="a cat", iters=1), on_event=said.append)
    (warning,) = [e.message for e in said if isinstance(e, Warning)]
    assert warning.startswith("1 of 2 images have a side of less than 64 pixels")


def record_bytes(quick, **options):
    """Bytes of one record of a short run."""
    job = prepared(quick("probe", **options))
    shutil.rmtree(job.directory)
    (layout,) = job.layouts.values()
    return layout.nbytes


@pytest.mark.parametrize(("mode", "once"), [("none", True), ("dynamic", False)])
def test_an_image_is_encoded_once_where_its_crops_do_not_vary(quick, tmp_path, mode, once):
    samples = prepared(quick(patch_mode=mode, train_resolution=32)).samples
    encode, seen = samples.model.encode_images, []

    def counted(pixels):
        seen.append(pixels.shape[0])
        return encode(pixels)

    samples.model.encode_images = counted
    precompute.encode_images(samples, range(10), tmp_path / "latents.safetensors")
    assert seen == [1] * len(seen)
    images = {samples.image_of(k) for k in range(20)}
    assert (len(seen) == len(images)) == once
    noisy, target, s = precompute.Noised(tmp_path / "latents.safetensors").read(9)
    draw = samples.draw(19)
    pixels = to_pixels(patches.cut(samples.image(draw.image), draw.patch, samples.config.patch))
    x0 = samples.model.draw_latents(encode(mx.array(pixels)[None]), mx.array(draw.posterior)).astype(mx.float32)
    assert s.tolist()[1] == np.float32(draw.s)
    assert same_bits(noisy[1:2], flow.noisy(x0, mx.array(draw.noise), s[1:2]))
    assert same_bits(target[1:2], mx.array(draw.noise) - x0)


@on_every
def test_a_streamed_run_gives_the_same_adapter_as_a_resident_one(quick):
    resident = train(quick("resident", iters=3)).adapter_path
    assert_same_adapter(resident, train(quick("streamed", iters=3, memory_budget="0")).adapter_path)


@on_every
def test_inner_runs_train(quick, tmp_path):
    plan = tmp_path / "plan.json"
    from mlx_blockskip.models.registry import open_model

    depth = open_model(Path(quick().model)).stack.depth
    plan.write_text(json.dumps({"depth": depth, "runs": [[0, 1], [2, 3], [depth - 1, depth]]}))
    result = train(quick(plan=str(plan)))
    prefixes = {name.split(".")[1] for name in factors(result.adapter_path)}
    assert prefixes
    assert result.skipped == 0


@on_toy
def test_a_cache_is_read_again_only_with_the_same_fingerprint(quick, tmp_path, monkeypatch):
    """Interrupt after the cache is made; what changes decides whether it is computed again."""
    data = tmp_path / "data"
    shutil.copytree(HEDGEHOG, data)
    base = quick(data=str(data), steps_per_save=1)

    def interrupted(settings):
        def stop(event):
            if isinstance(event, Step) and event.phase == "train" and event.done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(settings, on_event=stop)

    interrupted(base)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "a", kept)

    def again(**changes):
        """The phases until the first step of training."""
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(kept, tmp_path / "a", ignore=lambda *_: [] if "resume" in changes else ["checkpoints"])
        phases = []

        def stop(event):
            if isinstance(event, PhaseEnd):
                phases.append(event.phase)
            if isinstance(event, Step) and event.phase == "train":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(replace(base, **changes), on_event=stop)
        return phases

    assert "precompute" not in again(resume=True)
    for changes in ({"seed": 1}, {"resolution": 96}, {"timestep_mean": 0.5}, {"skip_first": 2, "skip_last": 0}):
        assert "precompute" in again(**changes), changes
    (data / "01.txt").write_text("another caption")
    assert "precompute" in again()
    shutil.copy(HEDGEHOG / "01.txt", data / "01.txt")
    assert "precompute" not in again()
    Image.open(data / "01.png").rotate(90).save(data / "01.png")
    assert "precompute" in again()


def test_resume_with_other_settings_is_refused_by_name(quick):
    train(quick(iters=2))
    with pytest.raises(UserError, match="seed"):
        train(quick(iters=4, seed=9, resume=True))
    assert train(quick(iters=4, resume=True)).steps == 4


def test_memory_does_not_grow_with_the_cache_file(tiny_flux, tmp_path):
    peaks = []
    for name, iters in (("short", 2), ("long", 20)):
        events = []
        train(
            TrainSettings(
                **{**QUICK, "iters": iters, "model": str(tiny_flux), "adapter_path": str(tmp_path / name)},
                train_resolution=64,
                resolution=64,
                batch_size=1,
            ),
            on_event=events.append,
        )
        peaks.append(next(e.peak_memory for e in events if isinstance(e, PhaseEnd) and e.phase == "train"))
    assert peaks[1] <= peaks[0] * 1.02 + 65536


def test_a_loss_that_is_not_finite_skips_the_step_and_ten_in_a_row_stop(quick):
    events = []
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(quick(learning_rate=1e6, clip=0.0, iters=30), on_event=events.append)
    assert sum(isinstance(e, Step) and e.phase == "train" for e in events) < 30


@pytest.mark.parametrize("family_model", ["toy"], indirect=True)
def test_a_short_run_that_diverges_is_a_failure_and_writes_no_adapter(quick):
    settings = quick("short", learning_rate=1e6, iters=12, steps_per_save=100)
    with pytest.raises(UserError, match="steps in a row; nothing worth keeping was learned; lower --learning-rate"):
        train(settings)
    directory = Path(settings.adapter_path)
    assert not (directory / "adapters.safetensors").exists()
    lines = (directory / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines), "and its log is JSON"


def test_learning_to_reduce_the_loss(tiny_flux, tmp_path):
    losses = []

    def keep(event):
        if isinstance(event, Step) and event.loss is not None:
            losses.append(event.loss)

    settings = {**QUICK, "iters": 40, "model": str(tiny_flux), "adapter_path": str(tmp_path / "a")}
    train(
        TrainSettings(**settings, train_resolution=64, resolution=64, batch_size=4, patch_mode="none", skip_ratio=0.5),
        on_event=keep,
    )
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    settings = TrainSettings(learning_rate=1.0, iters=110, warmup=10, lr_schedule=schedule)
    rates = [optimizer.learning_rate(settings, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx({"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule])


@pytest.mark.parametrize("on_disk", [False, True])
def test_adamw_is_bias_corrected_and_clipped(tmp_path, on_disk):
    """The first bias-corrected AdamW step has the size of the learning rate, whatever the gradient's."""
    settings = TrainSettings(learning_rate=0.1, iters=10, weight_decay=0.0, clip=1.0)
    state = State({0: {"m.lora_a": mx.zeros((2, 2))}}, Moments(tmp_path / "m" if on_disk else None))
    grads = {0: {"m.lora_a": mx.array([[3.0, -4.0], [0.1, 0.0]])}}
    optimizer.update(state, grads, settings, optimizer.global_norm(grads))
    expected = [[-0.1, 0.1], [-0.1, 0.0]]
    assert np.allclose(np.array(state.tree[0]["m.lora_a"]), expected, atol=1e-6)
    assert float(mx.abs(state.moments.get(0)["m.lora_a"]["m"]).max()) == pytest.approx(0.1 * 4 / 5.001, rel=1e-3)
    assert (tmp_path / "m").exists() == on_disk


@pytest.mark.parametrize(("budget", "stay"), [("0", False), ("40MB", True), ("1GB", True)])
def test_moments_stay_in_memory_where_there_is_room(quick, monkeypatch, budget, stay):
    moved = []
    monkeypatch.setattr(train_task, "check_training", lambda *_: False)  # room for moments, not for activations
    monkeypatch.setattr(Moments, "into_memory", lambda self: moved.append(self.blocks))
    directory = train(quick(iters=3, memory_budget=budget)).adapter_path
    assert bool(moved) == stay
    assert not (directory / "cache").exists()


def test_a_ctrl_c_never_leaves_a_step_half_done():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), interrupt.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data": ""}, "--data"),
        ({"data": "nowhere"}, "nowhere"),
        ({"skip_ratio": 1.0}, "--skip-ratio"),
        ({"skip_ratio": 0.5, "skip_first": 1}, "only one"),
        ({"train_resolution": 33}, "multiple of"),
        ({"residuals": "fresh", "refresh": 0}, "--refresh 0"),
        ({"train_resolution": 96}, "must not be above"),
        ({"cache_limit": "1KB"}, "--cache-limit"),
        ({"iters": 0}, "--iters 0"),
        ({"lora_targets": "none"}, "--lora-targets"),
    ],
)
def test_bad_settings_are_one_clear_error(quick, options, match):
    with pytest.raises(UserError, match=match):
        train(quick(**options))


def test_the_plan_is_said_and_recorded(quick):
    events = []
    result = train(quick(skip_ratio=0.25, plan="even", iters=1), on_event=events.append)
    assert any(isinstance(e, Note) and "even split of ratio 0.25" in e.message for e in events)
    assert files.read_json(result.adapter_path / "adapter_config.json")["plan"]["source"] == "even split of ratio 0.25"


def test_generate_takes_the_adapter_and_the_image_changes(tiny_flux, tmp_path):
    settings = {**QUICK, "iters": 20, "model": str(tiny_flux), "adapter_path": str(tmp_path / "a"), "batch_size": 2}
    train(TrainSettings(**settings, train_resolution=64, resolution=64))
    fixed = {"model": str(tiny_flux), "prompt": ["a sks toy"], "steps": 4, "width": 64, "height": 64}
    images = []
    for name, scale in (("base", None), ("zero", 0.0), ("one", 1.0)):
        more = {} if scale is None else {"adapter_path": [str(tmp_path / "a")], "lora_scale": [scale]}
        (path,) = generate(**fixed, **more, output=str(tmp_path / f"{name}.png"))
        images.append(np.asarray(Image.open(path), int))
    assert np.array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 4


def test_resume_where_there_is_no_checkpoint_yet_starts_the_run(quick, tmp_path):
    """A run that was stopped before its first checkpoint: what it left is used, and the adapter is the same."""
    whole = train(quick("whole", iters=2, class_prompt=["a dog"], class_images=1)).adapter_path

    def stop(event):
        if isinstance(event, Step) and event.phase == "train":
            raise RuntimeError

    settings = quick("stopped", iters=2, class_prompt=["a dog"], class_images=1, steps_per_save=0, resume=True)
    with pytest.raises(RuntimeError):
        train(settings, on_event=stop)
    events = []
    again = train(settings, on_event=events.append).adapter_path
    phases = {e.phase for e in events if isinstance(e, PhaseEnd)}
    assert not phases & {"class images", "encode images", "precompute"}
    assert any(isinstance(e, Note) and "no checkpoint that is whole" in e.message for e in events)
    assert_same_adapter(whole, again)


def test_two_runs_cannot_write_one_directory(quick, tmp_path):
    (tmp_path / "a").mkdir()
    with lock(tmp_path / "a" / ".lock"), pytest.raises(UserError, match=str(os.getpid())):
        train(quick(iters=1))


def test_a_run_is_a_function_of_its_seed(quick):
    a, b = (train(quick(name, iters=2)).adapter_path for name in "ab")
    c = train(quick("c", iters=2, seed=1)).adapter_path
    assert_same_adapter(a, b)
    assert not all(same_bits(x, y) for x, y in zip(factors(a).values(), factors(c).values(), strict=True))
