"""Adapters on modulation and on layers outside of the blocks: the weights are read with them, and only while worn."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import fuse, generate, lora, select
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter
from support.compare import same_bits
from support.models import HEDGEHOG, assets, convert

OUTSIDE = {
    "flux": (
        *("x_embedder", "norm_out.linear"),
        *("transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.norm.linear"),
    ),
    "sana": ("patch_embed.proj", "caption_projection.linear_1", "time_embed.linear", "proj_out"),
}
LEVELS = 2


@pytest.fixture(scope="module", params=["flux", "sana"])
def named_model(request, tmp_path_factory):
    if request.param == "flux":
        return "flux", request.getfixturevalue("tiny_flux")
    return "sana", convert(assets() / "tiny-sana", tmp_path_factory.mktemp("sana") / "model", "sana")


def lora_file(path, model_path, modules, seed=0, size=0.5):
    """A LoRA in diffusers' layout."""
    layers, tensors = Layers(open_model(model_path).reader.shards), {}
    for number, module in enumerate(modules):
        width, (out,) = layers.widths(layers.find(module))
        for part, (letter, shape) in enumerate((("A", (3, width)), ("B", (out, 3)))):
            value = mx.array(philox.normal(seed, number, part, shape=shape)) * size / shape[1] ** 0.5
            if len(layers.shapes[module]) == 4:
                value = value[..., None, None]
            tensors[f"transformer.{module}.lora_{letter}.weight"] = value
    files.save_tensors(path, tensors)
    return str(path)


def image(tmp_path, model, adapters=(), **options):
    paths = generate(
        model=str(model), prompt=["a cat"], adapter_path=list(adapters), width=64, height=64, steps=2,
        output=str(tmp_path / "o.png"), overwrite=True, **options,
    )  # fmt: skip
    return np.asarray(Image.open(paths[0]), int)


def test_generation_wears_what_fuse_writes_whatever_the_budget(tmp_path, named_model):
    name, path = named_model
    inside = "transformer_blocks.1.attn.to_q" if name == "flux" else "transformer_blocks.1.attn1.to_q"
    one = lora_file(tmp_path / "one.safetensors", path, (*OUTSIDE[name], inside))
    two = lora_file(tmp_path / "two.safetensors", path, OUTSIDE[name][1:3], seed=1)
    scales = {"lora_scale": [0.8, -0.5]}
    worn = image(tmp_path, path, (one, two), **scales)
    assert np.abs(worn - image(tmp_path, path)).max() > 10 * LEVELS
    assert np.array_equal(worn, image(tmp_path, path, (one, two), memory_budget="0", **scales))
    made = fuse(model=str(path), adapter_path=[one, two], save_path=str(tmp_path / "fused"), **scales)
    assert np.abs(image(tmp_path, made) - worn).max() <= LEVELS


