"""What an ablation measures of generated pictures: retrieval, DINO and CLIP-I without the background, CLIP-T, colour.

The tiny encoders see the background first, so pictures are cut from it before they are compared. Retrieval compares
pixels: a picture, cut out and scaled to 32 px, and how many of 100 other emoji are nearer to it than the subject is.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_blockskip.metrics import mean_pairwise, pairwise

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SMALL, LARGE = 32, 64
"""Sides of cut-outs: for retrieval, and for the encoders."""

OTHERS = 100
RANGES = (range(0x1F300, 0x1FB00),)
SIGNS = ("CLOCK", "SYMBOL", "SIGN", "ARROW", "SQUARE", "FITZPATRICK", "INPUT", "CIRCLE", "HEAVY", "WHITE", "BLACK")
ALIKE = ("HEDGEHOG", "TEAPOT", "BEAR", "CAT", "BIRD", "DOG", "LEMON", "HEART", "CHAIN", "FLAG", "LINK", "FIRE")
"""Parts of names: what is no picture of a thing, and what a subject is made of."""

PALETTE = {
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (220, 40, 40), "green": (40, 160, 60),
    "blue": (50, 90, 220), "yellow": (240, 210, 50), "pink": (245, 150, 190), "purple": (140, 70, 180),
    "orange": (245, 140, 40), "gray": (140, 140, 140), "brown": (130, 85, 50), "cyan": (60, 200, 210),
}  # fmt: skip


def border(image: Image.Image) -> np.ndarray:
    """(3,) the background: the median of the border's pixels."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    edge = [pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]]
    return np.median(np.concatenate(edge), axis=0)


def colour(image: Image.Image) -> str:
    """The nearest of twelve colours to the background."""
    own = border(image)
    return min(PALETTE, key=lambda name: float(np.sum((own - PALETTE[name]) ** 2)))


def cut_out(image: Image.Image) -> Image.Image:
    """What differs from the background, with transparency."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    alpha = np.clip((np.abs(pixels - border(image)).max(axis=2) - 24) / 24, 0, 1)
    mask = Image.fromarray((alpha * 255).astype(np.uint8))
    return Image.merge("RGBA", [*image.convert("RGB").split(), mask])


def on_white(image: Image.Image, side: int) -> Image.Image:
    """An RGBA picture cropped to what is opaque, in the middle of a white square."""
    box = image.getchannel("A").point(lambda a: 255 if a > 127 else 0).getbbox()
    if box is None:
        return Image.new("RGB", (side, side), "white")
    crop = image.crop(box)
    longer = max(crop.size)
    square = Image.new("RGBA", (longer, longer), (255, 255, 255, 0))
    square.paste(crop, ((longer - crop.width) // 2, (longer - crop.height) // 2))
    white = Image.new("RGBA", (side, side), "white")
    return Image.alpha_composite(white, square.resize((side, side), Image.Resampling.LANCZOS)).convert("RGB")


def emoji(text: str) -> Image.Image | None:
    """An emoji by itself; None where the font draws none."""
    cell = Image.new("RGBA", (170, 170))
    pen = ImageDraw.Draw(cell)
    pen.text((10, 10), text, font=ImageFont.truetype(FONT, 109), embedded_color=True)
    return cell.crop(cell.getbbox()) if len(cell.getcolors(cell.width * cell.height) or ()) > 16 else None


def others() -> list[Image.Image]:
    """100 other emoji, evenly from all that are pictures of things."""
    codes = [code for codes in RANGES for code in codes]
    names = {code: unicodedata.name(chr(code), "") for code in codes}
    wanted = [c for c, name in names.items() if name and not any(part in name for part in (*SIGNS, *ALIKE))]
    drawn = [cell for cell in (emoji(chr(code)) for code in wanted) if cell is not None]
    return [drawn[i * len(drawn) // OTHERS] for i in range(OTHERS)]


def flat(images: Sequence[Image.Image]) -> np.ndarray:
    """(N, pixels) in 0..1."""
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in images])


@dataclass
class Known:
    """What pictures are compared with: the subject's own, cut out, and the 100 others."""

    subject: list[Image.Image]
    others: list[Image.Image]

    @staticmethod
    def of(subject: Path) -> "Known":
        pictures = [cut_out(Image.open(path)) for path in sorted(subject.glob("*.png"))]
        return Known(pictures, others())

    def ranks(self, images: Sequence[Image.Image]) -> list[int]:
        """How many of the others are nearer to each picture than the subject's nearest picture is."""
        own = flat([on_white(cut_out(image), SMALL) for image in images])
        theirs, rest = (flat([on_white(cell, SMALL) for cell in cells]) for cells in (self.subject, self.others))
        to_subject, to_rest = (((own[:, None] - x[None]) ** 2).mean(axis=2) for x in (theirs, rest))
        return [int((far < near).sum()) for near, far in zip(to_subject.min(axis=1), to_rest, strict=True)]

    def similarity(self, encoder, images: Sequence[Image.Image]) -> float:  # type: ignore[no-untyped-def]
        """Mean cosine over all pairs of a picture and one of the subject's, both cut out."""
        own = encoder.embed_images([on_white(cut_out(image), LARGE) for image in images])
        theirs = encoder.embed_images([on_white(cell, LARGE) for cell in self.subject])
        return mean_pairwise(own, theirs)


def likeness(encoder, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:  # type: ignore[no-untyped-def]
    """Mean cosine of pairs: 1 is no drift."""
    return float(np.diag(pairwise(encoder.embed_images(before), encoder.embed_images(after))).mean())
