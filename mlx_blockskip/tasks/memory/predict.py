"""What a run will take, phase by phase, before it runs: the least MLX memory, what is read, and the seconds of a step.

One block of each kind is traced at the run's own shapes (`engine.planner`), and bytes of weights come from the index.
Images are traced small, at two sizes, since what a VAE takes grows along a line with the pixels. Nothing here knows a
family.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import limits, memory, planner, sweep
from mlx_blockskip.engine.planner import Cost
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import Modulation
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.family import DiffusionModel, Size
from mlx_blockskip.tasks.memory.waiting import together, waiting_bytes

TRACED_SIDES = (256, 384)
"""Sides in pixels at which a VAE is traced where larger images are asked for: its strips are full there."""


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
    guidance: float = 1.0


class Tracer:
    """Traces blocks at one shape, each kind once.

    rank, modules: of the LoRA, where training is asked for. timed: whether seconds are wanted too. once: a block is
    traced once, which may be a few operations' outputs too low. waiting: bytes of a second sample, beside what all
    share.
    """

    def __init__(
        self,
        model: DiffusionModel,
        shape: Shape,
        rank: int = 0,
        modules: Mapping[str, Sequence[str]] | None = None,
        timed: bool = False,
        once: bool = False,
    ):
        self.model, self.stack, self.shards = model, model.stack, model.reader.shards
        self.rank, self.modules, self.timed, self.once = rank, modules or {}, timed, once
        self.reader = BlockReader(self.shards, self.stack, 0, prefetch=False)
        self.first = {self.stack.blocks[i].kind.name: i for i in reversed(range(self.stack.depth))}
        model.release()
        floor = mx.get_active_memory()
        self.sample, self.waiting = self._sample(shape)
        self.embedders = mx.get_active_memory() - floor
        self.target = 4 * math.prod((shape.batch, *model.latent_shape(shape.width, shape.height)))  # bytes
        contexts = [self.sample.context]
        self._modulation: dict[str, Modulation] = {
            kind: sweep.modulations(self.stack, self.reader, contexts, [index])[0].get(index)
            for kind, index in self.first.items()
        }
        self.head = model.final_modulation(self.sample.context)
        mx.eval(self.head)
        model.release()
        self._known: dict[tuple[str, str], Any] = {}

    def _sample(self, shape: Shape) -> tuple[Batch, int]:
        """A sample, evaluated, and the bytes of another."""
        size: Size = self.model.latent_shape(shape.width, shape.height)[:2]
        latents = mx.zeros((shape.batch, *self.model.latent_shape(shape.width, shape.height)))
        prompt = {k: mx.concatenate([v] * shape.batch) for k, v in self.model.blank_prompt(shape.length).items()}
        context = self.model.context(mx.full((shape.batch,), 0.5), prompt, size, shape.guidance)
        sample = Batch(self.model.embed(latents, prompt), context)
        self.model.final_modulation(context)  # its weights stay with the embedders'
        mx.eval(sample.state, context)
        return sample, waiting_bytes(self.model, sample.state, prompt, context)

    @property
    def context(self) -> int:
        """Bytes of a second sample's context."""
        return self.waiting - planner.nbytes(self.sample.state)

    def on(self, model: DiffusionModel) -> "Tracer":
        """The same traces, for the same model with its weights in another precision."""
        other = copy.copy(self)
        other.reader = BlockReader(model.reader.shards, self.stack, 0, prefetch=False)
        return other

    def record_bytes(self, plan: SkipPlan) -> int:
        """What one record takes on disk."""
        modulation = sum(planner.nbytes(self._modulation[self.kind(index)] or ()) for index in plan.retained)
        states = 1 + 2 * len(plan.later)
        return states * planner.nbytes(self.sample.state) + self.target + modulation + planner.nbytes(self.head or ())

    def kind(self, index: int) -> str:
        return self.stack.blocks[index].kind.name

    def nbytes(self, index: int) -> int:
        """Weights of a block without its modulation."""
        return self.reader.nbytes(index, "body")

    def adapter_bytes(self, index: int) -> int:
        return sum(factor.nbytes for factor in self._factors(self.kind(index)).values())

    def beside_adapter(self, phase: Phase, plan: SkipPlan) -> Phase:
        """The same with the LoRA of the retained blocks in memory."""
        return replace(phase, peak=phase.peak + self._adapter(plan))

    def _adapter(self, plan: SkipPlan) -> int:
        return sum(self.adapter_bytes(index) for index in plan.retained)

    def together(self, batches: int) -> int:
        """How many of so many micro-batches wait in one precompute sweep."""
        return min(batches, together(self.waiting))

    def _once(self, what: str, kind: str, make: Callable[[], Any]) -> Any:
        if (what, kind) not in self._known:
            self._known[what, kind] = make()
        return self._known[what, kind]

    def _factors(self, kind: str) -> dict[str, mx.array]:
        def make() -> dict[str, mx.array]:
            factors: dict[str, mx.array] = {}
            for module in self.modules[kind]:
                out, width = lora.linear_shape(self.reader, self.first[kind], module)
                factors |= {
                    f"{module}.lora_a": mx.zeros((width, self.rank)),
                    f"{module}.lora_b": mx.zeros((self.rank, out)),
                }
            mx.eval(factors)
            return factors

        return self._once("factors", kind, make)

    @cached_property
    def recorded(self) -> Batch:
        """The sample as training and generation have it: modulation was computed ahead."""
        known, blocks = self._modulation, self.stack.blocks  # not self: a cycle would keep all this into the run
        return Batch(self.sample.state, self.sample.context, lambda index: known[blocks[index].kind.name])

    def forward(self, index: int, *, modulated: bool, adapted: bool = False) -> Cost:
        """One block forward. modulated: its modulation was computed ahead; adapted: with the LoRA."""
        sample, kind = self.recorded if modulated else self.sample, self.kind(index)
        return self._once(
            f"forward {modulated} {adapted}", kind,
            lambda: planner.forward_cost(
                self.stack, self.shards, sample, self.first[kind], self._factors(kind) if adapted else None,
                self.timed, self.once,
            ),
        )  # fmt: skip

    def backward(self, index: int) -> Cost:
        kind = self.kind(index)
        return self._once("backward", kind, lambda: planner.backward_cost(
            self.stack, self.shards, self.recorded, self.first[kind], self._factors(kind), self.timed, self.once
        ))  # fmt: skip

    def kept(self, index: int) -> int:
        kind = self.kind(index)
        return self._once("kept", kind, lambda: planner.kept_bytes(
            self.stack, self.shards, self.recorded, self.first[kind], self._factors(kind)
        ))  # fmt: skip

    def precompute(self, plan: SkipPlan, mode: str, waiting: int = 1) -> Phase:
        """A sweep of `waiting` micro-batches as far as records need it, the LoRA's factors beside it."""
        stop = max(residuals.boundaries(plan, mode))
        visited, rest = range(stop), [index for index in plan.retained if index >= stop]
        held = self.embedders + self._adapter(plan)
        weights = [self.reader.nbytes(index) for index in visited]
        adapted = plan.retained if mode == "fresh" else ()
        costs = [self.forward(index, modulated=False, adapted=index in adapted) for index in visited]
        state = self.waiting + self.target
        peaks = [planner.forward_peak(weights, costs, state, waiting)] if weights else []
        modulation = [self.reader.nbytes(index, "modulation") for index in rest]
        if modulation:
            found = sum(planner.nbytes(self._modulation[self.kind(index)] or ()) for index in rest)
            peaks.append(max(modulation) + (waiting - 1) * state + waiting * found)
        read = sum(weights) + sum(modulation)
        return Phase("precompute", held + max(peaks), read, sum(cost.seconds for cost in costs) * waiting, held + read)

    def train(self, retained: Sequence[int], accumulation: int = 1, fresh: bool = False) -> Phase:
        """One optimizer step, its moments in files. fresh: the adapter as it was at the chunk's start is there too."""
        weights = [self.nbytes(index) for index in retained]
        adapter = [self.adapter_bytes(index) for index in retained]
        costs = [self.backward(index) for index in retained]
        state = planner.nbytes(self.sample.state)
        held = (2 if fresh else 1) * sum(adapter) + max(adapter) + self._head_bytes() + accumulation * self.context
        peak = held + max(
            planner.backward_peak(weights, costs, state, adapter, accumulation),
            sum(adapter) + 4 * max(adapter),  # AdamW on one block, all gradients there
        )
        seconds = 0.0
        if self.timed:
            seconds = sum(self.forward(i, modulated=True).seconds + self.backward(i).seconds for i in retained)
        ample = held + 3 * sum(adapter) + sum(weights) + sum(self.kept(index) for index in retained)
        ample += 2 * max(cost.nbytes for cost in costs) + accumulation * state
        return Phase("train", peak, 2 * sum(weights), seconds * accumulation, ample)

    def _head_bytes(self) -> int:
        """What the head takes, once a step, and what a record gives beside the entry."""
        before = mx.get_active_memory()
        velocity = self.model.final_layer(self.sample.state, self.sample.context, self.head)
        mx.eval(velocity)
        found = mx.get_active_memory() - before + 2 * velocity.nbytes
        self.model.release()
        return found + planner.nbytes(self.sample.state)

    def generate(self, steps: int, waiting: int = 1, prompts: int = 1) -> Phase:
        """One step of `waiting` images (both branches of CFG counted), modulation of all steps ahead."""
        path = range(self.stack.depth)
        weights = [self.nbytes(index) for index in path]
        costs = [self.forward(index, modulated=True) for index in path]
        ahead = sum(planner.nbytes(self._modulation[self.kind(i)] or ()) for i in path) * steps * prompts
        held = self.embedders + ahead + (prompts - 1) * self.context
        peak = held + planner.forward_peak(weights, costs, planner.nbytes(self.sample.state), waiting)
        seconds = sum(cost.seconds for cost in costs) * waiting
        return Phase("generate", peak, sum(weights), seconds, peak + sum(weights) + max(c.nbytes for c in costs))


