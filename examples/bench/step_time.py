"""Time of a training step against plain LoRA's, beside the count of its products. Prints a Markdown table.

    python examples/bench/step_time.py

A transformer of FLUX.1's block layout with random weights in real files (0.6 GiB, in a temporary directory) takes
steps in float32, forward and back without the optimizer. Plain LoRA on all blocks at s_max, one graph over resident
weights, is 1.00. Ours trains the retained blocks at s_min from a record in a file (entry, both ends of the trailing
run, modulation). "+ precompute" adds a sweep over all blocks at s_min that makes one record; in a task one sweep makes
many, and reads once for all of them. "Streamed" reads every block each time from the page cache, with memory to spare,
so it shows what reading costs; "two blocks" does so with a budget for the least that the work takes and two blocks,
and "least memory" is --memory-budget 0, so they show what scarce memory costs: MLX then waits for each operation
before it schedules the next. "Activations kept" does not recompute. The variants take turns over several rounds after
one to warm up; a ratio is the median over rounds of the ratio within a round. About 8 minutes on 2 cores that are
free. Where other programs run, this is steadier:

    OPENBLAS_NUM_THREADS=1 python examples/bench/step_time.py --processor-time

It takes seconds of all threads on the processor, which leave out waiting and count what is read ahead in full.

Products are counted from shapes: linear layers on the tokens of their own stream, LoRA's two, attention's two. A pass
forward counts each once; the pass back counts linear layers once (their weights get no gradient), LoRA and attention
twice (both factors do). A recomputation is another pass forward.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)

# isort: split
import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import records, residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.converters.hollow import write_hollow
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files, kept, limits, sweep
from mlx_blockskip.engine.reader import BlockReader, Part
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Modulation, Stack, Trainable
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models import presets
from mlx_blockskip.models.family import Size, Tokens
from mlx_blockskip.models.flux1 import FAMILY
from mlx_blockskip.models.flux1.transformer import Context, FluxTransformer2DConfig, rope_tables, stack

DEPTH = (4, 8)
HEADS, HEAD_DIM, RANK = 6, 128, 16
TEXTS = (512, 64)
S_MAX, S_MIN = (64, 64), (32, 32)
"""Latents' height and width; 2 x 2 of them are an image token: 1024 and 256."""

SHARES = (0.3, 0.4, 0.5)
MODULES = FAMILY.lora_targets["all"]
OF_TEXT = ("attn.add_", "attn.to_add_out", "ff_context.")
AMPLE = 1 << 50
OVER_COUNT, OVER_RESIDENT = 1.15, 1.10
"""The goals: a measured ratio over the counted one, and a streamed row over the resident one."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Model:
    """A transformer on disk, a reader that keeps every block, and new factors for all of them."""

    shards: Shards
    stack: Stack
    reader: BlockReader
    tree: lora.Tree

    @property
    def width(self) -> int:
        return self.config.attention_head_dim * self.config.num_attention_heads

    @property
    def config(self) -> FluxTransformer2DConfig:
        return FluxTransformer2DConfig.from_dict(self.shards.config)

    @property
    def blocks(self) -> range:
        return range(self.stack.depth)


@dataclass(frozen=True)
class Record:
    """What a precompute sweep finds for one sample: tokens at every boundary, modulation of every block."""

    tokens: dict[int, Tokens] = field(default_factory=dict)
    modulation: dict[int, Modulation] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table: the parts whose times it adds up, and what they count. resident: the row with no reading."""

    name: str
    parts: tuple[str, ...]
    flops: int
    resident: str = ""


@dataclass(frozen=True)
class Setting:
    """What is timed with so many text tokens, and the lines made of it; the first is the baseline."""

    text: int
    parts: dict[str, Step] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, part: Step, flops: int, resident: str = "") -> None:
        self.parts[name] = part
        self.rows.append(Row(name, (name,), flops, resident))


def write_model(target: Path, heads: int) -> Model:
    """A hollow model whose blocks are then filled with random values: holes are read faster than data."""
    preset = presets.configs(presets.folders()["flux1-dev"])
    transformer = {
        **preset["transformer"], "num_layers": DEPTH[0], "num_single_layers": DEPTH[1],
        "num_attention_heads": heads, "attention_head_dim": HEAD_DIM,
    }  # fmt: skip
    tiny = Path(str(resources.files("mlx_blockskip") / "assets" / "tiny-flux"))
    configs = {**preset, "transformer": transformer}
    write_hollow(target, "flux1", configs, Precision("float32"), tiny, scheduler=preset["scheduler"])
    shards = Shards(target / "transformer")
    blocks = stack(FluxTransformer2DConfig.from_dict(transformer))
    for file in sorted({shards.weight_map[name] for block in blocks.blocks for name in shards.under(block.prefix)}):
        fill(shards.path / file)
    reader = BlockReader(shards, blocks)
    return Model(shards, blocks, reader, lora.init(reader, range(blocks.depth), MODULES, RANK, seed=0))


