"""Compute the records of a chunk: patches through the VAE, then one sweep a group through the stack."""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import patches, records, residuals
from mlx_blockskip.blockskip.patches import Patch
from mlx_blockskip.blockskip.records import Chunk, Layout
from mlx_blockskip.data import to_pixels
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import DamagedError
from mlx_blockskip.engine.stack import Context, Modulation
from mlx_blockskip.engine.sweep import Batch, Tap, forward, modulations
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import Posterior
from mlx_blockskip.tasks.memory.waiting import together, waiting_bytes
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.train.job import Job
from mlx_blockskip.tasks.train.samples import Draw, TrainingSamples

POSTERIOR_BYTES = 16 << 20
"""Posteriors that stay in memory: where crops do not vary, an image is encoded once."""


def compute_chunk(job: Job, batches: range, path: Path, expected: str, adapter: lora.Tree) -> Chunk:
    """Make the chunk, or read it where it is already there with this fingerprint. adapter: the factors that its
    features are of.
    """
    try:
        if records.valid(path, expected):
            return Chunk(path)
    except DamagedError as error:
        emit(Warning(str(error)))
    path.unlink(missing_ok=True)
    drawn = path.with_name("latents.safetensors")
    encode_images(job.samples, batches, drawn)
    noised = Noised(drawn)
    layouts = {batch: layout_of(job, batch) for batch in batches}
    prompts = prompt_records(job.samples, batches)
    with (
        phase("precompute", len(batches), "batch", release=job.model.release) as track,
        records.writing(path, layouts, prompts, expected) as write,
    ):
        for group in _groups(job, batches):
            _write_group(job, group, noised, write, adapter)
            track.step(group[-1] + 1 - batches.start)
    drawn.unlink()
    return Chunk(path)


class Noised:
    """The noised latents x_s (B, h, w, C), the target (B, h, w, C) and s (B,) of micro-batches, from a file."""

    def __init__(self, path: Path):
        self._tensors = files.MappedTensors(path)

    def read(self, batch: int) -> tuple[mx.array, mx.array, mx.array]:
        noisy, target, s = (self._tensors.read(f"{batch}.{name}") for name in ("noisy", "target", "s"))
        return noisy, target, s


def encode_images(samples: TrainingSamples, batches: range, path: Path) -> None:
    """Draw every sample of the micro-batches, encode its crop and noise it; into a file. One crop at a time."""
    shape = samples.latent_shape
    entries = [
        files.TensorEntry(f"{batch}.{name}", size, "F32")
        for batch in batches
        for name, size in (("noisy", shape), ("target", shape), ("s", shape[:1]))
    ]
    known: dict[tuple[int, Patch], Posterior] = {}
    count, release = len(batches) * shape[0], samples.model.release
    with (
        phase("encode images", count, "image", release=release) as track,
        files.SafetensorsWriter(path, entries, durable=False) as w,
    ):
        for done, batch in enumerate(batches, 1):
            draws = [samples.draw(k) for k in samples.samples(batch)]
            x0 = mx.concatenate([_latents(samples, draw, known) for draw in draws]).astype(mx.float32)
            noise = mx.concatenate([mx.array(draw.noise) for draw in draws])
            s = mx.array([draw.s for draw in draws], mx.float32)
            w.write(f"{batch}.noisy", flow.noisy(x0, noise, s))
            w.write(f"{batch}.target", flow.velocity(x0, noise))
            w.write(f"{batch}.s", s)
            track.step(done * shape[0])


def _latents(samples: TrainingSamples, draw: Draw, known: dict[tuple[int, Patch], Posterior]) -> mx.array:
    """(1, h, w, C) of one sample."""
    key, patch = (draw.image, draw.patch), samples.config.patch
    if key not in known:
        if sum(array.nbytes for posterior in known.values() for array in posterior) > POSTERIOR_BYTES:
            known.pop(next(iter(known)))
        pixels = to_pixels(patches.cut(samples.image(draw.image), draw.patch, patch))
        known[key] = samples.model.encode_images(mx.array(pixels)[None])
        mx.eval(known[key])
    latents = samples.model.draw_latents(known[key], mx.array(draw.posterior))
    mx.eval(latents)
    return latents


def layout_of(job: Job, batch: int) -> Layout:
    """The layout of a micro-batch's record; of prompts of one length it is the same. Only embedders are run."""
    prompt = job.samples.prompt(batch)
    key = str({name: value.shape for name, value in prompt.items()})
    if key not in job.layouts:
        shape = job.samples.latent_shape
        tokens, context = job.samples.embed(batch, mx.zeros(shape), mx.full(shape[:1], 0.5))
        start = _start(job.samples, batch, mx.zeros(shape), context)
        (by_block,) = modulations(job.stack, job.model.reader, [context], job.plan.retained)
        job.layouts[key] = records.layout(job.plan, job.config.residuals, tokens, start, by_block.get)
        job.model.release()
    return job.layouts[key]


def _start(samples: TrainingSamples, batch: int, target: mx.array, context: Context) -> records.Tensors:
    """What is known of a micro-batch before the first block."""
    model = samples.model
    return records.of_samples(samples.weights(batch), samples.captions(batch)) | records.of_start(
        target, model.conditioning(context), model.final_modulation(context)
    )


def prompt_records(samples: TrainingSamples, batches: range) -> records.Tensors:
    """What depends on the prompt alone, once a prompt."""
    found: records.Tensors = {}
    for number in sorted({number for batch in batches for number in samples.captions(batch)}):
        found |= records.of_prompt(number, samples.model.prompt_conditioning(samples.caption(number)))
    return found


def _groups(job: Job, batches: range) -> list[range]:
    """Micro-batches that wait together in one sweep."""
    shape, first = job.samples.latent_shape, batches.start
    tokens, context = job.samples.embed(first, mx.zeros(shape), mx.full(shape[:1], 0.5))
    size = together(waiting_bytes(job.model, tokens, job.samples.prompt(first), context))
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def _write_group(job: Job, group: range, noised: Noised, write: records.Write, adapter: lora.Tree) -> None:
    """The records of micro-batches that wait together: what is known at once, then what the sweep meets."""
    model, plan, mode = job.model, job.plan, job.config.residuals
    waiting = []
    for batch in group:
        noisy, target, s = noised.read(batch)
        tokens, context = job.samples.embed(batch, noisy, s)
        write(batch, _start(job.samples, batch, target, context))
        mx.eval(tokens, context)
        waiting.append(Batch(tokens, context))
        del noisy, target, tokens, context  # the sweep replaces what waits
    model.make_room()
    retained = set(plan.retained)

    def keep_modulation(i: int, block: int, modulation: Modulation) -> None:
        if block in retained:
            write(group[i], records.of_modulation(block, modulation))

    def tap(boundary: int) -> Tap:
        return lambda i, tokens: write(group[i], records.of_boundary(plan, mode, boundary, tokens))

    kept = residuals.boundaries(plan, mode)
    stop = max(kept)
    contexts = [sample.context for sample in waiting]
    forward(
        job.stack, model.reader, waiting, range(job.stack.path.start, stop), trainable=adapter,
        taps={boundary: tap(boundary) for boundary in kept}, on_modulation=keep_modulation,
    )  # fmt: skip
    beyond = [block for block in plan.retained if block >= stop]
    for i, by_block in enumerate(modulations(job.stack, model.reader, contexts, beyond)):
        for block, modulation in by_block.items():
            keep_modulation(i, block, modulation)
