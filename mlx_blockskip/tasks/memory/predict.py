"""What a run will take, phase by phase, before it runs: the least MLX memory, what is read, and the seconds of a step.

One block of each kind is traced once (`engine.planner`), and bytes of weights come from the index. Where there are many
tokens a block is traced at two smaller sizes, since what it takes grows along a line with them. Nothing here knows a
family.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import records, residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.blockskip.records import Layout
from mlx_blockskip.engine import memory, planner, sweep
from mlx_blockskip.engine.planner import Cost
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import Modulation, arrays
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.tasks.memory.waiting import adapter_waits, together, waiting_bytes

TRACED_SIDES = (256, 384)
"""Sides in pixels at which a VAE that works on streams of rows is traced where larger images are asked for."""

TRACED_STRIPS = (512, 1024)
"""The same of a VAE that works in strips."""

TRACED_TOKENS = 1024
"""Image tokens with which a block is traced, and a quarter of them, where a sample has more than twice as many."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    peak: bytes of MLX memory, the least that is possible. read: bytes of weights read a step (a sweep, an image) when
    nothing stays in memory. seconds: of work a step, without the reading. ample: bytes with which nothing is read twice
    (and, in training, activations are kept).
    """

    name: str
    peak: int
    read: int = 0
    seconds: float = 0.0
    ample: int = 0


@dataclass(frozen=True)
class Shape:
    """What a sample is: a patch or image in pixels, text tokens, images a micro-batch."""

    width: int
    height: int
    length: int
    batch: int = 1

    def scaled(self, share: float, multiple: int) -> "Shape":
        """The same with this share of the sides, in multiples of `multiple` pixels."""
        width, height = (max(multiple, round(side * share / multiple) * multiple) for side in (self.width, self.height))
        return replace(self, width=width, height=height)


class Tracer:
    """Traces blocks at one shape, each kind once. rank, modules: of the LoRA, where training is asked for.

    tokens: of a sample, text and batch counted. waiting: bytes of a second sample, beside what all share. embedding:
    bytes when a sample has been made, with the weights outside of the blocks; embedders: when the sweep begins.
    """

    def __init__(
        self, model: DiffusionModel, shape: Shape, rank: int = 0, modules: Mapping[str, Sequence[str]] | None = None
    ):
        self.model, self.stack, self.shards = model, model.stack, model.reader.shards
        self.shape, self.rank, self.modules = shape, rank, modules or {}
        self.reader = BlockReader(self.shards, self.stack, 0, prefetch=False)
        self.first = {self.stack.block(i).kind.name: i for i in reversed(self.stack.path)}
        self._costs: dict[tuple[str, str, Shape], Cost] = {}
        self._factors: dict[str, dict[str, mx.array]] = {}
        self._fewer: list[Tracer] | None = None
        model.release()
        floor = memory.settled()
        self._embed()
        self.embedding = memory.settled() - floor
        model.make_room()
        self.embedders = memory.settled() - floor
        self._modulation: dict[str, Modulation] = {
            kind: sweep.modulations(self.stack, self.reader, [self.sample.context], [index])[0].get(index)
            for kind, index in self.first.items()
        }
        known, stack = self._modulation, self.stack  # not self: a cycle would keep all this into the run
        self.sample.modulation = lambda index: known[stack.block(index).kind.name]
        model.release()

    def _embed(self) -> None:
        """A sample, evaluated, and the modulation of its head."""
        model, shape = self.model, self.shape
        size = model.latent_shape(shape.width, shape.height)
        prompt = {k: mx.concatenate([v] * shape.batch) for k, v in model.blank_prompt(shape.length).items()}
        self.target = mx.zeros((shape.batch, *size))
        context = model.context(mx.full((shape.batch,), 0.5), prompt, size[:2], 1.0)
        self.sample = Batch(model.embed(self.target, prompt), context)
        self.head = model.final_modulation(context)
        mx.eval(self.sample.state, context, self.head)
        self.waiting = waiting_bytes(model, self.sample.state, prompt, context)
        self.tokens = sum(math.prod(a.shape[:2]) for a in arrays(self.sample.state))

    def on(self, model: DiffusionModel) -> "Tracer":
        """The same traces, for the same model with its weights in another precision."""
        other = copy.copy(self)
        other.reader = BlockReader(model.reader.shards, self.stack, 0, prefetch=False)
        return other

    def at(self, shape: Shape) -> "Tracer":
        """For another shape, with what was traced so far."""
        other = Tracer(self.model, shape, self.rank, self.modules)
        other._costs, other._factors = self._costs, self._factors
        return other

    @property
    def state(self) -> int:
        """Bytes of a sample's tokens."""
        return planner.nbytes(self.sample.state)

    def kind(self, index: int) -> str:
        return self.stack.block(index).kind.name

    def modulation_bytes(self, index: int) -> int:
        """Bytes of what modulates a block."""
        return planner.nbytes(self._modulation[self.kind(index)] or ())

    def adapter_bytes(self, index: int) -> int:
        """Bytes of a block's LoRA."""
        return sum(factor.nbytes for factor in self.factors(self.kind(index)).values())

    def adapter(self, plan: SkipPlan) -> int:
        """Bytes of the LoRA of all retained blocks."""
        return sum(self.adapter_bytes(index) for index in plan.retained)

    def beside_adapter(self, phase: Phase, plan: SkipPlan, mode: str) -> Phase:
        """The same with what is in memory of the LoRA of the retained blocks, while records are made."""
        return replace(phase, peak=phase.peak + self._waiting_adapter(plan, mode))

    def _waiting_adapter(self, plan: SkipPlan, mode: str) -> int:
        """Bytes of it beside the work on records."""
        return 0 if adapter_waits(self.model, mode) else self.adapter(plan)

    def together(self, batches: int) -> int:
        """How many of so many micro-batches wait in one precompute sweep."""
        return min(batches, together(self.waiting))

    def factors(self, kind: str) -> dict[str, mx.array]:
        """The LoRA of a block of this kind."""
        if kind not in self._factors:
            self._factors[kind] = lora.blank(self.reader, self.first[kind], self.modules[kind], self.rank)
            mx.eval(self._factors[kind])
        return self._factors[kind]

    def forward(self, index: int, adapted: bool = False) -> Cost:
        """One block forward. adapted: with the LoRA."""
        kind = self.kind(index)
        return self._cost("adapted" if adapted else "forward", kind, lambda of: planner.forward_cost(
            of.stack, of.shards, of.sample, of.first[kind], of.factors(kind) if adapted else None
        ))  # fmt: skip

    def backward(self, index: int) -> Cost:
        """One block recomputed and pulled back."""
        kind = self.kind(index)
        return self._cost("backward", kind, lambda of: planner.backward_cost(
            of.stack, of.shards, of.sample, of.first[kind], of.factors(kind)
        ))  # fmt: skip

    def _cost(self, what: str, kind: str, trace: Callable[["Tracer"], Cost]) -> Cost:
        """Traced once; at fewer tokens where there are many."""
        key = what, kind, self.shape
        if key not in self._costs:
            fewer = self._with_fewer_tokens()
            points = [(one.tokens, one._cost(what, kind, trace)) for one in fewer]
            self._costs[key] = planner.carried(points, self.tokens) if fewer else trace(self)
        return self._costs[key]

    def _with_fewer_tokens(self) -> "list[Tracer]":
        """Tracers of two smaller shapes; none where this one is small enough."""
        if self._fewer is None:
            share = math.sqrt(TRACED_TOKENS / self.sample.state.image.shape[1])
            shapes = [self.shape.scaled(part * share, self.model.size_multiple) for part in (0.5, 1)]
            self._fewer = [self.at(shape) for shape in shapes] if share < math.sqrt(0.5) else []
        return self._fewer

    def layout(self, plan: SkipPlan, mode: str) -> Layout:
        """The layout of a training sample's record."""
        samples = records.of_samples([1.0] * self.shape.batch, [0] * self.shape.batch)
        start = samples | records.of_start(self.target, self.model.conditioning(self.sample.context), self.head)
        return records.layout(plan, mode, self.sample.state, start, lambda index: self._modulation[self.kind(index)])

    def precompute(self, plan: SkipPlan, mode: str, waiting: int = 1) -> Phase:
        """A sweep of `waiting` micro-batches as far as records need it, the LoRA's factors beside it."""
        stop = max(residuals.boundaries(plan, mode))
        visited, rest = range(self.stack.path.start, stop), [index for index in plan.retained if index >= stop]
        held = self.embedders + self._waiting_adapter(plan, mode)
        weights = [self.reader.nbytes(index) + self.modulation_bytes(index) for index in visited]
        adapted = plan.retained if mode == "fresh" else ()
        costs = [self.forward(index, index in adapted) for index in visited]
        state = self.waiting + self.target.nbytes
        peaks = [self.embedding - self.embedders + (waiting - 1) * state]
        peaks += [planner.forward_peak(weights, costs, state, waiting)] if weights else []
        modulation = [self.reader.nbytes(index, "modulation") for index in rest]
        if modulation:
            found = sum(self.modulation_bytes(index) for index in rest)
            peaks.append(max(modulation) + (waiting - 1) * state + waiting * found)
        read = sum(self.reader.nbytes(index) for index in visited) + sum(modulation)
        return Phase("precompute", held + max(peaks), read, sum(cost.seconds for cost in costs) * waiting, held + read)

    def train(self, retained: Sequence[int], accumulation: int = 1, fresh: bool = False) -> Phase:
        """One optimizer step; its moments, gradients and inputs of blocks in files. fresh: the adapter as it was at the
        chunk's start is there too.
        """
        weights = [self.reader.nbytes(index, "body") for index in retained]
        adapter = [self.adapter_bytes(index) for index in retained]
        costs = [self.backward(index) for index in retained]
        contexts = accumulation * (self.waiting - self.state)
        held = (2 if fresh else 1) * sum(adapter) + max(adapter) + self._head_bytes() + contexts
        peak = held + max(
            planner.backward_peak(weights, costs, self.state, adapter, accumulation),
            5 * max(adapter),  # AdamW on one block
        )
        ample = held + 3 * sum(adapter) + sum(weights) + sum(cost.kept for cost in costs)
        ample += 2 * max(cost.nbytes for cost in costs) + accumulation * self.state
        seconds = sum(self.forward(index).seconds for index in retained) + sum(cost.seconds for cost in costs)
        return Phase("train", peak, 2 * sum(weights), seconds * accumulation, ample)

    def _head_bytes(self) -> int:
        """What the head takes, once a step, and what a record gives beside the entry."""
        before = memory.settled()
        velocity = self.model.final_layer(self.sample.state, self.sample.context, self.head)
        mx.eval(velocity)
        found = memory.settled() - before + 2 * velocity.nbytes
        self.model.release()
        return found + self.state

    def generate(self, steps: int, waiting: int = 1, prompts: int = 1) -> Phase:
        """One step of `waiting` images (both branches of CFG counted), modulation of all steps ahead."""
        path = self.stack.path
        weights = [self.reader.nbytes(index, "body") for index in path]
        costs = [self.forward(index) for index in path]
        ahead = sum(self.modulation_bytes(index) for index in path) * steps * prompts
        held = self.embedders + ahead + (prompts - 1) * (self.waiting - self.state)
        peak = held + max(planner.forward_peak(weights, costs, self.state, waiting), self.embedding - self.embedders)
        seconds = sum(cost.seconds for cost in costs) * waiting
        return Phase("generate", peak, sum(weights), seconds, peak + sum(weights) + max(c.nbytes for c in costs))


