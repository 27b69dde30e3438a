"""Trials of every network of the bundled models against what the CPU backend computed in float32."""

from functools import partial

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_blockskip.engine import philox, sweep
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.vision.encoder import open_encoder
from mlx_blockskip.tasks.checkpoint.resolve import BUNDLED, ENCODER
from mlx_blockskip.tasks.doctor.trials import Trial
from mlx_blockskip.tasks.doctor.workshop import Workshop, as_numpy, difference

SIDE = 64
PROMPT = "a red apple on a green background"
SIGMA = 0.6
SEED, NOISE = 11, 1

TEXT, TRANSFORMER, ENCODE, DECODE = "text encoders", "transformer", "VAE encoding", "VAE decoding"
PARTS = (TEXT, TRANSFORMER, ENCODE, DECODE)

BOUNDS = {"float32": 1e-3, "bfloat16": 0.05}
"""In parts of the reference's rms. Rounding to bfloat16 on the CPU backend comes to 0.4 to 1.2 %."""

EXACT = "On another processor only last digits differ. "
WRONG = (
    "If `float32 products` fails too, set MLX_ENABLE_TF32=0; otherwise MLX computes something else on this machine: "
    "update MLX and macOS, and report it. Train nothing before."
)
ROUNDED = "Rounding explains 0.01 of it. If only this and `convolution in bfloat16` fail, see there. "


def pixels() -> mx.array:
    """A smooth picture in [-1, 1], (1, SIDE, SIDE, 3), from a formula."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.sin(6.3 * (x + shift)) * np.cos(9.4 * y * (1 - shift)) for shift in (0.0, 0.2, 0.45)]
    return mx.array(np.stack(waves, axis=-1)[None].astype(np.float32))


def picture() -> Image.Image:
    """The same as an image."""
    levels = (np.array(pixels()[0]) + 1) * 127.5
    return Image.fromarray(levels.round().astype(np.uint8))


def encoded_text(model: DiffusionModel) -> dict[str, mx.array]:
    """The prompt, encoded."""
    return dict(model.encode_prompts([PROMPT], model.defaults.max_sequence_length).prompts[0])


def velocity(model: DiffusionModel, prompt: dict[str, mx.array]) -> dict[str, mx.array]:
    """What the whole transformer predicts for fixed noise and this prompt."""
    h, w, channels = model.latent_shape(SIDE, SIDE)
    latents = mx.array(philox.normal(SEED, NOISE, shape=(1, h, w, channels)))
    context = model.context(mx.array([SIGMA]), prompt, (h, w), model.defaults.guidance)
    batch = Batch(model.embed(latents, prompt), context)
    sweep.forward(model.stack, model.reader, [batch])
    return {"velocity": model.final_layer(batch.state, context, model.final_modulation(context))}


def posterior(model: DiffusionModel) -> dict[str, mx.array]:
    """What the VAE says of the picture."""
    return {f"posterior{i}": part for i, part in enumerate(model.encode_images(pixels()))}


def decoded(model: DiffusionModel, found: dict[str, mx.array]) -> dict[str, mx.array]:
    """The picture again, from its posterior without noise."""
    parts = tuple(found[f"posterior{i}"] for i in range(len(found)))
    return {"pixels": model.decode(model.draw_latents(parts, mx.zeros(parts[0].shape)))}


def outputs(model: DiffusionModel, part: str, given: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of one of PARTS. given: those of the part before it, by which each network is tried alone."""
    if part == TEXT:
        return encoded_text(model)
    if part == TRANSFORMER:
        return velocity(model, given)
    return posterior(model) if part == ENCODE else decoded(model, given)


def key(model: str, part: str, array: str = "") -> str:
    """The name of a reference."""
    return f"{model}/{part}/{array}"


def stored(workshop: Workshop, model: str, part: str) -> dict[str, np.ndarray]:
    """The references of one part, by the arrays' names."""
    prefix = key(model, part)
    return {name[len(prefix) :]: value for name, value in workshop.references.items() if name.startswith(prefix)}


def _given(workshop: Workshop, name: str, part: str, dtype: mx.Dtype) -> dict[str, mx.array]:
    before = {TRANSFORMER: TEXT, DECODE: ENCODE}.get(part)
    if before is None:
        return {}
    arrays = {k: mx.array(v) for k, v in stored(workshop, name, before).items()}
    return {k: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in arrays.items()}


def error_of(name: str, part: str, dtype: str, workshop: Workshop) -> float:
    """The worst of the part's arrays."""
    model = workshop.model(name, dtype)
    found = outputs(model, part, _given(workshop, name, part, getattr(mx, dtype)))
    expected = stored(workshop, name, part)
    if set(found) != set(expected):
        return float("inf")
    return max(difference(as_numpy(found[array]), expected[array]) for array in found)


def vectors(workshop: Workshop, name: str) -> dict[str, np.ndarray]:
    """What an image encoder makes of the picture, and of the prompt where it reads texts."""
    encoder = open_encoder(workshop.checkpoint(name, "float32"))
    found = {"image": encoder.embed_images([picture()])}
    return found | ({"text": encoder.embed_texts([PROMPT])} if encoder.has_text else {})


def error_of_encoder(name: str, workshop: Workshop) -> float:
    """The worse of its vectors."""
    expected = stored(workshop, name, "vectors")
    return max(difference(value, expected[array]) for array, value in vectors(workshop, name).items())


def _trials() -> list[Trial]:
    unit = "of the reference's rms"
    found = [
        Trial(
            f"{name} {part}, {dtype}", partial(error_of, name, part, dtype), BOUNDS[dtype], unit,
            (EXACT if dtype == "float32" else ROUNDED) + WRONG, quick=dtype == "float32",
        )
        for dtype in BOUNDS for name in BUNDLED for part in PARTS
    ]  # fmt: skip
    return found + [
        Trial(name, partial(error_of_encoder, name), BOUNDS["float32"], unit, EXACT + WRONG, quick=True)
        for name in ENCODER.bundled
    ]


TRIALS = tuple(_trials())


def references(workshop: Workshop) -> dict[str, np.ndarray]:
    """All that TRIALS hold this machine against, computed here."""
    found: dict[str, np.ndarray] = {}
    for name in BUNDLED:
        model, made = workshop.model(name, "float32"), dict[str, dict[str, mx.array]]()
        for part in PARTS:
            made[part] = outputs(model, part, made.get({TRANSFORMER: TEXT, DECODE: ENCODE}.get(part, ""), {}))
            found |= {key(name, part, array): np.array(value) for array, value in made[part].items()}
    for name in ENCODER.bundled:
        found |= {key(name, "vectors", array): value for array, value in vectors(workshop, name).items()}
    return found