def fill(path: Path) -> None:
    """Random values for all tensors of a file; norms' scales are about 1."""
    header = files.read_header(path)
    with files.SafetensorsWriter(path, list(header.entries.values()), header.metadata) as writer:
        for number, (name, entry) in enumerate(header.entries.items()):
            values = mx.random.normal(entry.shape, scale=0.02, key=mx.random.key(number))
            writer.write(name, values + 1 if ".norm_" in name else values)


def image_tokens(size: Size) -> int:
    return size[0] * size[1] // 4


def random_tokens(model: Model, text: int, size: Size) -> Tokens:
    shapes = (1, image_tokens(size), model.width), (1, text, model.width)
    tokens = Tokens(*(mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)))
    mx.eval(tokens)
    return tokens


def context_of(model: Model, text: int, size: Size, temb: mx.array | None = None) -> Context:
    cos, sin = rope_tables(model.config.axes_dims_rope, text, size)
    return Context(mx.array(cos), mx.array(sin), temb, size)


def error(image: mx.array, target: mx.array) -> mx.array:
    return mx.mean(mx.square(image - target))


def whole_graph(model: Model, text: int, record: Record, checkpointed: bool) -> Step:
    """A step of plain LoRA at s_max: every block in one graph, weights and modulation in memory."""
    weights = dict(model.reader.walk(model.blocks, "body"))
    context = context_of(model, text, S_MAX)
    tokens = random_tokens(model, text, S_MAX)
    target = mx.zeros_like(tokens.image)

    def layer(index: int) -> Callable[[Tokens, Trainable], Tokens]:
        def run(x: Tokens, tree: Trainable) -> Tokens:
            apply = model.stack.blocks[index].kind.apply
            return apply(weights[index], tree, x, context, record.modulation[index], None)

        return mx.checkpoint(run) if checkpointed else run

    layers = [layer(index) for index in model.blocks]

    def loss(trees: list[Trainable]) -> mx.array:
        x = tokens
        for run, tree in zip(layers, trees, strict=True):
            x = run(x, tree)
        return error(x.image, target)

    def step() -> None:
        value, grads = mx.value_and_grad(loss)([model.tree[index] for index in model.blocks])
        mx.eval(value, grads[::-1])  # the last block's first, so that what a block recomputes is let go

    return step


def precompute(model: Model, text: int, reader: BlockReader) -> Record:
    """One sample through all blocks at s_min, which find their own modulation."""
    temb = mx.random.normal((1, model.width), key=mx.random.key(0))
    sample = Batch(random_tokens(model, text, S_MIN), context_of(model, text, S_MIN, temb))
    record = Record()

    def tap(boundary: int) -> sweep.Tap:
        return lambda _, tokens: record.tokens.__setitem__(boundary, tokens)

    def keep(_: int, block: int, modulation: Modulation) -> None:
        record.modulation[block] = modulation

    taps = {boundary: tap(boundary) for boundary in range(model.stack.depth + 1)}
    sweep.forward(model.stack, reader, [sample], taps=taps, on_modulation=keep)
    return record


def write_record(path: Path, plan: SkipPlan, record: Record) -> records.Chunk:
    """What a plan's step reads, as a chunk of one micro-batch."""
    tensors = {"target": mx.zeros_like(record.tokens[0].image), **records.of_samples([1.0], [0])}
    for boundary in residuals.boundaries(plan, "base"):
        tensors |= records.of_boundary(plan, "base", boundary, record.tokens[boundary])
    for block in plan.retained:
        tensors |= records.of_modulation(block, record.modulation[block])
    files.save_tensors(path, {f"0.{name}": value for name, value in tensors.items()})
    return records.Chunk(path)


def our_step(
    model: Model,
    text: int,
    plan: SkipPlan,
    chunk: records.Chunk,
    reader: BlockReader,
    backward: Callable[..., list[mx.array]] = sweep.backward,
) -> None:
    """A step of ours at s_min: the retained blocks, there and back."""
    grads: dict[int, dict[str, mx.array]] = {}
    backward(
        model.stack,
        reader,
        [Batch(chunk.tokens(0, "entry"), context_of(model, text, S_MIN), chunk.modulation(0))],
        plan.retained,
        trainable={block: model.tree[block] for block in plan.retained},
        loss=lambda _, tokens: error(tokens.image, chunk.target(0)),
        on_grad=grads.__setitem__,
        bridge=residuals.bridge(chunk.tokens, [0], "base"),
    )
    mx.eval(grads)


