"""Draw a block selection: the sum of Eq. 2 over (n, m) with the chosen plans, or distances by window."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GRID, CHOSEN = "#222222", "#dddddd", "#b23a2e"
LOW, HIGH = (253, 246, 227), (31, 95, 168)
PLOT, LEFT, TOP, RIGHT, BOTTOM = 640, 90, 90, 40, 110


def draw(record: Mapping[str, Any], kinds: Sequence[str]) -> Image.Image:
    """The picture of what selection.json holds. kinds: of the model's blocks, in order."""
    return _windows(record, kinds) if "windows" in record else _heat_map(record)


def _heat_map(record: Mapping[str, Any]) -> Image.Image:
    first, last = (np.array(record[end]) for end in ("first", "last"))
    k = len(first) - 1
    image, pen = _canvas(f"Distance when the first n and the last m of {record['depth']} blocks are masked")
    table = first[:, None] + last[None, :]
    inside = np.add.outer(range(k + 1), range(k + 1)) <= k
    low, high = table[inside].min(), max(table[inside].max(), 1e-12)
    cell = PLOT / (k + 1)
    for n in range(k + 1):
        for m in range(k + 1 - n):
            share = (table[n, m] - low) / max(high - low, 1e-12)
            box = (LEFT + m * cell, TOP + n * cell, LEFT + (m + 1) * cell, TOP + (n + 1) * cell)
            pen.rectangle(box, fill=_colour(share))
            if cell >= 44:
                pen.text(
                    ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), f"{table[n, m]:.3f}", anchor="mm",
                    fill="white" if share > 0.6 else INK, font=_font(13),
                )  # fmt: skip
    for plan in record["plans"].values():
        n, m = plan["n"], plan["m"]
        box = (LEFT + m * cell + 2, TOP + n * cell + 2, LEFT + (m + 1) * cell - 2, TOP + (n + 1) * cell - 2)
        pen.rectangle(box, outline=CHOSEN, width=max(2, int(cell // 16)))
    every = max(1, (k + 1) // 14)
    for i in range(0, k + 1, every):
        pen.text((LEFT + (i + 0.5) * cell, TOP - 8), str(i), anchor="ms", fill=INK, font=_font(14))
        pen.text((LEFT - 8, TOP + (i + 0.5) * cell), str(i), anchor="rm", fill=INK, font=_font(14))
    pen.text((LEFT + PLOT / 2, TOP - 30), "m, last blocks", anchor="ms", fill=INK, font=_font(15))
    pen.text((LEFT - 70, TOP + PLOT / 2), "n,\nfirst\nblocks", anchor="lm", fill=INK, font=_font(15))
    pen.rectangle((LEFT, TOP + PLOT + 24, LEFT + 18, TOP + PLOT + 42), outline=CHOSEN, width=3)
    text = f"the least for its k = n + m; colours from {low:.3f} to {high:.3f}"
    pen.text((LEFT + 28, TOP + PLOT + 33), text, anchor="lm", fill=INK, font=_font(15))
    return image


def _windows(record: Mapping[str, Any], kinds: Sequence[str]) -> Image.Image:
    windows = record["windows"]
    image, pen = _canvas(f"Distance when {windows[0]['stop'] - windows[0]['start']} consecutive blocks are masked")
    top = max(max(w["distance"] for w in windows), 1e-12)
    width = PLOT / len(windows)
    shades = dict(zip(dict.fromkeys(kinds), ("#1f5fa8", "#2e7d32", "#b23a2e", "#8a5a00"), strict=False))
    for i in range(6):
        y = TOP + PLOT * (1 - i / 5)
        pen.line((LEFT, y, LEFT + PLOT, y), fill=GRID)
        pen.text((LEFT - 8, y), f"{top * i / 5:.3f}", anchor="rm", fill=INK, font=_font(14))
    for i, window in enumerate(windows):
        height = PLOT * window["distance"] / top
        box = (LEFT + i * width + 1, TOP + PLOT - height, LEFT + (i + 1) * width - 1, TOP + PLOT)
        pen.rectangle(box, fill=shades.get(kinds[window["start"]], INK))
        if i % max(1, len(windows) // 14) == 0:
            place = (LEFT + (i + 0.5) * width, TOP + PLOT + 18)
            pen.text(place, str(window["start"]), anchor="ms", fill=INK, font=_font(14))
    pen.text((LEFT + PLOT / 2, TOP + PLOT + 44), "first block of the window", anchor="ms", fill=INK, font=_font(15))
    for i, (kind, shade) in enumerate(shades.items()):
        x = LEFT + i * 160
        pen.rectangle((x, TOP + PLOT + 62, x + 14, TOP + PLOT + 76), fill=shade)
        pen.text((x + 22, TOP + PLOT + 69), f"{kind} block", anchor="lm", fill=INK, font=_font(14))
    return image


def _canvas(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (LEFT + PLOT + RIGHT, TOP + PLOT + BOTTOM), "white")
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 24), title, anchor="lm", fill=INK, font=_font(17))
    return image, pen


def _colour(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(LOW, HIGH, strict=True))
    return red, green, blue


def _font(pixels: int) -> Any:
    return ImageFont.load_default(pixels)
