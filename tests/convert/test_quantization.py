"""What config.json says of quantized layers is what mlx-lm reads there; older directories are read as they are."""

import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model
from PIL import Image

from mlx_blockskip import convert, fuse, generate, verify
from mlx_blockskip.converters import quantization, sana
from mlx_blockskip.converters.run import read_components
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.registry import open_model, read_config
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig
from support.compare import same_bits
from support.models import assets
from support.models import convert as convert_directory

FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "vae")


@pytest.fixture(scope="module", params=["none", "8"])
def model(request, tmp_path_factory):
    """With groups of 64 where they fit; CLIP's layers have 128 and 256 inputs, all others of tiny-flux too."""
    path = tmp_path_factory.mktemp("quantized") / "model"
    return convert(hf_path=str(assets() / "tiny-flux"), mlx_path=str(path), quantize=True, q_modulation=request.param)


def stored_in(model, folder):
    """Group size and bits of the quantized layers, by module, from the files themselves."""
    whole = Whole(Shards(model / folder))
    names = {name: whole.quantized(name) for name in whole.shards.names if name.endswith(".weight")}
    return {name.removesuffix(".weight"): stored for name, stored in names.items() if stored}


def layers_of(model, folder):
    """A module tree with a layer wherever the component has a 2-D weight: linear, as mlx-lm's loader meets them."""
    component = next(c for c in read_components(model, "flux1") if c.folder == folder)
    layers = [(row.name.removesuffix(".weight"), row.shape) for row in component.rows if quantization.is_layer(row)]
    return {module: nn.Linear(width, out, bias=False) for module, (out, width) in layers}


class Tree(nn.Module):
    def __init__(self, layers):
        super().__init__()
        for name, value in tree_unflatten(list(layers.items())).items():
            setattr(self, name, value)


def quantized_in(module):
    found = ((path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.QuantizedLinear))
    return {path: (layer.group_size, layer.bits) for path, layer in found}


@pytest.mark.parametrize("folder", FOLDERS)
def test_mlx_lms_own_loader_quantizes_the_same_layers(model, folder, tmp_path):
    """Its `load_model`, on the shards under the names that it looks for."""
    for shard in (model / folder).glob("*.safetensors"):
        os.link(shard, tmp_path / f"model-{shard.name}")
    shutil.copy(model / folder / "config.json", tmp_path)
    layers = layers_of(model, folder)

    class Arguments:
        @classmethod
        def from_dict(cls, config):
            return cls()

    built, config = load_model(
        tmp_path, strict=False, get_model_classes=lambda config: (lambda arguments: Tree(layers), Arguments)
    )
    assert ("quantization" in config) == (folder != "vae")
    assert quantized_in(built) == stored_in(model, folder)
    assert bool(stored_in(model, folder)) == (folder != "vae")
    for path, (group_size, bits) in list(quantized_in(built).items())[:3]:
        layer = dict(built.named_modules())[path]
        x = mx.ones((1, layer.weight.shape[1] * 32 // bits))
        wanted = Whole(Shards(model / folder)).read(f"{path}.weight", 0, layer.weight.shape[0])
        assert mx.allclose(layer(x), x @ wanted.T, atol=1e-2), group_size


def test_the_models_config_alone_says_it_of_all_components(model):
    """`nn.quantize` driven by config.json, without a look at the weights."""
    record = read_config(model)["quantization"]
    layers = {f"{folder}.{name}": layer for folder in FOLDERS for name, layer in layers_of(model, folder).items()}
    tree = Tree(layers)
    nn.quantize(
        tree, group_size=record["group_size"], bits=record["bits"], mode=record["mode"],
        class_predicate=lambda path, layer: record.get(path, hasattr(layer, "to_quantized")),
    )  # fmt: skip
    wanted = {f"{folder}.{name}": s for folder in FOLDERS for name, s in stored_in(model, folder).items()}
    assert quantized_in(tree) == wanted
    assert verify(path=str(model)).problems == ()
    assert (record["group_size"], record["bits"], record["mode"]) == (64, 4, "affine")


def test_layers_that_64_does_not_divide_are_named():
    """As in SANA 1.6B, whose last feed-forward layer has 5600 inputs."""
    rows = sana.transformer("transformer", SanaTransformer2DConfig(num_layers=1))
    record = quantization.of_model(Precision("bfloat16", 4), [rows])
    assert record["transformer.transformer_blocks.0.ff.conv_point"] == {"group_size": 32, "bits": 4}
    assert record["transformer.proj_out"] is False
    assert "transformer.transformer_blocks.0.attn1.to_q" not in record
    assert quantization.of_model(Precision("bfloat16"), [rows]) is None
    own = quantization.with_record({"a": 1}, rows, Precision("bfloat16", 0, 64, 8))
    assert own == {"a": 1}  # SANA has no modulation layers


def test_a_directory_of_the_old_form_is_read(model, tmp_path):
    """As it was written before: a record of its own, none in the components."""
    modulated = read_config(model)["quantization"]["transformer.transformer_blocks.0.norm1.linear"]
    modulation = modulated["bits"] if modulated else 0
    old = shutil.copytree(model, tmp_path / "old")
    (old / "manifest.json").unlink()
    record = {"bits": 4, "group_size": 64, "modulation_bits": modulation, "exceptions": {}}
    files.write_json(old / "config.json", {**read_config(old), "quantization": record})
    for folder in FOLDERS:
        own = files.read_json(old / folder / "config.json")
        own.pop("quantization", None)
        files.write_json(old / folder / "config.json", own)
    assert verify(path=str(old)).problems == ()
    assert np.array_equal(*(_image(path, tmp_path) for path in (model, old)))
    made = [convert(hf_path=str(p), mlx_path=str(tmp_path / f"{p.name}-hf"), to="hf") for p in (model, old)]
    a, b = (files.load_lazily(next((p / "transformer").glob("*.safetensors"))) for p in made)
    assert all(same_bits(a[name], b[name]) for name in a)
    assert "quantization" not in files.read_json(made[0] / "transformer" / "config.json")
    files.write_json(old / "config.json", {**read_config(old), "quantization": {**record, "bits": 8}})
    first = verify(path=str(old)).problems[0]
    assert (first.file.name, first.expected, first.actual) == (
        "config.json", "4 bits in groups of 64", "8 bits in groups of 64",
    )  # fmt: skip


def _image(model, tmp_path):
    (path,) = generate(
        model=str(model), prompt=["a cat"], width=32, height=32, steps=1, output=str(tmp_path / f"{model.name}.png")
    )
    return np.asarray(Image.open(path))


def test_a_dequantized_model_says_that_nothing_is_quantized(tmp_path):
    from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
    from support.models import random_tree

    model = convert_directory(assets() / "tiny-flux", tmp_path / "q", bits=4, dtype="bfloat16")
    opened = open_model(model)
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", random_tree(opened, (1,)), opened, {"family": "flux1", "base_model": str(model)})
    made = fuse(adapter_path=[str(tmp_path / "a")], save_path=str(tmp_path / "whole"), dequantize=True)
    assert "quantization" not in files.read_json(made / "transformer" / "config.json")
    assert verify(path=str(made)).problems == ()
    kept = fuse(adapter_path=[str(tmp_path / "a")], save_path=str(tmp_path / "kept"))
    assert files.read_json(kept / "transformer" / "config.json")["quantization"]["bits"] == 4
    assert verify(path=str(kept)).problems == ()
