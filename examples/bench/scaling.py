"""How memory and time grow with depth, width, tokens, rank, retained blocks and waiting samples, beside the theory.

    python examples/bench/scaling.py OUT.png

Prints Markdown tables and draws OUT.png. One factor at a time is varied around a middle setting, in float32, on hollow
models of FLUX.1's architecture with a memory budget of 0 (the least that is possible). *train* is one optimizer step,
whose retained blocks are the last ones, all single; *precompute* is one forward sweep of all samples that wait through
the whole stack. Each point is run once to warm up and then measured: the highest peak of MLX memory and the median
seconds of a few.

Theory counts bytes from shapes alone. train: the largest retained block's weights without modulation, every retained
block's LoRA factors, and, at the worse end of the way back, each block's kept input or each block's gradients.
precompute: the largest block's weights, and the tokens that wait. What is measured beyond is the scratch of the work
on one block; the law takes it to be proportional to tokens x width, and its one coefficient is fitted on the points of
tokens and width (train) or samples (precompute): other factors do not enter it. CPU seconds, of all threads, which
suffer less from what else the machine does, are held against the products' operations at one rate for the whole job;
OpenBLAS is given one thread unless OPENBLAS_NUM_THREADS says otherwise, because threads that wait for others spin.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from steps import HEAD_DIM, MIB, Trainer, hollow_model, machine, transformer_config

FLOAT = 4
CACHE_LIMIT = 64 * MIB
TIMES = {"train": 3, "precompute": 1}


@dataclass(frozen=True)
class Setting:
    """One point. depth: a third double, two thirds single blocks; tokens: half text, half image."""

    job: str = "train"
    depth: int = 24
    width: int = 384
    tokens: int = 256
    rank: int = 16
    retained: int = 8
    samples: int = 1


@dataclass(frozen=True)
class Factor:
    """One row of points. fitted: whether the scratch's coefficient is found on them; unit: what a slope is by."""

    job: str
    name: str
    values: tuple[int, ...]
    fitted: bool = False
    unit: int = 1


FACTORS = (
    Factor("train", "depth", (12, 24, 48)),
    Factor("train", "width", (256, 384, 512, 768), True, HEAD_DIM),
    Factor("train", "tokens", (128, 256, 512, 768), True, 128),
    Factor("train", "rank", (4, 16, 32, 64)),
    Factor("train", "retained", (2, 4, 8, 16)),
    Factor("precompute", "depth", (12, 24, 48)),
    Factor("precompute", "samples", (1, 2, 4, 8), True),
)


@dataclass(frozen=True)
class Point:
    """What was measured at a setting, and what follows from its shapes: bytes (`theory`) and operations."""

    setting: Setting
    peak: int
    seconds: float
    cpu: float
    theory: int
    operations: float

    @property
    def kept(self) -> int:
        """Bytes of one sample's tokens at one boundary."""
        return FLOAT * self.setting.tokens * self.setting.width


def main(target: Path) -> None:
    import mlx.core as mx

    mx.set_cache_limit(CACHE_LIMIT)
    print(machine("mlx"), end="\n\n", flush=True)
    started = time.perf_counter()
    middle = Setting()
    wanted = {factor: [setting(factor, value) for value in factor.values] for factor in FACTORS}
    points = {each: measure(each) for each in dict.fromkeys(s for own in wanted.values() for s in own)}
    rows = {factor: [points[each] for each in own] for factor, own in wanted.items()}
    laws = {job: Law.fit(job, rows) for job in TIMES}
    print(f"middle setting, float32: {describe(middle)}; {time.perf_counter() - started:.0f} s in all\n")
    print_laws(laws)
    print_slopes(rows, laws)
    print_points(rows, laws)
    draw(rows, laws).save(target)


def setting(factor: Factor, value: int) -> Setting:
    """The middle setting but for one value."""
    return replace(Setting(job=factor.job), **{factor.name: value})


def describe(middle: Setting) -> str:
    return (
        f"depth {middle.depth}, width {middle.width}, {middle.tokens} tokens, rank {middle.rank}, "
        f"{middle.retained} blocks retained, {middle.samples} sample"
    )


def measure(own: Setting) -> Point:
    """One point on a model of its own."""
    with tempfile.TemporaryDirectory() as work:
        doubles = own.depth // 3
        hollow_model(Path(work) / "m", transformer_config(own.width, doubles, own.depth - doubles), "float32")
        trainer = Trainer(Path(work) / "m", 0, range(own.depth - own.retained, own.depth), own.rank)
        run = train(trainer, own) if own.job == "train" else precompute(trainer, own)
        peak, seconds, cpu = timed(run, TIMES[own.job])
        theory, operations = THEORIES[own.job](own, trainer)
    print(f"<!-- {own}: {peak / MIB:.1f} MiB, {seconds:.2f} s -->", file=sys.stderr, flush=True)
    return Point(own, peak, seconds, cpu, theory, operations)


