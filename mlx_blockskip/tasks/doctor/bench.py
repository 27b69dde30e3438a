"""How fast this machine is at what a training step is made of, and what that makes of a step of every known model."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlx_blockskip.engine import files, philox
from mlx_blockskip.events import Table
from mlx_blockskip.models import product
from mlx_blockskip.models.attention import attention
from mlx_blockskip.tasks.doctor import blocks, machine
from mlx_blockskip.tasks.doctor.blocks import Timed
from mlx_blockskip.tasks.doctor.forecast import OTHER, Step, steps
from mlx_blockskip.tasks.doctor.rates import Rates
from mlx_blockskip.tasks.doctor.workshop import Workshop

WIDTH, HIDDEN, HEADS, HEAD_DIM = 3072, 12288, 24, 128
"""The largest linear layer and the attention of FLUX.1."""

TOKENS = (768, 512, 256, 128)
"""As many as a training patch of 256 px has with 512 text tokens, or fewer where the machine is slow."""

REPEATS = 3
ELEMENTS = 1 << 24
CALIBRATION = 1024
GEMM_SECONDS = 0.8
"""That one product may take by the calibration."""

SECONDS = 75.0
"""After which no further block is begun."""


@dataclass(frozen=True)
class Speed:
    """One measurement. size: of what was measured, in words. seconds: the median."""

    name: str
    size: str
    seconds: float
    value: float
    unit: str

    @property
    def found(self) -> str:
        return f"{self.value:.3g} {self.unit} ({self.size})"


@dataclass(frozen=True)
class Bench:
    """speeds: of single operations. blocks: of whole ones. steps: predicted from both."""

    speeds: tuple[Speed, ...]
    blocks: tuple[Timed, ...]
    steps: tuple[Step, ...]


def seconds_of(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of `repeats` runs after one that warms up. run: returns arrays that are evaluated."""
    found = []
    for _ in range(repeats + 1):
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure(workshop: Workshop, disk: float | None, budget: int, done: Callable[[str], None]) -> Bench:
    """All of it. disk: bytes a second, where that was measured. budget: of MLX memory. done: told what is over."""
    started, speeds = time.perf_counter(), [calibrated()]
    tokens = affordable(speeds[0].value)
    for measured in (lambda: gemms(tokens), lambda: attentions(tokens), lambda: [bandwidth(), latency()]):
        speeds += measured()
        done(speeds[-1].name)
    speeds.append(reading(workshop, disk))
    rates = rates_of(speeds)
    timed = blocks.timed(workshop, rates, SECONDS - (time.perf_counter() - started), done)
    return Bench(tuple(speeds), timed, steps(workshop, rates, timed, budget))


def calibrated() -> Speed:
    """Products of float32: what the sizes of all else go by."""
    x = mx.array(philox.normal(17, 0, shape=(CALIBRATION, CALIBRATION)))
    mx.eval(x)
    return _flops("product, float32", f"{CALIBRATION} x {CALIBRATION}", 2 * CALIBRATION**3, lambda: x @ x)


def affordable(tflops: float) -> int:
    """Tokens whose largest product takes GEMM_SECONDS at most, by the calibration."""
    allowed = GEMM_SECONDS * tflops * 1e12 / (2 * WIDTH * HIDDEN)
    return next((tokens for tokens in TOKENS if tokens <= allowed), TOKENS[-1])


def gemms(tokens: int) -> list[Speed]:
    """FLUX.1's largest linear layer, in bfloat16 and in 4 bit, there and back to its input."""
    x = _random(0, (1, tokens, WIDTH))
    upstream = _random(1, (1, tokens, HIDDEN))
    weight = _random(2, (HIDDEN, WIDTH)) / math.sqrt(WIDTH)
    packed = mx.quantize(weight, group_size=64, bits=4)
    mx.eval(x, upstream, weight, packed)
    flops, size = 2 * tokens * WIDTH * HIDDEN, f"{tokens} tokens, {WIDTH} to {HIDDEN}"
    found = []
    products: dict[str, Callable[[mx.array], mx.array]] = {
        "bf16": lambda x: product.matmul(x, weight),
        "4 bit": lambda x: product.quantized_matmul(x, *packed),
    }
    for name, run in products.items():
        found.append(_flops(f"product, {name}", size, flops, partial(run, x)))
        found.append(_flops(f"product back, {name}", size, flops, partial(_pulled, run, x, upstream)))
    return found