def kinds_file(path, model_path):
    """A file of all other kinds: LoKr, LoHa, DoRA, a difference of a norm, and biases."""
    shards = open_model(model_path).reader.shards
    own, count = "transformer_blocks.0", iter(range(100))

    def draw(*shape):
        return mx.array(philox.normal(7, next(count), shape=shape)) * 0.3

    attn = "attn" if f"{own}.attn.to_q.weight" in shards.names else "attn1"
    (out, width), inner = shards.shape(f"{own}.{attn}.to_q.weight"), f"transformer.{own}.{attn}"
    tensors = {
        f"{inner}.to_q.lokr_w1": draw(4, 4), f"{inner}.to_q.lokr_w2": draw(out // 4, width // 4),
        f"{inner}.to_k.hada_w1_a": draw(out, 2), f"{inner}.to_k.hada_w1_b": draw(2, width),
        f"{inner}.to_k.hada_w2_a": draw(out, 2), f"{inner}.to_k.hada_w2_b": draw(2, width),
        f"{inner}.to_v.lora_A.weight": draw(2, width), f"{inner}.to_v.lora_B.weight": draw(out, 2),
        f"{inner}.to_v.lora_magnitude_vector": mx.abs(draw(out)) + 1,
        f"{inner}.to_out.0.diff_b": draw(shards.shape(f"{own}.{attn}.to_out.0.bias")[0]),
    }  # fmt: skip
    if attn == "attn":
        tensors[f"{inner}.norm_q.diff"] = draw(*shards.shape(f"{own}.attn.norm_q.weight"))
    else:
        channels = shards.shape(f"{own}.ff.conv_depth.weight")[0]
        tensors[f"transformer.{own}.ff.conv_depth.diff"] = draw(channels, 1, 3, 3)
    files.save_tensors(path, tensors)
    return str(path)


def test_all_other_kinds_are_drawn_as_fuse_writes_them_whatever_the_budget(tmp_path, named_model):
    path = named_model[1]
    one = kinds_file(tmp_path / "one.safetensors", path)
    plain, worn = image(tmp_path, path), image(tmp_path, path, [one])
    assert np.abs(worn - plain).max() > 10 * LEVELS
    assert np.array_equal(worn, image(tmp_path, path, [one], memory_budget="0"))
    made = fuse(model=str(path), adapter_path=[one], save_path=str(tmp_path / "fused"))
    assert np.abs(image(tmp_path, made) - worn).max() <= LEVELS
    tensors = files.load_lazily(tmp_path / "one.safetensors")
    mx.eval(tensors)
    for kind in ("lokr", "hada", "magnitude", "diff_b", "norm_q", "conv_depth"):
        left = {name: value for name, value in tensors.items() if kind not in name}
        if len(left) < len(tensors):
            files.save_tensors(tmp_path / "left.safetensors", left)
            assert np.abs(image(tmp_path, path, [str(tmp_path / "left.safetensors")]) - worn).max() > 0, kind


@pytest.mark.parametrize("module", OUTSIDE["flux"])
def test_each_layer_alone_changes_the_image(tmp_path, tiny_flux, module):
    one = lora_file(tmp_path / "one.safetensors", tiny_flux, [module], size=4.0)
    assert np.abs(image(tmp_path, tiny_flux, [one]) - image(tmp_path, tiny_flux)).max() > LEVELS


def test_a_model_is_as_it_was_when_the_adapter_is_off(tmp_path, tiny_flux):
    model = open_model(tiny_flux)
    lora_file(tmp_path / "a.safetensors", tiny_flux, OUTSIDE["flux"])
    adapter, _ = load_adapter(model, tmp_path / "a.safetensors")
    assert adapter.tree == {}
    assert set(adapter.worn) == set(OUTSIDE["flux"])

    def weights():
        ((_, block),) = model.reader.walk([0], "modulation")
        return model.weights("x_embedder")["x_embedder.weight"], block["norm1.linear.weight"]

    before = weights()
    with lora.worn(model, adapter):
        worn = weights()
    for module, was, now in zip(("x_embedder", "transformer_blocks.0.norm1.linear"), before, worn, strict=True):
        expected = was + adapter.worn[module].weight.rows(was, 0)
        assert np.allclose(np.array(now), np.array(expected), atol=1e-5)
        assert not same_bits(was, now)
    assert all(same_bits(was, now) for was, now in zip(before, weights(), strict=True))


def test_probing_several_adapters_is_probing_each(tmp_path, tiny_flux):
    """The tables of adapters on different layers, in both orders, are those of each alone."""
    paths = {"base": None, "outside": lora_file(tmp_path / "o.safetensors", tiny_flux, OUTSIDE["flux"], size=2.0)}
    paths["inside"] = lora_file(tmp_path / "i.safetensors", tiny_flux, ["transformer_blocks.2.ff.net.2"], size=2.0)

    def probe(*adapters):
        found = select(
            model=str(tiny_flux), data=str(HEDGEHOG), resolution=32, probe_images=1, noise_levels=1,
            adapter_path=[a for a in adapters if a], output=str(tmp_path / "s.json"), overwrite=True,
        )  # fmt: skip
        return [(one["first"], one["last"]) for one in files.read_json(found.path)["measurements"]]

    alone = {name: probe(path)[0] for name, path in paths.items()}
    assert len({str(table) for table in alone.values()}) == 3
    for order in (("inside", "outside", "inside"), ("outside", "inside")):
        assert probe(*(paths[name] for name in order)) == [alone[name] for name in order]
