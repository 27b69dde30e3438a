"""Timestep-aware patches (DiT-BlockSkip, Eq. 1): f(s) = s_min + s (s_max - s_min).

An image is resized so that its shorter side is s_max. At noise level s in (0, 1] a square of side f(s), rounded to the
size_multiple g, is cut at a uniform place and resized to s_min x s_min: large crops at high noise (global structure),
small crops at low noise (detail).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlx_blockskip.engine.errors import UserError

MODES = ("dynamic", "high-to-low", "random", "resize", "none")


@dataclass(frozen=True)
class PatchSettings:
    """mode: "dynamic" is Eq. 1; "high-to-low" its reverse (small crops at high noise); "random" draws the side
    uniformly, independently of s; "resize" always cuts the side s_max, at a uniform place, and resizes it to s_min;
    "none" cuts the side s_max and does not resize: training is at s_max.

    s_min, s_max in pixels, multiples of size_multiple. Raises UserError where they are not.
    """

    mode: str
    s_min: int
    s_max: int
    size_multiple: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--patch-mode {self.mode}: is not one of {', '.join(MODES)}")
        for name, side in (("--resolution", self.s_max), ("--train-resolution", self.s_min)):
            if side <= 0 or side % self.size_multiple:
                near = max(1, round(side / self.size_multiple)) * self.size_multiple
                raise UserError(f"{name} {side}: must be a multiple of {self.size_multiple}; the nearest is {near}")
        if self.s_min > self.s_max:
            raise UserError(f"--train-resolution {self.s_min}: must not be above --resolution {self.s_max}")

    @property
    def output_side(self) -> int:
        """Side of the patches that train."""
        return self.s_max if self.mode == "none" else self.s_min


@dataclass(frozen=True)
class Patch:
    """A square of the resized image, in its pixels."""

    left: int
    top: int
    side: int


def crop_side(s: float, u: float, settings: PatchSettings) -> int:
    """The crop's side at noise level s; u in [0, 1) is used by the mode "random" only."""
    s_min, s_max, g = settings.s_min, settings.s_max, settings.size_multiple
    share = {"dynamic": s, "high-to-low": 1 - s, "random": u}.get(settings.mode, 1.0)
    side = s_min + share * (s_max - s_min)
    return min(s_max, max(s_min, int(side / g + 0.5) * g))


def draw_patch(size: tuple[int, int], s: float, settings: PatchSettings, rng: np.random.Generator) -> Patch:
    """A patch of a resized image (width, height). Always draws three uniforms, whatever the mode.

    Raises ValueError for an image that `resize_shorter` has not seen and that is too small.
    """
    if min(size) < settings.s_max:
        raise ValueError(f"image of {size[0]} x {size[1]}: the shorter side is below s_max = {settings.s_max}")
    u, x, y = rng.random(3)
    side = crop_side(s, u, settings)
    return Patch(int(x * (size[0] - side + 1)), int(y * (size[1] - side + 1)), side)


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side at `side` pixels (Lanczos)."""
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def cut(image: Image.Image, patch: Patch, settings: PatchSettings) -> Image.Image:
    """The patch of a resized image, at the side that trains: one Lanczos resize, no flip."""
    box = (patch.left, patch.top, patch.left + patch.side, patch.top + patch.side)
    side = settings.output_side
    crop = image.crop(box)
    return crop if crop.size == (side, side) else crop.resize((side, side), Image.Resampling.LANCZOS)


def coverage(patches: Iterable[Patch], size: tuple[int, int]) -> float:
    """Mean share of a resized image (width, height) that a crop covers. A crop may miss the subject."""
    shares = [patch.side**2 / (size[0] * size[1]) for patch in patches]
    return sum(shares) / len(shares) if shares else 0.0
