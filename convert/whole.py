"""The tensors of a component of an MLX model directory as they are without quantization, with what adapters add to
them: some rows at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.converters.table import Component
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX, Added, Packed, Shards, made_whole


class Whole:
    """A component's layers, made whole. added: to a layer, by module (`transformer_blocks.0.attn.to_q`).

    What is read is computed in float32 and rounded once, to the type in which the layer is stored. Every file is
    verified before it is read. Raises UserError for a missing, truncated or altered file, a missing tensor, and a bias
    for a layer that has none, since no model of its kind has one.
    """

    def __init__(self, shards: Shards, added: Mapping[str, Added] | None = None):
        self.shards = shards
        self.added = added or {}
        for module, change in self.added.items():
            if change.bias is not None and f"{module}.bias" not in shards.weight_map:
                raise UserError(
                    f"{module}: gets a bias from the adapter and has none in this model, so it cannot be fused; give "
                    "the adapter with --adapter-path"
                )

    def quantized(self, name: str) -> tuple[int, int] | None:
        """Group size and bits of a quantized layer, by its weight's name; None for what is whole."""
        scales = f"{module_of(name)}.scales"
        if not name.endswith(".weight") or scales not in self.shards.weight_map:
            return None
        (_, packed), (_, groups) = self.shards.shape(name), self.shards.shape(scales)
        group_size = self.shards.group_sizes.get(module_of(name))
        if group_size is None:
            raise UserError(
                f"{self.shards.path / INDEX}: has no group size of {module_of(name)}; convert the model again"
            )
        return group_size, packed * 32 // (groups * group_size)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of a weight's as it is when it is whole."""
        if (stored := self.quantized(name)) is None:
            return self.shards.shape(name)
        out, groups = self.shards.shape(f"{module_of(name)}.scales")
        return out, groups * stored[0]

    def dtype(self, name: str) -> str:
        """safetensors' name of the type in which a tensor is stored; of a quantized layer, that of its scales."""
        return self.shards.dtype(name if self.quantized(name) is None else f"{module_of(name)}.scales")

    def read(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start to stop - 1."""
        module, _, kind = name.rpartition(".")
        stored, added = self.quantized(name), self.added.get(module, Added())
        rows = self.shards.part(name, start, stop)
        if kind == "bias" and added.bias is not None:
            return (rows.astype(mx.float32) + added.bias[start:stop]).astype(rows.dtype)
        if kind != "weight" or (stored is None and added.weight is None):
            return rows
        packed: Packed | None = None
        if stored is not None:
            scales, biases = (self.shards.part(f"{module}.{kind}", start, stop) for kind in ("scales", "biases"))
            packed = scales, biases, stored[0]
        return made_whole(rows, packed, added.weight, start)

    def changes(self, name: str) -> bool:
        """Whether something is added to a tensor."""
        module, _, kind = name.rpartition(".")
        added = self.added.get(module, Added())
        return (kind == "weight" and added.weight is not None) or (kind == "bias" and added.bias is not None)


def module_of(name: str) -> str:
    """The module whose weight this is."""
    return name.removesuffix(".weight")


def quantized_layers(component: Component, whole: Whole) -> list[str]:
    """`folder/module` of the layers that are quantized."""
    names: Sequence[str] = [row.name for row in component.rows if whole.quantized(row.name)]
    return [f"{component.folder}/{module_of(name)}" for name in names]


@dataclass(frozen=True)
class Misfit:
    """A tensor that is not as the component's config says; None where there should be none, or is none."""

    name: str
    expected: tuple[int, ...] | None
    actual: tuple[int, ...] | None


def misfits(component: Component, whole: Whole) -> list[Misfit]:
    """Tensors that are missing, of another shape than the config says, or unknown to it. Only headers are read."""
    found, known = [], set[str]()
    for row in component.rows:
        known |= {row.name, f"{module_of(row.name)}.scales", f"{module_of(row.name)}.biases"}
        actual = whole.shape(row.name) if row.name in whole.shards.weight_map else None
        if actual != row.shape:
            found.append(Misfit(row.name, row.shape, actual))
    unknown = [name for name in whole.shards.names if name not in known]
    return found + [Misfit(name, None, whole.shards.shape(name)) for name in unknown]
