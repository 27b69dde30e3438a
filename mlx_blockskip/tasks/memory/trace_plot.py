"""Draw a memory timeline: peak and active bytes over its points, phases shaded, the highest point named."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, PLOT_HEIGHT, LEFT, RIGHT, GAP = 1400, 520, 110, 30, 40
NAMES = 130  # where the strip with the phases' names begins; the plot is below it
TOP = NAMES + 130
TEXT, ROW = 15, 22
TICKS = 6
BREADTH = 0.3
"""Of the plot's width, what phases share evenly, so that a phase of two points can be seen beside one of thousands."""

ABOVE = 2.0
"""A budget up to this many times the highest point is on the axis."""

INK, GRID, PEAK, ACTIVE, BUDGET = "#222222", "#dddddd", "#b23a2e", "#1f5fa8", "#2e7d32"
SHADES = ("#fdf3d8", "#e3eefa", "#e8f5e4", "#f7e6ee", "#ece7f7", "#dff2f2", "#f2ece2", "#f0f0d8")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Band:
    """Points in a row that share a phase (None between two), and where they are: from `left` to `right` in pixels."""

    phase: int | None
    points: Sequence[Record]
    left: float
    right: float

    def cell(self, i: int) -> tuple[float, float]:
        """Where point i begins and ends."""
        step = (self.right - self.left) / len(self.points)
        return self.left + i * step, self.left + (i + 1) * step


@dataclass(frozen=True)
class Axis:
    """Bytes from 0 to `top` over the plot's height; unit: its name and bytes."""

    top: float
    tick: float
    unit: tuple[str, int]

    def y(self, count: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - count / self.top)


def draw(record: Record) -> Image.Image:
    """The picture of a timeline as trace.as_json gives it. Needs at least one phase."""
    names = list(dict.fromkeys(phase["name"] for phase in record["phases"]))
    shades = dict(zip(names, itertools.cycle(SHADES)))
    height = TOP + PLOT_HEIGHT + GAP + ROW * (len(names) + 2)
    image = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    shown, axis = bands(record), axis_for(record)
    highest = max(record["points"], key=lambda point: point["peak_memory"])
    for band in shown:
        if band.phase is not None:
            shade = shades[record["phases"][band.phase]["name"]]
            pen.rectangle((band.left, NAMES, band.right, TOP + PLOT_HEIGHT), fill=shade)
    _draw_axis(pen, axis)
    for band in shown:
        _draw_times(pen, band, record)
    _draw_curves(pen, shown, axis)
    for band in shown:
        if band.phase is not None:
            _draw_name(image, record["phases"][band.phase]["name"], band)
    _draw_budget(pen, record, axis)
    _draw_highest(pen, shown, axis, highest, record)
    _draw_heading(pen, record)
    _draw_legend(pen, record, names, shades)
    return image


def bands(record: Record) -> list[Band]:
    """The points by phase, side by side: wider where there are more of them, but never too narrow to see."""
    groups = [(k, list(g)) for k, g in itertools.groupby(record["points"], key=lambda point: point["phase"])]
    phases = sum(phase is not None for phase, _ in groups)
    total = sum(len(points) for _, points in groups)
    extra = BREADTH * total / (1 - BREADTH) / phases
    scale = (WIDTH - LEFT - RIGHT) * (1 - BREADTH) / total
    found, left = [], float(LEFT)
    for phase, points in groups:
        right = left + scale * (len(points) + (extra if phase is not None else 0))
        found.append(Band(phase, points, left, right))
        left = right
    return found


def axis_for(record: Record) -> Axis:
    """Round ticks in MiB or GiB, up to a little above what there is to show."""
    highest = max(point["peak_memory"] for point in record["points"])
    budget = record["memory_budget"] or 0
    wanted = max(1, highest, budget if budget <= ABOVE * highest else 0) * 1.05
    unit = ("GiB", 2**30) if wanted >= 2**30 else ("MiB", 2**20)
    rough = wanted / unit[1] / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    tick = next(step * power for step in (1, 2, 5, 10) if step * power >= rough) * unit[1]
    return Axis(math.ceil(wanted / tick) * tick, tick, unit)


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.{1 if count >= 2**20 else 3}f} MiB"


def name_of(point: Record) -> str:
    """What was at work."""
    if point["what"] == "block":
        return f"{point['direction']}, block {point['block']} ({point['kind']}, {point['prefix'].rstrip('.')})"
    if point["what"] == "start":
        return "at its start"
    when = f"in step {point['done']}" if point["what"] == "step" else f"after step {point['done']}"
    return f"outside of blocks, {when}" if point["done"] else "outside of blocks"


def _font(pixels: int = TEXT) -> Any:
    return ImageFont.load_default(pixels)


def _draw_axis(pen: ImageDraw.ImageDraw, axis: Axis) -> None:
    name, unit = axis.unit
    for i in range(round(axis.top / axis.tick) + 1):
        y = axis.y(i * axis.tick)
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        pen.text((LEFT - 8, y), f"{i * axis.tick / unit:g} {name}", fill=INK, font=_font(), anchor="rm")


