"""Of any adapter: what is exported is read back as the same, and every style of every kind gives the same weights."""

import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_blockskip import export
from mlx_blockskip.converters import flux1, sana
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter, write_adapter

EPSILON = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}


@pytest.fixture(scope="module")
def models(tiny_flux, tiny_sana):
    return {name: open_model(path) for name, path in (("flux1", tiny_flux), ("sana", tiny_sana))}


def layers_of(model, table):
    """Every linear layer, with (out, in)."""
    found = Layers(model.reader.shards, table.ADAPTER_RULES)
    return {
        module: (shape[0], math.prod(shape[1:]))
        for module, shape in found.shapes.items()
        if len(shape) > 1 and found.kernel(found.find(module)) is None
    }


def added(model, path):
    """What is added to each layer, (out, in)."""
    adapter, scale = load_adapter(model, path)
    return {
        name: np.array((one.weight.b * scale).T @ one.weight.a.T) for name, one in adapter.layers(model.stack).items()
    }


ADAPTERS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(["flux1", "flux1", "sana"]),
        "format": st.sampled_from(["diffusers", "comfyui", "kohya", "mlx"]),
        "dtype": st.sampled_from(list(EPSILON)),
        "scale": st.floats(0.01, 8),
        "layers": st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 5)), min_size=1, max_size=6),
    }
)


@settings(max_examples=60)
@given(ADAPTERS)
def test_export_then_import_is_the_identity(tmp_path_factory, models, drawn):
    path, model = tmp_path_factory.mktemp("export"), models[drawn["family"]]
    known = layers_of(model, {"flux1": flux1, "sana": sana}[drawn["family"]])
    tensors = {}
    for number, (place, rank) in enumerate(drawn["layers"]):
        module = sorted(known)[place % len(known)]
        out, width = known[module]
        tensors[f"{module}.lora_a"] = mx.array(philox.normal(number, shape=(width, rank)))
        tensors[f"{module}.lora_b"] = mx.array(philox.normal(number + 99, shape=(rank, out)))
    (path / "a").mkdir()
    write_adapter(path / "a", tensors, {"family": drawn["family"], "scale": drawn["scale"]})
    form = drawn["format"]
    if drawn["family"] == "sana" and form in ("comfyui", "kohya"):
        with pytest.raises(Exception, match="has no names for the layers of sana"):
            export(adapter_path=str(path / "a"), format=form, output=str(path / "made"))
        return
    target = path / ("made" if form == "mlx" else "made.safetensors")
    export(adapter_path=str(path / "a"), format=form, dtype=drawn["dtype"], output=str(target))
    ours, back = added(model, path / "a"), added(model, target)
    nothing = {name for name in back.keys() - ours.keys() if not np.abs(back[name]).max()}  # beside q what k and v get
    assert back.keys() - nothing == ours.keys()
    for name, delta in ours.items():
        rank = tensors[f"{name}.lora_a"].shape[1]
        assert np.abs(back[name] - delta).max() <= 4 * rank * EPSILON[drawn["dtype"]] * np.abs(delta).max() + 1e-6
    shutil.rmtree(path)


# every style of names x every kind

PREFIXES = ("", "transformer.", "base_model.model.", "diffusion_model.", "lycoris_", "lora_transformer_", "lora_unet_")
THEIRS = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "single_blocks.{}.linear1": [
        *(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.proj_out"],
    "img_in": ["x_embedder"],
}
OURS = {name: [name] for names in THEIRS.values() for name in names}


def lora(rows, width, draw):
    a, b = draw(2, width), draw(rows, 2)
    return {"lora_down.weight": a, "lora_up.weight": b, "alpha": mx.array(3.0)}, 1.5 * (b @ a)


def peft(rows, width, draw):
    a, b = draw(2, width), draw(rows, 2)
    return {"lora_A.default.weight": a, "lora_B.default.weight": b}, b @ a


def loha(rows, width, draw):
    a, b, c, d = draw(rows, 2), draw(2, width), draw(rows, 2), draw(2, width)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": mx.array(3.0)}
    return parts, 1.5 * (a @ b) * (c @ d)


def lokr(rows, width, draw):
    one, left, right = draw(4, 2), draw(rows // 4, 2), draw(2, width // 2)
    kron = mx.array(np.kron(np.array(one), np.array(left @ right)))
    return {"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": mx.array(3.0)}, 1.5 * kron


def full(rows, width, draw):
    delta = draw(rows, width)
    return {"diff": delta}, delta


@settings(max_examples=60)
@given(
    st.sampled_from([*THEIRS, *OURS]), st.integers(0, 3), st.sampled_from(PREFIXES),
    st.sampled_from([lora, peft, loha, lokr, full]), st.sampled_from(["float32", "bfloat16", "float16"]),
)  # fmt: skip
def test_every_style_of_every_kind_adds_the_same(tmp_path_factory, models, layer, block, prefix, kind, dtype):
    path, model = tmp_path_factory.mktemp("style"), models["flux1"]
    modules = [name.format(block) for name in {**THEIRS, **OURS}[layer]]
    shapes = [model.reader.shards.shape(f"{module}.weight") for module in modules]
    count = iter(range(100))

    def draw(*shape):
        return mx.array(philox.normal(next(count), shape=shape)).astype(getattr(mx, dtype)).astype(mx.float32)

    parts, delta = kind(sum(out for out, _ in shapes), shapes[0][1], draw)
    name = layer.format(block).replace(".", "_") if prefix.endswith("_") else layer.format(block)
    stored = {f"{prefix}{name}.{part}": value.astype(getattr(mx, dtype)) for part, value in parts.items()}
    files.save_tensors(path / "x.safetensors", stored)
    layers = load_adapter(model, path / "x.safetensors")[0].layers(model.stack)
    assert set(layers) == set(modules)
    found = [layers[module].weight.rows(mx.zeros(shape), 0) for module, shape in zip(modules, shapes, strict=True)]
    np.testing.assert_allclose(np.concatenate(found), np.array(delta), rtol=1e-4, atol=1e-4)
    shutil.rmtree(path)
