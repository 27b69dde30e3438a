"""Which emoji is it? A picture is cut from its plain background, scaled to 32 px, and its nearest neighbour is taken
among the subject's own pictures and 50 emoji (the sheet emoji.png beside this file).
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "ablation"))

from measures import SMALL, cut_out, on_white  # noqa: E402


def as_array(cut: Image.Image) -> np.ndarray:
    """(32, 32, 3) in 0..1, on white."""
    return np.asarray(on_white(cut, SMALL), np.float32) / 255


def references(subject: Path | None) -> list[tuple[str, np.ndarray]]:
    """The 50 emoji, and the subject's pictures under the name "subject"."""
    sheet = Image.open(HERE / "emoji.png").convert("RGBA")
    names = json.loads((HERE / "emoji.json").read_text())
    found = [
        (name, as_array(sheet.crop((i % 10 * 64, i // 10 * 64, i % 10 * 64 + 64, i // 10 * 64 + 64))))
        for i, name in enumerate(names)
    ]
    if subject is not None:
        found += [("subject", as_array(cut_out(Image.open(path)))) for path in sorted(subject.glob("*.png"))]
    return found


def nearest(image: Image.Image, known: list[tuple[str, np.ndarray]]) -> str:
    """The name of the nearest reference, by mean square difference."""
    own = as_array(cut_out(image))
    return min(known, key=lambda pair: float(np.mean((own - pair[1]) ** 2)))[0]
