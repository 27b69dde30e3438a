"""The training record: what the step of one micro-batch needs and does not change. This file alone knows its tensors.

    entry.image, entry.text           the tokens before the first retained block
    run{i}.start.*, run{i}.stop.*     f_i and f_(i+l) of each later skipped run (Eq. 3, see `residuals`)
    target                            the velocity e - x0
    weight                            what each of its samples counts in the loss
    captions                          the numbers of their prompts
    conditioning.{name}               what blocks and head take from the context beside modulation
    modulation.{block}.{j}, head.{j}  the modulation of the retained blocks and of the head

A chunk is one safetensors file with the records of a range of micro-batches, each under its number; what depends on the
prompt alone, once a prompt (`prompt.{p}.{name}`); and a fingerprint of all that they depend on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import dtypes, files, sealed
from mlx_blockskip.engine.errors import DamagedError, UserError
from mlx_blockskip.engine.files import TensorEntry
from mlx_blockskip.engine.stack import Modulation
from mlx_blockskip.engine.verify import Problem
from mlx_blockskip.models.family import Tokens

FINGERPRINT = "fingerprint"
FORMAT = 3
"""Of the tensors above: a chunk of another format is made again."""

WAY_OUT = "it is made again"

Tensors = dict[str, mx.array]


def of_samples(weights: Sequence[float], captions: Sequence[int]) -> Tensors:
    """What each sample of a micro-batch counts in the loss, and the number of its prompt."""
    return {"weight": mx.array(list(weights), mx.float32), "captions": mx.array(list(captions), mx.int32)}


def of_start(target: mx.array, conditioning: Mapping[str, mx.array], head: Modulation) -> Tensors:
    """What is known of a micro-batch before the first block. target: (B, h, w, C), float32."""
    return {"target": target, **{f"conditioning.{k}": v for k, v in conditioning.items()}, **_numbered("head", head)}


def of_boundary(plan: SkipPlan, mode: str, boundary: int, tokens: Tokens) -> Tensors:
    """What is kept of the tokens before block `boundary`; nothing where the plan has no end of a run there."""
    found: Tensors = {}
    for name in residuals.boundaries(plan, mode).get(boundary, ()):
        found[f"{name}.image"] = tokens.image
        if tokens.text is not None and residuals.keeps_text(plan, boundary):
            found[f"{name}.text"] = tokens.text
    return found


def of_modulation(block: int, modulation: Modulation) -> Tensors:
    """The modulation of one retained block."""
    return _numbered(f"modulation.{block}", modulation)


def of_prompt(number: int, conditioning: Mapping[str, mx.array]) -> Tensors:
    """What of the conditioning depends on a prompt alone, under the prompt's number."""
    return {f"prompt.{number}.{name}": value for name, value in conditioning.items()}


def _numbered(name: str, modulation: Modulation) -> Tensors:
    return {f"{name}.{j}": part for j, part in enumerate(modulation or ())}


@dataclass(frozen=True)
class Layout:
    """Shape and safetensors dtype of a record's tensors, by their names. Records of prompts of one length are alike."""

    tensors: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries(0))

    def entries(self, number: int) -> list[TensorEntry]:
        """The tensors of micro-batch `number` in a chunk."""
        return [TensorEntry(f"{number}.{name}", shape, dtype) for name, (shape, dtype) in self.tensors.items()]


def layout(
    plan: SkipPlan,
    mode: str,
    tokens: Tokens,
    start: Tensors,
    modulation: Callable[[int], Modulation],
) -> Layout:
    """The layout of records such as this micro-batch's. tokens: at any boundary. start: from `of_samples` and
    `of_start`. modulation: of a retained block, by its index. Only shapes and dtypes are looked at.
    """
    found = dict(start)
    for boundary in residuals.boundaries(plan, mode):
        found |= of_boundary(plan, mode, boundary, tokens)
    for block in plan.retained:
        found |= of_modulation(block, modulation(block))
    return Layout({entry.name: (entry.shape, entry.dtype) for entry in entries_of(found)})


def entries_of(tensors: Tensors) -> list[TensorEntry]:
    """What a file says of these tensors."""
    return [TensorEntry(name, tuple(a.shape), dtypes.dtype_name(a.dtype)) for name, a in tensors.items()]


def chunk_bytes(layouts: Mapping[int, Layout], prompts: Sequence[TensorEntry]) -> int:
    """Bytes of the file of a chunk with these micro-batches (by number) and prompts."""
    return files.encode_header(_entries(layouts, prompts), {FINGERPRINT: fingerprint({})})[1]


