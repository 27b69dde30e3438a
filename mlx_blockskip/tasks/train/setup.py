"""Setting a training run up: class images, encoded captions, the length of a chunk, and what a resumed run must
share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip import records
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.blockskip.records import Layout
from mlx_blockskip.data import Dataset, load_dataset
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.tasks.defaults import TrainConfig
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.prompts import warn_of_length
from mlx_blockskip.tasks.sampling.previews import class_images
from mlx_blockskip.tasks.train.begin import Given
from mlx_blockskip.tasks.train.job import CACHE, Job
from mlx_blockskip.tasks.train.precompute import layout_of
from mlx_blockskip.tasks.train.samples import TrainingSamples

FREE_TO_CHANGE = (
    *("model", "data", "adapter_path", "init_adapter", "resume", "memory_budget", "cache_limit"),
    *("steps_per_save", "steps_per_sample", "sample_prompt", "class_prompt", "class_images", "class_data"),
)
"""Settings that a resumed run may give differently; those that matter are in its identity by what they mean."""


def prepare(
    config: TrainConfig,
    directory: Path,
    model: DiffusionModel,
    dataset: Dataset,
    plan: SkipPlan,
    ample: bool,
    given: Given | None = None,
) -> Job:
    """Make the class images, encode the captions and set up what the records are made from. Raises UserError."""
    if small := sum(side < config.resolution for side in dataset.short_sides):
        emit(
            Warning(
                f"{small} of {len(dataset.examples)} images have a side of less than {config.resolution} pixels and "
                "are enlarged; larger photos, or a smaller --resolution, keep what is learned sharp"
            )
        )
    prior = prior_dataset(config, directory, model)
    examples = dataset.examples + (prior.examples if prior else ())
    captions = list(dict.fromkeys(example.caption for example in examples))
    store = directory / CACHE / "prompts.safetensors"
    with lora.worn(model, lora.Adapter(worn=given.kept if given else {})):  # of layers that prompts pass
        encode_captions(config, model, captions, store)
    prompt_of = [captions.index(example.caption) for example in examples]
    samples = TrainingSamples(config, model, dataset, files.MappedTensors(store), prompt_of, prior)
    job = Job(config, directory, model, lora.attach(model.stack, config.scale), plan, samples, ample, given or Given())
    largest = max((layout_of(job, batch) for batch in first_of_each_caption(job)), key=lambda one: one.nbytes)
    job.chunk_length = chunk_length(config, largest)
    job.identity = identity_of(job, prior)
    check_room(job, largest)
    return job


def check_room(job: Job, largest: Layout) -> None:
    """Raise UserError where the disk has no room for the largest chunk, beside what an earlier run has left of it."""
    held = sum(path.stat().st_size for path in job.cache.glob("chunk-*.safetensors"))
    need = min(job.config.batches, job.chunk_length) * largest.nbytes - held
    if need > (free := files.free_space(job.directory)):
        raise UserError(
            f"{job.directory}: the residual cache takes {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; "
            f"lower --cache-limit (now {job.config.cache_limit}), or choose another disk"
        )


def encode_captions(config: TrainConfig, model: DiffusionModel, captions: Sequence[str], store: Path) -> None:
    """Every caption once, into a file, under its number."""
    with phase("encode prompts", len(captions), "prompt") as track:
        encoded = model.encode_prompts(captions, config.max_sequence_length)
        named = {f"{i}.{key}": v for i, prompt in enumerate(encoded.prompts) for key, v in prompt.items()}
        files.save_tensors(store, named, durable=False)
        track.step(len(captions))
    warn_of_length(captions, encoded, config.max_sequence_length, "caption")
    shapes = {tuple((key, value.shape) for key, value in prompt.items()) for prompt in encoded.prompts}
    if len(shapes) > 1 and config.batch_size > 1:
        raise UserError(
            f"--batch-size {config.batch_size}: this model encodes captions to different lengths, which do not go into "
            f"one micro-batch; give --batch-size 1 --grad-accumulation {config.batch_size * config.grad_accumulation}"
        )


def first_of_each_caption(job: Job) -> list[int]:
    """A micro-batch for each caption, where they differ in length; else the first one."""
    if job.config.batch_size > 1:
        return [0]
    seen: dict[int, int] = {}
    for batch in range(min(job.config.batches, 2 * len(job.samples.examples))):
        seen.setdefault(job.samples.captions(batch)[0], batch)
    return list(seen.values())


def prior_dataset(config: TrainConfig, directory: Path, model: DiffusionModel) -> Dataset | None:
    """The class images: the user's own, or made once by the model as it is; None without prior preservation."""
    if config.class_data:
        caption = config.class_prompt[0] if len(config.class_prompt) == 1 else None
        prior = load_dataset(
            Path(config.class_data).expanduser(), caption, option="--class-data", prompt_option="--class-prompt"
        )
    elif config.class_images:
        side, target = config.resolution, directory / "class_images"
        prior = class_images(model, config.class_prompt, config.class_images, side, target, config.seed)
    else:
        return None
    for text in prior.warnings:
        emit(Warning(text))
    return prior


def chunk_length(config: TrainConfig, largest: Layout) -> int:
    """Micro-batches per chunk: as many whole optimizer steps as the cache limit holds. Raises UserError for none."""
    step = largest.nbytes * config.grad_accumulation
    steps = config.cache_bytes // step
    if steps < 1:
        raise UserError(f"--cache-limit {config.cache_limit}: one step's records take {step / 2**20:.0f} MiB; raise it")
    if config.residuals == "fresh":
        steps = min(steps, config.refresh)
    return int(steps * config.grad_accumulation)


def identity_of(job: Job, prior: Dataset | None) -> dict[str, Any]:
    """What decides the adapter: the settings that matter, and model, images and plan by what they are."""
    kept = {name: value for name, value in job.config.recorded().items() if name not in FREE_TO_CHANGE}
    if job.config.lr_schedule == "constant":
        kept.pop("iters")
    return {
        **kept,
        "model": job.model.identity,
        "data": job.samples.dataset.identity,
        "plan": job.plan.to_json()["runs"],
        "prior": prior.identity if prior else None,
        **({"init_adapter": job.given.checksum} if job.given.checksum else {}),
        "chunk_length": job.chunk_length,
        "records": records.FORMAT,
    }
