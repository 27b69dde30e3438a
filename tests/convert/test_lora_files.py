"""LoRA files of other tools: every style gives the same weights as adding its difference by hand."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import export
from mlx_blockskip.converters import flux1, lora_keys, sana
from mlx_blockskip.converters.float8 import VALUES
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.differences import LowRank
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.header import encode_header
from mlx_blockskip.engine.shards import Added
from mlx_blockskip.events import listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter, save_adapter
from support.models import assets, convert, random_tree

R = 4
BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
QKV = [f"{BLOCK}.attn.to_{part}" for part in "qkv"]
TEXT_QKV = [f"{BLOCK}.attn.add_{part}_proj" for part in "qkv"]
LINEAR1 = [*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"]


@pytest.fixture(scope="module")
def flux(tiny_flux):
    return open_model(tiny_flux)


@pytest.fixture(scope="module")
def small_sana(tmp_path_factory):
    path = tmp_path_factory.mktemp("sana") / "model"
    return open_model(convert(assets() / "tiny-sana", path, "sana"))


def pair(model, modules, seed=0, dtype=mx.float32):
    """A (r, in) and B (out, r) as torch has them, for layers below one another."""
    shapes = [model.reader.shards.shape(f"{module}.weight") for module in modules]
    width, out = math.prod(shapes[0][1:]), sum(shape[0] for shape in shapes)
    a, b = (mx.array(philox.normal(seed, i, shape=s)) for i, s in enumerate(((R, width), (out, R))))
    return a.astype(dtype), b.astype(dtype)


def read(path, model, tensors, metadata=None, name="lora.safetensors"):
    files.save_tensors(path / name, tensors, metadata)
    return load_adapter(model, path / name)[0]


def difference(model, adapter, module):
    """What an adapter adds to a layer's weight, as theirs is: (out, in)."""
    out, *rest = model.reader.shards.shape(f"{module}.weight")
    weight = mx.zeros((out, math.prod(rest)))
    return np.array(adapter.layers(model.stack)[module].weight.rows(weight, 0))


def assert_adds(model, adapter, modules, delta):
    """The adapter is for these layers alone, and adds the rows of `delta`, from top to bottom."""
    assert adapter.layers(model.stack).keys() == set(modules)
    found = np.concatenate([difference(model, adapter, module) for module in modules])
    np.testing.assert_allclose(found, np.array(delta), rtol=1e-5, atol=1e-6)


