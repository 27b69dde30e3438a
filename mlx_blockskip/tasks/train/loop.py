"""`train`: learn a subject. For each chunk of samples precompute records, then train the retained blocks on them."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.patches import coverage
from mlx_blockskip.blockskip.residuals import Chunk
from mlx_blockskip.data import load_dataset
from mlx_blockskip.engine import files, kept, owned, sweep
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Sample
from mlx_blockskip.events import Event, Note, Saved, Warning, as_record, emit, listening
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.registry import family_named, read_config
from mlx_blockskip.settings import TrainSettings, to_mapping
from mlx_blockskip.tasks.checkpoint.adapters import TENSORS, save_adapter
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.memory.check import budget_of, check_training
from mlx_blockskip.tasks.memory.trace import traced
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.previews import write_samples
from mlx_blockskip.tasks.skipping.choice import even_plan, known_plan, probed_plan
from mlx_blockskip.tasks.train import checkpoints, optimizer
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.moments import Moments
from mlx_blockskip.tasks.train.precompute import compute_chunk
from mlx_blockskip.tasks.train.setup import CACHE_FILES, Job, complete, prepare

PATIENCE = 10
"""Steps in a row without a finite loss before the run stops."""


@dataclass(frozen=True)
class TrainResult:
    """Where the adapter is, the steps done, those that were skipped, and the mean loss of the last steps."""

    adapter_path: Path
    steps: int
    skipped: int
    loss: float


@traced
def train(settings: TrainSettings) -> TrainResult:
    """Train a LoRA on the images in `data` and write the adapter directory. See `TrainSettings` for the options."""
    if not settings.data:
        raise UserError("--data: give a directory of images")
    directory = Path(settings.adapter_path).expanduser()
    if not settings.resume and (directory / TENSORS).exists():
        raise UserError(f"{directory}: already holds an adapter; choose another --adapter-path, or go on with --resume")
    dataset = load_dataset(Path(settings.data).expanduser(), settings.prompt)
    for text in dataset.warnings:
        emit(Warning(text))
    model = open_named(settings.model, budget_of(settings.memory_budget))
    settings = complete(settings, model)
    plan = known_plan(settings, model)
    ample = check_training(settings, model, plan or even_plan(settings, model))
    with files.lock(directory / ".lock"):
        owned.begin(directory / "cache", CACHE_FILES)
        if plan is None:
            plan = probed_plan(settings, model, dataset, directory)
            ample = check_training(settings, model, plan)
        job = prepare(settings, directory, model, dataset, plan, ample)
        state = first_state(job)
        describe(job)
        with logged(directory / "log.jsonl"):
            result = run(job, state)
        owned.clear(directory / "cache", CACHE_FILES)
    (directory / ".lock").unlink(missing_ok=True)
    return result


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Inside, events are written down too, a line of JSON each."""
    with path.open("a", encoding="utf-8") as log:

        def write(event: Event) -> None:
            log.write(json.dumps({"time": round(time.time(), 3), **as_record(event)}) + "\n")
            log.flush()

        with listening(write):
            yield


def first_state(job: Job) -> State:
    """The last checkpoint where the run goes on, else new factors."""
    settings, model = job.settings, job.model
    moments = Moments(None if job.ample else job.directory / "cache" / "moments")
    if settings.resume:
        saved = checkpoints.found(job.directory)
        if not saved:
            raise UserError(f"{job.directory}: has no checkpoint to go on from; run without --resume")
        emit(Note(f"Going on from {saved[-1].name}"))
        return checkpoints.load(saved[-1], model.stack, job.identity, moments)
    assert settings.rank
    modules = lora.targets(family_named(read_config(model.path)["family"]).lora_targets, settings.lora_targets)
    tree = lora.init(model.reader, job.recipe.plan.retained, modules, settings.rank, settings.seed)
    return State(tree, moments)


def describe(job: Job) -> None:
    """Say what is trained, and how much of the images the crops cover."""
    recipe, settings = job.recipe, job.settings
    assert settings.iters
    batches = settings.iters * settings.grad_accumulation
    own = (k for k in range(batches * recipe.batch_size) if recipe.shows_subject(recipe.image_of(k)))
    draws = [recipe.draw(k) for k in itertools.islice(own, 200)]
    sizes = [recipe.image(draw.image).size for draw in draws]
    share = sum(coverage([d.patch], size) for d, size in zip(draws, sizes, strict=True)) / len(draws)
    emit(Note(f"{recipe.plan}; {recipe.plan.source or 'given'}"))
    emit(Note(f"{len(recipe.dataset.examples)} images; a crop covers {share:.0%} of its image on average"))
    if settings.residuals == "fresh" and recipe.plan.later and batches <= job.chunk_length:
        emit(Warning("the run fits into one chunk, so its fresh residuals are those of the base model"))
    if recipe.prior:
        emit(Note(f"every other sample is one of {len(recipe.prior.examples)} class images"))