class Forgetful(BlockReader):
    """Reads every block each time, however much memory there is."""

    def _to_keep(self, order: Sequence[int], part: Part) -> int:
        return 0


def streamed(model: Model, work: Callable[[BlockReader], object], part: Part, blocks: int | None = None) -> Step:
    """The same work with weights that are read each time. blocks: that the budget has room for; None for any number."""
    if blocks is None:
        return partial(work, Forgetful(model.shards, model.stack, budget=AMPLE))
    reader = BlockReader(model.shards, model.stack, budget=0)

    def run() -> None:
        with bounded(reader, part, blocks):
            work(reader)

    return run


@contextmanager
def bounded(reader: BlockReader, part: Part, blocks: int) -> Iterator[None]:
    """A budget for the work, as the first walk measured it, and for so many blocks; MLX keeps to it as in a task."""
    if blocks and part in reader.overhead:
        reader.budget = reader.overhead[part] + blocks * max(reader.nbytes(i, part) for i in range(reader.stack.depth))
    limits.bound(reader.budget)
    try:
        yield
    finally:
        limits.bound(None)


def products(model: Model, block: int, text: int, image: int) -> tuple[int, int, int]:
    """FLOPs of a pass forward over a block: of its linear layers, of LoRA, of attention."""
    linear, low_rank = 0, 0
    kind = model.stack.blocks[block].kind.name
    for module in MODULES[kind]:
        rows = text + image if kind == "single" else text if module.startswith(OF_TEXT) else image
        out, width = lora.linear_shape(model.reader, block, module)
        linear += 2 * rows * out * width
        low_rank += 2 * rows * RANK * (out + width)
    return linear, low_rank, 4 * (text + image) ** 2 * model.width


def step_flops(model: Model, blocks: Sequence[int], text: int, image: int, forward: int = 2) -> int:
    """FLOPs of a training step: so many passes forward, and one back."""
    counts = [products(model, block, text, image) for block in blocks]
    return sum(forward * sum(each) + each[0] + 2 * each[1] + 2 * each[2] for each in counts)


def precompute_flops(model: Model, text: int, image: int) -> int:
    """FLOPs of a pass forward over all blocks, without LoRA."""
    counts = [products(model, block, text, image) for block in model.blocks]
    return sum(linear + attention for linear, _, attention in counts)


def setting(model: Model, text: int, work: Path) -> Setting:
    """All variants with so many text tokens."""
    found = Setting(text)
    record = precompute(model, text, model.reader)
    for name, checkpointed in (("plain LoRA, whole graph", False), ("plain LoRA, checkpointed", True)):
        flops = step_flops(model, model.blocks, text, image_tokens(S_MAX), 1 + checkpointed)
        found.add(name, whole_graph(model, text, record, checkpointed), flops)
    ahead = partial(precompute, model, text)
    found.parts["precompute, resident"] = partial(ahead, model.reader)
    found.parts["precompute, streamed"] = streamed(model, ahead, "all")
    for share in SHARES:
        plan = SkipPlan.from_ratio(share, model.stack.depth)
        add_plan(found, model, plan, f"{share:.0%}", write_record(work / f"{text}-{share}.safetensors", plan, record))
    return found


def add_plan(found: Setting, model: Model, plan: SkipPlan, share: str, chunk: records.Chunk) -> None:
    """The variants that skip so many blocks."""
    small = found.text, image_tokens(S_MIN)
    ahead = precompute_flops(model, *small)
    step = partial(our_step, model, found.text, plan, chunk)
    name = f"{share} skipped ({model.stack.depth - len(plan.retained)} of {model.stack.depth})"

    def add(how: str, part: Step, forward: int = 2, resident: str = "") -> None:
        own, flops = f"{name}, {how}", step_flops(model, plan.retained, *small, forward)
        found.add(own, part, flops, resident and f"{name}, {resident}")
        parts = own, f"precompute, {how.split(',')[0]}"
        beside = resident and f"{name}, {resident} + precompute"
        found.rows.append(Row(f"{own} + precompute", parts, flops + ahead, beside))

    add("resident", partial(step, model.reader))
    add("streamed", streamed(model, step, "body"), resident="resident")
    if share == f"{SHARES[-1]:.0%}":
        add("resident, activations kept", partial(step, model.reader, backward=kept.backward), forward=1)
        for how, blocks in (("two blocks", 2), ("least memory", 0)):
            part = streamed(model, step, "body", blocks)
            found.add(f"{name}, streamed, {how}", part, step_flops(model, plan.retained, *small))


