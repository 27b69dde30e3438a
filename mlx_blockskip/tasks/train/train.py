"""`train`: learn a subject from a few photos."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_blockskip import lora
from mlx_blockskip.blockskip.patches import coverage
from mlx_blockskip.data import load_dataset
from mlx_blockskip.engine import limits, oserrors, owned
from mlx_blockskip.engine.errors import DamagedError, UserError
from mlx_blockskip.events import Event, Note, Saved, Warning, as_record, emit, listening
from mlx_blockskip.models.registry import read_config
from mlx_blockskip.options import to_mapping
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks import targets
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint.adapter_names import TENSORS
from mlx_blockskip.tasks.checkpoint.adapters import write_adapter
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.defaults import train_config
from mlx_blockskip.tasks.memory.check import budget_of, check_training
from mlx_blockskip.tasks.memory.limit import described
from mlx_blockskip.tasks.memory.trace import traced
from mlx_blockskip.tasks.prompts import warn_of_syntax
from mlx_blockskip.tasks.skipping.choice import even_plan, known_plan, probed_plan
from mlx_blockskip.tasks.train import checkpoints, place
from mlx_blockskip.tasks.train.begin import begin, given_adapter, new_factors, whole, with_rank
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.job import CACHE, CACHE_FILES, Job
from mlx_blockskip.tasks.train.loop import run
from mlx_blockskip.tasks.train.moments import Moments
from mlx_blockskip.tasks.train.setup import prepare


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
    targets.check_writable(directory / TENSORS, "--adapter-path")
    with alone(directory / ".lock"):
        place.claim(directory, settings.resume, settings.overwrite)
        return _train(settings, directory)


def _train(settings: TrainSettings, directory: Path) -> TrainResult:
    dataset = load_dataset(Path(settings.data).expanduser(), settings.prompt)
    for text in dataset.warnings:
        emit(Warning(text))
    captions = dict.fromkeys(example.caption for example in dataset.examples)
    warn_of_syntax([*captions, *settings.sample_prompt, *settings.class_prompt])
    model = open_named(settings.model, budget_of(settings.memory_budget))
    adapter = given_adapter(settings, model)
    config = train_config(with_rank(settings, adapter), model, [example.caption for example in dataset.examples])
    emit(Note(described(limits.in_force())))
    plan = known_plan(settings, model)
    ample = check_training(config, model, plan or even_plan(settings, model))
    owned.begin(directory / CACHE, CACHE_FILES)
    if plan is None:
        plan = probed_plan(settings, config, model, dataset, directory)
        ample = check_training(config, model, plan)
    given = begin(config, model, plan, adapter)
    del adapter
    job = prepare(config, directory, model, dataset, plan, ample, given)
    state = first_state(job)
    describe(job)
    with logged(directory / "log.jsonl"):
        with lora.worn(model, lora.Adapter(worn=given.kept)):
            loss = run(job, state)
        finish(job, state, settings)
    owned.clear(directory / CACHE, CACHE_FILES)
    return TrainResult(directory, state.step, state.skipped, loss)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Inside, events are written down too, a line of JSON each."""
    with path.open("a", encoding="utf-8") as log:

        def write(event: Event) -> None:
            with oserrors.about(path):
                log.write(json.dumps({"time": round(time.time(), 3), **as_record(event)}) + "\n")
                log.flush()

        with listening(write):
            yield


def first_state(job: Job) -> State:
    """The last checkpoint where the run goes on, else new factors. A run that was stopped before its first checkpoint
    starts again; its class images and cache are used.
    """
    config, model = job.config, job.model
    moments = Moments(None if job.ample else job.cache / "moments")
    if config.resume:
        for saved in reversed(checkpoints.found(job.directory)):
            try:
                state = checkpoints.load(saved, model.stack, job.identity, moments)
            except DamagedError as error:
                emit(Warning(f"{error}; it is now called {checkpoints.set_apart(saved).name}"))
                continue
            emit(Note(f"Going on from {saved.name}"))
            return state
        emit(Note(f"{job.directory} has no checkpoint that is whole; the run starts at its first step"))
    return State(dict(job.given.trained) or new_factors(config, model, job.plan), moments)


def describe(job: Job) -> None:
    """Say what is trained, and how much of the images the crops cover."""
    samples, plan = job.samples, job.plan
    count = job.config.batches * job.config.batch_size
    own = (k for k in range(count) if samples.shows_subject(samples.image_of(k)))
    draws = [samples.draw(k) for k in itertools.islice(own, 200)]
    sizes = [samples.image(draw.image).size for draw in draws]
    share = sum(coverage([d.patch], size) for d, size in zip(draws, sizes, strict=True)) / len(draws)
    emit(Note(f"{plan}; {plan.source or 'given'}"))
    emit(Note(f"{len(samples.dataset.examples)} images; a crop covers {share:.0%} of its image on average"))
    if job.config.residuals == "fresh" and plan.later and job.config.batches <= job.chunk_length:
        emit(Warning("the run fits into one chunk, so its fresh residuals are those of the base model"))
    if samples.prior:
        emit(Note(f"every other sample is one of {len(samples.prior.examples)} class images"))


PLACES = ("data", "class_data")
"""Settings that later commands read where the adapter records them."""


def findable(path: str) -> str:
    """A directory by a path that means the same everywhere; what names no directory as it is."""
    place = Path(path).expanduser()
    return str(place.absolute()) if place.is_dir() else path


def finish(job: Job, state: State, given: TrainSettings) -> None:
    """Write the adapter, and say what went wrong on the way. given: the settings before they were filled."""
    settings = to_mapping(given) | job.config.recorded()
    description = {
        "format": 1,
        "family": read_config(job.model.path)["family"],
        "base_model": findable(job.config.model),
        "base_model_identity": job.model.identity,
        "rank": job.config.rank,
        "scale": job.config.scale,
        "targets": job.config.lora_targets,
        "captions": sorted({example.caption for example in job.samples.dataset.examples}),
        "plan": job.plan.to_json(),
        "steps": state.step,
        "skipped_steps": state.skipped,
        "settings": settings | {name: findable(settings[name]) for name in PLACES if settings.get(name)},
    }
    checkpoints.save(job.directory, state, job.model.stack, job.identity)
    write_adapter(job.directory, whole(state.tree, job.given.kept, job.model, job.config.scale), description)
    if state.skipped:
        emit(Warning(f"{state.skipped} steps had no finite loss and were skipped"))
    emit(Saved(job.directory, "adapter"))
