"""FLUX.2's checkpoints and LoRA files: every tensor of the reference classes, single files, and both ways for LoRA."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import flux2
from mlx_blockskip.converters.encoders import autoencoder_kl_flux2
from mlx_blockskip.converters.flux2_files import FILES
from mlx_blockskip.converters.write import Precision, plan_shards
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models import presets
from mlx_blockskip.models.flux2.transformer import Flux2Transformer2DConfig
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.vae.kl_flux2 import AutoencoderKLFlux2Config
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter
from support import flux2 as small
from support.adapters import STYLES, assert_each_is_read, assert_read_as_its_product, exported
from support.models import convert as converted
from support.models import random_tree
from support.singles import assert_read_as, assert_same_directory, latent_diffusion, weights

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

DOUBLE, SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
THEIRS = {
    "double_blocks.1.img_attn.qkv": [f"{DOUBLE}.attn.to_{part}" for part in "qkv"],
    "double_blocks.1.txt_attn.qkv": [f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.1.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.1.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "double_blocks.1.img_mlp.0": [f"{DOUBLE}.ff.linear_in"],
    "double_blocks.1.txt_mlp.2": [f"{DOUBLE}.ff_context.linear_out"],
    "single_blocks.2.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.2.linear2": [f"{SINGLE}.attn.to_out"],
    "img_in": ["x_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "final_layer.linear": ["proj_out"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2") / "hf"
    small.random_pipeline(path, distilled=True)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return open_model(converted(checkpoint, checkpoint.parent / "mlx", "flux2"))


def shapes(make):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


@pytest.mark.parametrize("name", ["flux2-klein-base-4b", "flux2-klein-9b", "dev"])
def test_the_transformer_has_every_tensor_of_the_reference(name):
    from diffusers import Flux2Transformer2DModel

    given = {} if name == "dev" else files.read_json(presets.folders()[name] / "transformer" / "config.json")
    own = {key: value for key, value in given.items() if not key.startswith("_")}
    component = flux2.transformer("transformer", Flux2Transformer2DConfig.from_dict(own))
    expected = shapes(lambda: Flux2Transformer2DModel(**own))
    assert {row.name: row.their_shape() for row in component.rows} == expected
    blocks = {shard.file for shard in plan_shards(component, Precision("bfloat16", 4))} - {"rest.safetensors"}
    assert len(blocks) == {"flux2-klein-base-4b": 25, "flux2-klein-9b": 32, "dev": 56}[name]


@pytest.mark.parametrize("change", [{}, {"decoder_block_out_channels": (64, 128, 256, 512)}])
def test_the_vae_has_every_tensor_of_the_reference(change):
    from diffusers import AutoencoderKLFlux2

    component = autoencoder_kl_flux2("vae", AutoencoderKLFlux2Config(**change))
    expected = shapes(lambda: AutoencoderKLFlux2(**change))
    assert component.ignored("bn.num_batches_tracked")
    expected.pop("bn.num_batches_tracked")
    assert {row.name for row in component.rows} == set(expected)
    assert [row.name for row in component.rows if not row.fits(expected[row.name])] == []


def test_diffusers_opens_what_is_converted_back(tmp_path, checkpoint, model):
    """The tensors that went in, the index that says that it is distilled, and what this tool makes of it again."""
    from diffusers import Flux2KleinPipeline

    made = convert(hf_path=str(model.path), mlx_path=str(tmp_path / "hf"), to="hf")
    pipe = Flux2KleinPipeline.from_pretrained(made, dtype=torch.float32)
    assert pipe.config.is_distilled
    first = Flux2KleinPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    for name in ("transformer", "vae", "text_encoder"):
        theirs = getattr(first, name).state_dict()
        for key, tensor in getattr(pipe, name).state_dict().items():
            if key not in ("lm_head.weight", "bn.num_batches_tracked"):
                assert torch.equal(tensor, theirs[key]), (name, key)
    again = open_model(converted(made, tmp_path / "mlx", "flux2"))
    assert again.identity == model.identity
    assert again.defaults == model.defaults


def black_forest_labs(ours):
    """A FLUX.2 transformer as in flux-2-klein-4b.safetensors: names and divisions written down once more."""
    theirs, ours = {}, dict(ours)
    for layer, modules in THEIRS.items():
        for i in range(3):
            own = [re.sub(r"blocks\.\d\.", f"blocks.{i}.", module) for module in modules]
            known = re.sub(r"blocks\.\d\.", f"blocks.{i}.", layer)
            if all(f"{module}.weight" in ours for module in own):
                theirs[f"{known}.weight"] = mx.concatenate([ours.pop(f"{module}.weight") for module in own])
    others = {
        r"context_embedder": "txt_in", r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"(double_stream_modulation_img|single_stream_modulation)\.linear": r"\1.lin",
        r"transformer_blocks\.(\d)\.ff\.linear_out": r"double_blocks.\1.img_mlp.2",
        r"transformer_blocks\.(\d)\.ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
        r"transformer_blocks\.(\d)\.attn\.norm_q": r"double_blocks.\1.img_attn.norm.query_norm",
        r"transformer_blocks\.(\d)\.attn\.norm_k": r"double_blocks.\1.img_attn.norm.key_norm",
        r"transformer_blocks\.(\d)\.attn\.norm_added_q": r"double_blocks.\1.txt_attn.norm.query_norm",
        r"transformer_blocks\.(\d)\.attn\.norm_added_k": r"double_blocks.\1.txt_attn.norm.key_norm",
        r"single_transformer_blocks\.(\d)\.attn\.norm_q": r"single_blocks.\1.norm.query_norm",
        r"single_transformer_blocks\.(\d)\.attn\.norm_k": r"single_blocks.\1.norm.key_norm",
    }  # fmt: skip
    scale, shift = mx.split(ours.pop("norm_out.linear.weight"), 2)
    theirs["final_layer.adaLN_modulation.1.weight"] = mx.concatenate([shift, scale])
    for name, tensor in ours.items():
        module = name.removesuffix(".weight")
        (known,) = {re.sub(a, b, module) for a, b in others.items() if re.fullmatch(a, module)}
        theirs[f"{known}.{'scale' if '_norm' in known else 'weight'}"] = tensor
    return theirs


def test_single_files_are_read_as_diffusers_reads_them(tmp_path, checkpoint):
    """And are not taken for FLUX.1's."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert_them

    ours = weights(checkpoint / "transformer")
    assert_read_as(tmp_path / "x.safetensors", black_forest_labs(ours), ours, FILES, "flux2", convert_them)


