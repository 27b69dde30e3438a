"""Choosing blocks without generating an image: how far masked attention carries the velocity on a subject's images.

Images are as large as a training patch, in `train --plan auto` and in `select` alike: the plan is for steps of that
size, and how much of its attention an image gives to the text depends on how many image tokens there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import patches, selection
from mlx_blockskip.blockskip.selection import Distances
from mlx_blockskip.data import Dataset, Example, load_image, to_pixels
from mlx_blockskip.engine import leftovers, philox
from mlx_blockskip.engine.spill import Spilled
from mlx_blockskip.engine.stack import Modulation, State, arrays
from mlx_blockskip.engine.sweep import Batch, modulations
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import DiffusionModel, Prompt
from mlx_blockskip.tasks.memory.waiting import WAITING_BYTES
from mlx_blockskip.tasks.phases import phase

PROBE = 0x9B0E
"""Keeps the noise of probes apart from other random streams of the same seed."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a subject is probed: `images` of its pictures, `side` pixels wide, at `levels` noise levels, with every
    `stride`-th n and m up to k.
    """

    k: int
    images: int
    levels: int
    stride: int
    side: int
    max_length: int
    guidance: float
    seed: int


def noise_levels(count: int, shift: float) -> list[float]:
    """Sigmas at the middle of `count` equal parts of the training distribution (logit-normal)."""
    normal = NormalDist()
    return [flow.noise_level(normal.inv_cdf((i + 0.5) / count), 0.0, 1.0, shift) for i in range(count)]


def probe_subject(
    model: DiffusionModel, dataset: Dataset, settings: ProbeSettings, adapters: Sequence[lora.Adapter]
) -> tuple[list[Distances], tuple[int, int]]:
    """A table for each adapter (an empty one is the base model), and block evaluations: done, and without sharing."""
    examples = dataset.examples[: settings.images]
    latents = _encode_images(model, examples, settings.side)
    captions = list(dict.fromkeys(example.caption for example in examples))
    with phase("encode prompts", len(captions), "prompt") as track:
        encoded = dict(zip(captions, model.encode_prompts(captions, settings.max_length).prompts, strict=True))
        track.step(len(captions))
    sigmas = noise_levels(settings.levels, flow.training_shift(model.scheduler))
    tables, done = [], 0
    with phase("probe", model.stack.depth * len(adapters), "block", release=model.release) as track:
        samples: list[Batch] = []
        heads: list[Modulation] = []

        def velocity(i: int, state: State) -> mx.array:
            return model.final_layer(state, samples[i].context, heads[i])

        for number, adapter in enumerate(adapters):
            with lora.worn(model, adapter) as tree, leftovers.scratch_directory() as directory:
                if not samples or adapter.worn or adapters[number - 1].worn:
                    samples, heads = _samples(model, examples, latents, encoded, sigmas, settings)
                found = selection.probe(
                    model.stack,
                    model.reader,
                    [Batch(sample.state, sample.context, sample.modulation) for sample in samples],
                    settings.k,
                    stride=settings.stride,
                    trainable=tree,
                    velocity=velocity,
                    wait=_Room(directory, None if model.reader.budget is None else WAITING_BYTES).put,
                )
            tables.append(selection.mean([selection.collect(one, settings.k) for one in found.distances]))
            done += found.evaluations
            track.step((number + 1) * model.stack.depth)
    alone = selection.evaluations(model.stack.depth, settings.k, settings.stride)[1] * len(samples) * len(adapters)
    return tables, (done, alone)


class _Room:
    """Variants wait in memory up to `limit` bytes (None for any number), and beyond that on disk."""

    def __init__(self, directory: Path, limit: int | None):
        self.directory = directory
        self.limit = limit
        self.taken = 0
        self.count = 0

    def put(self, sample: Batch) -> Batch:
        self.taken += sum(array.nbytes for array in arrays(sample.state))
        if self.limit is None or self.taken <= self.limit:
            return sample
        self.count += 1
        return Spilled(sample, self.directory / f"{self.count}.safetensors")


def _encode_images(model: DiffusionModel, examples: Sequence[Example], side: int) -> list[mx.array]:
    """Latents (1, h, w, C) of the middle of each image, by the mean of the posterior."""
    found = []
    with phase("encode images", len(examples), "image", release=model.release) as track:
        for done, example in enumerate(examples, 1):
            picture = patches.resize_shorter(load_image(example.path), side)
            left, top = ((length - side) // 2 for length in picture.size)
            pixels = to_pixels(picture.crop((left, top, left + side, top + side)))
            posterior = model.encode_images(mx.array(pixels)[None])
            found.append(model.draw_latents(posterior, mx.zeros((1, *model.latent_shape(side, side)))))
            mx.eval(found[-1])
            track.step(done)
    return found


def _samples(
    model: DiffusionModel,
    examples: Sequence[Example],
    latents: Sequence[mx.array],
    encoded: Mapping[str, Prompt],
    sigmas: Sequence[float],
    settings: ProbeSettings,
) -> tuple[list[Batch], list[Modulation]]:
    """A sample for every image and noise level, and its head modulation."""
    contexts, states = [], []
    for i, (example, x0) in enumerate(zip(examples, latents, strict=True)):
        for j, sigma in enumerate(sigmas):
            s, prompt = mx.array([sigma], mx.float32), encoded[example.caption]
            noise = mx.array(philox.normal(settings.seed, PROBE, i, j, shape=x0.shape))
            contexts.append(model.context(s, prompt, (x0.shape[1], x0.shape[2]), settings.guidance))
            states.append(model.embed(flow.noisy(x0, noise, s), prompt))
            mx.eval(states[-1])
    ahead = modulations(model.stack, model.reader, contexts)
    heads = [model.final_modulation(context) for context in contexts]
    mx.eval(heads)
    zipped = zip(states, contexts, ahead, strict=True)
    return [Batch(state, context, by_block.__getitem__) for state, context, by_block in zipped], heads
