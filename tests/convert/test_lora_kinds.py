"""DoRA, LoHa, LoKr, LoCon, differences and biases: what is added to the weights is what PEFT merges, and what formulas
give by hand.
"""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter
from support.compare import record, relative_error
from support.models import assets, convert

BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
QKV = [f"{BLOCK}.attn.to_{part}" for part in "qkv"]


@pytest.fixture(scope="module")
def models(tiny_flux, tmp_path_factory):
    """Each bundled model by its name, with its weights in float32."""
    sana = convert(assets() / "tiny-sana", tmp_path_factory.mktemp("sana") / "model", "sana")
    return {"tiny-flux": open_model(tiny_flux), "tiny-sana": open_model(sana)}


def normal(*shape, seed=0):
    return mx.array(philox.normal(seed, *shape, shape=shape)) * 0.2


def adapter_of(path, model, tensors):
    files.save_tensors(path / "a.safetensors", {name: mx.contiguous(value) for name, value in tensors.items()})
    return load_adapter(model, path / "a.safetensors")[0]


def weight(model, name, added=None):
    whole = Whole(model.reader.shards, added)
    return np.array(whole.read(name, 0, whole.shape(name)[0]))


def change(model, adapter, module, kind="weight"):
    """What the adapter makes of a layer's tensor, less what it was; rows of one axis."""
    added = adapter.layers(model.stack)
    found = weight(model, f"{module}.{kind}", added) - weight(model, f"{module}.{kind}")
    return found.reshape(len(found), -1)


def assert_adds(model, adapter, modules, delta):
    """The adapter is for these layers alone, and adds the rows of `delta`, from top to bottom."""
    assert adapter.layers(model.stack).keys() == set(modules)
    found = np.concatenate([change(model, adapter, module) for module in modules])
    np.testing.assert_allclose(found, np.array(delta), rtol=1e-4, atol=1e-5)


# what PEFT merges