def _draw_times(pen: ImageDraw.ImageDraw, band: Band, record: Record) -> None:
    if band.phase is None:
        return
    pen.line((band.left, NAMES, band.left, TOP + PLOT_HEIGHT + 6), fill="#aaaaaa")
    label = f"{band.points[0]['seconds']:.1f} s"
    if pen.textlength(label, font=_font()) + 8 <= band.right - band.left:
        pen.text((band.left + 2, TOP + PLOT_HEIGHT + 8), label, fill=INK, font=_font())


def _draw_curves(pen: ImageDraw.ImageDraw, shown: Sequence[Band], axis: Axis) -> None:
    """Peaks as steps, each as wide as its point; active bytes as they are at a point's end."""
    peaks: list[tuple[float, float]] = []
    active: list[tuple[float, float]] = []
    for band in shown:
        for i, point in enumerate(band.points):
            left, right = band.cell(i)
            y = axis.y(point["peak_memory"])
            peaks += [(left, y), (right, y)]
            active.append((right, axis.y(point["active_memory"])))
    pen.line(active, fill=ACTIVE, width=2)
    pen.line(peaks, fill=PEAK, width=2)


def _draw_name(image: Image.Image, name: str, band: Band) -> None:
    """Above the plot: across the band where it fits, upright in a narrow one, else left to the legend."""
    _, _, right, bottom = (math.ceil(side) for side in _font().getbbox(name))
    room = band.right - band.left
    label = Image.new("L", (right + 2, bottom + 2), 0)
    ImageDraw.Draw(label).text((0, 0), name, fill=255, font=_font())
    if label.width + 4 > room:
        label = label.rotate(90, expand=True)
        if label.width > room or label.height > TOP - NAMES:
            return
    x = round((band.left + band.right - label.width) / 2)
    image.paste(INK, (x, TOP - label.height - 4), label)


def _draw_budget(pen: ImageDraw.ImageDraw, record: Record, axis: Axis) -> None:
    budget = record["memory_budget"]
    if budget is None or budget > axis.top:
        return
    y = axis.y(budget)
    for x in range(LEFT, WIDTH - RIGHT, 16):
        pen.line((x, y, x + 9, y), fill=BUDGET, width=2)
    pen.text((LEFT + 4, y - 4), f"budget {size(budget)}", fill=BUDGET, font=_font(), anchor="lb")


def _draw_highest(pen: ImageDraw.ImageDraw, shown: Sequence[Band], axis: Axis, highest: Record, record: Record) -> None:
    band, i = next((b, i) for b in shown for i, point in enumerate(b.points) if point is highest)
    x, y = sum(band.cell(i)) / 2, axis.y(highest["peak_memory"])
    phase = "between phases" if band.phase is None else record["phases"][band.phase]["name"]
    label = f"highest: {size(highest['peak_memory'])} in {phase}: {name_of(highest)}"
    half = pen.textlength(label, font=_font()) / 2
    middle = min(max(x, LEFT + half), max(LEFT + half, WIDTH - RIGHT - half))
    pen.line((x, y - 5, x, NAMES - 8), fill=PEAK)
    pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline=PEAK, width=2)
    pen.text((middle, NAMES - 10), label, fill=PEAK, font=_font(), anchor="mb")


def _draw_heading(pen: ImageDraw.ImageDraw, record: Record) -> None:
    stopped = f", stopped ({record['stopped']})" if record["stopped"] else ""
    budget = record["memory_budget"]
    given = f", budget {size(budget)}" if budget is not None else ""
    pen.text((LEFT, 14), f"MLX memory of {record['task']}{given}{stopped}", fill=INK, font=_font(22))
    x = float(LEFT)
    for color, text in ((PEAK, "peak while at work"), (ACTIVE, "active after it")):
        pen.line((x, 62, x + 26, 62), fill=color, width=3)
        pen.text((x + 34, 62), text, fill=INK, font=_font(), anchor="lm")
        x += 60 + pen.textlength(text, font=_font())
    pen.text((LEFT, 76), f"{record['kept']}, in order", fill=INK, font=_font(13))


def _draw_legend(pen: ImageDraw.ImageDraw, record: Record, names: Sequence[str], shades: Mapping[str, str]) -> None:
    """A row for each phase, those of one name together: how often, how long, and what was highest."""
    by_number = {point["number"]: point for point in record["points"]}
    y = TOP + PLOT_HEIGHT + GAP + ROW
    for name in names:
        own = [phase for phase in record["phases"] if phase["name"] == name]
        top = max(own, key=lambda phase: phase["peak_memory"])
        seconds = sum(end - start for start, end in (phase["seconds"] for phase in own) if end is not None)
        times = f" ({len(own)} times)" if len(own) > 1 else ""
        text = f"{name}{times}: {seconds:.1f} s, peak {size(top['peak_memory'])}, {name_of(by_number[top['highest']])}"
        pen.rectangle((LEFT, y - 8, LEFT + 24, y + 8), fill=shades[name], outline="#aaaaaa")
        pen.text((LEFT + 34, y), text, fill=INK, font=_font(), anchor="lm")
        y += ROW
