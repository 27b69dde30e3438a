"""The training loop around its steps, which are scripted here: chunks, losses, checkpoints, and how it stops."""

import math
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Step
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.defaults import train_config
from mlx_blockskip.tasks.train import loop, optimizer
from mlx_blockskip.tasks.train import train as train_task
from mlx_blockskip.tasks.train.begin import Given
from mlx_blockskip.tasks.train.checkpoints import State
from support.metal import FAILED
from support.models import HEDGEHOG, prepared
from support.tasks import drive

QUIET = {"steps_per_save": 0, "class_images": 0, "warmup": 4}


def tree(value):
    return {1: {"m.lora_a": mx.full((2, 2), float(value)), "m.lora_b": mx.full((2, 2), 1.0)}}


@pytest.fixture
def scripted(toy, tmp_path, monkeypatch):
    """A job whose steps give these losses, each with another adapter (an error is raised instead), and what is done."""
    done = SimpleNamespace(chunks=[], saved=[], sampled=[], released=0)

    def compute(job, batches, path, expected, adapter):
        path.write_bytes(b"")
        done.chunks.append(SimpleNamespace(batches=batches, path=path, expected=expected, adapter=adapter))

    def release():
        done.released += 1

    def make(losses=(), chunk_length=100, identity=(), **given):
        config = train_config(TrainSettings(**{**QUIET, "iters": len(losses) or 1, **given}), open_model(toy))
        (tmp_path / "cache").mkdir(exist_ok=True)
        left = iter(losses)

        def step(job, chunk, state):
            loss = next(left)
            if isinstance(loss, BaseException):
                raise loss
            state.step += 1
            state.tree = tree(state.step)
            return loss

        monkeypatch.setattr(loop, "train_step", step)
        model = SimpleNamespace(release=release, stack="stack", scarce=False)
        job = SimpleNamespace(config=config, chunk_length=chunk_length, identity=dict(identity), model=model)
        job.given = Given()
        job.directory, job.cache = tmp_path, tmp_path / "cache"
        return job, done

    def save(directory, state, stack, identity):
        done.saved.append(state.step)
        return directory / "step"

    def sample(model, prompts, adapter, directory, step, seed):
        done.sampled.append((step, prompts, directory.name, seed, done.released))

    monkeypatch.setattr(loop, "compute_chunk", compute)
    monkeypatch.setattr(loop.checkpoints, "save", save)
    monkeypatch.setattr(loop, "write_samples", sample)
    return make


def test_chunks_hold_every_micro_batch_once_and_only_the_last_ones_file_stays(scripted):
    job, done = scripted([1.0] * 5, chunk_length=4, grad_accumulation=2)
    loop.run(job, State(tree(0)))
    assert [chunk.batches for chunk in done.chunks] == [range(4), range(4, 8), range(8, 10)]
    assert [chunk.path.name for chunk in done.chunks] == [f"chunk-{i:04d}.safetensors" for i in range(3)]
    assert list(job.cache.iterdir()) == [done.chunks[2].path]


@pytest.mark.parametrize(("residuals", "adapters"), [("base", [None] * 3), ("none", [None] * 3), ("fresh", [0, 2, 4])])
def test_the_records_of_fresh_residuals_are_made_with_the_adapter_of_the_chunks_start(scripted, residuals, adapters):
    job, done = scripted([1.0] * 5, chunk_length=2, residuals=residuals)
    loop.run(job, State(tree(0)))
    found = [float(c.adapter[1]["m.lora_a"][0, 0]) if c.adapter else None for c in done.chunks]
    assert found == adapters


def test_a_run_that_goes_on_within_a_chunk_takes_the_adapter_of_its_start(scripted):
    job, done = scripted([1.0] * 2, iters=5, chunk_length=3, residuals="fresh")
    whole, _ = scripted([1.0] * 5, chunk_length=3, residuals="fresh")
    loop.next_chunk(job, State(tree(4), step=4, at_chunk=tree(3)))
    loop.next_chunk(whole, State(tree(3), step=3))
    assert done.chunks[0].batches == done.chunks[1].batches == range(3, 5)
    assert done.chunks[0].expected == done.chunks[1].expected


def test_records_are_made_again_for_another_chunk_adapter_or_run(scripted):
    job, done = scripted(iters=9, chunk_length=3, residuals="fresh", identity={"seed": 1})
    for step, value in ((0, 0), (0, 0), (3, 0), (0, 1)):
        loop.next_chunk(job, State(tree(value), step=step))
    loop.next_chunk(scripted(iters=9, chunk_length=3, residuals="fresh", identity={"seed": 2})[0], State(tree(0)))
    first, same, *others = [chunk.expected for chunk in done.chunks]
    assert first == same
    assert len({first, *others}) == 4


