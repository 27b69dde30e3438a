"""Draw subjects that tiny-flux never saw: emoji that are sequences of code points, five pictures each with captions.

    python examples/ablation/subjects.py OUT

Needs Noto Color Emoji (SIL Open Font License 1.1; Debian: fonts-noto-color-emoji) and Pillow with raqm.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIDE = 128
SUBJECTS = {
    "polar-bear": "🐻‍❄️",
    "black-cat": "🐈‍⬛",
    "phoenix": "🐦‍🔥",
    "service-dog": "🐕‍🦺",
    "lime": "🍋‍🟩",
    "heart-on-fire": "❤️‍🔥",
    "broken-chain": "⛓️‍💥",
    "pirate-flag": "🏴‍☠️",
}
COLOURS = {
    "white": (255, 255, 255), "orange": (245, 140, 40), "cyan": (60, 200, 210), "black": (20, 20, 20),
    "pink": (245, 150, 190), "green": (40, 160, 60), "yellow": (240, 210, 50), "blue": (50, 90, 220),
}  # fmt: skip
PICTURES = 5
SIZES = (96, 96, 60, 100, 88)
"""Longer side of the thing in pixels, by picture; the third is called small."""


def cut_out(text: str) -> Image.Image:
    """The emoji by itself, with transparency."""
    font = ImageFont.truetype(FONT, 109)
    cell = Image.new("RGBA", (170, 170))
    ImageDraw.Draw(cell).text((10, 10), text, font=font, embedded_color=True)
    return cell.crop(cell.getbbox())


def draw(out: Path, name: str) -> Path:
    """Five pictures of a subject in a folder of its own, each with its caption. The same whenever it is drawn."""
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    number = list(SUBJECTS).index(name)
    rng = np.random.default_rng(number)
    thing = cut_out(SUBJECTS[name])
    colours = list(COLOURS)
    for i in range(PICTURES):
        colour = colours[(number + i) % len(colours)]
        share = SIZES[i] / max(thing.size)
        scaled = thing.resize([max(1, round(side * share)) for side in thing.size], Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (SIDE, SIDE), COLOURS[colour])
        left, top = ((SIDE - side) // 2 + int(rng.integers(-3, 4)) for side in scaled.size)
        picture.paste(scaled, (left, top), scaled)
        picture.save(directory / f"{i}.png")
        small = "small " if SIZES[i] < 70 else ""
        (directory / f"{i}.txt").write_text(f"a {small}sks toy on a {colour} background\n")
    return directory


if __name__ == "__main__":
    if not features.check("raqm"):
        raise SystemExit("Pillow has no raqm, which joins code points into one emoji; install libraqm")
    for subject in SUBJECTS:
        print(draw(Path(sys.argv[1]), subject))