def _pulled(run: Callable[[mx.array], mx.array], x: mx.array, upstream: mx.array) -> list[mx.array]:
    """The gradient alone: the product itself is not evaluated."""
    return mx.vjp(lambda x: [run(x)], [x], [upstream])[1]


def attentions(tokens: int) -> list[Speed]:
    """FLUX.1's attention, and the same with its gradients."""
    q, k, v, upstream = (_random(i, (1, HEADS, tokens, HEAD_DIM)) for i in range(4))
    mx.eval(q, k, v, upstream)
    scale, size = 1 / math.sqrt(HEAD_DIM), f"{tokens} tokens, {HEADS} heads of {HEAD_DIM}"
    flops = 4 * HEADS * tokens * tokens * HEAD_DIM

    def run(*qkv: mx.array) -> list[mx.array]:
        return [attention(*qkv, scale=scale)]

    return [
        _flops("attention", size, flops, lambda: run(q, k, v)),
        _flops("attention and back", size, 3 * flops, lambda: mx.vjp(run, [q, k, v], [upstream])),
    ]


def bandwidth() -> Speed:
    """Memory, by a sum of two arrays."""
    a, b = mx.ones((ELEMENTS,), mx.bfloat16), mx.ones((ELEMENTS,), mx.bfloat16)
    mx.eval(a, b)
    seconds = seconds_of(lambda: a + b)
    return Speed("elementwise", f"{ELEMENTS >> 20} M numbers in bf16", seconds, 6 * ELEMENTS / seconds / 1e9, "GB/s")


def latency() -> Speed:
    """Waiting for the smallest operation there is."""
    x = mx.zeros((1,))
    seconds = seconds_of(lambda: x + 1, 50)
    return Speed("synchronisation", "one number", seconds, seconds * 1e6, "us")


def reading(workshop: Workshop, disk: float | None) -> Speed:
    """A block of a file into MLX's memory, no faster than the disk is."""
    path, elements = workshop.place("block.safetensors"), 32 << 20
    mx.save_safetensors(str(path), {"weight": mx.zeros((elements,), mx.bfloat16)})
    cached = seconds_of(lambda: list(files.load_lazily(path).values()))
    disk = disk or machine.disk_speed()
    seconds = max(cached, 2 * elements / disk) if disk else cached
    path.unlink()
    return Speed("reading", f"{2 * elements >> 20} MiB", seconds, 2 * elements / seconds / 1e9, "GB/s")


def rates_of(speeds: list[Speed]) -> Rates:
    """What a forecast goes by."""
    value = {speed.name: speed.value for speed in speeds}
    return Rates(
        there={name: value[f"product, {name}"] * 1e12 for name in ("bf16", "4 bit")},
        back={name: value[f"product back, {name}"] * 1e12 for name in ("bf16", "4 bit")},
        reading=value["reading"] * 1e9,
        waiting=value["synchronisation"] / 1e6,
    )


def _flops(name: str, size: str, flops: int, run: Callable[[], object]) -> Speed:
    seconds = seconds_of(run)
    return Speed(name, size, seconds, flops / seconds / 1e12, "TFLOP/s")


def _random(place: int, shape: tuple[int, ...]) -> mx.array:
    return mx.array(philox.normal(17, place, shape=shape)).astype(mx.bfloat16)


def tables(bench: Bench) -> list[Table]:
    """For a person."""
    return [
        Table(
            "Speed",
            ("what", "size", "ms", "speed"),
            tuple((s.name, s.size, f"{s.seconds * 1e3:.3g}", f"{s.value:.3g} {s.unit}") for s in bench.speeds),
        ),
        Table(
            "One block, 4 bit",
            ("model", "block", "tokens", "forward, ms", "in a step, ms", "beside products, ms"),
            tuple(
                (b.model, b.kind, str(b.tokens), f"{b.forward * 1e3:.3g}", f"{b.whole * 1e3:.3g}",
                 f"{b.other * 1e3:.3g}")
                for b in bench.blocks
            ),
        ),
        Table(
            "Predicted training step, half of the blocks skipped, at each model's own sizes",
            ("model", "weights", "s a step", "products", OTHER, "waiting", "reading", "binds", "by a block of"),
            tuple(
                (s.model, s.precision, f"{s.seconds:.3g}", f"{s.products:.3g}", f"{s.other:.3g}", f"{s.waiting:.2g}",
                 f"{s.reading:.3g}", s.binds, s.basis or "-")
                for s in bench.steps
            ),
        ),
    ]  # fmt: skip
