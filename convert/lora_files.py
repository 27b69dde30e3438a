"""LoRA files of other tools become factors of our layers. `lora_keys` has their names, `lora_scales` their strengths.

Theirs are A (r, in) and B (out, r), of convolutions kernels with two axes more; ours are transposed. Where a layer of
theirs is several of ours below one another (q, k and v), each gets all of A and its rows of B, which is exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_blockskip.converters import lora_keys, lora_scales
from mlx_blockskip.converters.lora_layers import Layers, Target
from mlx_blockskip.converters.lora_scales import Strengths
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Factors


class Entry(NamedTuple):
    """One layer of ours. a: (in, r), b: (r, out), float32, with the file's strength in b."""

    module: str
    a: mx.array
    b: mx.array


@dataclass(frozen=True)
class Given:
    """A tensor of a file."""

    name: str
    value: mx.array
    bare: bool = False


def read(
    tensors: Mapping[str, mx.array], strengths: Strengths, layers: Layers, source: Path
) -> tuple[list[Entry], list[str]]:
    """Every layer that the file is for, in its order, and the names of tensors for text encoders, which are left out.

    Raises UserError for what is not a LoRA, is for another model, is not whole, or would change the picture in a way
    that is not implemented; by the tensor's name.
    """
    parts, left_out = _sorted(tensors, source)
    found: dict[str, str] = {}
    entries = []
    for layer, given in parts.items():
        if given.keys() == {"alpha"}:
            continue
        for entry in _entries(layer, given, strengths, layers, source):
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


def _sorted(tensors: Mapping[str, mx.array], source: Path) -> tuple[dict[str, dict[str, Given]], list[str]]:
    """Factors and alpha of each layer of theirs, and the names that are left out."""
    parts: dict[str, dict[str, Given]] = {}
    left_out = []
    known = any(lora_keys.parse(name).part in ("a", "b", "text") for name in tensors)
    for name, value in tensors.items():
        key = lora_keys.parse(name)
        if key.part in ("a", "b", "alpha"):
            own = parts.setdefault(key.layer, {})
            if key.part in own:
                raise UserError(f"{source}: {own[key.part].name} and {name} are both for {key.layer}; keep one of them")
            own[key.part] = Given(name, value, key.bare)
        elif key.part == "text":
            left_out.append(name)
        elif key.part == "added":
            if bool((value != 0).any()):
                raise UserError(f"{source}: {name} is more than a LoRA, and is not applied here; export it without")
        elif key.part != "unknown":
            raise UserError(f"{source}: {name} is of a {key.part}, which is not applied here; export it as a LoRA")
        elif known:
            raise UserError(f"{source}: {name} is not known of LoRA files, and not applied here; export it without")
    return parts, left_out


def _entries(
    layer: str, given: Mapping[str, Given], strengths: Strengths, layers: Layers, source: Path
) -> Iterator[Entry]:
    target = layers.find(layer)
    if target is None:
        if layers.refused(layer):
            raise UserError(f"{source}: a LoRA on {layer} is not applied here; train or export it without")
        raise UserError(f"{source}: this model has no layer {layer}; the adapter is for another one")
    for part in "ab":
        if part not in given:
            raise UserError(f"{source}: {next(iter(given.values())).name} has no other half; get the file again")
        _check_numbers(given[part], source)
    a, b = _ours(given["a"], given["b"], target, layers, layer, source)
    rank = a.shape[1]
    if "alpha" in given:
        scale = lora_scales.stored(given["alpha"].name, given["alpha"].value, source) / rank
    else:
        scale = strengths.of(lora_keys.stripped(layer), rank)
    if target.swapped:
        b = mx.concatenate(list(reversed(mx.split(b, 2, axis=1))), axis=1)
    first, a = 0, mx.contiguous(a)
    for module, rows in zip(target.modules, layers.widths(target)[1], strict=True):
        yield Entry(module, a, mx.contiguous(b[:, first : first + rows] * scale))
        first += rows


def _ours(a: Given, b: Given, target: Target, layers: Layers, layer: str, source: Path) -> Factors:
    """(in, r) and (r, out) in float32, checked to fit."""
    width, rows = layers.widths(target)
    first, second = (given.value.astype(mx.float32) for given in (a, b))
    if first.ndim == 4:  # O I H W; ours are O H W I
        first = first.transpose(0, 2, 3, 1)
    if first.ndim >= 2 and second.ndim >= 2:
        first, second = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
        fits = first.shape[1] == width and second.shape == (sum(rows), first.shape[0])
        fits_bare = first.shape[0] == width and second.shape == (first.shape[1], sum(rows))
        if a.bare and b.bare and fits_bare:
            return first, second
        if fits:
            return first.T, second.T
    raise UserError(
        f"{source}: the factors of {layer} do not fit a layer of {width} -> {sum(rows)}; "
        "the adapter is for another model"
    )


def _check_numbers(given: Given, source: Path) -> None:
    if not mx.issubdtype(given.value.dtype, mx.floating):
        raise UserError(f"{source}: {given.name} holds no floating-point numbers; export it again")
    if not bool(mx.isfinite(given.value).all()):
        raise UserError(f"{source}: {given.name} holds NaN or infinity; the file is damaged or its training diverged")
