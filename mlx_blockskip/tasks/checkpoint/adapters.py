"""Adapters on disk: our directory, and the LoRA files of other tools; one adapter that adds them up."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.converters import lora_files, lora_scales
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.engine import files, listing, sealed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import family_named, read_config

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PEFT_FILE = "pytorch_lora_weights.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_TYPE = "peft_type"
"""What PEFT's adapter_config.json says, and ours does not."""

SUFFIXES = (".safetensors", ".sft")
ALL_LAYERS = -1
"""As mlx-lm counts the blocks that have a LoRA, from the last on."""


def load_adapters(model: DiffusionModel, paths: Sequence[str], scales: Sequence[float]) -> lora.Adapter:
    """One adapter of those given, each with its strength (1 where `scales` is shorter). Raises UserError."""
    check_strengths(paths, scales)
    adapters, strengths = [], []
    for i, path in enumerate(paths):
        adapter, scale = load_adapter(model, Path(path).expanduser())
        adapters.append(adapter)
        strengths.append(scale * (scales[i] if i < len(scales) else 1.0))
    return lora.together(adapters, strengths)


def check_strengths(paths: Sequence[Any], scales: Sequence[float]) -> None:
    """Raise UserError where more strengths than adapters are given."""
    if len(scales) > len(paths):
        raise UserError(f"--lora-scale is given {len(scales)} times for {len(paths)} adapters; give one for each")


def load_adapter(model: DiffusionModel, path: Path) -> tuple[lora.Adapter, float]:
    """An adapter's factors and its own scale, checked against the model's layers."""
    family = family_named(read_config(model.path)["family"])
    file, config = located(path)
    if config is not None and PEFT_TYPE not in config:
        check_sums(file, config)
        tree = lora.unflatten(read_tensors(file), model.stack, file)
        lora.check(tree, model.reader, file)
        return lora.divided(lora.layers(tree, model.stack), model.stack, family.lora_targets), scale_of(config, file)
    tensors = read_tensors(file)
    layers = Layers(model.reader.shards, getattr(load_table(family.name), "ADAPTER_RULES", ()))
    if config is None:
        strengths = lora_scales.from_metadata(files.read_header(file).metadata, file)
    else:
        strengths = lora_scales.from_config(config, file.parent / CONFIG)
    entries, left_out = lora_files.read(tensors, strengths, layers, file)
    if left_out:
        emit(Warning(f"{file}: its {len(left_out)} tensors for text encoders are left out ({left_out[0]} ...)"))
    found = {entry.module: (entry.a, entry.b) for entry in entries}
    return lora.divided(found, model.stack, family.lora_targets), 1.0


def located(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file of tensors that a path stands for: it may be a file by any name, our directory, PEFT's, or one with a
    single LoRA file in it; and what the adapter_config.json beside it says, where that is of the same adapter.
    """
    config = path if path.is_dir() else path.parent
    known = {TENSORS, PEFT_TENSORS}
    found = None
    if (config / CONFIG).is_file() and (path.is_dir() or path.name in known):
        found = files.read_json(config / CONFIG)
        if not isinstance(found, dict):
            raise UserError(f"{config / CONFIG}: describes no adapter; get the directory again")
    if not path.is_dir():
        return path, found
    if found is not None:
        return path / (PEFT_TENSORS if PEFT_TYPE in found else TENSORS), found
    for name in (PEFT_FILE, PEFT_TENSORS):
        if (path / name).is_file():
            return path / name, None
    held = [file for file in listing.visible(path) if file.suffix.lower() in SUFFIXES and file.is_file()]
    if len(held) > 1:
        names = ", ".join(sorted(file.name for file in held))
        raise UserError(f"{path}: has several LoRA files ({names}); give the path of one of them")
    return (held[0] if held else path / PEFT_FILE), None


def scale_of(config: Mapping[str, Any], file: Path) -> float:
    """The scale that our adapter_config.json records. Raises UserError where it is no number."""
    try:
        return float(config.get("scale", 1.0))
    except (TypeError, ValueError):
        raise UserError(f"{file.parent / CONFIG}: scale is {config['scale']!r} and has to be a number") from None


def read_tensors(file: Path) -> dict[str, mx.array]:
    """Every tensor of a file, checked to be whole, in the file's order: what is written again has the same bytes."""
    if not file.is_file():
        raise UserError(f"{file}: no such adapter; give an adapter directory or a LoRA safetensors file")
    names = files.read_header(file).entries
    tensors = files.load_lazily(file)
    mx.eval(tensors)
    return {name: tensors[name] for name in names}


def save_adapter(directory: Path, tree: lora.Tree, model: DiffusionModel, config: dict[str, Any]) -> None:
    """Write the factors and their description, with the checksum of their file."""
    write_adapter(directory, lora.flatten(tree, model.stack), config)


def write_adapter(directory: Path, tensors: Mapping[str, mx.array], config: dict[str, Any]) -> None:
    """Write factors by their full names, and their description: as mlx-lm has it, and beside that as we do."""
    files.save_tensors(directory / TENSORS, tensors, {"format": "mlx"})
    theirs = mlx_lm_config(tensors, float(config.get("scale", 1.0)))
    sums = {TENSORS: files.sha256(directory / TENSORS), "scale": _sum_of(config.get("scale", 1.0))}
    files.write_json(directory / CONFIG, {**config, **theirs, "sha256": sums})


def check_sums(file: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError where the factors or their scale are not what was written."""
    sums = config.get("sha256")
    sums = sums if isinstance(sums, dict) else {}
    if sums.get(file.name):
        sealed.check(file, sums[file.name], "take it from a copy, or train again")
    if sums.get("scale", _sum_of(config.get("scale", 1.0))) != _sum_of(config.get("scale", 1.0)):
        raise UserError(
            f"{file.parent / CONFIG}: scale is not what was written; if you have changed it yourself, take out the "
            "'scale' under 'sha256'"
        )


def _sum_of(scale: Any) -> str:
    return hashlib.sha256(repr(scale).encode()).hexdigest()


def mlx_lm_config(tensors: Mapping[str, mx.array], scale: float) -> dict[str, Any]:
    """What mlx-lm's adapter_config.json holds. Keys are paths inside a block, and whole ones outside of the blocks."""
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    rank = max((tensors[f"{module}.lora_a"].shape[1] for module in modules), default=0)
    keys = sorted({re.sub(r"^.+?\.\d+\.", "", module) for module in modules})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return {"fine_tune_type": "lora", "num_layers": ALL_LAYERS, "lora_parameters": parameters}