def prompts(model: DiffusionModel, length: int) -> Phase:
    """Encoding one prompt."""

    def encode() -> None:
        mx.eval([list(prompt.values()) for prompt in model.encode_prompts(["a photo"], length).prompts])

    peak, _, _ = planner.traced(encode)
    model.release()
    return Phase("encode prompts", peak)


def images(model: DiffusionModel, width: int, height: int, *, decoding: bool) -> Phase:
    """One image through the VAE.

    Where it works in strips, its maps are made as large as they are and a few strips of each are filled. A VAE that
    keeps no large maps has nothing to leave out: a large image is traced at two smaller sizes, and what it takes is
    carried along the line through them.
    """
    least = model.size_multiple
    small, large = TRACED_SIDES
    if width * height > large**2 and _image(model, least, least, decoding)[1]:
        small, large = TRACED_STRIPS
    if width * height <= large**2:
        return _image(model, width, height, decoding)[0]
    sides = [max(least, side // least * least) for side in (small, large)]
    low, high = (_image(model, side, side, decoding)[0] for side in sides)
    share = (width * height - sides[0] ** 2) / (sides[1] ** 2 - sides[0] ** 2)
    seconds = low.seconds + share * (high.seconds - low.seconds)
    return Phase(low.name, int(low.peak + share * (high.peak - low.peak)), seconds=seconds)


def _image(model: DiffusionModel, width: int, height: int, decoding: bool) -> tuple[Phase, bool]:
    """One image of this size, and whether some of its strips were left out."""

    def run() -> None:
        if decoding:
            mx.eval(model.decode(mx.zeros((1, *model.latent_shape(width, height)))))
        else:
            mx.eval(model.encode_images(mx.zeros((1, height, width, 3))))

    peak, seconds, in_strips = planner.traced(run)
    model.release()
    return Phase("decode" if decoding else "encode images", peak, seconds=seconds), in_strips
