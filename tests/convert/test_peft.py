"""LoRA files of diffusers and PEFT: ours load there, theirs load here, and the images are the same."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import export, generate
from mlx_blockskip.converters.peft import to_peft
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from support.compare import assert_same_image, same_bits
from support.golden import GOLDEN, PROMPTS
from support.models import assets, random_tree

TINY = assets() / "tiny-flux"
STEPS = 2


def our_images(tmp_path, tiny_flux, adapter, **options):
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": GOLDEN["96x64.latents"][:2]})
    paths = generate(
        model=str(tiny_flux),
        prompt=PROMPTS[:2],
        noise=str(tmp_path / "noise.safetensors"),
        width=64,
        height=96,
        steps=STEPS,
        cfg_scale=1.0,
        adapter_path=[str(a) for a in adapter],
        output=str(tmp_path / "o.png"),
        overwrite=True,
        **options,
    )
    return np.stack([np.asarray(Image.open(p), np.float64) for p in paths])


def pipeline():
    torch = pytest.importorskip("torch")
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return torch, pipe


def their_images(torch, pipe):
    latents = torch.from_numpy(np.array(GOLDEN["96x64.packed"][:2]))
    made = pipe(
        prompt=PROMPTS[:2],
        num_inference_steps=STEPS,
        width=64,
        height=96,
        latents=latents,
        max_sequence_length=24,
        output_type="np",
    )
    return made.images * 255


def our_adapter(path, tiny_flux, scale, rank=3, targets="all"):
    model = open_model(tiny_flux)
    tree = random_tree(model, range(5, 11), rank=rank, targets=targets, b_scale=0.3)
    path.mkdir()
    save_adapter(path, tree, model, {"family": "flux1", "scale": scale, "rank": rank})
    return path


@pytest.fixture(scope="module")
def plain():
    """Their images without an adapter."""
    return their_images(*pipeline())


@pytest.mark.parametrize(("targets", "scale"), [("all", 0.5), ("attention", 1.0)])
def test_diffusers_loads_our_export_and_gives_our_image(tmp_path, tiny_flux, plain, targets, scale):
    adapter = our_adapter(tmp_path / "a", tiny_flux, scale, targets=targets)
    exported = export(adapter_path=str(adapter), output=str(tmp_path / "out.safetensors"))
    torch, pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name=exported.name)
    theirs = their_images(torch, pipe)
    ours = our_images(tmp_path, tiny_flux, [adapter])
    assert np.abs(theirs - plain).max() > 10
    assert_same_image("LoRA exported to diffusers + peft", ours, theirs)
    assert_same_image("LoRA exported and imported", our_images(tmp_path, tiny_flux, [exported]), theirs)
    assert np.array_equal(our_images(tmp_path, tiny_flux, [adapter], memory_budget="0"), ours)


INSIDE = ["to_q", "to_k", "to_out.0", "add_v_proj", "ff.net.0.proj", "proj_mlp", "proj_out"]
MODULATION = ["norm1.linear", "norm1_context.linear", "norm.linear"]
OUTSIDE = ["x_embedder", "context_embedder", "linear_1", "linear_2", "norm_out.linear"]


@pytest.mark.parametrize(
    ("alpha", "modules", "options"),
    [
        (4, INSIDE + MODULATION + OUTSIDE, {"use_rslora": True}),
        (4, INSIDE + MODULATION + OUTSIDE, {"use_dora": True}),
        (4, INSIDE + MODULATION + OUTSIDE, {"lora_bias": True}),
        (
            4,
            INSIDE,
            {"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_[qk]": 12}, "rank_pattern": {"proj_mlp": 2}},
        ),
    ],
)
def test_a_lora_of_diffusers_and_peft_gives_the_same_image_here(tmp_path, tiny_flux, plain, alpha, modules, options):
    torch, pipe = pipeline()
    pytest.importorskip("peft")
    from diffusers import FluxPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=modules, init_lora_weights=False, **options)
    pipe.transformer.add_adapter(config)
    with torch.no_grad():
        for module in pipe.transformer.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.mul_(0.3)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer))
    from diffusers.training_utils import _collate_lora_metadata

    FluxPipeline.save_lora_weights(
        tmp_path / "theirs", transformer_lora_layers=state, **_collate_lora_metadata({"transformer": pipe.transformer})
    )
    theirs = their_images(torch, pipe)
    assert np.abs(theirs - plain).max() > 5
    ours = our_images(tmp_path, tiny_flux, [tmp_path / "theirs"])
    assert_same_image("LoRA of diffusers + peft", ours, theirs)


def test_two_adapters_with_strengths_equal_diffusers(tmp_path, tiny_flux):
    torch, pipe = pipeline()
    adapters = [our_adapter(tmp_path / "a", tiny_flux, 1.0), our_adapter(tmp_path / "b", tiny_flux, 0.5, rank=2)]
    for adapter, name in zip(adapters, "ab", strict=True):
        export(adapter_path=str(adapter), output=str(tmp_path / f"{name}.safetensors"))
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    theirs = their_images(torch, pipe)
    assert_same_image("two LoRAs", our_images(tmp_path, tiny_flux, adapters, lora_scale=[0.7, -0.4]), theirs)


def test_the_scale_is_inside_the_second_factor():
    tensors = {"m.lora_a": mx.ones((4, 2)), "m.lora_b": mx.ones((2, 3))}
    scaled = to_peft(tensors, 0.5, "p.")
    assert set(scaled) == {"p.m.lora_A.weight", "p.m.lora_B.weight"}
    assert same_bits(scaled["p.m.lora_B.weight"], tensors["m.lora_b"].T * 0.5)


def test_what_does_not_fit_is_refused_by_name(tmp_path, tiny_flux):
    adapter = our_adapter(tmp_path / "a", tiny_flux, 1.0)
    tensors = files.load_lazily(adapter / "adapters.safetensors")
    mx.eval(tensors)
    name = next(n for n in tensors if n.endswith("lora_a"))
    for wrong, match in (
        ({**tensors, name: mx.zeros((7, 3))}, "do not fit"),
        ({**tensors, "other_blocks.0.x.lora_a": mx.zeros((2, 2))}, "no layer other_blocks.0.x"),
        ({"transformer_blocks.0.nope.lora_a": mx.zeros((2, 2))}, "no layer transformer_blocks.0.nope"),
    ):
        copy = tmp_path / "wrong"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(adapter, copy)
        config = files.read_json(copy / "adapter_config.json")
        files.write_json(copy / "adapter_config.json", {**config, "sha256": {}})
        files.save_tensors(copy / "adapters.safetensors", wrong)
        with pytest.raises(UserError, match=match):
            our_images(tmp_path, tiny_flux, [copy])
    files.save_tensors(tmp_path / "kohya.safetensors", {"lora_unet_x.lora_down.weight": mx.zeros((2, 2))})
    with pytest.raises(UserError, match="lora_unet_x"):
        our_images(tmp_path, tiny_flux, [tmp_path / "kohya.safetensors"])
    with pytest.raises(UserError, match="already exists"):
        export(adapter_path=str(adapter), output=str(tmp_path / "kohya.safetensors"))
