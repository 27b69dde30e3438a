"""Sample images while training: the same prompts and seeds each time, with the full model."""

from collections.abc import Generator, Sequence
from pathlib import Path

from mlx_blockskip import lora
from mlx_blockskip.engine import files
from mlx_blockskip.events import Event, Image
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.tasks.sampling import Request, sample, seeded_noise, to_images


def write_samples(
    model: DiffusionModel, prompts: Sequence[str], tree: lora.Tree, directory: Path, step: int, seed: int
) -> Generator[Event, None, None]:
    """One image a prompt, by the model's own defaults, as samples/step-000100-1.png."""
    d = model.defaults
    cfg = d.get("cfg_scale", 1.0)
    encoded = model.encode_prompts([*prompts, ""], d["max_sequence_length"]).prompts
    negative = encoded[-1] if cfg > 1 else None
    noise = seeded_noise(model, seed, d["width"], d["height"])
    requests = [Request(prompt, negative, noise) for prompt in encoded[:-1]]
    steps = sample(model, requests, steps=d["steps"], cfg_scale=cfg, guidance=d.get("guidance"), trainable=tree)
    *_, latents = steps
    for i, (latent, prompt) in enumerate(zip(latents, prompts, strict=True), 1):
        path = directory / f"step-{step:06d}-{i}.png"
        with files.atomic_file(path) as temporary:
            to_images(model.decode(latent))[0].save(temporary, format="PNG")
        yield Image(path, prompt)
    model.release()
