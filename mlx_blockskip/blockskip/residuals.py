"""Residual features (DiT-BlockSkip, Eq. 3): f'_(i+l) = f'_i + D with D = f_(i+l) - f_i of the base model.

For each micro-batch a record holds what its training step needs and does not change: the *entry* (the tokens before the
first retained block), f_i and f_(i+l) of every later skipped run, the target, the modulation of the retained blocks and
of the head, and what blocks and head take from the context. The sum is computed as f_(i+l) + (f'_i - f_i): the same
equation, bit-exact while f' = f. For the leading run the entry is exact, because nothing before it trains; for later
runs the gradient passes as the identity.

A chunk is one safetensors file with the records of a range of micro-batches and a fingerprint of all they depend on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import files
from mlx_blockskip.engine.sweep import Bridge
from mlx_blockskip.models.family import Tokens

FINGERPRINT = "fingerprint"
MODES = ("base", "fresh", "none")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A checksum of everything that a chunk depends on (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cross(at_start: Tokens, at_stop: Tokens, own: Tokens) -> Tokens:
    """Eq. 3: f_(i+l) + (f'_i - f_i), for image and text tokens apart. Text of the record is None where nothing reads
    it after the run; then the own text passes as it is.
    """
    text = own.text
    if text is not None and at_start.text is not None and at_stop.text is not None:
        text = at_stop.text + (text - at_start.text)
    return Tokens(at_stop.image + (own.image - at_start.image), text)


def keeps_text(plan: SkipPlan, boundary: int) -> bool:
    """Nothing reads the text after the trailing run; elsewhere it goes on."""
    return not (plan.m and boundary >= plan.depth - plan.m)


@dataclass(frozen=True)
class Layout:
    """Names and sizes of one record, from the shapes of a first micro-batch; all records are alike.

    tensors: shape and safetensors dtype by the name inside the record.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def nbytes(self) -> int:
        return sum(files.TensorEntry(n, shape, dtype).nbytes for n, (shape, dtype) in self.tensors.items())

    def entries(self, number: int) -> list[files.TensorEntry]:
        return [files.TensorEntry(f"{number}.{n}", shape, dtype) for n, (shape, dtype) in self.tensors.items()]


def boundaries(plan: SkipPlan, mode: str) -> dict[int, list[str]]:
    """Where the precompute sweep keeps tokens, and under which names: the entry, and both ends of later runs."""
    found: dict[int, list[str]] = {plan.n if mode != "none" else 0: ["entry"]}
    if mode != "none":
        for start, stop in plan.later:
            found.setdefault(start, []).append(f"run{start}.start")
            found.setdefault(stop, []).append(f"run{start}.stop")
    return found


def named(name: str, tokens: Tokens, text: bool) -> dict[str, mx.array]:
    """A record's tensors for tokens at a boundary."""
    found = {f"{name}.image": tokens.image}
    if tokens.text is not None and text:
        found[f"{name}.text"] = tokens.text
    return found


class Chunk:
    """The records of one chunk, read through a memory map, a tensor at a time."""

    def __init__(self, path: Path):
        self.tensors = files.MappedTensors(path)

    def tokens(self, number: int, name: str) -> Tokens:
        """Tokens of a record: "entry", "run{start}.start" or "run{start}.stop"."""
        text = f"{number}.{name}.text"
        image = self.tensors.read(f"{number}.{name}.image")
        return Tokens(image, self.tensors.read(text) if text in self.tensors else None)

    def target(self, number: int) -> mx.array:
        return self.tensors.read(f"{number}.target")

    def context(self, number: int, prompts: Sequence[int]) -> dict[str, mx.array]:
        """What blocks and head take from the context; what depends on the prompt alone is joined over the batch."""
        found = {name.split(".", 2)[2]: self.tensors.read(name) for name in self.tensors.under(f"{number}.context.")}
        for name in self.tensors.under(f"prompt.{prompts[0]}."):
            key = name.split(".", 2)[2]
            found[key] = mx.concatenate([self.tensors.read(f"prompt.{p}.{key}") for p in prompts])
        return found

    def modulation(self, number: int) -> Callable[[int], tuple[mx.array, ...] | None]:
        """The modulation of a block from the record, as a sweep takes it."""
        return lambda block: self._parts(f"{number}.modulation.{block}.")

    def head_modulation(self, number: int) -> tuple[mx.array, ...] | None:
        return self._parts(f"{number}.head.")

    def _parts(self, prefix: str) -> tuple[mx.array, ...] | None:
        names = self.tensors.under(prefix)
        return tuple(self.tensors.read(name) for name in names) if names else None


def bridge(chunk: Chunk, numbers: Sequence[int], mode: str) -> Bridge:
    """What carries a micro-batch across a skipped run while training; without residuals the tokens pass as they are."""

    def over(sample: int, start: int, stop: int, own: Tokens) -> Tokens:
        if mode == "none":
            return own
        number = numbers[sample]
        return cross(chunk.tokens(number, f"run{start}.start"), chunk.tokens(number, f"run{start}.stop"), own)

    return over


def valid(path: Path, expected: str) -> bool:
    """Whether the file is a whole chunk with this fingerprint."""
    return path.is_file() and files.read_header(path).metadata.get(FINGERPRINT) == expected