STYLES = [
    ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    ("{}.lora_A.weight", "{}.lora_B.weight"),
    ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    ("base_model.model.transformer.{}.lora_A.weight", "base_model.model.transformer.{}.lora_B.weight"),
    ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    ("transformer.{}.lora_A.default_0.weight", "transformer.{}.lora_B.default_0.weight"),
    ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    ("lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight"),
    ("lora_unet_{_}.lora_A.weight", "lora_unet_{_}.lora_B.weight"),
    ("transformer.{}.lora_A", "transformer.{}.lora_B"),
    ("{}.lora_a", "{}.lora_b"),
]
THEIRS = {
    "double_blocks.1.img_attn.qkv": QKV,
    "double_blocks.1.txt_attn.qkv": TEXT_QKV,
    "double_blocks.1.img_attn.proj": [f"{BLOCK}.attn.to_out.0"],
    "double_blocks.1.txt_mlp.2": [f"{BLOCK}.ff_context.net.2"],
    "double_blocks.1.img_mod.lin": [f"{BLOCK}.norm1.linear"],
    "single_blocks.2.linear1": LINEAR1,
    "single_blocks.2.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.2.modulation.lin": [f"{SINGLE}.norm.linear"],
    "img_in": ["x_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}


def named(style, layer):
    return style.replace("{_}", layer.replace(".", "_")).replace("{}", layer)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style[0])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_style_of_our_names_and_of_theirs(tmp_path, flux, style, alpha):
    ours = {module: [module] for module in (QKV[0], f"{SINGLE}.proj_mlp", f"{BLOCK}.norm1.linear", "norm_out.linear")}
    for number, (layer, modules) in enumerate({**ours, **THEIRS}.items()):
        a, b = pair(flux, modules, number)
        bare = style[0].endswith(("lora_A", "lora_a"))
        stored = (mx.contiguous(x.T) for x in (a, b)) if bare else (a, b)
        tensors = dict(zip((named(one, layer) for one in style), stored, strict=True))
        if alpha:
            tensors[named(style[0].partition(".lora_" if "_down" in style[0] else ".lora")[0], layer) + ".alpha"] = (
                mx.array(alpha, mx.bfloat16)
            )
        adapter = read(tmp_path, flux, tensors)
        assert_adds(flux, adapter, modules, b @ a * ((alpha or R) / R))


XLABS = {
    "double_blocks.1.processor.qkv_lora1": QKV,
    "double_blocks.1.processor.qkv_lora2": TEXT_QKV,
    "double_blocks.1.processor.proj_lora2": [f"{BLOCK}.attn.to_add_out"],
    "single_blocks.2.processor.qkv_lora": LINEAR1[:3],
    "single_blocks.2.processor.proj_lora": [f"{SINGLE}.proj_out"],
}
MLX = {
    "double_blocks.1.img_mlp.layers.0": [f"{BLOCK}.ff.net.0.proj"],
    "transformer_blocks.1.ff_context.linear2": [f"{BLOCK}.ff_context.net.2"],
}


@pytest.mark.parametrize("layer", [*XLABS, *MLX])
def test_layers_that_one_tool_alone_calls_so(tmp_path, flux, layer):
    modules = {**XLABS, **MLX}[layer]
    a, b = pair(flux, modules)
    if layer in XLABS:
        tensors = {f"{layer}.down.weight": a, f"{layer}.up.weight": b}
    else:
        tensors = {f"{layer}.lora_a": a.T, f"{layer}.lora_b": b.T}
    assert_adds(flux, read(tmp_path, flux, tensors), modules, b @ a)


def test_the_last_norm_has_its_halves_the_other_way_round(tmp_path, flux):
    a, b = pair(flux, ["norm_out.linear"])
    layer = "diffusion_model.final_layer.adaLN_modulation.1"
    adapter = read(tmp_path, flux, {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
    shift, scale = mx.split(b @ a, 2)
    assert_adds(flux, adapter, ["norm_out.linear"], mx.concatenate([scale, shift]))


def test_sana_as_diffusers_and_as_nvidia_call_it(tmp_path, small_sana):
    for layer, modules in {
        "transformer.transformer_blocks.1.attn2.to_q": ["transformer_blocks.1.attn2.to_q"],
        "transformer.transformer_blocks.0.ff.conv_inverted": ["transformer_blocks.0.ff.conv_inverted"],
        "transformer.caption_projection.linear_1": ["caption_projection.linear_1"],
        "transformer.patch_embed.proj": ["patch_embed.proj"],
        "transformer.time_embed.linear": ["time_embed.linear"],
        "transformer.proj_out": ["proj_out"],
        "diffusion_model.blocks.1.attn.qkv": [f"transformer_blocks.1.attn1.to_{part}" for part in "qkv"],
    }.items():
        a, b = pair(small_sana, modules)
        four = layer.endswith(("conv_inverted", "patch_embed.proj"))
        stored = (a[..., None, None], b[..., None, None]) if four else (a, b)
        tensors = dict(zip((f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"), stored, strict=True))
        assert_adds(small_sana, read(tmp_path, small_sana, tensors), modules, b @ a)


@pytest.mark.parametrize("module", [f"{BLOCK}.norm1.linear", "proj_out", QKV[0]])
def test_no_name_of_a_model_stands_for_two_layers(flux, small_sana, module):
    for model, table in ((flux, flux1), (small_sana, sana)):
        layers = Layers(model.reader.shards, table.ADAPTER_RULES)
        flat = {name.replace(".", "_") for name in layers._targets}
        assert len(flat) == len(layers._targets)
    assert Layers(flux.reader.shards).find(module).modules == (module,)


def names(module="x_embedder", prefix=""):
    return [f"{prefix}{module}.lora_{letter}.weight" for letter in "AB"]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 4, "use_rslora": True}, 2.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {QKV[0]: 12}}, 3.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_[qk]": 12}}, 3.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2, "attn.to_q": 12}}, 0.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"o_q": 12, r"^to_q": 12}}, 1.0),
        ({"r": 64, "lora_alpha": 8, "rank_pattern": {r".*to_q": 4}}, 2.0),
    ],
)
def test_strengths_as_peft_says_them_in_metadata_and_in_its_directory(tmp_path, flux, config, scale):
    a, b = pair(flux, QKV[:1])
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    tensors = dict(zip(names(QKV[0], "transformer."), (a, b), strict=True))
    assert_adds(flux, read(tmp_path, flux, tensors, metadata), QKV[:1], b @ a * scale)
    tensors = dict(zip(names(QKV[0], "base_model.model."), (a, b), strict=True))
    files.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", **config})
    read(tmp_path, flux, tensors, name="adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_adds(flux, load_adapter(flux, path)[0], QKV[:1], b @ a * scale)


def test_patterns_are_matched_as_peft_matches_them():
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    from mlx_blockskip.converters.lora_scales import Strengths

    pool = ["to_q", "q", r"attn\.to_.", "attn.to_q", r"blocks\.1\.attn\.to_q", r".*_q", r"^blocks", QKV[0], "to_k|to_q"]
    for seed in range(40):
        chosen = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[:3]]
        patterns = {key: float(number + 2) for number, key in enumerate(chosen)}
        for layer in (*QKV, "x_embedder", f"{SINGLE}.proj_mlp"):
            expected = patterns.get(get_pattern_key(list(patterns), layer), 1.0)
            assert Strengths(1.0, patterns).of(layer, 1) == expected


@pytest.mark.parametrize(
    "alpha", [mx.array(2, d) for d in (mx.bfloat16, mx.float16, mx.int64)] + [mx.full((1, 1), 2.0)]
)
def test_an_alpha_of_any_dtype_and_shape_goes_over_the_metadata(tmp_path, flux, alpha):
    a, b = pair(flux, ["x_embedder"], dtype=mx.bfloat16)
    tensors = dict(zip(names(), (a, b.astype(mx.float32)), strict=True)) | {"x_embedder.alpha": alpha}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 100}), "ss_network_alpha": "100"}
    adapter = read(tmp_path, flux, tensors, metadata)
    assert_adds(flux, adapter, ["x_embedder"], b.astype(mx.float32) @ a.astype(mx.float32) * 0.5)


