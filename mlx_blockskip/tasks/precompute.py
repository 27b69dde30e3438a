"""Compute the records of a chunk: patches through the VAE, then one sweep a group through the stack."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image as PillowImage

from mlx_blockskip import flow, lora
from mlx_blockskip.blockskip import patches, residuals
from mlx_blockskip.blockskip.patches import Patch, PatchSettings
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.blockskip.residuals import FINGERPRINT, Chunk, Layout
from mlx_blockskip.data import Dataset, load_image, to_pixels
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.stack import Stack, arrays
from mlx_blockskip.engine.sweep import Sample, forward, modulations
from mlx_blockskip.events import Event
from mlx_blockskip.models.family import DiffusionModel, Prompt, Tokens
from mlx_blockskip.tasks.phases import phase

DRAW, ORDER = 1, 2
"""The streams of a run: what one sample draws, and the order of the images in one epoch."""

WAITING_BYTES = 192 << 20
"""Tokens that wait in one precompute sweep. How many wait changes no result: each micro-batch is applied by itself."""


@dataclass(frozen=True)
class Draw:
    """One training sample: image, noise level s, crop, and the noise of the posterior and of the flow (1, h, w, C)."""

    image: int
    s: float
    patch: Patch
    posterior: np.ndarray
    noise: np.ndarray


@dataclass
class Recipe:
    """All that the records of a run depend on, besides the adapter."""

    model: DiffusionModel
    stack: Stack
    plan: SkipPlan
    dataset: Dataset
    patch: PatchSettings
    mode: str
    seed: int
    batch_size: int
    mean: float
    std: float
    guidance: float | None
    prompts: files.MappedTensors
    prompt_of: Sequence[int]  # the caption's number in `prompts`, by image
    _images: dict[int, PillowImage.Image] = field(default_factory=dict)

    def image(self, number: int) -> PillowImage.Image:
        """An image with its shorter side at s_max; the last few stay in memory."""
        if number not in self._images:
            if len(self._images) >= 16:
                self._images.pop(next(iter(self._images)))
            picture = load_image(self.dataset.examples[number].path)
            self._images[number] = patches.resize_shorter(picture, self.patch.s_max)
        return self._images[number]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(B, h, w, C) of a micro-batch."""
        side = self.patch.output_side
        return (self.batch_size, *self.model.latent_shape(side, side))

    def samples(self, number: int) -> range:
        """The numbers of the samples in micro-batch `number`."""
        return range(number * self.batch_size, (number + 1) * self.batch_size)

    def image_of(self, k: int) -> int:
        """The image of sample k: every image once an epoch, in an order of the epoch's own."""
        count = len(self.dataset.examples)
        return int(philox.generator(self.seed, ORDER, k // count).permutation(count)[k % count])

    def draw(self, k: int) -> Draw:
        """Sample k, a pure function of (seed, k)."""
        image = self.image_of(k)
        rng = philox.generator(self.seed, DRAW, k)
        shift = flow.training_shift(self.model.scheduler)
        s = flow.noise_level(float(rng.standard_normal()), self.mean, self.std, shift)
        patch = patches.draw_patch(self.image(image).size, s, self.patch, rng)
        shape = (1, *self.latent_shape[1:])
        posterior, noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        return Draw(image, s, patch, posterior, noise)

    def draws(self, number: int) -> list[Draw]:
        """The samples of micro-batch `number`."""
        return [self.draw(k) for k in self.samples(number)]

    def images(self, number: int) -> list[int]:
        """The images of a micro-batch, without drawing anything else."""
        return [self.image_of(k) for k in self.samples(number)]

    def prompt(self, draws: Sequence[Draw]) -> Prompt:
        """The encoded captions of a micro-batch, joined over the batch."""
        captions = [self.caption(self.prompt_of[draw.image]) for draw in draws]
        return {key: mx.concatenate([caption[key] for caption in captions]) for key in captions[0]}

    def caption(self, number: int) -> Prompt:
        """One encoded caption, by its number in `prompts`."""
        names = self.prompts.under(f"{number}.")
        return {name.split(".", 1)[1]: self.prompts.read(name) for name in names}

    def prepare(self, number: int, x0: mx.array) -> tuple[Tokens, object, mx.array]:
        """Tokens and context of a noised micro-batch, and its target."""
        draws = self.draws(number)
        noise = mx.array(np.concatenate([draw.noise for draw in draws]))
        s = mx.array([draw.s for draw in draws], mx.float32)
        prompt = self.prompt(draws)
        context = self.model.context(s, prompt, (x0.shape[1], x0.shape[2]), self.guidance)
        tokens = self.model.tokens(flow.noisy(x0, noise, s), prompt)
        return tokens, context, flow.velocity(x0, noise)


def encode_images(recipe: Recipe, numbers: range, path: Path) -> Generator[Event, None, None]:
    """Latents x0 of the micro-batches, into a file."""
    entries = [files.TensorEntry(str(number), recipe.latent_shape, "F32") for number in numbers]
    with phase("encode images", len(numbers) * recipe.batch_size, "image") as track:
        yield track.begin
        with files.SafetensorsWriter(path, entries) as writer:
            for done, number in enumerate(numbers, 1):
                draws = recipe.draws(number)
                cuts = [patches.cut(recipe.image(d.image), d.patch, recipe.patch) for d in draws]
                pixels = mx.array(np.stack([to_pixels(cut) for cut in cuts]))
                noise = mx.array(np.concatenate([d.posterior for d in draws]))
                writer.write(str(number), recipe.model.encode_images(pixels, noise).astype(mx.float32))
                yield track.step(done * recipe.batch_size)
    recipe.model.release()
    yield track.end


def layout(recipe: Recipe) -> Layout:
    """Shapes of one record, from micro-batch 0 with empty latents: only embedders are run."""
    tokens, context, target = recipe.prepare(0, mx.zeros(recipe.latent_shape))
    found = {"target": target}
    for boundary, names in residuals.boundaries(recipe.plan, recipe.mode).items():
        for name in names:
            found |= residuals.named(name, tokens, residuals.keeps_text(recipe.plan, boundary))
    found |= {f"context.{key}": value for key, value in recipe.model.record(context).items()}
    found |= _numbered("head", recipe.model.head_modulation(context))
    (by_block,) = modulations(recipe.stack, recipe.model.reader, [context], recipe.plan.retained)
    for block, modulation in by_block.items():
        found |= _numbered(f"modulation.{block}", modulation)
    recipe.model.release()
    return Layout({name: (tuple(a.shape), files.dtype_name(a.dtype)) for name, a in found.items()})


def _numbered(name: str, modulation: Sequence[mx.array] | None) -> dict[str, mx.array]:
    return {f"{name}.{i}": part for i, part in enumerate(modulation or ())}


def compute_chunk(
    recipe: Recipe, shape: Layout, numbers: range, path: Path, fingerprint: str, tree: lora.Tree
) -> Generator[Event, None, Chunk]:
    """Make the chunk, or read it where it is already there with this fingerprint. `tree`: the adapter of fresh
    residuals (empty for base).
    """
    if residuals.valid(path, fingerprint):
        return Chunk(path)
    path.unlink(missing_ok=True)
    latents_path = path.with_name("latents.safetensors")
    yield from encode_images(recipe, numbers, latents_path)
    latents = files.MappedTensors(latents_path)
    prompts = _prompt_records(recipe, numbers)
    entries = [files.TensorEntry(n, tuple(a.shape), files.dtype_name(a.dtype)) for n, a in prompts.items()]
    entries += [entry for number in numbers for entry in shape.entries(number)]
    with phase("precompute", len(numbers), "batch") as track:
        yield track.begin
        with files.SafetensorsWriter(path, entries, {FINGERPRINT: fingerprint}) as writer:
            for name, array in prompts.items():
                writer.write(name, array)
            for group in _groups(recipe, numbers):
                _write_group(recipe, group, latents, writer, tree)
                yield track.step(group[-1] + 1 - numbers.start)
        recipe.model.release()
    yield track.end
    latents_path.unlink()
    return Chunk(path)


def _prompt_records(recipe: Recipe, numbers: range) -> dict[str, mx.array]:
    """What depends on the prompt alone, once a prompt."""
    used = {recipe.prompt_of[image] for number in numbers for image in recipe.images(number)}
    found: dict[str, mx.array] = {}
    for number in sorted(used):
        record = recipe.model.prompt_record(recipe.caption(number))
        found |= {f"prompt.{number}.{key}": value for key, value in record.items()}
    return found


def _groups(recipe: Recipe, numbers: range) -> list[range]:
    """Micro-batches that wait together in one sweep."""
    tokens, _, _ = recipe.prepare(numbers.start, mx.zeros(recipe.latent_shape))
    size = max(1, WAITING_BYTES // sum(array.nbytes for array in arrays(tokens)))
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def _write_group(
    recipe: Recipe,
    group: range,
    latents: files.MappedTensors,
    writer: files.SafetensorsWriter,
    tree: lora.Tree,
) -> None:
    model, plan = recipe.model, recipe.plan
    waiting = []
    for number in group:
        tokens, context, target = recipe.prepare(number, latents.read(str(number)))
        writer.write(f"{number}.target", target)
        for key, value in model.record(context).items():
            writer.write(f"{number}.context.{key}", value)
        for name, part in _numbered("head", model.head_modulation(context)).items():
            writer.write(f"{number}.{name}", part)
        mx.eval(tokens)
        waiting.append(Sample(tokens, context))
    retained = set(plan.retained)

    def keep_modulation(i: int, block: int, modulation: Sequence[mx.array] | None) -> None:
        if block in retained:
            for name, part in _numbered(f"modulation.{block}", modulation).items():
                writer.write(f"{group[i]}.{name}", part)

    def tap(boundary: int, names: list[str]):  # type: ignore[no-untyped-def]
        def keep(i: int, tokens: Tokens) -> None:
            for name in names:
                for key, value in residuals.named(name, tokens, residuals.keeps_text(plan, boundary)).items():
                    writer.write(f"{group[i]}.{key}", value)

        return keep

    kept = residuals.boundaries(plan, recipe.mode)
    stop = max(kept)
    taps = {boundary: tap(boundary, names) for boundary, names in kept.items()}
    unvisited = [block for block in plan.retained if block >= stop]
    contexts = [sample.context for sample in waiting]
    forward(
        recipe.stack,
        model.reader,
        waiting,
        range(stop),
        trainable=tree,
        taps=taps,
        on_modulation=keep_modulation,
    )
    for i, by_block in enumerate(modulations(recipe.stack, model.reader, contexts, unvisited)):
        for block, modulation in by_block.items():
            keep_modulation(i, block, modulation)
