"""Which emoji is it? A picture is cut from its plain background, scaled to 32 px, and its nearest neighbour is taken
among the subject's own pictures and 50 emoji (the sheet emoji.png beside this file).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
HERE = Path(__file__).parent


def cut_out(image: Image.Image) -> np.ndarray:
    """(32, 32, 3) float: what differs from the border's colour, on white, cropped to its box."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    alpha = np.clip((np.abs(pixels - background).max(axis=2) - 24) / 24, 0, 1)
    mask = Image.fromarray((alpha * 255).astype(np.uint8))
    return normalised(Image.merge("RGBA", [*image.convert("RGB").split(), mask]))


def normalised(image: Image.Image) -> np.ndarray:
    """An RGBA picture cropped to what is opaque, centred in a square, scaled, on white."""
    solid = image.getchannel("A").point(lambda a: 255 if a > 127 else 0).getbbox()
    if solid is None:
        return np.ones((SIDE, SIDE, 3), np.float32)
    crop = image.crop(solid)
    side = max(crop.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
    square = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", square.size, "white")
    return np.asarray(Image.alpha_composite(white, square).convert("RGB"), np.float32) / 255


def references(subject: Path | None) -> list[tuple[str, np.ndarray]]:
    """The 50 emoji, and the subject's pictures under the name "subject"."""
    sheet = Image.open(HERE / "emoji.png").convert("RGBA")
    names = json.loads((HERE / "emoji.json").read_text())
    found = [
        (name, normalised(sheet.crop((i % 10 * 64, i // 10 * 64, i % 10 * 64 + 64, i // 10 * 64 + 64))))
        for i, name in enumerate(names)
    ]
    if subject is not None:
        found += [("subject", cut_out(Image.open(path))) for path in sorted(subject.glob("*.png"))]
    return found


def nearest(image: Image.Image, known: list[tuple[str, np.ndarray]]) -> str:
    """The name of the nearest reference, by mean square difference."""
    own = cut_out(image)
    return min(known, key=lambda pair: float(np.mean((own - pair[1]) ** 2)))[0]
