"""`generate`: prompts become images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from mlx_blockskip import lora
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.stack import Mask
from mlx_blockskip.events import Image, Warning, emit
from mlx_blockskip.models.family import DiffusionModel, Encoded
from mlx_blockskip.settings import GenerateSettings, defaults_of, from_mapping, required, to_mapping
from mlx_blockskip.tasks.checkpoint.adapters import load_adapters
from mlx_blockskip.tasks.checkpoint.resolve import open_named
from mlx_blockskip.tasks.memory.check import budget_of, check_generation
from mlx_blockskip.tasks.memory.trace import trace_paths, traced
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.denoise import Request, check_size, noise_shape, sample, seeded_noise, to_image

PNG_KEY = "mlx-blockskip"
FROM_MODEL = ("steps", "cfg_scale", "guidance", "width", "height", "max_sequence_length")


@traced
def generate(settings: GenerateSettings) -> list[Path]:
    """Generate `n_images` for every prompt; returns the paths of the PNG files, in that order."""
    if settings.from_image:
        settings = recall(settings)
    prompts = read_prompts(settings)
    targets = output_paths(Path(settings.output).expanduser(), len(prompts) * settings.n_images)
    for path in trace_paths(settings.trace_memory):
        if path in targets:
            raise UserError(f"--trace-memory: {path} is an image of this run; choose another name")
    model = open_named(settings.model, budget_of(settings.memory_budget))
    settings = complete(settings, model)
    width, height, _ = required(settings, "width", "height", "steps")
    check_size(model, width, height)
    check_generation(settings, model, len(targets))
    tree = load_adapters(model, settings.adapter_path, settings.lora_scale)

    noises = read_noise(settings, model, len(targets))
    shots = [
        Shot(prompts[i // settings.n_images], settings.seed + i, noise, target)
        for i, (noise, target) in enumerate(zip(noises, targets, strict=True))
    ]
    draw(model, settings, shots, tree)
    return targets


@dataclass(frozen=True)
class Shot:
    """One image to make: what it shows, the seed that is recorded, its noise (1, h, w, C), the PNG file, and masks by
    block. With masks the file holds no settings: they would make another image.
    """

    prompt: str
    seed: int
    noise: mx.array
    target: Path
    masks: Mapping[int, Mask] = field(default_factory=dict)


def draw(
    model: DiffusionModel,
    settings: GenerateSettings,
    shots: Sequence[Shot],
    tree: lora.Tree,
    shown: bool = True,
) -> None:
    """Make all images in one sweep a step, then decode and write one after the other. settings: `complete`. shown:
    whether each is told of; not those that are there only to be compared.
    """
    count, width, height = required(settings, "steps", "width", "height")
    prompts = list(dict.fromkeys(shot.prompt for shot in shots))
    encoded, negative = encode(model, prompts, settings)
    requests = [Request(encoded.prompts[prompts.index(s.prompt)], negative, s.noise, s.masks) for s in shots]
    with phase("generate", count, "step", release=model.release) as track:
        latents = [r.noise for r in requests]
        steps = sample(
            model,
            requests,
            steps=count,
            cfg_scale=settings.cfg_scale if settings.cfg_scale is not None else 1.0,
            guidance=settings.guidance,
            trainable=tree,
        )
        for done, latest in enumerate(steps, 1):
            latents = latest
            track.step(done)
    del steps, latest, encoded, negative, requests
    with phase("decode", len(latents), "image", release=model.release) as track:
        for done, (latent, shot) in enumerate(zip(latents, shots, strict=True), 1):
            image = to_image(model, latent, width, height)
            write_png(shot.target, image, None if shot.masks else record(settings, shot.prompt, shot.seed))
            track.step(done)
            if shown:
                emit(Image(shot.target, shot.prompt))


def read_prompts(settings: GenerateSettings) -> list[str]:
    """The prompts of the command line and of the prompt file. Raises UserError where there is none."""
    prompts = list(settings.prompt)
    if settings.prompt_file:
        try:
            lines = Path(settings.prompt_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{settings.prompt_file}: not readable as text ({error})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("--prompt: say what to show")
    if settings.n_images < 1:
        raise UserError(f"--n-images {settings.n_images}: at least one image is needed")
    if settings.seed < 0:
        raise UserError(f"--seed {settings.seed}: must be at least 0")
    return prompts


def complete(settings: GenerateSettings, model: DiffusionModel) -> GenerateSettings:
    """Fill what was left open from the model's defaults."""
    open_fields: dict[str, Any] = {
        name: model.defaults.get(name) for name in FROM_MODEL if getattr(settings, name) is None
    }
    return replace(settings, **open_fields)