def test_single_files_give_the_same_directory(tmp_path, checkpoint):
    """Of which the transformer fits no published config: it is measured."""
    flat = tmp_path / "flat"
    flat.mkdir()
    files.save_tensors(flat / "flux-2-klein-4b.safetensors", black_forest_labs(weights(checkpoint / "transformer")))
    text = weights(checkpoint / "text_encoder")
    files.save_tensors(flat / "qwen_3_4b.safetensors", text)
    vae = {}
    for name, tensor in weights(checkpoint / "vae").items():
        half = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(name.partition(".")[0], "")
        vae[half + name] = tensor
    files.save_tensors(flat / "flux2-vae.safetensors", latent_diffusion(vae))
    assert_same_directory(tmp_path, checkpoint, flat, {"num_layers": 7, "mlp_ratio": 4.0})


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style[0])
def test_lora_files_in_our_names_and_in_theirs(tmp_path, model, style):
    ours = {module: [module] for module in (f"{DOUBLE}.attn.add_q_proj", f"{SINGLE}.attn.to_out", "norm_out.linear")}
    assert_each_is_read(tmp_path, model, style, {**ours, **THEIRS})


def test_halves_of_the_last_norm_are_the_other_way_round_there(tmp_path, model):
    a, b = (mx.array(philox.normal(0, i, shape=shape)) for i, shape in enumerate(((3, 32), (64, 3))))
    layer = "diffusion_model.final_layer.adaLN_modulation.1"
    files.save_tensors(tmp_path / "x.safetensors", {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
    ((module, added),) = load_adapter(model, tmp_path / "x.safetensors")[0].layers(model.stack).items()
    shift, scale = mx.split(b @ a, 2)
    assert module == "norm_out.linear"
    np.testing.assert_allclose(
        added.weight.b.T @ added.weight.a.T, mx.concatenate([scale, shift]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_diffusers_reads_every_format_as_the_adapters_own_product(model, form):
    pytest.importorskip("peft")
    from diffusers import Flux2KleinPipeline

    tensors, made = exported(model, random_tree(model, model.stack.path), flux2, form)
    assert_read_as_its_product(Flux2KleinPipeline, tensors, made)


def test_no_name_of_a_model_stands_for_two_layers(model):
    from mlx_blockskip.converters.lora_layers import Layers

    targets = Layers(model.reader.shards, flux2.ADAPTER_RULES)._targets
    assert len({name.replace(".", "_") for name in targets}) == len(targets)