def _entries(layouts: Mapping[int, Layout], prompts: Sequence[TensorEntry]) -> list[TensorEntry]:
    return [*prompts, *(entry for number, one in layouts.items() for entry in one.entries(number))]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A checksum of everything that a chunk depends on (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Write = Callable[[int, Tensors], None]
"""`(micro-batch, some of its record's tensors)`."""


@contextmanager
def writing(path: Path, layouts: Mapping[int, Layout], prompts: Tensors, expected: str) -> Iterator[Write]:
    """Write a chunk: the records' tensors in any order, `prompts` (from `of_prompt`; emptied) at once. The file appears
    when all are there. expected: its fingerprint.
    """
    entries = _entries(layouts, entries_of(prompts))
    with files.SafetensorsWriter(path, entries, {FINGERPRINT: expected}, hashed=True) as writer:
        while prompts:
            writer.write(*prompts.popitem())

        def write(number: int, tensors: Tensors) -> None:
            for name, value in tensors.items():
                writer.write(f"{number}.{name}", value)

        yield write
    files.write_json(seal_of(path), sealed.seal({FINGERPRINT: expected, "sha256": writer.checksum}))


def seal_of(path: Path) -> Path:
    """The file with the checksum of a chunk, beside it."""
    return path.with_suffix(".json")


def valid(path: Path, expected: str) -> bool:
    """Whether the file is a whole chunk with this fingerprint. Raises DamagedError where it was one."""
    if not (path.is_file() and seal_of(path).is_file()):
        return False
    seal = _seal(path)
    if seal.get(FINGERPRINT) != expected:
        return False
    sealed.check(path, seal["sha256"], WAY_OUT)
    return True


def _seal(path: Path) -> dict[str, Any]:
    try:
        return sealed.opened(seal_of(path), files.read_json(seal_of(path)), WAY_OUT, required=True)
    except UserError as error:
        raise DamagedError(str(error)) from None


def problems(path: Path) -> list[Problem]:
    """What is wrong with a chunk whose header is whole: no fingerprint, records that lack what others have, samples
    whose numbers differ from tensor to tensor, prompts that are not there.
    """
    return _content_problems(path) or _seal_problems(path)


def _seal_problems(path: Path) -> list[Problem]:
    """A chunk whose bytes are not those that were written."""
    try:
        sealed.check(path, _seal(path)["sha256"], WAY_OUT)
    except DamagedError as error:
        return [Problem(path, None, "the bytes that were written", str(error).removeprefix(f"{path}: "))]
    return []


def _content_problems(path: Path) -> list[Problem]:
    header = files.read_header(path, ours=True)
    if FINGERPRINT not in header.metadata:
        return [Problem(path, None, f"a {FINGERPRINT} in its metadata", "none")]
    found: list[Problem] = []
    tensors = files.MappedTensors(path)
    by_number: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in header.entries.items():
        number, _, rest = name.partition(".")
        by_number.setdefault(number, {})[rest] = entry
    prompts = {name.split(".")[0] for name in by_number.pop("prompt", {})}
    wanted = {"target", "weight", "captions"}.union(*by_number.values())
    for number, held in by_number.items():
        found += [Problem(path, f"{number}.{name}", "a tensor", "none") for name in sorted(wanted - set(held))]
        (batch, *_) = held["captions"].shape or (0,) if "captions" in held else (0,)
        for name in ("target", "weight", "entry.image"):
            if name in held and held[name].shape[:1] != (batch,):
                found.append(Problem(path, f"{number}.{name}", f"{batch} samples", f"{list(held[name].shape)}"))
        asked = cast(list[int], tensors.read(f"{number}.captions").reshape(-1).tolist()) if "captions" in held else []
        for prompt in (p for p in asked if prompts and str(p) not in prompts):
            found.append(Problem(path, f"{number}.captions", "prompts that the chunk has", str(prompt)))
    return found


class Chunk:
    """The records of one chunk, read through a memory map, a tensor at a time."""

    def __init__(self, path: Path):
        self._tensors = files.MappedTensors(path)

    def tokens(self, number: int, name: str) -> Tokens:
        """Tokens of a record: "entry", "run{start}.start" or "run{start}.stop"."""
        text = f"{number}.{name}.text"
        image = self._tensors.read(f"{number}.{name}.image")
        return Tokens(image, self._tensors.read(text) if text in self._tensors else None)

    def target(self, number: int) -> mx.array:
        """The velocity that the step of this micro-batch should predict: (B, h, w, C), float32."""
        return self._tensors.read(f"{number}.target")

    def latent_size(self, number: int) -> tuple[int, int]:
        """Height and width of the latents."""
        _, height, width, _ = self._tensors.entry(f"{number}.target").shape
        return height, width

    def weight(self, number: int) -> mx.array:
        """What each sample counts in the loss: (B, 1, 1, 1), float32."""
        return self._tensors.read(f"{number}.weight").reshape(-1, 1, 1, 1)

    def conditioning(self, number: int) -> Tensors:
        """What blocks and head take from the context; what depends on the prompt alone is joined over the batch."""
        prompts = cast(list[int], self._tensors.read(f"{number}.captions").tolist())
        found = {self._last(name): self._tensors.read(name) for name in self._under(f"{number}.conditioning.")}
        for name in self._under(f"prompt.{prompts[0]}."):
            key = self._last(name)
            found[key] = mx.concatenate([self._tensors.read(f"prompt.{p}.{key}") for p in prompts])
        return found

    def modulation(self, number: int) -> Callable[[int], tuple[mx.array, ...] | None]:
        """The modulation of a block from the record, as a sweep takes it."""
        return lambda block: self._parts(f"{number}.modulation.{block}.")

    def final_modulation(self, number: int) -> tuple[mx.array, ...] | None:
        """The head's modulation; None where it has none."""
        return self._parts(f"{number}.head.")

    def _parts(self, prefix: str) -> tuple[mx.array, ...] | None:
        names = self._under(prefix)
        return tuple(self._tensors.read(name) for name in names) if names else None

    def _under(self, prefix: str) -> list[str]:
        return self._tensors.under(prefix)

    @staticmethod
    def _last(name: str) -> str:
        return name.split(".", 2)[2]
