"""Adapters on disk: our directory, and the LoRA files of other tools; one adapter that adds them up."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.converters import lora_files, lora_origin, lora_scales
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.converters.views import Stored, whole
from mlx_blockskip.differences import LowRank
from mlx_blockskip.engine import files, listing, sealed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Added
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import family_named, read_config
from mlx_blockskip.options import from_mapping, options_of, shown
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint import adapter_hub
from mlx_blockskip.tasks.checkpoint.adapter_names import CONFIG, PEFT_FILE, PEFT_TENSORS, PEFT_TYPE, SUFFIXES, TENSORS

KINDS: dict[str, type | tuple[type, ...]] = {
    "base_model": str, "family": str, "captions": list, "settings": dict, "plan": dict,
}  # fmt: skip
"""What our adapter_config.json says of an adapter, as far as commands go by it."""

ALL_LAYERS = -1
"""As mlx-lm counts the blocks that have a LoRA, from the last on."""


def load_adapters(model: DiffusionModel, paths: Sequence[str], scales: Sequence[float]) -> lora.Adapter:
    """One adapter of those given, each with its strength (1 where `scales` is shorter). Raises UserError."""
    check_strengths(paths, scales)
    adapters, strengths = [], []
    for i, path in enumerate(paths):
        adapter, scale = load_adapter(model, here(path))
        adapters.append(adapter)
        strengths.append(scale * (scales[i] if i < len(scales) else 1.0))
    return lora.together(adapters, strengths)


def check_strengths(paths: Sequence[Any], scales: Sequence[float]) -> None:
    """Raise UserError where more strengths than adapters are given."""
    if len(scales) > len(paths):
        raise UserError(f"--lora-scale is given {len(scales)} times for {len(paths)} adapters; give one for each")


def here(text: str) -> Path:
    """Where the adapter of this name is on this disk; a repo's is downloaded. Raises UserError where it is nowhere."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    try:
        return adapter_hub.fetched(text) or path
    except UserError as error:
        raise UserError(f"{text}: no such adapter here, and on the Hub: {error}") from None


def load_adapter(model: DiffusionModel, path: Path) -> tuple[lora.Adapter, float]:
    """An adapter and its own scale, checked against the model's layers. Says what base it is of where that is another
    one. Raises UserError.
    """
    file, config = located(path)
    family, scale = family_named(read_config(model.path)["family"]), 1.0
    if config is not None and PEFT_TYPE not in config:
        found, scale = _ours(model, family.name, file, config), scale_of(config, file)
    else:
        found = _theirs(model, family.name, file, config)
    return lora.divided(found, model.stack, family.lora_targets), scale


def _ours(model: DiffusionModel, family: str, file: Path, config: Mapping[str, Any]) -> dict[str, Added]:
    """What an adapter of our own training adds, by layer."""
    if config.get("family", family) != family:
        raise UserError(f"{file.parent}: is an adapter for {config['family']}, and the model is one of {family}")
    warn_of_another_model(file.parent, config, model)
    check_sums(file, config)
    tensors = {name: value.astype(mx.float32) for name, value in read_tensors(file).items()}
    mx.eval(tensors)
    lora.check(tensors, model.reader, file)
    return {name: Added(LowRank(*both)) for name, both in lora.paired(tensors).items()}


def warn_of_another_model(path: Path, recorded: Mapping[str, Any], model: DiffusionModel) -> None:
    """Warn where an adapter was trained on other weights than these, and not on a sibling's, for which it is meant.

    recorded: its adapter_config.json.
    """
    siblings = family_named(read_config(model.path)["family"]).siblings
    if recorded.get("base_model_identity", model.identity) != model.identity and not siblings:
        told = f" ({recorded['base_model']})" if recorded.get("base_model") else ""
        emit(Warning(f"{path}: was trained on another model{told} than this one, or on another precision of it"))


def _theirs(model: DiffusionModel, family: str, file: Path, config: Mapping[str, Any] | None) -> dict[str, Added]:
    """What a file of another tool adds, by layer, with its strength."""
    if not file.is_file():
        raise UserError(f"{file}: no such adapter; give an adapter directory, a LoRA safetensors file, or owner/name")
    header = files.read_header(file)
    table = _table_of(family)
    layers = Layers(model.reader.shards, getattr(table, "ADAPTER_RULES", ()))
    if config is None:
        strengths = lora_scales.from_metadata(header.metadata, file)
    else:
        strengths = lora_scales.from_config(config, file.parent / CONFIG)
    tensors = {name: whole(Stored(file, entry)) for name, entry in header.entries.items()}
    entries, left_out = lora_files.read(tensors, strengths, layers, file)
    if left_out:
        emit(Warning(f"{file}: its {len(left_out)} tensors for text encoders are left out ({left_out[0]} ...)"))
    _say_of_another(model, header.metadata, table, file)
    return {entry.module: entry.added for entry in entries}


def _table_of(family: str) -> ModuleType | None:
    """The converter module of the family; None for one that comes without, whose files are in its own names."""
    try:
        return load_table(family)
    except UserError:
        return None


def _say_of_another(model: DiffusionModel, metadata: Mapping[str, str], table: ModuleType | None, file: Path) -> None:
    """Warn where the file's metadata name another architecture than the model has."""
    if table is None or not hasattr(table, "adapter_metadata"):
        return
    name = str(read_config(model.path).get("source") or model.path.name)
    if found := lora_origin.disagreement(metadata, table.adapter_metadata(name)):
        emit(Warning(f"{file}: says that it is for {found[0]}, and the model is {found[1]}"))


def located(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file of tensors that a path stands for: it may be a file by any name, our directory, PEFT's, or one with a
    single LoRA file in it; and what the adapter_config.json beside it says, where that is of the same adapter.
    """
    config = path if path.is_dir() else path.parent
    known = {TENSORS, PEFT_TENSORS}
    found = None
    if (config / CONFIG).is_file() and (path.is_dir() or path.name in known):
        found = files.read_json(config / CONFIG)
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
        scale = float(config.get("scale", 1.0))
    except (TypeError, ValueError, OverflowError):
        scale = math.nan
    if not math.isfinite(scale):
        said = shown(repr(config["scale"]))
        raise UserError(f"{file.parent / CONFIG}: scale is {said} and has to be a number that is finite")
    return scale


def recorded(directory: Path) -> dict[str, Any]:
    """What an adapter directory of ours says of itself; nothing where it says nothing. Raises UserError for what is of
    another kind, and for settings out of their ranges.
    """
    path = directory / CONFIG
    found = files.read_json(path) if path.is_file() else {}
    for name, kind in KINDS.items():
        if name in found and not isinstance(found[name], kind):
            raise UserError(f"{path}: its {name} is {shown(repr(found[name]))}; get the directory again")
    if not all(isinstance(caption, str) for caption in found.get("captions", [])):
        raise UserError(f"{path}: its captions are not all text; get the directory again")
    known = {field.name for field in options_of(TrainSettings)}
    settings = found.get("settings", {})
    try:
        from_mapping(TrainSettings, {k: v for k, v in settings.items() if k in known and v not in ("", None)})
    except UserError as error:
        raise UserError(f"{path}: its settings: {error}; get the directory again") from None
    return found


def read_tensors(file: Path) -> dict[str, mx.array]:
    """Every tensor of a file, checked to be whole, in the file's order: what is written again has the same bytes."""
    if not file.is_file():
        raise UserError(f"{file}: no such adapter; give an adapter directory, a LoRA safetensors file, or owner/name")
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
