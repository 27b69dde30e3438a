"""The training loop: for each chunk of samples precompute records, then train the retained blocks on them.

A step goes through the retained blocks alone. It begins at the recorded entry, crosses each skipped run by the recorded
residual (Eq. 3), and takes the mean square error of the velocity; there and back in one sweep.
"""

import math
from contextlib import nullcontext
from functools import partial

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import records, residuals
from mlx_blockskip.blockskip.records import Chunk
from mlx_blockskip.engine import device, kept, oserrors, sweep
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.spill import Trees, hold_in
from mlx_blockskip.engine.stack import arrays
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.tasks.memory.waiting import adapter_waits
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.previews import SAMPLES, missing_samples, write_samples
from mlx_blockskip.tasks.train import checkpoints, optimizer
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.job import Job
from mlx_blockskip.tasks.train.precompute import compute_chunk

PATIENCE = 10
"""Steps in a row without a finite loss before the run stops."""


def run(job: Job, state: State) -> float:
    """Chunk after chunk until `iters`; returns the mean loss of the last steps. Ctrl-C saves and says how to go on, and
    so does an error of the device, which becomes a UserError.
    """
    config = job.config
    losses: list[float] = []
    failures = 0
    try:
        sample(job, state)  # where the run was stopped between a checkpoint and these
        while state.step < config.iters:
            batches, chunk = next_chunk(job, state)
            last = min(config.iters, batches.stop // config.grad_accumulation)
            with phase("train", config.iters, "step", release=job.model.release) as track:
                while state.step < last:
                    loss = train_step(job, chunk, state)
                    finite = math.isfinite(loss)
                    failures = 0 if finite else failures + 1
                    losses = [*losses[-49:], loss] if finite else losses
                    if failures == PATIENCE:
                        raise UserError(
                            f"the loss was not finite {PATIENCE} steps in a row; "
                            f"lower --learning-rate (now {config.learning_rate:g})"
                        )
                    track.step(state.step, loss, optimizer.learning_rate(config, state.step - 1))
                    after_step(job, state)
    except KeyboardInterrupt:
        if state.step:
            path = checkpoints.save(job.directory, state, job.model.stack, job.identity)
            emit(Note(f"Stopped; {path} is saved. Go on with the same command and --resume"))
        raise
    except OSError as error:
        held = checkpoints.found(job.directory)
        saved = f"; {held[-1]} is the last checkpoint, from which --resume goes on" if held else ""
        raise UserError(f"{oserrors.sentence(error)}{saved}") from error
    except RuntimeError as error:
        if not device.is_device_error(error):
            raise
        raise UserError(f"{device.described(error)}; {rescued(job, state)}") from error
    return sum(losses) / max(1, len(losses))


def rescued(job: Job, state: State) -> str:
    """Save after an error of the device, and say what is there now and how to go on. What was saved before stays."""
    device.drain()
    path, unsaved = None, "" if state.whole else "the step under way is lost, and "
    if state.whole and state.step:
        try:
            with mx.stream(mx.cpu):  # the GPU may refuse everything from now on
                path = checkpoints.save(job.directory, state, job.model.stack, job.identity)
        except (OSError, RuntimeError) as error:
            unsaved = f"what is done could not be saved ({error}), and "
    saved = path or next(reversed(checkpoints.found(job.directory)), None)
    if saved is None:
        return f"{unsaved}no checkpoint is saved yet; give a smaller --memory-budget or --train-resolution"
    what = f"{saved} is saved" if path else f"{unsaved}{saved} is the last checkpoint"
    return (
        f"{what}: go on with the same command, --resume and a smaller --memory-budget, or begin another run with a "
        "smaller --train-resolution if it stops again"
    )


def next_chunk(job: Job, state: State) -> tuple[range, Chunk]:
    """The micro-batches of the chunk that the next step is in, and their records. The chunk before it is removed."""
    position = state.step * job.config.grad_accumulation
    index = position // job.chunk_length
    start = index * job.chunk_length
    batches = range(start, min(start + job.chunk_length, job.config.batches))
    fresh = job.config.residuals == "fresh"
    if position == start and fresh:
        state.at_chunk = state.tree
    adapter = state.at_chunk if fresh else {}
    parts = {**job.identity, "chunk": [start, batches.stop], "adapter": lora.checksum(adapter)}
    path = job.cache / f"chunk-{index:04d}.safetensors"
    for old in path.parent.glob("chunk-*.*"):
        if old.stem != path.stem:
            old.unlink()
    aside = adapter_waits(job.model, job.config.residuals)
    with checkpoints.set_aside(state, job.cache / "adapter.safetensors") if aside else nullcontext():
        return batches, compute_chunk(job, batches, path, records.fingerprint(parts), adapter)


def train_step(job: Job, chunk: Chunk, state: State) -> float:
    """One optimizer step: all its micro-batches wait in one sweep there and back.

    Returns the loss; not a number where the step was skipped.
    """
    config, model = job.config, job.model
    count = config.grad_accumulation
    batches = range(state.step * count, (state.step + 1) * count)
    waiting = []
    for batch in batches:
        context = model.context_from(chunk.latent_size(batch), chunk.conditioning(batch))
        waiting.append(Batch(chunk.tokens(batch, "entry"), context, chunk.modulation(batch)))

    def loss(i: int, tokens: Tokens) -> mx.array:
        velocity = model.final_layer(tokens, waiting[i].context, chunk.final_modulation(batches[i]))
        error = velocity.astype(mx.float32) - chunk.target(batches[i])
        return mx.mean(mx.square(error) * chunk.weight(batches[i])) / count

    inputs = len(job.plan.retained) * sum(array.nbytes for batch in waiting for array in arrays(batch.state))
    in_memory = state.moments.in_memory
    grads: optimizer.Grads = {} if in_memory else Trees(job.cache / "gradients")
    hold = None if in_memory else hold_in(job.cache / "inputs")
    with job.resident():
        losses = (kept.backward if job.ample else partial(sweep.backward, hold=hold))(
            job.stack,
            model.reader,
            waiting,
            job.plan.retained,
            trainable=state.tree,
            loss=loss,
            on_grad=grads.__setitem__,
            bridge=residuals.bridge(chunk.tokens, batches, config.residuals),
        )
    value = sum(float(loss) for loss in losses)
    norm = optimizer.global_norm(grads)
    with state.stepping():
        if math.isfinite(value) and math.isfinite(norm):
            optimizer.update(state, grads, config, norm)
        else:
            state.skipped += 1
            value = math.nan
        state.step += 1
    state.moments.settle(job.model.reader, state.tree, inputs)
    return value


def after_step(job: Job, state: State) -> None:
    """Checkpoint and sample images, where it is time."""
    config = job.config
    if config.steps_per_save and state.step % config.steps_per_save == 0 and state.step < config.iters:
        checkpoints.save(job.directory, state, job.model.stack, job.identity)
    sample(job, state)


def sample(job: Job, state: State) -> None:
    """Sample images, where it is time and they are not there yet."""
    config, directory = job.config, job.directory / SAMPLES
    due = config.steps_per_sample and state.step and state.step % config.steps_per_sample == 0
    if due and missing_samples(config.sample_prompt, directory, state.step):
        adapter = lora.combine([state.tree], [config.scale])
        job.model.release()
        write_samples(job.model, config.sample_prompt, adapter, directory, state.step, config.seed)
