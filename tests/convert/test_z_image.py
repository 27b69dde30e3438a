"""Z-Image's checkpoints and LoRA files: every tensor of the reference class, single files, and both ways for LoRA."""

import re

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import convert, generate
from mlx_blockskip.converters import z_image
from mlx_blockskip.converters.lora_export import NATIVE, to_native
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.converters.write import Precision, plan_shards
from mlx_blockskip.converters.z_image_files import FILES
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models import presets
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.z_image.transformer import ZImageTransformer2DConfig
from support import z_image as small
from support.adapters import STYLES, assert_each_is_read, assert_read_as_its_product, exported
from support.models import convert as converted
from support.models import random_tree
from support.singles import assert_read_as, assert_same_directory, latent_diffusion, weights

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

MAIN, TEXT = "layers.1", "context_refiner.0"
THEIRS = {
    "layers.1.attention.qkv": [f"{MAIN}.attention.to_{part}" for part in "qkv"],
    "noise_refiner.0.attention.qkv": [f"noise_refiner.0.attention.to_{part}" for part in "qkv"],
    "layers.1.attention.out": [f"{MAIN}.attention.to_out.0"],
    "context_refiner.0.attention.out": [f"{TEXT}.attention.to_out.0"],
    "layers.1.feed_forward.w3": [f"{MAIN}.feed_forward.w3"],
    "layers.1.adaLN_modulation.0": [f"{MAIN}.adaLN_modulation.0"],
    "x_embedder": ["all_x_embedder.2-1"],
    "final_layer.linear": ["all_final_layer.2-1.linear"],
    "cap_embedder.1": ["cap_embedder.1"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("z_image") / "hf"
    small.random_pipeline(path, turbo=True)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return open_model(converted(checkpoint, checkpoint.parent / "mlx", "z_image"))


@pytest.mark.parametrize("change", [{}, {"qk_norm": False, "n_refiner_layers": 1, "n_layers": 3}])
def test_the_transformer_has_every_tensor_of_the_reference(change):
    from diffusers import ZImageTransformer2DModel

    given = files.read_json(presets.folders()["z-image"] / "transformer" / "config.json") | change
    own = {key: value for key, value in given.items() if not key.startswith("_")}
    component = z_image.transformer("transformer", ZImageTransformer2DConfig.from_dict(own))
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in ZImageTransformer2DModel(**own).state_dict().items()}
    assert {row.name: row.their_shape() for row in component.rows} == expected
    blocks = {shard.file for shard in plan_shards(component, Precision("bfloat16", 4))} - {"rest.safetensors"}
    assert len(blocks) == (5 if change else 34)


def test_diffusers_opens_what_is_converted_back(tmp_path, checkpoint, model):
    """The tensors that went in, the shift that says that it is Turbo, and what this tool makes of it again."""
    from diffusers import ZImagePipeline

    made = convert(hf_path=str(model.path), mlx_path=str(tmp_path / "hf"), to="hf")
    pipe = ZImagePipeline.from_pretrained(made, dtype=torch.float32)
    assert pipe.scheduler.config.shift == 3.0
    first = ZImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    for name in ("transformer", "vae", "text_encoder"):
        theirs = getattr(first, name).state_dict()
        assert theirs
        for key, tensor in getattr(pipe, name).state_dict().items():
            assert torch.equal(tensor, theirs[key]), (name, key)
    again = open_model(converted(made, tmp_path / "mlx", "z_image"))
    assert again.identity == model.identity
    assert again.defaults == model.defaults


def tongyi(ours):
    """A Z-Image transformer as in z_image_turbo_bf16.safetensors: names and divisions written down once more."""
    theirs, ours = {}, dict(ours)
    for name in [name for name in ours if ".to_q." in name]:
        parts = [ours.pop(name.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        theirs[name.replace(".to_q.", ".qkv.")] = mx.concatenate(parts)
    for name, tensor in ours.items():
        known = re.sub(r"^all_(\w+)\.2-1", r"\1", name).replace(".to_out.0.", ".out.")
        theirs[re.sub(r"\.norm_([qk])\.", r".\1_norm.", known)] = tensor
    return theirs


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_are_read_as_diffusers_reads_them(tmp_path, checkpoint, prefix):
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert_them

    ours = weights(checkpoint / "transformer")
    tensors = {prefix + name: tensor for name, tensor in tongyi(ours).items()}
    tensors[f"{prefix}norm_final.weight"] = mx.ones((48,))
    assert_read_as(tmp_path / "x.safetensors", tensors, ours, FILES, "z_image", convert_them)


def test_single_files_give_the_same_directory(tmp_path, checkpoint):
    """Of which the transformer fits no published config: it is measured."""
    flat = tmp_path / "flat"
    flat.mkdir()
    files.save_tensors(flat / "z_image_turbo_bf16.safetensors", tongyi(weights(checkpoint / "transformer")))
    text = {f"model.{name}": tensor for name, tensor in weights(checkpoint / "text_encoder").items()}
    files.save_tensors(flat / "qwen_3_4b.safetensors", text)
    files.save_tensors(flat / "ae.safetensors", latent_diffusion(weights(checkpoint / "vae")))
    assert_same_directory(tmp_path, checkpoint, flat, {"n_layers": 7, "dim": 96, "n_heads": 4})


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style[0])
def test_lora_files_in_our_names_and_in_theirs(tmp_path, model, style):
    ours = {module: [module] for module in (f"{MAIN}.attention.to_q", f"{TEXT}.attention.to_out.0", "t_embedder.mlp.2")}
    assert_each_is_read(tmp_path, model, style, {**ours, **THEIRS})


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_diffusers_reads_every_format_as_the_adapters_own_product(model, form):
    pytest.importorskip("peft")
    from diffusers import ZImagePipeline

    tree = {-1: random_tree(model, [0], seed=1)[0], **random_tree(model, range(model.stack.depth))}
    tensors, made = exported(model, tree, z_image, form)
    assert any("qkv" in name for name in made) == (form == "kohya")
    assert_read_as_its_product(ZImagePipeline, tensors, made)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_every_layer_has_a_name_in_every_format(model, form):
    layers = Layers(model.reader.shards)
    shapes = {m: shape for m, shape in layers.shapes.items() if len(shape) == 2 and not m.endswith("pad_token")}
    pair = {module: {"a": mx.zeros((w, 2)), "b": mx.zeros((out, 2)).T} for module, (out, w) in shapes.items()}
    tensors = {f"{module}.lora_{letter}": value for module, own in pair.items() for letter, value in own.items()}
    naming = z_image.ADAPTER_NAMINGS.get(form, NATIVE[form])
    assert to_native(tensors, 1.0, naming, z_image.ADAPTER_FORMATS[form], mx.float32)
    targets = Layers(model.reader.shards, z_image.ADAPTER_RULES)._targets
    assert len({name.replace(".", "_") for name in targets}) == len(targets)


@pytest.mark.parametrize(
    "module", [f"{MAIN}.adaLN_modulation.0", f"{TEXT}.attention.to_v", "noise_refiner.0.feed_forward.w1"]
)
def test_an_adapter_of_any_layer_is_seen_in_the_picture(tmp_path, model, module):
    """As diffusers shows it: also of the layers that a prompt passes before the main blocks, and of modulation."""
    pytest.importorskip("peft")
    from diffusers import ZImagePipeline

    out, width = model.shards.shape(f"{module}.weight")
    own = {"lora_A": philox.normal(1, shape=(2, width)), "lora_B": philox.normal(2, shape=(out, 2))}
    file = tmp_path / "x.safetensors"
    files.save_tensors(file, {f"transformer.{module}.{name}.weight": mx.array(v) for name, v in own.items()})
    pipe = ZImagePipeline.from_pretrained(model.path.parent / "hf", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = philox.normal(0, shape=(1, 4, 8, 8))
    options = {"prompt": "red", "num_inference_steps": 2, "guidance_scale": 0.0, "width": 16, "height": 16}
    options |= {"latents": torch.from_numpy(noise), "max_sequence_length": 40, "output_type": "np"}
    plain = pipe(**options).images[0]
    pipe.load_lora_weights(str(file))
    theirs = pipe(**options).images[0]
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    (path,) = generate(
        model=str(model.path), prompt=["red"], steps=2, width=16, height=16, max_sequence_length=40,
        adapter_path=[str(file)], noise=str(tmp_path / "noise.safetensors"), output=str(tmp_path / "o.png"),
        memory_budget="any",
    )  # fmt: skip
    assert np.abs(theirs - plain).max() * 255 > 4
    assert np.abs(np.asarray(Image.open(path), float) - theirs * 255).max() <= 2