def test_kohyas_metadata_is_for_people(tmp_path, flux):
    a, b = pair(flux, ["x_embedder"])
    tensors = {"lora_unet_img_in.lora_down.weight": a, "lora_unet_img_in.lora_up.weight": b}
    adapter = read(tmp_path, flux, tensors, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    assert_adds(flux, adapter, ["x_embedder"], b @ a)


@pytest.mark.parametrize("name", ["my dog.sft", "lora", "my_dog.safetensors"])
def test_a_file_by_any_name_and_a_folder_with_one(tmp_path, flux, name):
    a, b = pair(flux, ["x_embedder"])
    files.save_tensors(tmp_path / "file.safetensors", dict(zip(names(), (a, b), strict=True)))
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "file.safetensors").rename(folder / name)
    (folder / "._other.safetensors").write_bytes(b"macOS")
    paths = [folder / name] if name == "lora" else [folder / name, folder]
    for path in paths:
        assert_adds(flux, load_adapter(flux, path)[0], ["x_embedder"], b @ a)
    if name == "my dog.sft":
        (folder / "second.safetensors").write_bytes((folder / name).read_bytes())
        with pytest.raises(UserError, match=r"several LoRA files \(my dog.sft, second.safetensors\)"):
            load_adapter(flux, folder)
    if name == "lora":
        with pytest.raises(UserError, match="no such adapter"):
            load_adapter(flux, folder)


def test_a_file_that_mlx_wrote_without_metadata(tmp_path, flux):
    a, b = pair(flux, ["x_embedder"])
    mx.save_safetensors(str(tmp_path / "a.safetensors"), dict(zip(names(), (a, b), strict=True)))
    assert b'"__metadata__":null' in (tmp_path / "a.safetensors").read_bytes()[:200]
    assert_adds(flux, load_adapter(flux, tmp_path / "a.safetensors")[0], ["x_embedder"], b @ a)


def test_factors_in_float8_are_what_their_codes_stand_for(tmp_path, flux):
    shapes = (R, 64), (128, R)
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 0x78, shape, np.uint8) for shape in shapes]  # none of them is NaN
    entries = [files.TensorEntry(name, shape, "F8_E4M3") for name, shape in zip(names(), shapes, strict=True)]
    beginning, _ = encode_header(entries)
    (tmp_path / "f8.safetensors").write_bytes(beginning + b"".join(code.tobytes() for code in codes))
    a, b = (VALUES["F8_E4M3"][code] for code in codes)
    assert_adds(flux, load_adapter(flux, tmp_path / "f8.safetensors")[0], ["x_embedder"], b @ a)


