"""Image encoders: what checkpoints of DINO (ViTModel), DINOv2 and CLIP in Hugging Face layout hold.

Their config.json and weights lie at the top, so this is no family: both towers of CLIP are read from one folder. In
the checkpoints on the Hub, q is `attention.attention.query`; transformers 5 calls it `attention.q_proj` inside, and may
save it so. Both are read.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import run
from mlx_blockskip.converters.encoders import block_of, clip_layers, clip_text
from mlx_blockskip.converters.run import Precision
from mlx_blockskip.converters.source import Source, open_source
from mlx_blockskip.converters.table import Component, Row, conv, linear, norm

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.text import clip as text_clip
from mlx_blockskip.models.vision import preprocess, vit
from mlx_blockskip.models.vision.patches import grid_of, pair

VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True,
}  # fmt: skip
DINOV2 = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "image_size": 224, "patch_size": 14, "num_channels": 3, "qkv_bias": True,
    "use_swiglu_ffn": False,
}  # fmt: skip
CLIP_VISION = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
}  # fmt: skip
CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
    "intermediate_size": 2048, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
"""What the reference classes take where a config says nothing; what is not named here is not kept."""

PROCESSORS = {"vit": "ViTImageProcessor", "dinov2": "BitImageProcessor", "clip": "CLIPImageProcessor"}
"""The class that reads a preprocessor_config.json which names none."""

UNUSED = r"(pooler|classifier)\.|(.*\.)?(position_ids|mask_token)$|logit_scale$"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
PLAIN = ("config.json", preprocess.FILE, "processor_config.json", *TOKENIZER)
"""What of a repo is needed beside its weights."""


@dataclass(frozen=True)
class Part:
    """A component to write: its rows, its whole config, and the tensors that are its own."""

    component: Component
    config: Mapping[str, Any]
    source: Source


def kind_of(source: Path) -> str | None:
    """The kind of encoder ("vit", "dinov2", "clip") in a directory in Hugging Face layout; None where it has no
    config.json with a model_type.

    Raises UserError for a model_type that is none of these.
    """
    path = source / "config.json"
    config = files.read_json(path) if path.is_file() else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is not None and kind not in PROCESSORS:
        raise UserError(f"{path}: model_type {kind!r} is not supported; the image encoders are {', '.join(PROCESSORS)}")
    return kind


def open_checkpoint(source: Path) -> list[Part]:
    """Every part with its tensors, checked to be complete and of the right shapes. Raises UserError."""
    kind = kind_of(source)
    if kind is None:
        raise UserError(f"{source}: has no config.json with a model_type, so it is not an image encoder")
    _preprocessing(source, kind)
    config, weights = files.read_json(source / "config.json"), open_source(source)
    try:
        parts = [Part(c, own, _own(weights, c)) for c, own in components(kind, config)]
    except KeyError as error:
        raise UserError(f"{source / 'config.json'}: lacks {error}; download the checkpoint again") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{source / 'config.json'}: has a wrong value ({error}); download it again") from error
    if kind == "clip":
        _check_tokenizer(source)
    for part in parts:
        (text_clip if kind == "clip" else vit).stack(part.config)  # refuses an activation that is not implemented
        run.check_rows(part.component, part.source)
    return parts


def components(kind: str, config: Mapping[str, Any]) -> list[tuple[Component, dict[str, Any]]]:
    """The components of a checkpoint, each with its whole config."""
    if kind != "clip":
        whole = _complete(VIT if kind == "vit" else DINOV2, config)
        return [(transformer("vision", kind, whole), whole)]
    width = config.get("projection_dim", 512)
    vision, text = (
        _complete(defaults, {**(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})})
        for part, defaults in (("vision", CLIP_VISION), ("text", CLIP_TEXT))
    )
    return [(clip_vision("vision", vision, width), vision), (clip_text_projected("text", text, width), text)]


def _complete(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: config.get(key, default) for key, default in defaults.items()}
    if found["hidden_size"] % found["num_attention_heads"]:
        raise ValueError(f"num_attention_heads {found['num_attention_heads']} does not divide hidden_size")
    return found


def transformer(folder: str, kind: str, config: Mapping[str, Any]) -> Component:
    """transformers ViTModel (`kind` "vit") and Dinov2Model, whose names of today are ours."""
    width, patch = config["hidden_size"], pair(config["patch_size"])
    count = 1 + grid_of(config)[0] * grid_of(config)[1]
    rows = [Row("embeddings.cls_token", (1, 1, width)), Row("embeddings.position_embeddings", (1, count, width))]
    rows += conv("embeddings.patch_embeddings.projection", width, config["num_channels"], patch)
    rows += norm("layernorm", width)
    for i in range(config["num_hidden_layers"]):
        rows += _layer(f"encoder.layer.{i}", config)
    return Component(
        folder,
        tuple(replace(row, aliases=_names(row, kind)) for row in rows),
        block=lambda name: block_of(r"encoder\.layer\.\d+\.", name),
        ignored=lambda name: re.match(UNUSED, name.removeprefix(f"{kind}.")) is not None,
    )


def _layer(name: str, config: Mapping[str, Any]) -> list[Row]:
    width = config["hidden_size"]
    rows = norm(f"{name}.norm1", width) + norm(f"{name}.norm2", width)
    for part in "qkv":
        rows += linear(f"{name}.attention.{part}_proj", width, width, bias=config["qkv_bias"])
    rows += linear(f"{name}.attention.o_proj", width, width)
    inner = config["intermediate_size"] if "intermediate_size" in config else int(width * config["mlp_ratio"])
    if "mlp_ratio" in config:
        rows += [Row(f"{name}.layer_scale{i}.lambda1", (width,)) for i in (1, 2)]
    if not config.get("use_swiglu_ffn", False):
        return rows + linear(f"{name}.mlp.fc1", inner, width) + linear(f"{name}.mlp.fc2", width, inner)
    inner = (int(inner * 2 / 3) + 7) // 8 * 8
    rows += linear(f"{name}.mlp.gate_proj", inner, width, fix="first")
    rows += linear(f"{name}.mlp.up_proj", inner, width, fix="second")
    return rows + linear(f"{name}.mlp.down_proj", width, inner)


HUB: Mapping[str, Mapping[str, str]] = {
    "dinov2": {
        "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
        "mlp.gate_proj": "mlp.weights_in", "mlp.up_proj": "mlp.weights_in", "mlp.down_proj": "mlp.weights_out",
    },
    "vit": {
        "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
}  # fmt: skip
"""Modules inside a layer: our name and that in the checkpoints on the Hub."""

NOW = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
"""Modules that transformers 5 calls otherwise in ViTModel than in Dinov2Model; its layers are `layers`."""


def hub_name(name: str, kind: str) -> str:
    """What a tensor of ours is called in the checkpoints on the Hub."""
    return _renamed(name, HUB[kind], "encoder.layer")


def _names(row: Row, kind: str) -> tuple[str, ...]:
    """Every name that a tensor may have: the Hub's, transformers' own, both also in a model with a head."""
    names = [hub_name(row.name, kind)]
    if kind == "vit":
        names.append(_renamed(row.name, NOW, "layers"))
    names += [f"{kind}.{name}" for name in (row.name, *names)]
    return tuple(name for name in dict.fromkeys(names) if name != row.name)


def _renamed(name: str, modules: Mapping[str, str], layers: str) -> str:
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(\w+)", name)
    return name if match is None else f"{layers}.{match[1]}.{modules.get(match[2], match[2])}.{match[3]}"


def clip_vision(folder: str, config: Mapping[str, Any], projection: int) -> Component:
    """transformers CLIPModel's vision tower and its projection. `pre_layrnorm` is what it is called."""
    width = config["hidden_size"]
    rows = [
        Row("embeddings.class_embedding", (width,)),
        *conv("embeddings.patch_embedding", width, config["num_channels"], pair(config["patch_size"]), bias=False),
        Row("embeddings.position_embedding.weight", (1 + grid_of(config)[0] * grid_of(config)[1], width)),
        *norm("pre_layrnorm", width),
        *norm("post_layernorm", width),
        *clip_layers(config),
    ]
    projected = linear("visual_projection", projection, width, bias=False)
    return Component(
        folder,
        (*(replace(row, aliases=(f"vision_model.{row.name}",)) for row in rows), *projected),
        block=lambda name: block_of(r"encoder\.layers\.\d+\.", name),
        ignored=lambda name: re.match(UNUSED, name) is not None,
    )


