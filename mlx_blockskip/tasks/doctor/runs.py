"""Trials of whole tasks on the bundled models: a short training run, the same streamed and resumed, and a picture."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_blockskip.engine import files, philox
from mlx_blockskip.events import Event, Step, listening
from mlx_blockskip.settings import GenerateSettings, TrainSettings
from mlx_blockskip.tasks.checkpoint.adapter_names import TENSORS
from mlx_blockskip.tasks.checkpoint.resolve import BUNDLED
from mlx_blockskip.tasks.doctor.networks import WRONG
from mlx_blockskip.tasks.doctor.trials import Trial
from mlx_blockskip.tasks.doctor.workshop import Workshop, as_numpy, difference
from mlx_blockskip.tasks.generate import generate
from mlx_blockskip.tasks.train.train import train

STEPS = 2
SHORT: dict[str, Any] = {
    "iters": STEPS, "rank": 2, "learning_rate": 1e-3, "batch_size": 1, "resolution": 64, "train_resolution": 32,
    "steps_per_save": 1, "class_images": 0, "seed": 3,
}  # fmt: skip
PROMPT = "a sks toy on a red background"
DRAWN: dict[str, Any] = {"prompt": [PROMPT], "steps": 2, "width": 64, "height": 64, "seed": 5}
PROJECTION = 7
LEVELS = 0.5
"""A model in bfloat16 is 0.6 to 1.2 away."""

ADAPTER = 0.003
"""A model in bfloat16 is 0.005 away."""


class Stopped(Exception):  # noqa: N818
    """A run that a trial stopped on purpose."""


def trained(workshop: Workshop, name: str, budget: str, stop: bool = False) -> tuple[float, Path]:
    """The loss and the adapter of a short run in float32. stop: after its first step, to be resumed."""

    def run() -> tuple[float, Path]:
        directory = workshop.place(f"{name}-trained-{budget}{'-resumed' if stop else ''}")
        settings = TrainSettings(
            model=str(workshop.checkpoint(name, "float32")), data=str(photos()), adapter_path=str(directory),
            memory_budget=budget, **SHORT,
        )  # fmt: skip
        if stop:
            _until_first_step(settings)
        result = train(TrainSettings(**{**vars(settings), "resume": stop}))
        return result.loss, directory / TENSORS

    return workshop.once(("trained", name, budget, stop), run)


def _until_first_step(settings: TrainSettings) -> None:
    def follow(event: Event) -> None:
        if isinstance(event, Step) and event.loss is not None:
            raise Stopped

    try:
        with listening(follow):
            train(settings)
    except Stopped:
        return
    raise RuntimeError("the run could not be stopped after its first step")


def photos() -> Path:
    """The bundled subject."""
    return Path(str(resources.files("mlx_blockskip") / "assets" / "subjects" / "hedgehog"))


def checksums(adapter: Path) -> np.ndarray:
    """Of each tensor its norm and its product with fixed random numbers, by the order of names: (tensors, 2)."""
    found = []
    for i, (_, tensor) in enumerate(sorted(files.load_lazily(adapter).items())):
        values = as_numpy(tensor)
        found.append((np.linalg.norm(values), np.sum(values * philox.normal(PROJECTION, i, shape=values.shape))))
    return np.array(found)


def training_error(name: str, workshop: Workshop) -> float:
    """The worse of the loss and of the adapter's checksums."""
    loss, adapter = trained(workshop, name, "auto")
    expected = workshop.references
    return max(
        difference(np.array([loss]), expected[f"{name}/training/loss"]),
        difference(checksums(adapter), expected[f"{name}/training/checksums"]),
    )


def differing_bytes(one: Path, other: Path) -> int:
    """How many bytes of two files differ; those that only one of them has count too."""
    a, b = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other))
    length = min(len(a), len(b))
    return int(np.sum(a[:length] != b[:length])) + abs(len(a) - len(b))


def streamed_error(name: str, workshop: Workshop) -> float:
    """Resident against streamed weights."""
    return differing_bytes(trained(workshop, name, "auto")[1], trained(workshop, name, "0")[1])


def resumed_error(name: str, workshop: Workshop) -> float:
    """A run that was stopped and resumed against one that was not."""
    return differing_bytes(trained(workshop, name, "auto")[1], trained(workshop, name, "auto", stop=True)[1])


def drawn(workshop: Workshop, name: str) -> np.ndarray:
    """An image, (64, 64, 3) in levels of 255."""
    target = workshop.place(f"{name}.png")
    settings = GenerateSettings(
        model=str(workshop.checkpoint(name, "float32")), output=str(target), overwrite=True, **DRAWN
    )
    (path,) = generate(settings)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.float32)


def picture_error(name: str, workshop: Workshop) -> float:
    """The mean difference of the pixels, in levels."""
    expected = workshop.references[f"{name}/picture/levels"].astype(np.float32)
    found = drawn(workshop, name)
    return float(np.mean(np.abs(found - expected))) if found.shape == expected.shape else float("inf")


LOSS = "A run of two steps ends elsewhere than in the reference. "
STREAMED = (
    "Weights that are read at each step give other bits than weights that stay, so the memory budget changes results. "
    "Report it; until then train with one budget, and do not compare runs of different ones."
)
RESUMED = (
    "A resumed run does not end where an uninterrupted one does. Report it; until then start stopped runs again from "
    "the beginning where the exact result matters."
)


def _trials() -> list[Trial]:
    streamed, *_ = BUNDLED
    return [
        *(Trial(f"{name} training", partial(training_error, name), ADAPTER, "of the reference", LOSS + WRONG)
          for name in BUNDLED),
        Trial(f"{streamed} streamed = resident", partial(streamed_error, streamed), 0, "differing bytes", STREAMED),
        Trial(f"{streamed} resumed = whole", partial(resumed_error, streamed), 0, "differing bytes", RESUMED),
        *(Trial(f"{name} picture", partial(picture_error, name), LEVELS, "levels of 255", WRONG) for name in BUNDLED),
    ]  # fmt: skip


TRIALS = tuple(_trials())


def references(workshop: Workshop) -> dict[str, np.ndarray]:
    """All that TRIALS hold this machine against, computed here."""
    found: dict[str, np.ndarray] = {}
    for name in BUNDLED:
        loss, adapter = trained(workshop, name, "auto")
        found[f"{name}/training/loss"] = np.array([loss], np.float32)
        found[f"{name}/training/checksums"] = checksums(adapter).astype(np.float32)
        found[f"{name}/picture/levels"] = drawn(workshop, name).astype(np.uint8)
    mx.synchronize()
    return found
