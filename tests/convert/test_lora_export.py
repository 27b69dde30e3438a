"""LoRA files for other tools: the code of the tools reads them, and every layer's product is the adapter's own."""

import json
import zlib

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import export, generate
from mlx_blockskip.converters import flux1, sana
from mlx_blockskip.converters.layouts import rule
from mlx_blockskip.converters.lora_export import NATIVE, joined, peft_config, renamed, to_diffusers, to_native
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter, save_adapter, write_adapter
from support.compare import assert_same_image, same_bits
from support.golden import GOLDEN, PROMPTS
from support.models import assets, random_tree

WIDTH = 3072
"""diffusers' converter of kohya's and ComfyUI's names takes FLUX.1's width for granted."""

DOUBLE = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{f"{stream}.linear": (WIDTH, 6 * WIDTH) for stream in ("norm1", "norm1_context")},
    **{f"{stream}.net.0.proj": (WIDTH, 4 * WIDTH) for stream in ("ff", "ff_context")},
    **{f"{stream}.net.2": (4 * WIDTH, WIDTH) for stream in ("ff", "ff_context")},
}
SINGLE = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    **{"proj_mlp": (WIDTH, 4 * WIDTH), "proj_out": (5 * WIDTH, WIDTH), "norm.linear": (WIDTH, 3 * WIDTH)},
}
LAYERS = {f"transformer_blocks.7.{name}": shape for name, shape in DOUBLE.items()} | {
    f"single_transformer_blocks.11.{name}": shape for name, shape in SINGLE.items()
}
FORMATS = ("diffusers", "comfyui", "kohya")
DTYPES = {"float32": 1e-6, "bfloat16": 0.03, "float16": 0.004}
"""How far a product may be from that of the unrounded factors."""


def case(seed):
    """An adapter of random layers, ranks and scale; half of the attentions share their first factor."""
    draw = np.random.default_rng(seed)
    shares, tensors = bool(seed % 2), {}
    common = int(draw.integers(1, 5))
    for name, (width, out) in LAYERS.items():
        if draw.random() < 0.3:
            continue
        rank = common if shares or draw.random() < 0.5 else int(draw.integers(1, 5))
        key = f"{seed} {name.rpartition('.to_')[0] if shares and '.to_' in name else name} {width} {rank}"
        a = np.random.default_rng(zlib.crc32(key.encode())).standard_normal((width, rank)).astype(np.float32)
        b = draw.standard_normal((rank, out)).astype(np.float32)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = mx.array(a), mx.array(b)
    return tensors, float(draw.choice([1.0, 0.5, 2.7]))


def exported(tensors, scale, form, dtype="float32"):
    made = getattr(mx, dtype)
    if form == "diffusers":
        return to_diffusers(tensors, scale, flux1.ADAPTER_PREFIX, (), made)[0]
    return to_native(tensors, scale, NATIVE[form], flux1.ADAPTER_FORMATS[form], made)


def in_torch(tensors):
    torch = pytest.importorskip("torch")
    found = {}
    for name, value in tensors.items():
        whole = torch.from_numpy(np.array(value.astype(mx.float32)))
        found[name] = whole.to(getattr(torch, str(value.dtype).removeprefix("mlx.core.")))
    return found


def as_diffusers_reads(tensors):
    """Every layer's factors as diffusers' own converter makes them: (r, in) and (out, r) in float64."""
    pytest.importorskip("peft")
    from diffusers import FluxPipeline

    read = {n: v.double().numpy() for n, v in FluxPipeline.lora_state_dict(in_torch(tensors)).items()}
    assert all(name.startswith("transformer.") for name in read)
    names = [n.removesuffix(".lora_A.weight") for n in read if n.endswith(".lora_A.weight")]
    assert len(read) == 2 * len(names)
    return {n.removeprefix("transformer."): (read[f"{n}.lora_A.weight"], read[f"{n}.lora_B.weight"]) for n in names}


