"""Compute the records of a chunk: patches through the VAE, then one sweep a group through the stack."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import patches, residuals
from mlx_blockskip.blockskip.patches import Patch
from mlx_blockskip.blockskip.residuals import FINGERPRINT, Chunk, Layout
from mlx_blockskip.data import to_pixels
from mlx_blockskip.engine import files
from mlx_blockskip.engine.stack import arrays
from mlx_blockskip.engine.sweep import Sample, forward, modulations
from mlx_blockskip.models.family import DiffusionModel, Posterior, Prompt, Tokens
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.train.recipe import Draw, Recipe

KNOWN_BYTES = 16 << 20
"""What the VAE said of the last crops."""

WAITING_BYTES = 192 << 20
"""Of micro-batches that wait in one precompute sweep. How many wait changes no result: each is applied by itself."""


def encode_images(recipe: Recipe, numbers: range, path: Path) -> None:
    """Latents x0 of the micro-batches, into a file. The VAE takes one crop at a time; the last few stay in memory."""
    entries = [files.TensorEntry(str(number), recipe.latent_shape, "F32") for number in numbers]
    known: dict[tuple[int, Patch], Posterior] = {}
    count, release = len(numbers) * recipe.batch_size, recipe.model.release
    with phase("encode images", count, "image", release=release) as track, files.SafetensorsWriter(path, entries) as w:
        for done, number in enumerate(numbers, 1):
            latents = [_latents(recipe, draw, known) for draw in recipe.draws(number)]
            w.write(str(number), mx.concatenate(latents).astype(mx.float32))
            track.step(done * recipe.batch_size)


def _latents(recipe: Recipe, draw: Draw, known: dict[tuple[int, Patch], Posterior]) -> mx.array:
    """(1, h, w, C) of one sample. Where crops do not vary, each image is encoded once."""
    key = draw.image, draw.patch
    if key not in known:
        if sum(array.nbytes for posterior in known.values() for array in posterior) > KNOWN_BYTES:
            known.pop(next(iter(known)))
        pixels = to_pixels(patches.cut(recipe.image(draw.image), draw.patch, recipe.patch))
        known[key] = recipe.model.encode_images(mx.array(pixels)[None])
        mx.eval(known[key])
    latents = recipe.model.draw_latents(known[key], mx.array(draw.posterior))
    mx.eval(latents)
    return latents


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
) -> Chunk:
    """Make the chunk, or read it where it is already there with this fingerprint. `tree`: the adapter of fresh
    residuals (empty for base).
    """
    if residuals.valid(path, fingerprint):
        return Chunk(path)
    path.unlink(missing_ok=True)
    latents_path = path.with_name("latents.safetensors")
    encode_images(recipe, numbers, latents_path)
    latents = files.MappedTensors(latents_path)
    prompts = _prompt_records(recipe, numbers)
    entries = [files.TensorEntry(n, tuple(a.shape), files.dtype_name(a.dtype)) for n, a in prompts.items()]
    entries += [entry for number in numbers for entry in shape.entries(number)]
    with (
        phase("precompute", len(numbers), "batch", release=recipe.model.release) as track,
        files.SafetensorsWriter(path, entries, {FINGERPRINT: fingerprint}) as writer,
    ):
        while prompts:
            writer.write(*prompts.popitem())
        for group in _groups(recipe, numbers):
            _write_group(recipe, group, latents, writer, tree)
            track.step(group[-1] + 1 - numbers.start)
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


def together(nbytes: int) -> int:
    """Micro-batches of so many bytes that wait in one sweep."""
    return max(1, WAITING_BYTES // nbytes)


def waiting_bytes(model: DiffusionModel, tokens: Tokens, prompt: Prompt, context: object) -> int:
    """Of a micro-batch that waits: its tokens, and what of its context is its own."""
    own = (*arrays(tokens), *model.prompt_record(prompt).values(), *model.record(context).values())
    return sum(array.nbytes for array in own)


def _groups(recipe: Recipe, numbers: range) -> list[range]:
    """Micro-batches that wait together in one sweep."""
    tokens, context, _ = recipe.prepare(numbers.start, mx.zeros(recipe.latent_shape))
    prompt = recipe.prompt(recipe.draws(numbers.start))
    size = together(waiting_bytes(recipe.model, tokens, prompt, context))
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
        del tokens, context, target  # the sweep replaces what waits
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