def run(job: Job, state: State) -> TrainResult:
    """Chunk after chunk until `iters`. Ctrl-C saves and says how to go on."""
    settings = job.settings
    assert settings.iters
    losses: list[float] = []
    failures = 0
    try:
        while state.step < settings.iters:
            numbers, chunk = next_chunk(job, state)
            last = min(settings.iters, numbers.stop // settings.grad_accumulation)
            with phase("train", settings.iters, "step", release=job.model.release) as track:
                while state.step < last:
                    with job.resident():
                        loss = train_step(job, chunk, state)
                    finite = math.isfinite(loss)
                    failures = 0 if finite else failures + 1
                    losses = [*losses[-49:], loss] if finite else losses
                    if failures == PATIENCE:
                        raise UserError(
                            f"the loss was not finite {PATIENCE} steps in a row; "
                            f"lower --learning-rate (now {settings.learning_rate:g})"
                        )
                    track.step(state.step, loss, optimizer.learning_rate(settings, state.step - 1))
                    after_step(job, state)
    except KeyboardInterrupt:
        if state.step:
            path = checkpoints.save(job.directory, state, job.model.stack, job.identity)
            emit(Note(f"Stopped; {path} is saved. Go on with the same command and --resume"))
        raise
    finish(job, state)
    if state.skipped:
        emit(Warning(f"{state.skipped} steps had no finite loss and were skipped"))
    emit(Saved(job.directory, "adapter"))
    return TrainResult(job.directory, state.step, state.skipped, sum(losses) / max(1, len(losses)))


def next_chunk(job: Job, state: State) -> tuple[range, Chunk]:
    """The micro-batches of the chunk that the next step is in, and their records. The chunk before it is removed."""
    settings = job.settings
    assert settings.iters
    position = state.step * settings.grad_accumulation
    index = position // job.chunk_length
    start = index * job.chunk_length
    stop = min(start + job.chunk_length, settings.iters * settings.grad_accumulation)
    fresh = settings.residuals == "fresh"
    if position == start and fresh:
        state.at_chunk = state.tree
    adapter = state.at_chunk if fresh else {}
    parts = {**job.identity, "chunk": [start, stop], "adapter": lora.checksum(adapter)}
    path = job.directory / "cache" / f"chunk-{index:04d}.safetensors"
    for old in path.parent.glob("chunk-*.safetensors"):
        if old != path:
            old.unlink()
    numbers, expected = range(start, stop), residuals.fingerprint(parts)
    return numbers, compute_chunk(job.recipe, job.layout, numbers, path, expected, adapter)


def train_step(job: Job, chunk: Chunk, state: State) -> float:
    """One optimizer step: all its micro-batches wait in one sweep there and back.

    Returns the loss; not a number where the step was skipped.
    """
    settings, recipe, model = job.settings, job.recipe, job.model
    count = settings.grad_accumulation
    numbers = range(state.step * count, (state.step + 1) * count)
    _, height, width, _ = recipe.latent_shape
    samples = []
    weights = [recipe.weights(number).reshape(-1, 1, 1, 1) for number in numbers]
    for number in numbers:
        prompts = [recipe.prompt_of[image] for image in recipe.images(number)]
        context = model.restore((height, width), chunk.context(number, prompts))
        samples.append(Sample(chunk.tokens(number, "entry"), context, chunk.modulation(number)))

    def loss(i: int, tokens: Tokens) -> mx.array:
        velocity = model.head(tokens, samples[i].context, chunk.head_modulation(numbers[i]))
        error = velocity.astype(mx.float32) - chunk.target(numbers[i])
        return mx.mean(mx.square(error) * weights[i]) / count

    grads: optimizer.Grads = {}
    losses = (kept if job.ample else sweep).backward(
        recipe.stack,
        model.reader,
        samples,
        recipe.plan.retained,
        trainable=state.tree,
        loss=loss,
        on_grad=grads.__setitem__,
        bridge=residuals.bridge(chunk, numbers, recipe.mode),
    )
    value = sum(float(loss) for loss in losses)
    norm = optimizer.global_norm(grads)
    if math.isfinite(value) and math.isfinite(norm):
        optimizer.update(state, grads, settings, norm)
    else:
        state.skipped += 1
        value = math.nan
    state.step += 1
    settle_moments(job, state)
    return value


def settle_moments(job: Job, state: State) -> None:
    """After the first step it is known what a step takes: where there is room, the moments stay in memory."""
    reader, size = job.model.reader, 2 * sum(v.nbytes for factors in state.tree.values() for v in factors.values())
    spare = reader.spare()
    if state.moments.directory is None or (spare is not None and ("body" not in reader.overhead or spare < size)):
        return
    state.moments.into_memory()
    reader.reserve(size)


def after_step(job: Job, state: State) -> None:
    """Checkpoint and sample images, where it is time."""
    settings = job.settings
    if settings.steps_per_save and state.step % settings.steps_per_save == 0 and state.step < (settings.iters or 0):
        checkpoints.save(job.directory, state, job.model.stack, job.identity)
    if settings.steps_per_sample and state.step % settings.steps_per_sample == 0:
        prompts = settings.sample_prompt or [job.recipe.dataset.examples[0].caption]
        tree = lora.combine([state.tree], [settings.scale])
        job.model.release()
        write_samples(job.model, prompts, tree, job.directory / "samples", state.step, settings.seed)


def finish(job: Job, state: State) -> None:
    """Write the adapter."""
    settings = to_mapping(job.settings)
    config = {
        "format": 1,
        "family": read_config(job.model.path)["family"],
        "base_model": job.settings.model,
        "base_model_identity": job.model.identity,
        "rank": job.settings.rank,
        "scale": job.settings.scale,
        "targets": job.settings.lora_targets,
        "captions": sorted({example.caption for example in job.recipe.dataset.examples}),
        "plan": job.recipe.plan.to_json(),
        "steps": state.step,
        "skipped_steps": state.skipped,
        "settings": settings,
    }
    checkpoints.save(job.directory, state, job.model.stack, job.identity)
    save_adapter(job.directory, state.tree, job.model, config)
