"""What a run trains on: sample k, a pure function of (seed, k), and how its micro-batches are made from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image as PillowImage

from mlx_blockskip import flow
from mlx_blockskip.blockskip import patches
from mlx_blockskip.blockskip.patches import Patch, PatchSettings
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.data import Dataset, Example, load_image
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.stack import Stack
from mlx_blockskip.models.family import DiffusionModel, Prompt, Tokens

DRAW, ORDER, PRIOR_ORDER = 1, 2, 3
"""The streams of a run: what one sample draws, and the order of the images (and of the class images) in one epoch."""


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
    prior: Dataset | None = None  # class images; every other sample is one of them
    prior_weight: float = 1.0
    _images: dict[int, PillowImage.Image] = field(default_factory=dict)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The subject's images, then the class images; an image's number is its place here."""
        return self.dataset.examples + (self.prior.examples if self.prior else ())

    def image(self, number: int) -> PillowImage.Image:
        """An image with its shorter side at s_max; the last few stay in memory."""
        if number not in self._images:
            if len(self._images) >= 16:
                self._images.pop(next(iter(self._images)))
            picture = load_image(self.examples[number].path)
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
        """The image of sample k: every image once an epoch, in an order of the epoch's own. With class images, the
        subject's take the even samples and theirs the odd ones.
        """
        own = len(self.dataset.examples)
        if self.prior is None:
            return self._in_epochs(ORDER, k, own)
        if k % 2 == 0:
            return self._in_epochs(ORDER, k // 2, own)
        return own + self._in_epochs(PRIOR_ORDER, k // 2, len(self.prior.examples))

    def _in_epochs(self, stream: int, k: int, count: int) -> int:
        return int(philox.generator(self.seed, stream, k // count).permutation(count)[k % count])

    def shows_subject(self, image: int) -> bool:
        """Whether an image is the subject's and not a class image, by its number."""
        return image < len(self.dataset.examples)

    def weights(self, number: int) -> mx.array:
        """(B,) what each sample of a micro-batch counts in the loss."""
        return mx.array([1.0 if self.shows_subject(image) else self.prior_weight for image in self.images(number)])

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