def prompts(model: DiffusionModel, length: int, count: int = 1) -> Phase:
    """Encoding `count` prompts, by encoding one."""
    before, highest = mx.get_active_memory(), memory.Peak()
    mx.clear_cache()
    with limits.tight():
        highest.restart()
        found = model.encode_prompts(["a photo"], length).prompts[0]
        mx.eval(list(found.values()))
    peak = highest.read() - before
    size = sum(value.nbytes for value in found.values())
    model.release()
    return Phase("encode prompts", peak + 2 * (count - 1) * size)


def images(model: DiffusionModel, width: int, height: int, *, decoding: bool, once: bool = False) -> Phase:
    """One image through the VAE: traced as it is where it is small, else carried along the line through two sizes.
    once: see Tracer.
    """
    name = "decode" if decoding else "encode images"
    sides = [max(model.size_multiple, side // model.size_multiple * model.size_multiple) for side in TRACED_SIDES]
    if width * height <= sides[1] ** 2:
        peak, seconds = _image(model, width, height, decoding, once)
        return Phase(name, peak, seconds=seconds)
    points = [(side * side, _image(model, side, side, decoding, once)) for side in sides]
    (x0, low), (x1, high) = points
    share = (width * height - x0) / (x1 - x0)
    grown = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
    return Phase(name, int(grown[0]), seconds=grown[1])


def _image(model: DiffusionModel, width: int, height: int, decoding: bool, once: bool) -> tuple[int, float]:
    """Bytes and seconds. Where operations are short, MLX may free an input only after it made the next output, by
    chance; so what is small is traced again, and the least is taken.
    """
    found = [_traced_image(model, width, height, decoding)]
    while not once and found[0][0] < planner.SMALL and len(found) < planner.TRIES:
        found.append(_traced_image(model, width, height, decoding))
    return min(found)


def _traced_image(model: DiffusionModel, width: int, height: int, decoding: bool) -> tuple[int, float]:
    def run() -> None:
        if decoding:
            mx.eval(model.decode(mx.zeros((1, *model.latent_shape(width, height)))))
        else:
            mx.eval(model.encode_images(mx.zeros((1, height, width, 3))))

    mx.clear_cache()
    before, highest = mx.get_active_memory(), memory.Peak()
    with limits.tight():
        highest.restart()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    model.release()
    return highest.read() - before, seconds
