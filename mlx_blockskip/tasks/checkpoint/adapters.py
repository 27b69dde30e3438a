"""Adapters on disk: our directory, and the LoRA files of diffusers; one tree that adds them up."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.converters.peft import from_peft
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import read_config

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PEFT_FILE = "pytorch_lora_weights.safetensors"
ALL_LAYERS = -1
"""As mlx-lm counts the blocks that have a LoRA, from the last on."""


def load_adapters(model: DiffusionModel, paths: Sequence[str], scales: Sequence[float]) -> lora.Tree:
    """One tree for the given adapters, each with its strength (1 where `scales` is shorter). Raises UserError."""
    check_strengths(paths, scales)
    trees, strengths = [], []
    for i, path in enumerate(paths):
        tree, scale = load_adapter(model, Path(path).expanduser())
        trees.append(tree)
        strengths.append(scale * (scales[i] if i < len(scales) else 1.0))
    return lora.combine(trees, strengths)


def check_strengths(paths: Sequence[Any], scales: Sequence[float]) -> None:
    """Raise UserError where more strengths than adapters are given."""
    if len(scales) > len(paths):
        raise UserError(f"--lora-scale is given {len(scales)} times for {len(paths)} adapters; give one for each")


def load_adapter(model: DiffusionModel, path: Path) -> tuple[lora.Tree, float]:
    """An adapter's factors and its own scale, checked against the model's layers."""
    if (path / CONFIG).is_file():
        file, scale = path / TENSORS, float(files.read_json(path / CONFIG).get("scale", 1.0))
        tensors = read_tensors(file)
    else:
        file, scale = (path / PEFT_FILE if path.is_dir() else path), 1.0
        theirs = read_tensors(file)
        prefix = load_table(read_config(model.path)["family"]).ADAPTER_PREFIX
        tensors, others = from_peft(theirs, files.read_header(file).metadata, prefix, file)
        if others:
            emit(Warning(f"{file}: {len(others)} tensors are not used ({others[0]} ...)"))
    tree = lora.unflatten(tensors, model.stack, file)
    lora.check(tree, model.reader, file)
    return tree, scale


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
    files.write_json(directory / CONFIG, {**config, **theirs, "sha256": {TENSORS: files.sha256(directory / TENSORS)}})


def mlx_lm_config(tensors: Mapping[str, mx.array], scale: float) -> dict[str, Any]:
    """What mlx-lm's adapter_config.json holds. Keys are paths inside a block, and whole ones outside of the blocks."""
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    rank = max((tensors[f"{module}.lora_a"].shape[1] for module in modules), default=0)
    keys = sorted({re.sub(r"^.+?\.\d+\.", "", module) for module in modules})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return {"fine_tune_type": "lora", "num_layers": ALL_LAYERS, "lora_parameters": parameters}
