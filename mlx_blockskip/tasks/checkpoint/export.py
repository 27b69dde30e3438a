"""`export`: an adapter directory becomes a LoRA file of another tool, or a directory whose factors hold its scale."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_blockskip.converters import lora_export
from mlx_blockskip.converters.lora_export import NATIVE, folded, rounded, to_diffusers, to_native
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Saved, emit
from mlx_blockskip.settings import ExportSettings
from mlx_blockskip.tasks.captions import common_words
from mlx_blockskip.tasks.checkpoint.adapter_names import CONFIG, PEFT_FILE, TENSORS
from mlx_blockskip.tasks.checkpoint.adapters import read_tensors, recorded, scale_of, write_adapter
from mlx_blockskip.tasks.checkpoint.base import base_model
from mlx_blockskip.tasks.targets import check

SAID = {"diffusers": "LoRA for diffusers", "comfyui": "LoRA for ComfyUI", "kohya": "LoRA in kohya's format"}
FOLDER = "mlx_adapter"
OURS = "mlx_blockskip."


def export(settings: ExportSettings) -> Path:
    """Write an adapter directory in the format of another tool, with its scale inside the factors; returns what was
    written, a file or with `mlx` a directory. Raises UserError.
    """
    source = Path(settings.adapter_path).expanduser()
    as_directory = settings.format == "mlx"
    target = Path(settings.output or (FOLDER if as_directory else PEFT_FILE)).expanduser()
    check(target, "--output", settings.overwrite and not as_directory)
    config = recorded(source) or files.read_json(source / CONFIG)
    tensors, scale = read_tensors(source / TENSORS), scale_of(config, source / TENSORS)
    dtype: mx.Dtype = getattr(mx, settings.dtype)
    if as_directory:
        with files.atomic_directory(target) as temporary:
            write_adapter(temporary, rounded(folded(tensors, scale), dtype), {**config, "scale": 1.0})
        emit(Saved(target, "adapter"))
        return target
    table = load_table(config["family"])
    found, metadata = _converted(tensors, scale, table, settings.format, config["family"], dtype)
    about = described(source.resolve().name, config, found, table)
    files.save_tensors(target, found, {"format": "pt", **about, **metadata})
    emit(Saved(target, SAID[settings.format]))
    return target


def _converted(
    tensors: Mapping[str, mx.array], scale: float, table: ModuleType, name: str, family: str, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a LoRA file, and metadata that its loader needs."""
    if name == "diffusers":
        pointwise = getattr(table, "ADAPTER_POINTWISE", ())
        return to_diffusers(tensors, scale, table.ADAPTER_PREFIX, pointwise, dtype)
    rules = getattr(table, "ADAPTER_FORMATS", {}).get(name)
    if rules is None:
        raise UserError(f"--format {name}: has no names for the layers of {family}; export it with --format diffusers")
    naming = getattr(table, "ADAPTER_NAMINGS", {}).get(name, NATIVE[name])
    return to_native(tensors, scale, naming, rules, dtype), {}


def described(
    title: str, config: Mapping[str, Any], tensors: Mapping[str, mx.array], table: ModuleType
) -> dict[str, str]:
    """What a LoRA file says of itself, in the terms of ModelSpec and of sd-scripts, and beside them in ours.

    config: adapter_config.json. tensors: those of the file. No path of this disk is in it.
    """
    captions = [str(caption) for caption in config.get("captions", [])]
    base = base_model(config["base_model"]).name if config.get("base_model") else ""
    rank = str(max(lora_export.ranks(tensors), default=0))
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.trigger_phrase": common_words(captions),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_sd_model_name": base,
        f"{OURS}base_model": base,
        f"{OURS}plan": json.dumps(config["plan"]) if config.get("plan") else "",
        f"{OURS}captions": json.dumps(captions, ensure_ascii=False) if captions else "",
    }
    family = table.adapter_metadata(base) if hasattr(table, "adapter_metadata") else {}
    return {key: value for key, value in {**found, **family}.items() if value}
