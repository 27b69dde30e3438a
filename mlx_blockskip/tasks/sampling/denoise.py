"""From noise to images: every image and both CFG branches wait in one sweep a step. Used by generate and by train."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256

import mlx.core as mx
import numpy as np
from PIL import Image as PillowImage

from mlx_blockskip import data
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.stack import Mask, Trainable
from mlx_blockskip.engine.sweep import Batch, forward, modulations
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import DiffusionModel, Prompt, Size

NOISE = 0x501
"""Keeps the noise of images apart from other random streams of the same seed."""


@dataclass(frozen=True)
class Request:
    """One image: its encoded prompt, negative prompt (None without CFG), noise (1, h, w, C), and masks by block."""

    prompt: Prompt
    negative: Prompt | None
    noise: mx.array
    masks: Mapping[int, Mask] = field(default_factory=dict)


def noise_shape(model: DiffusionModel, width: int, height: int) -> tuple[int, int, int, int]:
    """(1, h, w, C) of the latents that an image of this size is drawn from."""
    return (1, *model.latent_shape(*model.native_size(width, height)))


def seeded_noise(model: DiffusionModel, seed: int, width: int, height: int) -> mx.array:
    """(1, h, w, C) standard normal, float32, a function of the seed and the size."""
    return mx.array(philox.normal(seed, NOISE, shape=noise_shape(model, width, height)))


def fresh_noise(noise: mx.array) -> flow.Fresh:
    """What a sampler adds at its steps: standard normal, float32, a function of the image's first noise and the step.

    So the noise alone, from a seed or from a file, makes the image again.
    """

    @cache
    def seed() -> int:
        return int.from_bytes(sha256(np.array(noise.astype(mx.float32)).tobytes()).digest()[:7])

    return lambda step, shape: mx.array(philox.normal(seed(), NOISE, step, shape=shape))


def sample(
    model: DiffusionModel,
    requests: Sequence[Request],
    *,
    steps: int,
    cfg_scale: float,
    guidance: float,
    trainable: Mapping[int, Trainable] | None = None,
) -> Iterator[list[mx.array]]:
    """Yield the latents of all requests (each (1, h, w, C), float32) after every step.

    Modulation for all steps is computed ahead, in one sweep over its weights.
    """
    size: Size = (requests[0].noise.shape[1], requests[0].noise.shape[2])
    samplers = [model.sampler(steps, size, fresh_noise(r.noise)) for r in requests]
    branches = [(i, p) for i, r in enumerate(requests) for p in (r.prompt, r.negative) if p is not None]
    distinct = list({id(p): p for _, p in branches}.values())
    times = samplers[0].times
    keys = [(id(p), step) for p in distinct for step in range(steps)]
    contexts = [model.context(mx.array(times[s : s + 1]), p, size, guidance) for p in distinct for s in range(steps)]
    ahead = dict(zip(keys, zip(contexts, modulations(model.stack, model.reader, contexts), strict=True), strict=True))
    last = {key: model.final_modulation(context) for key, (context, _) in ahead.items()}
    mx.eval(contexts, list(last.values()))
    model.make_room()

    def advance(step: int, latents: list[mx.array]) -> list[mx.array]:
        """The latents after a step; in a function of its own, so that nothing of it waits beside the next one."""
        waiting = []
        for i, prompt in branches:
            context, modulation = ahead[id(prompt), step]
            waiting.append(Batch(model.embed(latents[i], prompt), context, modulation.__getitem__, requests[i].masks))
            waiting[-1].settle()
        model.make_room()
        forward(model.stack, model.reader, waiting, trainable=trainable)
        velocities: list[list[mx.array]] = [[] for _ in requests]
        for (i, prompt), done in zip(branches, waiting, strict=True):
            velocity = model.final_layer(done.state, done.context, last[id(prompt), step])
            velocities[i].append(velocity.astype(mx.float32))
        guided = [found[0] if len(found) == 1 else model.guide(found[0], found[1], cfg_scale) for found in velocities]
        return [samplers[i].step(step, v, latents[i]) for i, v in enumerate(guided)]

    latents = [r.noise.astype(mx.float32) for r in requests]
    for step in range(steps):
        latents = advance(step, latents)
        mx.eval(latents)
        yield latents


def to_image(model: DiffusionModel, latents: mx.array, width: int, height: int) -> PillowImage.Image:
    """The picture of this size from latents (1, h, w, C): decoded; scaled and cut where it was drawn in another."""
    (pixels,) = model.decode(latents).astype(mx.float32)
    return data.to_image(data.fitted(np.array(pixels), width, height))
