"""Which layers are quantized and how, as mlx-lm writes it into config.json: `group_size`, `bits` and `mode` of all
layers, and by module path what of a layer differs, or false where it is whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mlx_blockskip.converters.table import Component, Row

MODE = "affine"
"""The kind of quantization that `mx.quantize` does by default."""

Stored = tuple[int, int]
"""Group size and bits of a quantized layer."""


class Chosen(Protocol):
    """What is wanted (`write.Precision`)."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def modulation_bits(self) -> int: ...
    def bits_for(self, row: Row) -> int: ...
    def group_for(self, row: Row) -> int: ...


def chosen_for(row: Row, precision: Chosen) -> Stored | None:
    """How one layer is to be quantized; None for a tensor that stays whole."""
    bits = precision.bits_for(row)
    group_size = precision.group_for(row) if bits else 0
    return (group_size, bits) if group_size else None


def record_of(precision: Chosen, components: Mapping[str, Component]) -> dict[str, Any] | None:
    """The value of `quantization`; None where no layer is quantized. components: by what stands before their modules'
    paths: nothing in a component's own config.json, `transformer.` and so on in the model's.
    """
    everything = {"group_size": precision.group_size, "bits": precision.bits or precision.modulation_bits}
    found: dict[str, Any] = {}
    quantized = False
    for prefix, component in components.items():
        for row in filter(is_layer, component.rows):
            stored = chosen_for(row, precision)
            quantized = quantized or stored is not None
            said = False if stored is None else {"group_size": stored[0], "bits": stored[1]}
            if said != everything:
                found[prefix + row.name.removesuffix(".weight")] = said
    return {**everything, "mode": MODE, **found} if quantized else None


def of_model(precision: Chosen, components: Sequence[Component]) -> dict[str, Any] | None:
    """What the model's config.json says of all its components."""
    return record_of(precision, {f"{component.folder}.": component for component in components})


def with_record(config: Mapping[str, Any], component: Component, precision: Chosen) -> dict[str, Any]:
    """A component's own config, with what mlx-lm's loader reads of quantized layers."""
    record = record_of(precision, {"": component})
    return {**config, "quantization": record} if record else dict(config)


def is_layer(row: Row) -> bool:
    """Whether a tensor is a weight that tools may quantize: that of a linear layer, or an embedding."""
    return row.name.endswith(".weight") and len(row.shape) == 2


def recorded(record: Mapping[str, Any] | None, folder: str, row: Row) -> Stored | None:
    """How a model's config.json says that a layer is quantized; None for whole. Also of directories that were written
    before this form: `bits`, `group_size`, `modulation_bits`, and `exceptions` by `folder/module`.
    """
    if record is None or not is_layer(row):
        return None
    module = row.name.removesuffix(".weight")
    if "exceptions" in record:
        bits = {"linear": record["bits"], "modulation": record["modulation_bits"], "plain": 0}[row.role]
        group_size = record["exceptions"].get(f"{folder}/{module}", record["group_size"])
        return (group_size, bits) if bits and group_size else None
    said = record.get(f"{folder}.{module}", record)
    return (said["group_size"], said["bits"]) if said else None