def encode(model: DiffusionModel, prompts: list[str], settings: GenerateSettings) -> tuple[Encoded, Any]:
    """Encode all prompts in one sweep; the negative prompt too where CFG is on."""
    (length,) = required(settings, "max_sequence_length")
    guided = (settings.cfg_scale or 1.0) > 1
    negatives = [settings.negative_prompt] if guided else []
    texts = [*prompts, *negatives]
    with phase("encode prompts", len(texts), "prompt") as track:
        encoded = model.encode_prompts(prompts, length, negatives)
        track.step(len(texts))
    for text, cut in zip(texts, encoded.truncated, strict=True):
        if cut:
            emit(Warning(f"the prompt is longer than {length} tokens and was cut: {text}"))
    return encoded, encoded.prompts[-1] if guided else None


def read_noise(settings: GenerateSettings, model: DiffusionModel, count: int) -> list[mx.array]:
    """Noise (1, h, w, C) for each image, from the seeds or from the file. Raises UserError where it does not fit."""
    width, height = required(settings, "width", "height")
    if settings.noise is None:
        return [seeded_noise(model, settings.seed + i, width, height) for i in range(count)]
    path = Path(settings.noise).expanduser()
    entry = files.read_header(path).entries.get("noise")
    _, h, w, c = noise_shape(model, width, height)
    if entry is None or entry.shape != (count, c, h, w):
        found = "no tensor `noise`" if entry is None else f"noise {list(entry.shape)}"
        raise UserError(f"{path}: has {found}, and {[count, c, h, w]} is needed for {count} images of this size")
    noise = files.load_lazily(path)["noise"].astype(mx.float32).transpose(0, 2, 3, 1)
    return [noise[i : i + 1] for i in range(count)]


def output_paths(output: Path, count: int) -> list[Path]:
    """The file itself for one image; numbered files for several."""
    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: images are written as PNG; let --output end in .png")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:02d}{output.suffix}") for i in range(1, count + 1)]


def record(settings: GenerateSettings, prompt: str, seed: int) -> dict[str, Any]:
    """What makes this one image again."""
    kept = to_mapping(replace(settings, prompt=[prompt], seed=seed, n_images=1, prompt_file=None, from_image=None))
    left_out = ("output", "memory_budget", "trace_memory", "from_image", "prompt_file")
    return {k: v for k, v in kept.items() if k not in left_out}


def write_png(path: Path, image: PillowImage.Image, record: dict[str, Any] | None) -> None:
    """Write a PNG whose text chunk holds the settings, where there are any."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_itxt(PNG_KEY, json.dumps(record, ensure_ascii=False))
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def recall(settings: GenerateSettings) -> GenerateSettings:
    """The settings in a PNG, with those that were given on top. Raises UserError where it holds none."""
    path = Path(settings.from_image or "").expanduser()
    try:
        with PillowImage.open(path) as image:
            text = getattr(image, "text", {}).get(PNG_KEY)
    except OSError as error:
        raise UserError(f"{path}: not an image that Pillow can read ({error})") from None
    if text is None:
        raise UserError(f"{path}: holds no settings; only PNG files made by mlx-blockskip do")
    defaults = defaults_of(GenerateSettings)
    given = {k: v for k, v in to_mapping(settings).items() if v != defaults[k]}
    return from_mapping(GenerateSettings, {**json.loads(text), **given, "from_image": None})