def whole_pair(flux):
    return dict(zip(names(), pair(flux, ["x_embedder"]), strict=True))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"single_blocks.0.norm.query_norm.scale": mx.ones(4)}, "query_norm.scale is not known"),
        ({"proj_out.lora_A.weight": mx.ones((2, 2))}, r"proj_out\.lora_A\.weight has no other half"),
        ({"double_blocks.99.img_mlp.0.lora_A.weight": mx.ones((2, 2))}, r"no layer double_blocks\.99"),
        (dict(zip(names("img_in"), [0, 0], strict=True)), "x_embedder and img_in are both for x_embedder"),
        ({"x_embedder.lora_A.other.weight": mx.ones((2, 2))}, r"x_embedder.lora_A.other.weight are both for"),
        ({"x_embedder.lora_A.weight": mx.full((4, 4), math.nan)}, r"x_embedder\.lora_A\.weight holds NaN"),
        ({"x_embedder.lora_B.weight": mx.full((4, 4), math.inf)}, r"x_embedder\.lora_B\.weight holds NaN or inf"),
        ({"x_embedder.lora_A.weight": mx.ones((4, 5))}, "factors of x_embedder do not fit a layer of"),
        ({"x_embedder.alpha": mx.ones(3)}, r"x_embedder\.alpha has shape \[3\]"),
        ({"x_embedder.lora_A.weight": mx.ones((4, 5), mx.int32)}, "no floating-point numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_picture_is_refused_by_name(tmp_path, flux, more, said):
    if 0 in [v for v in more.values() if isinstance(v, int)]:
        more = dict(zip(more, whole_pair(flux).values(), strict=True))
    with pytest.raises(UserError, match=said):
        read(tmp_path, flux, {**whole_pair(flux), **more})


def test_what_changes_nothing_is_passed_over_and_text_encoders_are_said(tmp_path, flux):
    a, b = pair(flux, ["x_embedder"])
    harmless = {"x_embedder.diff_b": mx.zeros(128), "x_embedder.lora_B.bias": mx.zeros(128)}
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": mx.ones((2, 2)),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": mx.ones((2, 2)),
            "lora_te1_x.dora_scale": mx.ones(2)}  # fmt: skip
    heard = []
    with listening(heard.append):
        adapter = read(tmp_path, flux, {**whole_pair(flux), **harmless, **text})
    assert_adds(flux, adapter, ["x_embedder"], b @ a)
    assert ["its 3 tensors for text encoders are left out" in event.message for event in heard] == [True]
    with pytest.raises(UserError, match="text encoders alone"):
        read(tmp_path, flux, text)


def test_random_names_of_every_layer_are_read_back(tmp_path, flux):
    """All layers of the model at once, each in a style drawn for it."""
    layers = Layers(flux.reader.shards, flux1.ADAPTER_RULES)
    rng = np.random.default_rng(5)
    tensors, expected = {}, {}
    for number, module in enumerate(layers.shapes):
        style = STYLES[rng.integers(len(STYLES))]
        a, b = pair(flux, [module], number)
        bare = style[0].endswith(("lora_A", "lora_a"))
        for one, value in zip(style, (a.T, b.T) if bare else (a, b), strict=True):
            tensors[named(one, module)] = mx.contiguous(value)
        expected[module] = b @ a
    adapter = read(tmp_path, flux, tensors)
    assert adapter.layers(flux.stack).keys() == expected.keys()
    for module, delta in expected.items():
        np.testing.assert_allclose(difference(flux, adapter, module), np.array(delta), rtol=1e-5, atol=1e-6)


def test_a_quantized_layer_is_read_whole_with_what_is_added(tmp_path):
    """As Whole computes it for `fuse`, and with the bytes that were counted."""
    path = convert(assets() / "tiny-flux", tmp_path / "q", modulation_bits=4, group_size=32)
    model = open_model(path)
    shards = model.reader.shards
    module = f"{BLOCK}.norm1.linear"
    assert module in shards.group_sizes
    width, out = Whole(shards).shape(f"{module}.weight")[::-1]
    a, b = mx.array(philox.normal(1, shape=(width, R))), mx.array(philox.normal(2, shape=(R, out)))
    shards.added = {module: Added(LowRank(a, b))}
    found = shards.load(shards.under(f"{module}."))
    assert found.keys() == {f"{module}.weight", f"{module}.bias"}
    expected = Whole(shards, shards.added).read(f"{module}.weight", 0, out)
    np.testing.assert_allclose(np.array(found[f"{module}.weight"]), np.array(expected), rtol=1e-5, atol=1e-6)
    assert shards.nbytes(shards.under(f"{module}.")) == sum(array.nbytes for array in found.values())


def test_keys_know_text_encoders_from_layers():
    for name in ("text_encoder_2.x.lora_A.weight", "lora_te_x.alpha", "text_encoders.clip_l.x.lora_up.weight"):
        assert lora_keys.parse(name).part == "text"
    for name in ("time_text_embed.text_embedder.linear_1.lora_A.weight", "txt_in.lora_A.weight"):
        assert lora_keys.parse(name).part == "a"


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya"])
def test_what_export_writes_is_read_back(tmp_path, flux, format):
    tree = random_tree(flux, range(5, 11), b_scale=0.3)
    save_adapter(tmp_path / "a", tree, flux, {"family": "flux1", "scale": 0.5, "rank": 3})
    made = export(adapter_path=str(tmp_path / "a"), format=format, output=str(tmp_path / "made.safetensors"))
    (ours, scale), (back, one) = load_adapter(flux, tmp_path / "a"), load_adapter(flux, made)
    assert (scale, one, back.worn) == (0.5, 1.0, {})
    assert ours.layers(flux.stack).keys() == back.layers(flux.stack).keys()
    for module in ours.layers(flux.stack):
        mine, theirs = difference(flux, ours, module) * scale, difference(flux, back, module)
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-5)