def probed(a, b):
    """What a layer's product makes of a few inputs; a: (r, in), b: (out, r)."""
    return (np.random.default_rng(1).standard_normal((4, a.shape[1])) @ a.T) @ b.T


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float16")])
def test_diffusers_reads_every_format_as_the_adapters_own_product(form, seed, dtype):
    tensors, scale = case(seed)
    read = as_diffusers_reads(exported(tensors, scale, form, dtype))
    for name in LAYERS:
        if f"{name}.lora_a" not in tensors:
            assert not probed(*read[name]).any() if name in read else True
            continue
        a, b = (np.array(tensors[f"{name}.lora_{letter}"], np.float64).T for letter in "ab")
        expected, found = probed(a, b) * scale, probed(*read[name])
        assert np.abs(found - expected).max() <= DTYPES[dtype] * np.abs(expected).max(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_is_rounded_once(dtype):
    tensors, scale = case(1)
    name = next(n.removesuffix(".lora_b") for n in tensors if n.endswith(".norm.linear.lora_b"))
    rounded = (tensors[f"{name}.lora_b"] * scale).astype(getattr(mx, dtype)).T
    assert scale != 1.0
    assert same_bits(exported(tensors, scale, "diffusers", dtype)[f"transformer.{name}.lora_B.weight"], rounded)
    theirs = exported(tensors, scale, "kohya", dtype)
    assert same_bits(theirs["lora_unet_single_blocks_11_modulation_lin.lora_up.weight"], rounded)


def factors(seed, width, rank, out):
    return mx.array(philox.normal(seed, 0, shape=(width, rank))), mx.array(philox.normal(seed, 1, shape=(rank, out)))


def test_parts_are_the_blocks_of_a_diagonal_and_shared_first_factors_stay_one():
    q, v = factors(0, 8, 2, 4), factors(1, 8, 3, 4)
    rules = [rule("x.{}.qkv", "m.{}.q", "m.{}.k", "m.{}.v")]
    ((name, (a, b)),) = renamed({"m.3.q": q, "m.3.v": v}, rules).items()
    assert (name, a.shape, b.shape) == ("x.3.qkv", (8, 5), (5, 12))
    wanted = np.concatenate([q[0] @ q[1], np.zeros((8, 4)), v[0] @ v[1]], axis=1)
    assert np.allclose(a @ b, wanted, atol=1e-5)
    assert not np.any(np.array(b)[:2, 4:])
    assert not np.any(np.array(b)[2:, :8])
    shared, second = joined({0: q, 2: (q[0], v[1][:2])}, rules[0])
    assert same_bits(shared, q[0])
    assert np.array_equal(second, np.concatenate([q[1], np.zeros((2, 4)), v[1][:2]], axis=1))


def test_scale_and_shift_of_the_last_norm_are_in_the_other_order_there():
    a, b = factors(0, 8, 2, 6)
    found = exported({"norm_out.linear.lora_a": a, "norm_out.linear.lora_b": b}, 1.0, "comfyui")
    theirs = found["diffusion_model.final_layer.adaLN_modulation.1.lora_up.weight"]
    assert np.array_equal(theirs, np.concatenate([b.T[3:], b.T[:3]]))


def test_layers_of_other_ranks_keep_their_strength_in_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layers = {"blocks.0.q": 3, "blocks.1.q": 3, "q": 2}  # the last one's name is how the others' end

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}) for _ in range(2))
            self.q = torch.nn.Linear(4, 4)

    model = peft.inject_adapter_in_model(peft.LoraConfig(**peft_config(layers)), Net())
    found = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
    assert {name: module.r["default"] for name, module in found.items()} == layers
    assert {module.scaling["default"] for module in found.values()} == {1.0}


def our_adapter(path, tree, model, **config):
    path.mkdir()
    save_adapter(path, tree, model, {"family": "flux1", "scale": 0.5, "rank": 3, **config})
    return path


def tiny_tree(model, rank):
    """All layers whose width diffusers' converter does not take for granted."""
    tree = random_tree(model, range(12), rank=rank, b_scale=0.2)
    fused = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return {
        index: {n: v for n, v in found.items() if index < 4 or not n.startswith(fused)} for index, found in tree.items()
    }


