"""Adapter files of other tools become differences of our layers. `lora_keys` has their names, `lora_scales` their
strengths, `lora_kinds` what each kind of adapter computes.

Where a layer of theirs is several of ours below one another (q, k and v), each gets its rows of what is added, which is
exact; of low-rank factors all of A and its rows of B.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_blockskip.converters import lora_keys, lora_kinds, lora_origin
from mlx_blockskip.converters.lora_layers import Layers, Target
from mlx_blockskip.converters.lora_parts import MisfitError, Part, Parts, Shape
from mlx_blockskip.converters.lora_scales import Strengths
from mlx_blockskip.converters.views import View
from mlx_blockskip.differences import LowRank, Ranges
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Added, Difference


class Entry(NamedTuple):
    """What is added to one layer of ours, with the file's strength in it."""

    module: str
    added: Added


def read(
    tensors: Mapping[str, View], strengths: Strengths, layers: Layers, source: Path
) -> tuple[list[Entry], list[str]]:
    """Every layer that the file is for, in its order, and the names of tensors for text encoders, which are left out.

    Raises UserError for what is no adapter, is for another model, is not whole, or would change the picture in a way
    that is not implemented; by the tensor's name.
    """
    parts, left_out = _sorted(tensors, source)
    found: dict[str, str] = {}
    entries = []
    for layer in list(parts):
        given = parts.pop(layer)  # what is read of it is in memory until the next one
        if given.keys() == {"alpha"}:
            continue
        for entry in _entries(layer, given, strengths, layers, source, lora_origin.likely(tensors)):
            if entry.module in found:
                raise UserError(
                    f"{source}: {found[entry.module]} and {layer} are both for {entry.module}; keep one of them"
                )
            found[entry.module] = layer
            entries.append(entry)
    if not entries:
        example = next(iter(tensors), "nothing")
        what = "holds factors of text encoders alone" if left_out else f"is not a LoRA (it holds {example})"
        raise UserError(f"{source}: {what}; give a LoRA of the diffusion transformer")
    return entries, left_out


def _sorted(tensors: Mapping[str, View], source: Path) -> tuple[dict[str, Parts], list[str]]:
    """The parts of each layer of theirs, and the names that are left out."""
    parts: dict[str, dict[str, Part]] = {}
    left_out, unknown = [], None
    for name, view in tensors.items():
        key = lora_keys.parse(name)
        if key.part == "text":
            left_out.append(name)
        elif key.part == "unknown":
            unknown = unknown or name
        elif key.part == "OFT":
            raise UserError(f"{source}: {name} is of an OFT adapter, which is not applied here; export it as a LoRA")
        else:
            own = parts.setdefault(key.layer, {})
            if key.part in own:
                raise UserError(f"{source}: {own[key.part].name} and {name} are both for {key.layer}; keep one of them")
            own[key.part] = Part(name, view, key.bare)
    if unknown and (parts or left_out):
        raise UserError(f"{source}: {unknown} is not known of LoRA files, and not applied here; export it without")
    return {layer: Parts(own) for layer, own in parts.items()}, left_out


def _entries(
    layer: str, given: Parts, strengths: Strengths, layers: Layers, source: Path, origin: str
) -> Iterator[Entry]:
    target = layers.find(layer)
    if target is None:
        raise UserError(f"{source}: this model has no layer {layer}; the adapter is for another one{origin}")
    width, rows = layers.widths(target)
    for one in given.values():
        _check_numbers(one, source)
    try:
        weight, bias = lora_kinds.added(layer, given, strengths, Shape(width, sum(rows), layers.kernel(target)), source)
    except MisfitError:
        raise UserError(
            f"{source}: the factors of {layer} do not fit a layer of {width} -> {sum(rows)}; the adapter is for "
            f"another model{origin}"
        ) from None
    first = 0
    for module, count in zip(target.modules, rows, strict=True):
        ranges = _ranges(target, first, first + count)
        part = Added(
            None if weight is None else _part(weight, ranges, sum(rows)),
            None if bias is None else mx.concatenate([bias[start:stop] for start, stop in ranges]),
        )
        if not part.nothing:
            yield Entry(module, part)
        first += count


def _ranges(target: Target, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The rows of theirs, one range below the other, that are a layer of ours."""
    if not target.swapped:
        return ((first, last),)
    half = (first + last) // 2
    return (half, last), (first, half)


def _part(weight: Difference, ranges: tuple[tuple[int, int], ...], rows: int) -> Difference:
    if ranges == ((0, rows),):
        return weight
    if isinstance(weight, LowRank):
        b = mx.contiguous(mx.concatenate([weight.b[:, start:stop] for start, stop in ranges], axis=1))
        mx.eval(b)
        return LowRank(weight.a, b)
    return Ranges(weight, ranges)


def _check_numbers(given: Part, source: Path) -> None:
    if given.name.endswith(".alpha"):
        return  # it may be an integer, and is checked as one number
    if not lora_kinds.is_floating(given.view):
        raise UserError(f"{source}: {given.name} holds no floating-point numbers; export it again")
    if not bool(mx.isfinite(given.values).all()):
        raise UserError(f"{source}: {given.name} holds NaN or infinity; the file is damaged or its training diverged")
