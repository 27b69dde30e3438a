"""`generate`: prompts become images."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.engine import files, limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.options import to_mapping
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks.checkpoint.adapters import load_adapters
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.defaults import DrawConfig, check_seeds, draw_config
from mlx_blockskip.tasks.memory.check import budget_of, check_generation
from mlx_blockskip.tasks.memory.limit import described
from mlx_blockskip.tasks.memory.trace import traced
from mlx_blockskip.tasks.prompts import check_negative, read_lines
from mlx_blockskip.tasks.sampling.denoise import noise_shape, seeded_noise
from mlx_blockskip.tasks.sampling.pictures import Shot, draw
from mlx_blockskip.tasks.sampling.recall import recall
from mlx_blockskip.tasks.targets import chosen

OUTPUT = "out.png"


@traced
def generate(settings: GenerateSettings) -> list[Path]:
    """Generate `n_images` for every prompt; returns the paths of the PNG files, in that order."""
    if settings.from_image:
        settings = recall(settings)
    prompts = read_prompts(settings)
    targets = output_paths(settings, len(prompts) * settings.n_images)
    check_seeds(settings.seed, len(targets))
    model = open_named(settings.model, budget_of(settings.memory_budget))
    emit(Note(described(limits.in_force())))
    config = replace(draw_config(settings, model), n_images=settings.n_images)
    check_negative(config)
    adapter = load_adapters(model, settings.adapter_path, settings.lora_scale)
    noises = read_noise(settings, config, model, len(targets))
    shots = []
    for i, (noise, target) in enumerate(zip(noises, targets, strict=True)):
        prompt = prompts[i // settings.n_images]
        shots.append(Shot(prompt, noise, target, record(settings, config, prompt, settings.seed + i)))
    with lora.worn(model, adapter) as tree:
        check_generation(config, model, len(targets))  # a quantized layer may be read whole now
        draw(model, config, shots, tree)
    return targets


def read_prompts(settings: GenerateSettings) -> list[str]:
    """The prompts of the command line and of the prompt file. Raises UserError where there is none."""
    prompts = list(settings.prompt)
    if settings.prompt_file:
        prompts += read_lines(settings.prompt_file, "--prompt-file")
    if not prompts:
        raise UserError("--prompt: say what to show")
    return prompts


def read_noise(settings: GenerateSettings, config: DrawConfig, model: DiffusionModel, count: int) -> list[mx.array]:
    """Noise (1, h, w, C) for each image, from the seeds or from the file. Raises UserError where it does not fit."""
    width, height = config.width, config.height
    if settings.noise is None:
        return [seeded_noise(model, settings.seed + i, width, height) for i in range(count)]
    path = Path(settings.noise).expanduser()
    entry = files.read_header(path).entries.get("noise")
    _, h, w, c = noise_shape(model, width, height)
    if entry is None or entry.shape != (count, c, h, w):
        found = "no tensor `noise`" if entry is None else f"noise {list(entry.shape)}"
        raise UserError(f"{path}: has {found}, and {[count, c, h, w]} is needed for {count} images of this size")
    noise = files.load_lazily(path)["noise"].astype(mx.float32).transpose(0, 2, 3, 1)
    if not mx.all(mx.isfinite(noise)):
        raise UserError(f"{path}: its noise holds numbers that are not finite; make it again")
    return [noise[i : i + 1] for i in range(count)]


def output_paths(settings: GenerateSettings, count: int) -> list[Path]:
    """The file itself for one image; numbered files for several. Raises UserError where they cannot be written."""
    if settings.output is not None and Path(settings.output).suffix.lower() != ".png":
        raise UserError(f"{settings.output}: images are written as PNG; let --output end in .png")
    numbered = partial(numbered_paths, count=count)
    return numbered(chosen(settings.output, OUTPUT, "--output", settings.overwrite, numbered))


def numbered_paths(output: Path, count: int) -> list[Path]:
    """The file itself for one image; numbered files for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:02d}{output.suffix}") for i in range(1, count + 1)]


def record(settings: GenerateSettings, config: DrawConfig, prompt: str, seed: int) -> dict[str, Any]:
    """What makes this one image again."""
    kept = to_mapping(replace(settings, prompt=[prompt], seed=seed, n_images=1)) | config.recorded()
    left_out = ("output", "overwrite", "memory_budget", "trace_memory", "from_image", "prompt_file")
    return {k: v for k, v in kept.items() if k not in left_out}
