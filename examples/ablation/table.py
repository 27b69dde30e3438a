"""The table and the picture of an ablation's results: means over subjects, and differences from plain LoRA in pairs.

    python examples/ablation/table.py examples/ablation/tiny-flux examples/ablation/tiny-sana

prints the shorter table of several models, side by side, from their results.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from results import Stored

COMPARED = ("top-1", "DINO", "CLIP-I")
"""What retention is of."""

SHOWN = ("top-1", "top-1 at 64 px", "rank", "DINO", "CLIP-I", "CLIP-T", "colour", "kept")
DRAWS = 2000
INK, GRID, BAR = "#222222", "#dddddd", "#1f5fa8"
Results = Sequence[dict[str, Any]]


def by_row(results: Results, measure: str) -> dict[str, dict[tuple[str, int], float]]:
    """Values by row, and there by subject and seed."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for result in results:
        if measure in result:
            found.setdefault(result["row"], {})[result["subject"], result["seed"]] = result[measure]
    return found


def difference(own: dict, plain: dict) -> tuple[float, float, float]:
    """Mean of the paired differences, and its 95 % bootstrap interval over subjects (and seeds)."""
    pairs = np.array([own[key] - plain[key] for key in own if key in plain])
    draws = np.random.default_rng(0).choice(pairs, (DRAWS, len(pairs))).mean(axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(pairs.mean()), float(low), float(high)


def mean(values: dict) -> float:
    return float(np.mean(list(values.values())))


def table(results: Results, plain: str) -> tuple[str, Image.Image]:
    """Markdown, and bars of what each row retains of `plain`."""
    shown = [name for name in SHOWN if by_row(results, name)]
    measures = {name: by_row(results, name) for name in (*shown, "peak", "seconds a step")}
    rows = list(measures["top-1"])
    head = ["", *shown, "peak, MiB", "s a step", *(f"{name} - plain" for name in COMPARED)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    retained: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        cells = [f"{mean(measures[name][row]):.{1 if name == 'rank' else 3}f}" for name in shown]
        trained = row in measures["peak"]
        cells.append(f"{mean(measures['peak'][row]) / 2**20:.1f}" if trained else "")
        cells.append(f"{mean(measures['seconds a step'][row]):.2f}" if trained else "")
        for name in COMPARED:
            if row == plain or row == "base":
                cells.append("")
                continue
            middle, low, high = difference(measures[name][row], measures[name][plain])
            cells.append(f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]")
            whole = mean(measures[name][plain])
            retained.setdefault(row, []).append(tuple(100 * (1 + x / whole) for x in (middle, low, high)))  # type: ignore
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n", _bars(retained)


BESIDE = {"top-1": "top-1", "top-1 at 64 px": "at 64 px", "kept": "others kept"}
"""Of each model, in the table of several, before the peak and what is retained."""


def beside(models: dict[str, Results], order: dict[str, Sequence[str]]) -> str:
    """Markdown of several models: the same rows, whose names may differ, in the order of each; the second is plain."""
    head = ["", *(f"{name}: {column}" for name in models for column in (*BESIDE.values(), "peak, MiB", "retained"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for place, names in enumerate(zip(*order.values(), strict=True)):
        cells = [" or ".join(dict.fromkeys(names))]
        for (model, results), row in zip(models.items(), names, strict=True):
            cells += [f"{mean(by_row(results, measure)[row]):.2f}" for measure in BESIDE]
            peaks = by_row(results, "peak")
            cells.append(f"{mean(peaks[row]) / 2**20:.1f}" if row in peaks else "")
            kept = [
                mean(by_row(results, name)[row]) / mean(by_row(results, name)[order[model][1]]) for name in COMPARED
            ]
            cells.append(", ".join(f"{100 * share:.0f}" for share in kept) + " %" if place > 1 else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _bars(retained: dict[str, list[tuple[float, float, float]]]) -> Image.Image:
    """For each row and measure what is retained of plain LoRA, in per cent, with its interval."""
    left, width, height, gap = 260, 620, 16, 14
    group = len(COMPARED) * height + gap
    image = Image.new("RGB", (left + width + 70, 70 + group * len(retained)), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    pen.text((left, 2), "retained of plain LoRA, % (95 % interval)", fill=INK, font=ImageFont.load_default(16))
    shades = (BAR, "#2e7d32", "#b23a2e")
    for i, (name, shade) in enumerate(zip(COMPARED, shades, strict=True)):
        pen.text((left + 360 + 90 * i, 4), name, fill=shade, font=font)
    for percent in range(0, 121, 20):
        x = left + width * percent / 120
        pen.line((x, 44, x, 60 + group * len(retained)), fill=INK if percent == 100 else GRID)
        pen.text((x, 40), str(percent), fill=INK, font=font, anchor="ms")

    def place(percent: float) -> float:
        return left + width * min(max(percent, 0), 120) / 120

    for r, (row, values) in enumerate(retained.items()):
        top = 52 + r * group
        pen.text((left - 10, top + group / 2 - gap / 2), row, fill=INK, font=font, anchor="rm")
        for i, (middle, low, high) in enumerate(values):
            y = top + i * height
            pen.rectangle((left, y + 2, place(middle), y + height - 3), fill=shades[i])
            pen.line((place(low), y + height / 2, place(high), y + height / 2), fill=INK, width=2)
    return image


def pictures(rows: Sequence[str], columns: dict[str, dict[str, list[Path]]]) -> Image.Image:
    """What each row draws of each subject. columns: by subject and row, the pictures' files."""
    left, side, gap, top = 230, 64, 2, 22
    each = max(len(files) for by_row in columns.values() for files in by_row.values()) * (side + gap) + 8
    sheet = Image.new("RGB", (left + each * len(columns), top + len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for r, row in enumerate(rows):
        pen.text((left - 8, top + r * (side + gap) + side / 2), row, fill=INK, font=font, anchor="rm")
    for c, (subject, by_row) in enumerate(columns.items()):
        pen.text((left + c * each, 3), subject, fill=INK, font=font)
        for r, row in enumerate(rows):
            for i, file in enumerate(by_row.get(row, ())):
                picture = Image.open(file).resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left + c * each + i * (side + gap), top + r * (side + gap)))
    return sheet


def main(directories: Sequence[Path]) -> None:
    models = {path.name: list(Stored(path).own.values()) for path in directories}
    lines = {path.name: (path / "table.md").read_text().splitlines()[2:] for path in directories}
    print(beside(models, {name: [line.split(" | ")[0].strip("| ") for line in own] for name, own in lines.items()}))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