def test_diffusers_draws_our_image_with_every_format_and_strength(tmp_path, tiny_flux):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from diffusers import FluxPipeline

    model = open_model(tiny_flux)
    pipe = FluxPipeline.from_pretrained(assets() / "tiny-flux", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    adapters = [our_adapter(tmp_path / f"a{rank}", tiny_tree(model, rank), model, rank=rank) for rank in (2, 3, 4)]
    for adapter, form in zip(adapters, FORMATS, strict=True):
        export(adapter_path=str(adapter), format=form, output=str(tmp_path / f"{form}.safetensors"))
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{form}.safetensors", adapter_name=form)
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": GOLDEN["96x64.latents"][:1]})

    size = {"width": 64, "height": 96}

    def theirs():
        latents = torch.from_numpy(np.array(GOLDEN["96x64.packed"][:1]))
        options = {"num_inference_steps": 2, "max_sequence_length": 24, "output_type": "np"}
        return pipe(prompt=PROMPTS[:1], latents=latents, **size, **options).images[0] * 255

    strengths = [0.7, -0.4, 1.3]
    pipe.set_adapters(list(FORMATS), strengths)
    (path,) = generate(
        model=str(tiny_flux), prompt=PROMPTS[:1], noise=str(tmp_path / "noise.safetensors"), steps=2, cfg_scale=1.0,
        adapter_path=[str(a) for a in adapters], lora_scale=strengths, output=str(tmp_path / "o.png"), **size,
    )  # fmt: skip
    drawn = theirs()
    assert_same_image("LoRA exported in every format to diffusers + peft", np.asarray(Image.open(path)), drawn)
    for number, name in enumerate(FORMATS):  # each of them counts
        pipe.set_adapters(list(FORMATS), [0.0 if i == number else s for i, s in enumerate(strengths)])
        assert np.abs(theirs() - drawn).max() > 10, name


def test_a_file_says_what_it_is(tmp_path, tiny_flux):
    model = open_model(tiny_flux)
    config = {
        "base_model": "black-forest-labs/FLUX.1-dev", "captions": ["a photo of sks dog", "a photo of sks dog, running"],
        "plan": {"depth": 12, "runs": [[0, 5]]},
    }  # fmt: skip
    our_adapter(tmp_path / "dog", random_tree(model, [3, 7], rank=3), model, **config)
    for form in FORMATS:
        file = export(adapter_path=str(tmp_path / "dog"), format=form, output=str(tmp_path / form))
        found = files.read_header(file).metadata
        rank = "3" if form == "diffusers" else "12"
        assert found.pop("lora_adapter_metadata", None) is None if form != "diffusers" else True
        peft = json.loads(found.pop("lora_adapter_metadata", "{}"))
        assert peft.get("transformer.r", 3) == peft.get("transformer.lora_alpha", 3) == 3
        assert found == {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
            "modelspec.title": "dog",
            "modelspec.trigger_phrase": "a photo of sks",
            "ss_base_model_version": "flux1",
            "ss_network_module": "networks.lora_flux",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
            "ss_sd_model_name": "black-forest-labs/FLUX.1-dev",
            "mlx_blockskip.base_model": "black-forest-labs/FLUX.1-dev",
            "mlx_blockskip.plan": '{"depth": 12, "runs": [[0, 5]]}',
            "mlx_blockskip.captions": json.dumps(config["captions"]),
        }
    assert flux1.adapter_metadata("FLUX.1-schnell")["modelspec.architecture"] == "flux-1-schnell/lora"


def test_no_path_of_this_disk_is_in_a_file(tmp_path, tiny_flux):
    model = open_model(tiny_flux)
    adapter = our_adapter(tmp_path / "a", random_tree(model, [3]), model, base_model=str(tmp_path / "flux-dev"))
    file = export(adapter_path=str(adapter), output=str(tmp_path / "f"))
    assert str(tmp_path).encode() not in file.read_bytes()
    assert files.read_header(file).metadata["mlx_blockskip.base_model"] == "flux-dev"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_directory_holds_its_scale(tmp_path, tiny_flux, dtype):
    model = open_model(tiny_flux)
    adapter = our_adapter(tmp_path / "a", random_tree(model, [3, 7], rank=3), model, captions=["a dog"])
    made = export(adapter_path=str(adapter), format="mlx", dtype=dtype, output=str(tmp_path / "made"))
    config = files.read_json(made / "adapter_config.json")
    assert (config["scale"], config["rank"], config["captions"]) == (1.0, 3, ["a dog"])
    assert config["sha256"]["adapters.safetensors"] == files.sha256(made / "adapters.safetensors")
    (ours, scale), (theirs, one) = load_adapter(model, adapter), load_adapter(model, made)
    assert (scale, one) == (0.5, 1.0)
    for index, found in ours.tree.items():
        for name, value in found.items():
            value = value * scale if name.endswith("lora_b") else value
            assert same_bits(theirs.tree[index][name], value.astype(getattr(mx, dtype)).astype(mx.float32))


def test_mlx_lm_reads_what_is_written(tmp_path):
    utils, nn = pytest.importorskip("mlx_lm.tuner.utils"), pytest.importorskip("mlx.nn")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = [Block() for _ in range(3)], nn.Linear(4, 4)

    tensors, x = {}, {width: mx.array(philox.normal(9, width, shape=(3, width))) for width in (4, 6)}
    for name, (width, out) in {"layers.1.first": (4, 6), "layers.2.second": (6, 4), "head": (4, 4)}.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = factors(len(tensors), width, 2, out)
    write_adapter(tmp_path, tensors, {"family": "flux1", "scale": 0.5})
    net = Net()
    before = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    after = dict(utils.load_adapters(net, str(tmp_path)).named_modules())
    for name, module in before.items():
        expected = module(x[module.weight.shape[1]])
        if f"{name}.lora_a" in tensors:
            inputs = x[module.weight.shape[1]]
            expected += 0.5 * (inputs @ tensors[f"{name}.lora_a"]) @ tensors[f"{name}.lora_b"]
        assert np.allclose(after[name](x[module.weight.shape[1]]), expected, atol=1e-5), name


def test_what_cannot_be_exported_is_refused(tmp_path, tiny_flux):
    model = open_model(tiny_flux)
    adapter = our_adapter(tmp_path / "sana", random_tree(model, [3]), model, family="sana")
    for form in ("kohya", "comfyui"):
        with pytest.raises(UserError, match=f"--format {form}: has no names for the layers of sana"):
            export(adapter_path=str(adapter), format=form, output=str(tmp_path / "out"))
    assert not hasattr(sana, "ADAPTER_FORMATS")
    with pytest.raises(UserError, match="no name in this format"):
        exported(dict(zip(("m.lora_a", "m.lora_b"), factors(0, 4, 2, 4), strict=True)), 1.0, "kohya")
    large = {"m.lora_a": mx.full((4, 2), 1e5), "m.lora_b": mx.ones((2, 4))}
    with pytest.raises(UserError, match="m.lora_a: holds values that are too large for float16"):
        exported(large, 1.0, "diffusers", "float16")
    exported(large, 1.0, "diffusers", "bfloat16")
    with pytest.raises(UserError, match="already exists"):
        export(adapter_path=str(adapter), format="mlx", output=str(adapter))
