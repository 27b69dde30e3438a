"""`fuse`: adapters are added to the weights of their model, W + scale A B, and a model of its own is written."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.converters.rewrite import Rewriting
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.engine import files, listing, manifest
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX, Shards
from mlx_blockskip.events import Saved, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import open_model, read_config
from mlx_blockskip.settings import FuseSettings
from mlx_blockskip.tasks.checkpoint.adapters import check_strengths, here, load_adapter, recorded
from mlx_blockskip.tasks.checkpoint.hf import write_hugging_face
from mlx_blockskip.tasks.checkpoint.resolve import resolve
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.targets import check_room, check_writable


def fuse(settings: FuseSettings) -> Path:
    """Write the model with its adapters inside into the new directory `save_path`; returns its path."""
    target = Path(settings.save_path).expanduser()
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --save-path or remove it")
    check_writable(target, "--save-path")
    paths = [here(path) for path in settings.adapter_path or ["adapters"]]
    check_strengths(paths, settings.lora_scale)
    name = settings.model or recorded(paths[0]).get("base_model")
    if not name:
        raise UserError(f"{paths[0]}: does not say which model it is for; give --model")
    model = open_model(resolve(str(name)))
    adapter, fused = _load(model, paths, settings.lora_scale)
    config = read_config(model.path)
    config = {**config, "fused": [*config.get("fused", []), *fused]}
    whole = Whole(model.reader.shards, adapter.layers(model.stack))
    if settings.to == "hf":
        folder = model.reader.shards.path.name
        write_hugging_face(model.path, target, added={folder: whole.added}, config=config)
    else:
        write_fused(model.path, target, whole, config, settings.dequantize)
    emit(Saved(target, "model for diffusers" if settings.to == "hf" else "model"))
    return target


def _load(
    model: DiffusionModel, paths: Sequence[Path], strengths: Sequence[float]
) -> tuple[lora.Adapter, list[dict[str, Any]]]:
    """One adapter of all, and what is recorded of each."""
    adapters, scales, fused = [], [], []
    for number, path in enumerate(paths):
        about = recorded(path)
        adapter, scale = load_adapter(model, path)
        strength = strengths[number] if number < len(strengths) else 1.0
        adapters.append(adapter)
        scales.append(scale * strength)
        said: dict[str, Any] = {key: about[key] for key in ("base_model_identity", "captions") if key in about}
        fused.append({"adapter": str(path), "scale": scale * strength, "factors": adapter.checksum(), **said})
    return lora.together(adapters, scales), fused


def write_fused(source: Path, target: Path, whole: Whole, config: dict[str, Any], dequantize: bool) -> None:
    """Write an MLX model directory in which one component is `whole`; the target appears when all of it is there.

    config: its config.json. dequantize: the layers of every component are written whole. Raises UserError.
    """
    found = listing.visible(source)
    changed = {whole.shards.path.name: Rewriting(whole, dequantize)}
    for path in found:
        if (path / INDEX).is_file() and path.name not in changed:
            changed[path.name] = Rewriting(Whole(Shards(path)), dequantize)
    check_room(target, sum(one.nbytes() for one in changed.values()))
    count = sum(len(one.shard_files) for one in changed.values())
    with phase("fuse", count, "shards") as track, files.atomic_directory(target) as temporary:
        for done, _ in enumerate(_fill(temporary, found, changed), 1):
            track.step(done)
        files.write_json(temporary / "config.json", {**config, **({"quantization": None} if dequantize else {})})
        manifest.write(temporary)


def _fill(target: Path, found: Sequence[Path], changed: Mapping[str, Rewriting]) -> Iterator[str]:
    """Write the components anew and copy what lies beside them; yields each shard's name when it is done."""
    for path in found:
        copy = target / path.name
        if path.name in changed:
            copy.mkdir()
            yield from changed[path.name].write(copy)
        elif path.is_dir():
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns(".*"))
        elif path.name != "config.json":
            shutil.copyfile(path, copy)
