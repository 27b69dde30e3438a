"""Write a component directory of an MLX model from plain dictionaries of tensors."""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.shards import INDEX
from mlx_blockskip.engine.stack import Stack


def save_component(path: Path, config: dict, tensors: dict[str, mx.array], stack: Stack | None = None) -> Path:
    """One shard a block of the stack, and one for the rest."""
    path.mkdir(parents=True)
    prefixes = [stack.block(index).prefix for index in stack.path] if stack else []
    shards: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        number = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        shards.setdefault("rest.safetensors" if number is None else f"block-{number:03d}.safetensors", {})[name] = (
            tensor
        )
    weight_map, checksums = {}, {}
    for file, held in shards.items():
        files.save_tensors(path / file, held)
        weight_map |= dict.fromkeys(held, file)
        checksums[file] = files.sha256(path / file)
    groups = {}
    for name in tensors:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            groups[module] = 32
    metadata = {"sha256": checksums, "group_sizes": groups}
    files.write_json(path / INDEX, {"metadata": metadata, "weight_map": weight_map})
    files.write_json(path / "config.json", config)
    return path