def timed(settings: Sequence[Setting], rounds: int, clock: Callable[[], float]) -> list[list[dict[str, float]]]:
    """Seconds of every part, by setting and round."""
    found: list[list[dict[str, float]]] = [[] for _ in settings]
    for number in range(rounds + 1):
        for own, times in zip(settings, found, strict=True):
            print(f"round {number} of {rounds}, {own.text} text tokens", file=sys.stderr, flush=True)
            times.append({name: seconds(part, clock) for name, part in own.parts.items()})
    return [times[1:] for times in found]


def seconds(part: Step, clock: Callable[[], float]) -> float:
    mx.clear_cache()
    started = clock()
    part()
    return clock() - started


def median(times: Sequence[dict[str, float]], row: Row, over: Row | None = None) -> float:
    """Over rounds, the seconds of a row, or their ratio to another row's."""
    return statistics.median(
        sum(own[part] for part in row.parts) / (sum(own[part] for part in over.parts) if over else 1.0) for own in times
    )


def table(settings: Sequence[Setting], found: Sequence[list[dict[str, float]]]) -> Iterator[str]:
    """The lines of the table."""
    titles = [f"{s.text} text tokens: s | measured | counted | measured / counted" for s in settings]
    yield f"| | {' | '.join(titles)} |"
    yield "|---|" + "---:|" * 4 * len(settings)
    for rows in zip(*(s.rows for s in settings), strict=True):
        cells = [rows[0].name]
        for row, own, times in zip(rows, settings, found, strict=True):
            ratio, count = median(times, row, own.rows[0]), row.flops / own.rows[0].flops
            cells += [f"{median(times, row):.2f}", f"{ratio:.2f}", f"{count:.2f}", f"{ratio / count:.2f}"]
        yield f"| {' | '.join(cells)} |"


def goals(settings: Sequence[Setting], found: Sequence[list[dict[str, float]]]) -> Iterator[str]:
    """Which goals are met, and the worst of each."""
    counted, reading = [], []
    for own, times in zip(settings, found, strict=True):
        named = {row.name: row for row in own.rows}
        for row in own.rows[2:]:
            where = f"{row.name}, {own.text} text tokens"
            base = own.rows[0]
            counted.append((median(times, row, base) * base.flops / row.flops, where))
            if row.resident:
                reading.append((median(times, row, named[row.resident]), where))
    yield verdict(f"measured at most {OVER_COUNT:.2f} x counted", counted, OVER_COUNT)
    yield verdict(f"streamed at most {OVER_RESIDENT:.2f} x resident, page cache warm", reading, OVER_RESIDENT)


def verdict(goal: str, ratios: Sequence[tuple[float, str]], limit: float) -> str:
    worst, where = max(ratios)
    met = sum(ratio <= limit for ratio, _ in ratios)
    return f"Goal: {goal}. Met by {met} of {len(ratios)}; the worst is {worst:.2f} ({where})."


def commit() -> str:
    """The commit of the source, where it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(heads: int, rounds: int, processor_time: bool) -> None:
    began, source = time.perf_counter(), commit()
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / "model", heads)
        settings = [setting(model, text, Path(directory)) for text in TEXTS]
        found = timed(settings, rounds, time.process_time if processor_time else time.perf_counter)
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores, {mx.default_device()},")
    print(f"mlx {version('mlx')}, Python {platform.python_version()}, commit {source}\n")
    print(f"{DEPTH[0]} double and {DEPTH[1]} single blocks of width {model.width}, float32, LoRA of rank {RANK} in all")
    print(f"linear layers, image tokens {image_tokens(S_MAX)} at s_max and {image_tokens(S_MIN)} at s_min; medians of")
    clock = "processor time" if processor_time else "time"
    if threads := os.environ.get("OPENBLAS_NUM_THREADS"):
        clock += f" (OPENBLAS_NUM_THREADS={threads})"
    print(f"{clock} over {rounds} rounds. The whole graph runs at", end=" ")
    speeds = [f"{s.rows[0].flops / median(t, s.rows[0]) / 1e9:.0f}" for s, t in zip(settings, found, strict=True)]
    print(f"{' and '.join(speeds)} GFLOP/s.\n")
    print("\n".join(table(settings, found)), end="\n\n")
    print("\n".join(goals(settings, found)))
    print(f"Took {(time.perf_counter() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=int, default=HEADS, help=f"the width is {HEAD_DIM} times this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    main(arguments.heads, arguments.rounds, arguments.processor_time)