def test_ten_losses_in_a_row_that_are_not_finite_stop_a_run_and_nine_do_not(scripted):
    nan = math.nan
    job, _ = scripted([1.0, *[nan] * 9, 2.0, *[math.inf] * 9, 6.0])
    assert loop.run(job, State(tree(0))) == 3.0, "the mean of those that are"
    job, _ = scripted([1.0, *[nan] * 10, 2.0], learning_rate=0.25)
    state = State(tree(0))
    with pytest.raises(UserError, match=r"10 steps in a row; nothing .*; lower --learning-rate \(now 0.25\)"):
        loop.run(job, state)
    assert state.step == 11


@pytest.mark.parametrize("wrong", [math.nan, 2000.0])
def test_a_run_that_diverges_keeps_what_was_good_and_ends_as_a_failure(scripted, wrong):
    """Also where it ends before it is out of patience. The state that the first bad step began with is no better."""
    job, done = scripted([1.0, 1.0, 1.0, *[wrong] * 4], steps_per_save=1)
    for step in (2, 3):
        (job.directory / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (job.directory / "checkpoints" / f"step-{step:06d}" / "state.json").touch()
    with pytest.raises(UserError, match=r"4 steps in a row; \S+step-000002 is the last good state"):
        loop.run(job, State(tree(0)))
    assert done.saved == [1, 2, 3], "and nothing of what came after"


def test_one_loss_at_the_end_of_a_long_run_may_be_anything(scripted):
    assert loop.run(scripted([*[1.0] * 7, math.nan])[0], State(tree(0))) == 1.0
    loss = scripted([*[1.0] * 3, *[3000.0] * 4], prior_weight=5.0, class_data="theirs")[0]
    assert loop.run(loss, State(tree(0))) > 1000, "of class images that count five times as much"


def test_the_loss_of_a_run_is_the_mean_of_its_last_fifty(scripted):
    assert loop.run(scripted([1000.0, *range(50)])[0], State(tree(0))) == pytest.approx(24.5)
    assert loop.run(scripted([2.0, 3.0])[0], State(tree(0))) == 2.5
    with pytest.raises(UserError, match="lower --learning-rate"):
        loop.run(scripted([math.nan])[0], State(tree(0)))


def test_each_step_is_told_with_its_loss_and_its_own_learning_rate(scripted):
    job, _ = scripted([float(i) for i in range(6)], chunk_length=2)
    _, events = drive(loop.run, job, State(tree(0)))
    steps = [event for event in events if isinstance(event, Step) and event.phase == "train"]
    assert [(event.done, event.loss) for event in steps] == [(i + 1, float(i)) for i in range(6)]
    rates = [optimizer.learning_rate(job.config, i) for i in range(6)]
    assert [event.learning_rate for event in steps] == rates
    assert len(set(rates)) == 4


def test_ctrl_c_saves_what_is_done_and_nothing_where_nothing_is(scripted):
    for losses, saved in (((1.0, KeyboardInterrupt()), [1]), ((KeyboardInterrupt(),), [])):
        job, done = scripted(losses, iters=4)
        done.saved.clear()
        said = []

        def stopped(job=job, said=said):
            with pytest.raises(KeyboardInterrupt):
                loop.run(job, State(tree(0)))

        _, said = drive(stopped)
        assert done.saved == saved
        assert sum("--resume" in event.message for event in said if isinstance(event, Note)) == len(saved)


def stopped_by(error, job, state):
    """What the run says that this error ends."""
    with pytest.raises(type(error)) as found:
        loop.run(job, state)
    return str(found.value)


def test_an_error_of_the_device_saves_what_is_done_and_becomes_a_sentence(scripted):
    job, done = scripted((1.0, 1.0, RuntimeError(FAILED)), iters=4)
    said = stopped_by(UserError(), job, State(tree(0)))
    assert done.saved == [2]
    assert said.startswith("the GPU could not go on: [METAL] Command buffer execution failed: Insufficient Memory")
    assert f"{job.directory / 'step'} is saved: go on with the same command, --resume and a smaller" in said
    job, done = scripted((RuntimeError(FAILED),), iters=4)
    done.saved.clear()
    assert "no checkpoint is saved yet; give a smaller --memory-budget" in stopped_by(UserError(), job, State(tree(0)))
    assert done.saved == []


def test_an_error_of_another_kind_is_not_taken_for_one(scripted):
    job, done = scripted((1.0, RuntimeError("out of cheese")), iters=4)
    assert stopped_by(RuntimeError(), job, State(tree(0))) == "out of cheese"
    assert done.saved == []


def test_what_is_not_whole_or_cannot_be_saved_leaves_the_checkpoint_before_it(scripted, monkeypatch):
    job, done = scripted((1.0, RuntimeError(FAILED)), iters=4)
    for name in ("step-000002", "step-000004"):
        (job.directory / "checkpoints" / name).mkdir(parents=True)
        (job.directory / "checkpoints" / name / "state.json").write_text("{}")
    said = stopped_by(UserError(), job, State(tree(0), whole=False))
    assert "the step under way is lost, and " in said
    assert "step-000004 is the last checkpoint: go on with" in said
    assert done.saved == []

    def full(*arguments):
        raise OSError(28, "No space left on device")

    job, _ = scripted((1.0, RuntimeError(FAILED)), iters=4)
    monkeypatch.setattr(loop.checkpoints, "save", full)
    said = stopped_by(UserError(), job, State(tree(0)))
    assert "what is done could not be saved ([Errno 28] No space left on device), and " in said
    assert "step-000004 is the last checkpoint: go on with" in said


def test_it_is_saved_without_the_gpu(scripted, monkeypatch):
    job, _ = scripted((1.0, RuntimeError(FAILED)), iters=4)
    used = []
    monkeypatch.setattr(
        loop.checkpoints, "save", lambda *arguments: used.append(mx.default_stream(mx.default_device()))
    )
    monkeypatch.setattr(loop.mx, "stream", lambda device: used.append(device) or nullcontext())
    stopped_by(UserError(), job, State(tree(0)))
    assert used[0] == mx.cpu
    assert len(used) == 2


def test_checkpoints_are_between_steps_and_samples_after_the_last_one_too(scripted):
    job, done = scripted([1.0] * 6, steps_per_save=2, steps_per_sample=3, sample_prompt=["a cat"], seed=5)
    loop.run(job, State(tree(0)))
    assert done.saved == [2, 4], "the last is for the end of the run"
    assert [sample[:4] for sample in done.sampled] == [(step, ("a cat",), "samples", 5) for step in (3, 6)]
    assert done.sampled[0][4] == 1, "the memory of training is let go of first"
    job, done = scripted([1.0] * 3, steps_per_save=1)
    done.saved.clear(), done.sampled.clear()
    loop.run(job, State(tree(0)))
    assert (done.saved, done.sampled) == ([1, 2], [])


@pytest.fixture
def small(toy, tmp_path):
    """A run of the toy, set up and not begun."""
    fixed = {"model": str(toy), "data": str(HEDGEHOG), "resolution": 64, "train_resolution": 32, "class_images": 0}
    fixed |= {"adapter_path": str(tmp_path / "a"), "iters": 3, "rank": 2, "skip_first": 1, "skip_last": 1}
    return lambda: prepared(TrainSettings(**fixed))


@pytest.mark.parametrize("ample", [True, False])
def test_activations_are_kept_where_memory_is_ample_and_made_again_elsewhere(small, monkeypatch, ample):
    job = small()
    job.ample, called = ample, []
    for way in (loop.kept, loop.sweep):
        given = way.backward
        monkeypatch.setattr(way, "backward", lambda *a, own=way, do=given, **k: called.append(own) or do(*a, **k))
    state = train_task.first_state(job)
    _, chunk = loop.next_chunk(job, state)
    assert math.isfinite(loop.train_step(job, chunk, state))
    assert called == [loop.kept if ample else loop.sweep]
    assert (state.step, state.updates, state.skipped) == (1, 1, 0)


def test_a_step_without_a_finite_loss_is_counted_and_changes_nothing(small, monkeypatch):
    job = small()
    state = train_task.first_state(job)
    before = state.tree
    _, chunk = loop.next_chunk(job, state)
    for norm in (math.nan, math.inf):
        monkeypatch.setattr(loop.optimizer, "global_norm", lambda grads, norm=norm: norm)
        assert math.isnan(loop.train_step(job, chunk, state))
    assert (state.step, state.updates, state.skipped) == (2, 0, 2)
    assert state.tree is before


def test_a_ctrl_c_cannot_fall_between_an_update_and_the_count_of_its_step(small, monkeypatch):
    job = small()
    state = train_task.first_state(job)
    _, chunk = loop.next_chunk(job, state)
    update = optimizer.update

    def interrupted(*arguments):
        update(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.optimizer, "update", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train_step(job, chunk, state)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (state.updates, state.step, state.whole) == (1, 1, True)
