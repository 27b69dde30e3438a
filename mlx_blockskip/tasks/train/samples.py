"""What a run trains on. Sample k is a pure function of (seed, k); micro-batch i holds samples i B to (i + 1) B - 1."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image as PillowImage

from mlx_blockskip.blockskip import patches
from mlx_blockskip.blockskip.patches import Patch
from mlx_blockskip.data import Dataset, Example, load_image
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.stack import Context
from mlx_blockskip.models import flow
from mlx_blockskip.models.family import DiffusionModel, Prompt, Tokens
from mlx_blockskip.tasks.defaults import TrainConfig

DRAW, ORDER, PRIOR_ORDER = 1, 2, 3
"""The random streams of a run: what one sample draws, and the order of the images (of the class images) in an epoch."""


@dataclass(frozen=True)
class Draw:
    """One sample: image, noise level s, crop, and the noise of the posterior and of the flow (1, h, w, C)."""

    image: int
    s: float
    patch: Patch
    posterior: np.ndarray
    noise: np.ndarray


@dataclass
class TrainingSamples:
    """The images of a run and their encoded captions. prior: class images, which take every other sample. prompt_of:
    the number in `prompts` of each image's caption.
    """

    config: TrainConfig
    model: DiffusionModel
    dataset: Dataset
    prompts: files.MappedTensors
    prompt_of: Sequence[int]
    prior: Dataset | None = None
    _images: dict[int, PillowImage.Image] = field(default_factory=dict)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The subject's images, then the class images; an image's number is its place here."""
        return self.dataset.examples + (self.prior.examples if self.prior else ())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(B, h, w, C) of a micro-batch."""
        side = self.config.patch.output_side
        return (self.config.batch_size, *self.model.latent_shape(side, side))

    def image(self, number: int) -> PillowImage.Image:
        """An image with its shorter side at s_max; the last few stay in memory."""
        if number not in self._images:
            if len(self._images) >= 16:
                self._images.pop(next(iter(self._images)))
            picture = load_image(self.examples[number].path)
            self._images[number] = patches.resize_shorter(picture, self.config.resolution)
        return self._images[number]

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
        return int(philox.generator(self.config.seed, stream, k // count).permutation(count)[k % count])

    def shows_subject(self, image: int) -> bool:
        """Whether an image is the subject's and not a class image, by its number."""
        return image < len(self.dataset.examples)

    def draw(self, k: int) -> Draw:
        """Sample k."""
        image = self.image_of(k)
        rng = philox.generator(self.config.seed, DRAW, k)
        shift = flow.training_shift(self.model.scheduler)
        s = flow.noise_level(float(rng.standard_normal()), self.config.timestep_mean, self.config.timestep_std, shift)
        patch = patches.draw_patch(self.image(image).size, s, self.config.patch, rng)
        shape = (1, *self.latent_shape[1:])
        posterior, noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        return Draw(image, s, patch, posterior, noise)

    def samples(self, batch: int) -> range:
        """The numbers of the samples in a micro-batch."""
        return range(batch * self.config.batch_size, (batch + 1) * self.config.batch_size)

    def images(self, batch: int) -> list[int]:
        """The images of a micro-batch, without drawing anything else."""
        return [self.image_of(k) for k in self.samples(batch)]

    def weights(self, batch: int) -> list[float]:
        """What each sample of a micro-batch counts in the loss."""
        return [1.0 if self.shows_subject(image) else self.config.prior_weight for image in self.images(batch)]

    def captions(self, batch: int) -> list[int]:
        """The numbers in `prompts` of a micro-batch's captions."""
        return [self.prompt_of[image] for image in self.images(batch)]

    def caption(self, number: int) -> Prompt:
        """One encoded caption, by its number in `prompts`."""
        names = self.prompts.under(f"{number}.")
        return {name.split(".", 1)[1]: self.prompts.read(name) for name in names}

    def prompt(self, batch: int) -> Prompt:
        """The encoded captions of a micro-batch, joined over the batch."""
        captions = [self.caption(number) for number in self.captions(batch)]
        return {key: mx.concatenate([caption[key] for caption in captions]) for key in captions[0]}

    def embed(self, batch: int, noisy: mx.array, s: mx.array) -> tuple[Tokens, Context]:
        """What the blocks of the transformer take. noisy: x_s (B, h, w, C); s: (B,)."""
        prompt = self.prompt(batch)
        context = self.model.context(s, prompt, (noisy.shape[1], noisy.shape[2]), self.config.guidance)
        return self.model.embed(noisy, prompt), context