LINEAR = {
    "tiny-flux": [
        *("to_q", "add_v_proj", "to_out.0", "ff.net.0.proj", "proj_mlp", "proj_out", "x_embedder", "context_embedder"),
        *("norm1.linear", "norm.linear", "norm_out.linear", "timestep_embedder.linear_1"),
    ],
    "tiny-sana": [
        *("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "caption_projection.linear_1", "time_embed.linear", "proj_out"),
        *("ff.conv_inverted", "ff.conv_point"),
    ],
}


def configs(peft, targets):
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    lycoris = {"r": 4, "alpha": 6, "target_modules": targets, "init_weights": False}
    return {
        "DoRA": peft.LoraConfig(**lora, use_dora=True, use_rslora=True),
        "LoHa": peft.LoHaConfig(**lycoris, rank_pattern={"to_q": 2}, alpha_pattern={"proj_out": 3}),
        "LoKr": peft.LoKrConfig(**lycoris),
        "LoKr of four factors": peft.LoKrConfig(**lycoris, decompose_both=True),
        "LoKr of two matrices": peft.LoKrConfig(**{**lycoris, "r": 1000, "alpha": 3000}, decompose_factor=8),
    }


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sana"])
@pytest.mark.parametrize("kind", [*configs(pytest.importorskip("peft"), []), "LoRA with biases"])
def test_layers_become_what_peft_merges(tmp_path, models, name, kind):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import diffusers

    cls = {"tiny-flux": diffusers.FluxTransformer2DModel, "tiny-sana": diffusers.SanaTransformer2DModel}[name]
    theirs = cls.from_pretrained(assets() / name, subfolder="transformer", dtype=torch.float32)
    targets = LINEAR[name]
    if kind == "LoRA with biases":
        targets = [target for target in targets if not target.startswith(("attn1.to_q", "attn2.to_v", "ff.conv_point"))]
        options = {"r": 4, "target_modules": targets, "init_lora_weights": False, "lora_bias": True}
        config = peft.LoraConfig(**options, lora_alpha=6)
    else:
        config = configs(peft, targets)[kind]
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "magnitude" in key or "lora_B" in key:
                value.mul_(torch.rand_like(value) * 0.5 + 0.5)
    wrapped.save_pretrained(tmp_path)
    merged = {key: value.numpy() for key, value in wrapped.merge_and_unload().state_dict().items()}
    model = models[name]
    layers = load_adapter(model, tmp_path)[0].layers(model.stack)
    assert len(layers) >= len(targets)
    worst = 0.0
    for module, added in layers.items():
        kinds = [part for part, value in (("weight", added.weight), ("bias", added.bias)) if value is not None]
        assert kinds == (["weight", "bias"] if kind == "LoRA with biases" else ["weight"])
        for part in kinds:
            ours, reference = weight(model, f"{module}.{part}", layers), merged[f"{module}.{part}"]
            worst = max(worst, relative_error(ours, reference.reshape(ours.shape)))
            assert relative_error(weight(model, f"{module}.{part}"), reference.reshape(ours.shape)) > 1e-3
    record(f"{kind} merged by PEFT", worst, 1e-5)


# in LyCORIS' names, where q, k and v may be one layer


def kron(first, second):
    return np.kron(np.array(first), np.array(second))


@pytest.mark.parametrize(
    "layer", ["lycoris_double_blocks_1_img_attn_qkv", "diffusion_model.double_blocks.1.img_attn.qkv"]
)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_layers_that_are_one_of_theirs_get_their_rows(tmp_path, models, layer, alpha):
    model = models["tiny-flux"]
    width = model.reader.shards.shape(f"{QKV[0]}.weight")[1]
    a, b, c, d = normal(3 * width, 2), normal(2, width), normal(3 * width, 2, seed=1), normal(2, width, seed=1)
    one, two, left, right = normal(12, 8), normal(width // 4, width // 8), normal(width // 4, 2), normal(2, width // 8)
    more = {f"{layer}.alpha": mx.array(alpha)} if alpha else {}
    scale = (alpha or 2.0) / 2
    for tensors, delta in (
        ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, np.array((a @ b) * (c @ d)) * scale),
        ({"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right}, kron(one, left @ right) * scale),
        ({"lokr_w1": one, "lokr_w2": two}, kron(one, two)),
        ({"lora_up.weight": a, "lora_down.weight": b}, np.array(a @ b) * scale),
        ({"diff": a @ b}, np.array(a @ b)),
    ):
        found = adapter_of(tmp_path, model, {**{f"{layer}.{key}": value for key, value in tensors.items()}, **more})
        assert_adds(model, found, QKV, delta)


def test_doras_of_lycoris_bring_rows_to_their_lengths(tmp_path, models):
    model, layer = models["tiny-flux"], "lora_unet_double_blocks_1_img_attn_qkv"
    whole = np.concatenate([weight(model, f"{module}.weight") for module in QKV])
    rows, width = whole.shape
    up, down, lengths = normal(rows, 2), normal(2, width), mx.abs(normal(rows, 1, seed=3)) + 0.5
    inner = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths}
    changed = whole + np.array(up @ down)
    expected = changed * np.array(lengths) / np.linalg.norm(changed, axis=1, keepdims=True)
    found = adapter_of(tmp_path, model, {f"{layer}.{key}": value for key, value in inner.items()})
    assert_adds(model, found, QKV, expected - whole)
    columns = {**inner, "dora_scale": normal(1, width)}
    with pytest.raises(UserError, match=r"dora_scale has lengths of columns and not of rows"):
        adapter_of(tmp_path, model, {f"{layer}.{key}": value for key, value in columns.items()})


def test_halves_that_are_the_other_way_round_there_are_so_in_every_kind(tmp_path, models):
    model, layer = models["tiny-flux"], "diffusion_model.final_layer.adaLN_modulation.1"
    rows, width = model.reader.shards.shape("norm_out.linear.weight")
    one, two, bias = normal(4, 2), normal(rows // 4, width // 2), normal(rows)
    tensors = {f"{layer}.lokr_w1": one, f"{layer}.lokr_w2": two, f"{layer}.diff_b": bias}
    found = adapter_of(tmp_path, model, tensors)
    shift, scale = np.split(kron(one, two), 2)
    assert_adds(model, found, ["norm_out.linear"], np.concatenate([scale, shift]))
    shift, scale = np.split(np.array(bias), 2)
    expected = np.concatenate([scale, shift])[:, None]
    np.testing.assert_allclose(change(model, found, "norm_out.linear", "bias"), expected, atol=1e-5)


NORMS = {
    "diffusion_model.double_blocks.1.img_attn.norm.query_norm.scale.diff": f"{BLOCK}.attn.norm_q",
    "transformer.transformer_blocks.1.attn.norm_added_k.diff": f"{BLOCK}.attn.norm_added_k",
    "lycoris_single_transformer_blocks_2_attn_norm_k.w_norm": f"{SINGLE}.attn.norm_k",
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_get_a_difference(tmp_path, models, name):
    model = models["tiny-flux"]
    delta = normal(*model.reader.shards.shape(f"{NORMS[name]}.weight"))
    assert_adds(model, adapter_of(tmp_path, model, {name: delta}), [NORMS[name]], delta[:, None])


def test_a_layer_without_a_bias_gets_one_as_it_is_read_and_cannot_be_fused(tmp_path, models):
    model, module = models["tiny-sana"], "transformer_blocks.0.ff.conv_point"
    shards = model.reader.shards
    assert f"{module}.bias" not in shards.weight_map
    bias = normal(shards.shape(f"{module}.weight")[0])
    adapter = adapter_of(tmp_path, model, {f"transformer.{module}.diff_b": bias})
    shards.added = adapter.worn
    found = shards.load([f"{module}.weight"])
    shards.added = {}
    np.testing.assert_array_equal(np.array(found[f"{module}.bias"]), np.array(bias))
    with pytest.raises(UserError, match=r"conv_point: gets a bias from the adapter and has none"):
        Whole(shards, adapter.layers(model.stack))


DEPTH = "transformer_blocks.0.ff.conv_depth"


def kernel_kinds(channels):
    """Adapters of a depth-wise 3 x 3 convolution in torch's shapes, and (channels, 1, 3, 3) by hand."""
    up, down = normal(channels, 2), normal(2, 1, 3, 3)
    yield {"lora_up.weight": up[..., None, None], "lora_down.weight": down}, np.einsum("or,rihw->oihw", up, down)
    mid, point = normal(2, 2, 3, 3), normal(2, 1, 1, 1)
    tensors = {"lora_up.weight": up[..., None, None], "lora_mid.weight": mid, "lora_down.weight": point}
    yield tensors, np.einsum("op,pqhw,qi->oihw", up, mid, point[..., 0, 0])
    a, b, c, d = normal(channels, 2), normal(2, 9), normal(channels, 2, seed=1), normal(2, 9, seed=1)
    hada = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    yield hada, np.array((a @ b) * (c @ d)).reshape(channels, 1, 3, 3)
    t1, t2, a, c = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=1), normal(2, channels), normal(2, channels, seed=1)
    b, d = normal(2, 1), normal(2, 1, seed=1)
    tucker = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    cores = [np.einsum("ijkl,jr,ip->prkl", *(np.array(x) for x in three)) for three in ((t1, b, a), (t2, d, c))]
    yield tucker, cores[0] * cores[1]
    one, two = normal(4, 1), normal(channels // 4, 1, 3, 3)
    yield {"lokr_w1": one, "lokr_w2": two}, kron(one[..., None, None], two)
    core, out, inner = normal(2, 2, 3, 3), normal(2, channels // 4), normal(2, 1)
    right = np.einsum("ijkl,ip,jr->prkl", *(np.array(x) for x in (core, out, inner)))
    yield {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": out, "lokr_w2_b": inner}, kron(one[..., None, None], right)
    delta = normal(channels, 1, 3, 3)
    yield {"diff": delta}, np.array(delta)


def test_depthwise_convolutions_take_every_kind(tmp_path, models):
    model = models["tiny-sana"]
    channels = model.reader.shards.shape(f"{DEPTH}.weight")[0]
    for tensors, delta in kernel_kinds(channels):
        found = adapter_of(tmp_path, model, {f"transformer.{DEPTH}.{key}": value for key, value in tensors.items()})
        ours = delta.transpose(0, 2, 3, 1).reshape(channels, -1)
        assert_adds(model, found, [DEPTH], ours)
    dense = {"lora_down.weight": normal(2, channels, 3, 3), "lora_up.weight": normal(channels, 2, 1, 1)}
    with pytest.raises(UserError, match=r"conv_depth\.lora_down\.weight sees all channels of a depth-wise conv"):
        adapter_of(tmp_path, model, {f"{DEPTH}.{key}": value for key, value in dense.items()})


# strengths, several adapters, quantized layers


def test_strengths_are_those_of_peft_and_several_adapters_add_up(tmp_path, models):
    model, module = models["tiny-flux"], QKV[0]
    whole = weight(model, f"{module}.weight")
    out, width = whole.shape
    up, down = normal(out, 2), normal(2, width)
    lengths = mx.array(np.linalg.norm(whole, axis=1)) * 1.5
    dora = {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down, f"{module}.lora_magnitude_vector": lengths}
    lokr = {f"{module}.lokr_w1": normal(4, 4), f"{module}.lokr_w2": normal(out // 4, width // 4)}
    (tmp_path / "second").mkdir()
    both = [adapter_of(tmp_path, model, dora), adapter_of(tmp_path / "second", model, lokr)]
    from mlx_blockskip import lora

    found = change(model, lora.together(both, [0.5, -2.0]), module)
    changed = whole + 0.5 * np.array(up @ down)
    first = changed * np.array(lengths)[:, None] / np.linalg.norm(changed, axis=1, keepdims=True) - whole
    second = -2.0 * kron(lokr[f"{module}.lokr_w1"], lokr[f"{module}.lokr_w2"])
    np.testing.assert_allclose(found, first + second, atol=1e-5)


def test_checksums_see_kinds_numbers_and_strengths(tmp_path, models):
    model, module = models["tiny-flux"], QKV[0]
    out, width = model.reader.shards.shape(f"{module}.weight")
    one, two = normal(4, 4), normal(out // 4, width // 4)
    made = [
        {f"{module}.lokr_w1": one, f"{module}.lokr_w2": two},
        {f"{module}.lokr_w1": one, f"{module}.lokr_w2": two * 1.001},
        {f"{module}.diff": mx.array(kron(one, two))},
        {f"{module}.diff_b": normal(out)},
        {f"{module}.diff_b": normal(out) * 2},
    ]
    from mlx_blockskip import lora

    adapters = [adapter_of(tmp_path / str(i), model, t) for i, t in enumerate(made) if not (tmp_path / str(i)).mkdir()]
    adapters.append(lora.together(adapters[:1], [0.5]))
    assert len({adapter.checksum() for adapter in adapters}) == len(adapters)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_layer_keeps_the_whole_strength(tmp_path, models, bits):
    """The difference from the float32 model is that of the quantization, however small what is added is."""
    path = convert(assets() / "tiny-flux", tmp_path / "q", bits=bits, group_size=32)
    model, module = open_model(path), QKV[0]
    shards = model.reader.shards
    assert module in shards.group_sizes
    out, width = models["tiny-flux"].reader.shards.shape(f"{module}.weight")
    small = normal(out, width) * 1e-3
    adapter = adapter_of(tmp_path, model, {f"{module}.diff": small, f"{module}.diff_b": normal(out)})
    plain = weight(model, f"{module}.weight")
    shards.added = adapter.worn
    names = shards.under(f"{module}.")
    found, count = shards.load(names), shards.nbytes(names)
    shards.added = {}
    assert count == sum(value.nbytes for value in found.values())
    np.testing.assert_allclose(np.array(found[f"{module}.weight"]) - plain, np.array(small), atol=1e-6)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "bits": 4, "group_size": 32}])
def test_in_half_precision_small_differences_keep_their_strength(tmp_path, options):
    """A hundredth of a step of bfloat16, which rounding to the nearest number would lose."""
    model, module = open_model(convert(assets() / "tiny-flux", tmp_path / "m", **options)), QKV[0]
    shards = model.reader.shards
    plain = np.array(Whole(shards).read(f"{module}.weight", 0, 128).astype(mx.float32))
    small = np.sign(np.array(normal(*plain.shape))).astype(np.float32) * np.abs(plain).mean() / 12800
    adapter = adapter_of(tmp_path, model, {f"{module}.diff": mx.array(small)})
    shards.added = adapter.worn
    found = np.array(shards.load([name for name in shards.names if name.startswith(f"{module}.")])[
        f"{module}.weight"].astype(mx.float32))  # fmt: skip
    shards.added = {}
    kept = ((found - plain) * small).sum() / (small * small).sum()
    spread = 4 * np.abs(plain).mean() / 256 / np.abs(small).mean() / plain.size**0.5
    assert abs(kept - 1) < spread


def test_a_layer_that_gets_a_bias_alone_stays_quantized(tmp_path):
    path = convert(assets() / "tiny-flux", tmp_path / "q", bits=4, group_size=32)
    model, module = open_model(path), QKV[0]
    shards = model.reader.shards
    bias = normal(shards.shape(f"{module}.bias")[0])
    adapter = adapter_of(tmp_path, model, {f"{module}.diff_b": bias})
    plain = shards.load(shards.under(f"{module}."))
    shards.added = adapter.worn
    found = shards.load(shards.under(f"{module}."))
    assert found.keys() == plain.keys()
    assert mx.array_equal(found[f"{module}.weight"], plain[f"{module}.weight"])
    assert mx.allclose(found[f"{module}.bias"], plain[f"{module}.bias"] + bias)


def test_weights_are_changed_in_parts_without_a_seam(tmp_path, models, monkeypatch):
    """The rows that are made whole together decide nothing."""
    from mlx_blockskip.engine import shards as module_of_shards

    model, layer = models["tiny-flux"], "diffusion_model.double_blocks.1.img_attn.qkv"
    width = model.reader.shards.shape(f"{QKV[0]}.weight")[1]
    tensors = {f"{layer}.lokr_w1": normal(12, 8), f"{layer}.lokr_w2": normal(width // 4, width // 8)}
    model.reader.shards.added = adapter_of(tmp_path, model, tensors).worn
    at_once = model.reader.shards.load([f"{module}.weight" for module in QKV])
    monkeypatch.setattr(module_of_shards, "PART", 7 * width)
    parts = model.reader.shards.load([f"{module}.weight" for module in QKV])
    model.reader.shards.added = {}
    assert all(mx.array_equal(at_once[name], parts[name]) for name in at_once)


def test_a_file_that_changes_while_it_is_in_use_is_named(tmp_path, models):
    model = models["tiny-flux"]
    out, width = model.reader.shards.shape(f"{QKV[0]}.weight")
    lokr = {f"{QKV[0]}.lokr_w1": normal(4, 4), f"{QKV[0]}.lokr_w2": normal(out // 4, width // 4)}
    adapter = adapter_of(tmp_path, model, lokr)
    change(model, adapter, QKV[0])
    for spoil in (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), lambda file: file.unlink()):
        spoil(tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=r"a\.safetensors: was changed while it was in use"):
            change(model, adapter, QKV[0])


# what is refused


def factors(**parts):
    return {f"x_embedder.{key.replace('__', '.')}": value for key, value in parts.items()}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors(lokr_w1=mx.ones((2, 2))), r"x_embedder\.lokr_w1 has no lokr_w2_a beside it"),
        (factors(lokr_w1=mx.ones((2, 2)), lokr_w2=mx.ones((2, 2))), "do not fit a layer of 64 -> 128"),
        (factors(lokr_w1_a=mx.ones((2, 3)), lokr_w1_b=mx.ones((2, 2)), lokr_w2=mx.ones((64, 32))), "do not fit"),
        (factors(hada_w1_a=mx.ones((128, 2)), hada_w1_b=mx.ones((2, 64))), "has no hada_w2_a beside it"),
        (factors(diff=mx.ones((64, 128))), "do not fit a layer of 64 -> 128"),
        (factors(diff=mx.ones((128, 64)), lokr_w1=mx.ones((2, 2))), "has a LoKr and a difference; keep one"),
        (factors(dora_scale=mx.ones((128, 1))), r"dora_scale is of a DoRA whose factors are missing"),
        (factors(diff_b=mx.ones(64)), "do not fit a layer of 64 -> 128"),
        (factors(diff=mx.full((128, 64), math.nan)), r"x_embedder\.diff holds NaN or infinity"),
        (factors(oft_blocks=mx.ones((2, 2))), "is of an OFT adapter, which is not applied here"),
        ({"transformer_blocks.1.attn.norm_q.lora_A.weight": mx.ones((2, 2)),
          "transformer_blocks.1.attn.norm_q.lora_B.weight": mx.ones((2, 2))}, "norm_q do not fit a layer of 1 ->"),
        (factors(lora_A__weight=mx.array(1.0), lora_B__weight=mx.array(1.0)), "do not fit"),
        (factors(lora_magnitude_vector__weight=mx.ones(4), lora_A__weight=mx.ones((2, 64)),
                 lora_B__weight=mx.ones((128, 2))), "do not fit a layer of 64 -> 128"),
    ],
)  # fmt: skip
def test_what_is_not_whole_or_does_not_fit_is_refused_by_name(tmp_path, models, tensors, said):
    with pytest.raises(UserError, match=said):
        adapter_of(tmp_path, models["tiny-flux"], tensors)