def latent_size(own: Setting) -> tuple[int, int]:
    """Of half the tokens, which are 2 x 2 patches."""
    return 2, own.tokens


def train(trainer: Trainer, own: Setting) -> Callable[[], Any]:
    import mlx.core as mx

    record = trainer.prepare(own.tokens - own.tokens // 2, latent_size(own))
    mx.eval(trainer.state.tree)
    return lambda: trainer.step(record)


def precompute(trainer: Trainer, own: Setting) -> Callable[[], Any]:
    import mlx.core as mx

    from mlx_blockskip.engine.sweep import Batch, forward

    trainer.state.tree.clear()
    embedded, context = trainer.embed(own.tokens - own.tokens // 2, latent_size(own))
    trainer.model.release()

    def run() -> None:
        samples = [Batch(type(embedded)(*(mx.array(part) for part in embedded)), context) for _ in range(own.samples)]
        mx.eval([sample.state for sample in samples])
        forward(trainer.model.stack, trainer.model.reader, samples)

    return run


def timed(run: Callable[[], Any], times: int) -> tuple[int, float, float]:
    """Highest peak of MLX memory, median seconds and CPU seconds of `times` runs, after one to warm up."""
    import mlx.core as mx

    from mlx_blockskip.engine import memory

    run()
    mx.clear_cache()
    memory.reset()
    seconds, cpu = [], []
    for _ in range(times):
        started, used = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return memory.peak(), statistics.median(seconds), statistics.median(cpu)


def train_theory(own: Setting, trainer: Trainer) -> tuple[int, float]:
    """Bytes and operations of a step: each block twice forward and once back, for tokens and for its factors."""
    weights = max(trainer.model.reader.nbytes(index, "body") for index in trainer.retained)
    factors = FLOAT * trainer.parameters
    one, kept = factors // own.retained, FLOAT * own.tokens * own.width
    forth, back = own.retained * kept + one, kept + factors
    linear, attention = 3 * 24 * own.width**2, 5 * 4 * own.tokens * own.width
    low_rank = 4 * 2 * one / FLOAT
    return weights + factors + max(forth, back), own.retained * own.tokens * (linear + attention + low_rank)


def precompute_theory(own: Setting, trainer: Trainer) -> tuple[int, float]:
    """Bytes and operations of a sweep: each block once forward."""
    weights = max(trainer.model.reader.nbytes(index, "all") for index in range(own.depth))
    waiting = own.samples * FLOAT * own.tokens * own.width
    linear, attention = 24 * own.width**2, 4 * own.tokens * own.width
    return weights + waiting, own.depth * own.samples * own.tokens * (linear + attention)


THEORIES = {"train": train_theory, "precompute": precompute_theory}


@dataclass(frozen=True)
class Law:
    """scratch: bytes beside theory, as a multiple of one sample's tokens; rate: operations a CPU second."""

    scratch: float
    rate: float

    @classmethod
    def fit(cls, job: str, rows: dict[Factor, list[Point]]) -> "Law":
        points = [point for factor, own in rows.items() if factor.job == job for point in own]
        fitted = [point for factor, own in rows.items() if factor.job == job and factor.fitted for point in own]
        over = sum((point.peak - point.theory) * point.kept for point in fitted)
        rate = sum(point.operations for point in points) / sum(point.cpu for point in points)
        return cls(over / sum(point.kept**2 for point in fitted), rate)

    def peak(self, point: Point) -> float:
        return point.theory + self.scratch * point.kept

    def cpu(self, point: Point) -> float:
        return point.operations / self.rate


def print_laws(laws: dict[str, Law]) -> None:
    for job, law in laws.items():
        print(f"- {job}: scratch of one block {law.scratch:.1f} x tokens x width x {FLOAT} bytes (fitted); ", end="")
        print(f"{law.rate / 1e9:.0f} GFLOP a CPU second")
    print()


def print_slopes(rows: dict[Factor, list[Point]], laws: dict[str, Law]) -> None:
    """Of straight lines by least squares through what was measured, what theory says, and the law."""
    print("| factor | job | by | MiB measured | theory | law | CPU seconds measured | by operations |\n|" + "---|" * 8)
    for factor, points in rows.items():
        law = laws[factor.job]
        peaks: list[list[float]] = [
            [point.peak for point in points],
            [point.theory for point in points],
            [law.peak(point) for point in points],
        ]
        times = [[point.cpu for point in points], [law.cpu(point) for point in points]]
        cells = [f"{slope(factor, ys) / MIB:.3f}" for ys in peaks] + [f"{slope(factor, ys):.4f}" for ys in times]
        print(f"| {factor.name} | {factor.job} | {factor.unit} | {' | '.join(cells)} |")
    print()


def slope(factor: Factor, ys: Sequence[float]) -> float:
    """By least squares, for one unit of the factor."""
    return statistics.linear_regression(factor.values, ys).slope * factor.unit


def print_points(rows: dict[Factor, list[Point]], laws: dict[str, Law]) -> None:
    names = ("factor", "job", "value", "peak, MiB", "theory", "scratch, by difference", "law", "off", "seconds")
    print(f"| {' | '.join((*names, 'CPU seconds', 'by operations'))} |\n|{'---|' * 11}")
    for factor, points in rows.items():
        law = laws[factor.job]
        for value, point in zip(factor.values, points, strict=True):
            sizes = (point.peak, point.theory, point.peak - point.theory, law.peak(point))
            cells = [f"{size / MIB:.1f}" for size in sizes] + [f"{100 * (law.peak(point) / point.peak - 1):+.1f} %"]
            cells += [f"{point.seconds:.2f}", f"{point.cpu:.2f}", f"{law.cpu(point):.2f}"]
            print(f"| {factor.name} | {factor.job} | {value} | {' | '.join(cells)} |")


PANEL, GAP, COLUMNS, TOP = (300, 200), (70, 90), 4, 110
INK, GRID, MEASURED, THEORY, LAW = "#222222", "#dddddd", "#b23a2e", "#888888", "#1f5fa8"
TEXT = ImageFont.load_default(14)

Box = tuple[float, float, float, float]
Curve = tuple[str, list[float]]


def draw(rows: dict[Factor, list[Point]], laws: dict[str, Law]) -> Image.Image:
    """A pair of panels for each factor, memory above seconds, from zero."""
    lines = -(-len(rows) // COLUMNS)
    height = TOP + lines * 2 * (PANEL[1] + GAP[1])
    image = Image.new("RGB", (COLUMNS * (PANEL[0] + GAP[0]) + 30, height), "white")
    pen = ImageDraw.Draw(image)
    draw_heading(pen)
    for i, (factor, points) in enumerate(rows.items()):
        law = laws[factor.job]
        left = GAP[0] + i % COLUMNS * (PANEL[0] + GAP[0])
        top = TOP + i // COLUMNS * 2 * (PANEL[1] + GAP[1])
        memory: list[Curve] = [
            (THEORY, [point.theory / MIB for point in points]),
            (LAW, [law.peak(point) / MIB for point in points]),
            (MEASURED, [point.peak / MIB for point in points]),
        ]
        draw_panel(pen, (left, top), factor, f"{factor.job}: peak, MiB", memory)
        times = [(LAW, [law.cpu(point) for point in points]), (MEASURED, [point.cpu for point in points])]
        draw_panel(pen, (left, top + PANEL[1] + GAP[1]), factor, f"{factor.job}: CPU seconds", times)
    return image


def draw_heading(pen: ImageDraw.ImageDraw) -> None:
    title = f"Memory and time of a sweep, one factor at a time ({describe(Setting())})"
    pen.text((GAP[0], 16), title, fill=INK, font=ImageFont.load_default(20))
    x = float(GAP[0])
    for color, name in (
        (MEASURED, "measured"),
        (LAW, "law: theory and the fitted scratch of one block; CPU seconds by operations"),
        (THEORY, "theory: bytes from shapes alone"),
    ):
        if color == MEASURED:
            pen.ellipse((x + 9, 56, x + 17, 64), fill=color)
        else:
            pen.line((x, 60, x + 26, 60), fill=color, width=3)
        pen.text((x + 34, 60), name, fill=INK, font=TEXT, anchor="lm")
        x += 70 + pen.textlength(name, font=TEXT)


def draw_panel(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], factor: Factor, title: str, curves: Sequence[Curve]
) -> None:
    """Curves over the factor's values; the last one as points."""
    (left, top), (width, height) = corner, PANEL
    tick = round_step(max(max(ys) for _, ys in curves) * 1.08 / 4)
    highest, furthest = 4 * tick, factor.values[-1] * 1.05

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * x / furthest, top + height * (1 - y / highest)

    pen.text((left, top - 8), title, fill=INK, font=TEXT, anchor="lb")
    for i in range(5):
        y = place(0, i * tick)[1]
        pen.line((left, y, left + width, y), fill=GRID)
        pen.text((left - 6, y), f"{i * tick:g}", fill=INK, font=TEXT, anchor="rm")
    for value in factor.values:
        x = place(value, 0)[0]
        pen.line((x, top + height, x, top + height + 5), fill=INK)
        pen.text((x, top + height + 8), str(value), fill=INK, font=TEXT, anchor="mt")
    pen.text((left + width / 2, top + height + 28), factor.name, fill=INK, font=TEXT, anchor="mt")
    for color, ys in curves[:-1]:
        pen.line([place(x, y) for x, y in zip(factor.values, ys, strict=True)], fill=color, width=2)
    color, ys = curves[-1]
    for x, y in (place(x, y) for x, y in zip(factor.values, ys, strict=True)):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)


def round_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least this much."""
    power = 10.0 ** next(k for k in range(-9, 12) if 10.0 ** (k + 1) > least)
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path, metavar="OUT.png")
    main(parser.parse_args().target)