def clip_text_projected(folder: str, config: Mapping[str, Any], projection: int) -> Component:
    """transformers CLIPModel's text tower and its projection."""
    tower = clip_text(folder, config)
    projected = linear("text_projection", projection, config["hidden_size"], bias=False)
    return replace(tower, rows=(*tower.rows, *projected), ignored=lambda name: re.match(UNUSED, name) is not None)


def _own(weights: Source, component: Component) -> Source:
    """Of one folder's tensors, those of this component: without the other tower's."""
    other = {"vision": ("text_model.", "text_projection."), "text": ("vision_model.", "visual_projection.")}
    mine = {n: t for n, t in weights.tensors.items() if not n.startswith(other[component.folder])}
    return Source(weights.folder, mine)


def _preprocessing(source: Path, kind: str) -> dict[str, Any]:
    """preprocessor_config.json with the name of its class, or what processor_config.json holds of it. Checked."""
    path, around = source / preprocess.FILE, source / "processor_config.json"
    whole = files.read_json(path if path.is_file() or not around.is_file() else around)
    config = whole if path.is_file() or not isinstance(whole, dict) else whole.get("image_processor")
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not an image processor's config; download the checkpoint again")
    if not config.get("image_processor_type") and not config.get("feature_extractor_type"):
        config = config | {"image_processor_type": PROCESSORS[kind]}
    preprocess.check(config, path)
    return config


def _check_tokenizer(source: Path) -> None:
    held = {name for name in TOKENIZER if (source / name).is_file()}
    if "tokenizer_config.json" not in held or not ({"tokenizer.json"} <= held or {"vocab.json", "merges.txt"} <= held):
        raise UserError(
            f"{source}: its tokenizer (tokenizer_config.json, and tokenizer.json or vocab.json with merges.txt) is "
            "missing or not whole; download the checkpoint again"
        )


def write_encoder(
    source: Path, target: Path, precision: Precision, parts: list[Part], origin: str
) -> Iterator[tuple[str, str]]:
    """Fill the (temporary) directory `target`; yields (component, shard) as they are done."""
    kind = kind_of(source)
    assert kind is not None
    for part in parts:
        folder = target / part.component.folder
        folder.mkdir()
        for shard in run.write_component(part.component, part.source, folder, precision):
            yield part.component.folder, shard
        files.write_json(folder / "config.json", part.config)
    files.write_json(target / preprocess.FILE, _preprocessing(source, kind))
    if kind == "clip":
        (target / "tokenizer").mkdir()
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / "tokenizer" / name)
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "README")):
            shutil.copyfile(path, target / path.name)
    config = {
        "format": 1,
        "encoder": kind,
        "components": [part.component.folder for part in parts],
        "dtype": precision.dtype,
        "quantization": None,
        "source": origin,
    }
    files.write_json(target / "config.json", config)
