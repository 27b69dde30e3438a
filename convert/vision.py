"""Image encoders: what checkpoints of DINO (ViTModel), DINOv2 and CLIP in Hugging Face layout hold.

Their config.json and weights lie at the top, so this is no family: both towers of CLIP are read from one folder. In
the checkpoints on the Hub, q is `attention.attention.query`; transformers 5 calls it `attention.q_proj` inside, and may
save it so. Both are read.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.encoders import block_of, clip_layers, clip_text
from mlx_blockskip.converters.source import Source, open_source
from mlx_blockskip.converters.table import Component, Row, conv, linear, norm
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files, manifest
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.config import Config
from mlx_blockskip.models.text.clip import CLIPTextConfig
from mlx_blockskip.models.vision import preprocess
from mlx_blockskip.models.vision.clip import CLIPConfig, CLIPVisionConfig
from mlx_blockskip.models.vision.patches import grid_of, pair
from mlx_blockskip.models.vision.vit import Dinov2Config, ViTConfig

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
    config: Config
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
    found, weights = read_components(source), open_source(source)
    parts = [Part(component, config, _own(weights, component)) for component, config in found]
    if kind == "clip":
        _check_tokenizer(source)
    for part in parts:
        run.check_rows(part.component, part.source)
    return parts


def read_components(source: Path) -> list[tuple[Component, Config]]:
    """The components of a checkpoint by its config.json alone, each with its config. Raises UserError."""
    path, kind = source / "config.json", kind_of(source)
    if kind is None:
        raise UserError(f"{source}: has no config.json with a model_type, so it is not an image encoder")
    return components(kind, files.read_json(path), path)


def components(kind: str, given: Mapping[str, Any], where: Path | None = None) -> list[tuple[Component, Config]]:
    """The components of a checkpoint, each with its config. given: the content of the file `where`.

    Raises UserError for what is not implemented.
    """
    if kind != "clip":
        config = (ViTConfig if kind == "vit" else Dinov2Config).from_dict(given, where)
        return [(transformer("vision", config), config)]
    width, place = CLIPConfig.from_dict(given, where).projection_dim, where or "CLIPModel"
    vision = CLIPVisionConfig.from_dict(_tower(given, "vision"), f"{place}: vision_config")
    text = CLIPTextConfig.from_dict(_tower(given, "text"), f"{place}: text_config")
    return [(clip_vision("vision", vision, width), vision), (clip_text_projected("text", text, width), text)]


def _tower(given: Mapping[str, Any], name: str) -> Any:
    """A tower's config; before version 5 of transformers another dictionary went over it."""
    own, over = (given.get(key) or {} for key in (f"{name}_config", f"{name}_config_dict"))
    return {**own, **over} if isinstance(own, dict) and isinstance(over, dict) else None


def transformer(folder: str, config: ViTConfig | Dinov2Config) -> Component:
    """transformers ViTModel and Dinov2Model, whose names of today are ours."""
    kind = "vit" if isinstance(config, ViTConfig) else "dinov2"
    width, patch = config.hidden_size, pair(config.patch_size)
    count = 1 + grid_of(config)[0] * grid_of(config)[1]
    rows = [Row("embeddings.cls_token", (1, 1, width)), Row("embeddings.position_embeddings", (1, count, width))]
    rows += conv("embeddings.patch_embeddings.projection", width, config.num_channels, patch)
    rows += norm("layernorm", width)
    for i in range(config.num_hidden_layers):
        rows += _layer(f"encoder.layer.{i}", config)
    return Component(
        folder,
        tuple(replace(row, aliases=_names(row, kind)) for row in rows),
        block=lambda name: block_of(r"encoder\.layer\.\d+\.", name),
        ignored=lambda name: re.match(UNUSED, name.removeprefix(f"{kind}.")) is not None,
    )


def _layer(name: str, config: ViTConfig | Dinov2Config) -> list[Row]:
    width = config.hidden_size
    rows = norm(f"{name}.norm1", width) + norm(f"{name}.norm2", width)
    for part in "qkv":
        rows += linear(f"{name}.attention.{part}_proj", width, width, bias=config.qkv_bias)
    rows += linear(f"{name}.attention.o_proj", width, width)
    inner = config.intermediate_size
    if isinstance(config, Dinov2Config):
        rows += [Row(f"{name}.layer_scale{i}.lambda1", (width,)) for i in (1, 2)]
    if not (isinstance(config, Dinov2Config) and config.use_swiglu_ffn):
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


def clip_vision(folder: str, config: CLIPVisionConfig, projection: int) -> Component:
    """transformers CLIPModel's vision tower and its projection. `pre_layrnorm` is what it is called."""
    width = config.hidden_size
    rows = [
        Row("embeddings.class_embedding", (width,)),
        *conv("embeddings.patch_embedding", width, config.num_channels, pair(config.patch_size), bias=False),
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


def clip_text_projected(folder: str, config: CLIPTextConfig, projection: int) -> Component:
    """transformers CLIPModel's text tower and its projection."""
    tower = clip_text(folder, config)
    projected = linear("text_projection", projection, config.hidden_size, bias=False)
    return replace(tower, rows=(*tower.rows, *projected), ignored=lambda name: re.match(UNUSED, name) is not None)


def _own(weights: Source, component: Component) -> Source:
    """Of one folder's tensors, those of this component: without the other tower's."""
    other = {"vision": ("text_model.", "text_projection."), "text": ("vision_model.", "visual_projection.")}
    mine = {n: t for n, t in weights.tensors.items() if not n.startswith(other[component.folder])}
    return replace(weights, tensors=mine)


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
        for shard in write.write_component(part.component, part.source, folder, precision):
            yield part.component.folder, shard
        files.write_json(folder / "config.json", asdict(part.config))
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
    manifest.write(target)
