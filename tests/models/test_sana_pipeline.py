"""SANA as a model: whole pipelines against diffusers, prompts, sizes, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import data, export, generate, load
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.registry import families
from mlx_blockskip.models.sana.prompting import INSTRUCTION
from mlx_blockskip.models.sana.sizes import binned
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from support.compare import assert_same_image, relative_error
from support.models import random_tree

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from support.sana import VAE, random_pipeline  # noqa: E402

PROMPTS = ["A small Cat ", "a dog on a red background"]
LENGTH = 12
IMAGE = "SanaPipeline image (of 255)"


def opened(source, **defaults):
    """The checkpoint with its own defaults beside it."""
    files.write_json(source / "defaults.json", {"instruction": True, "resolution_binning": False, **defaults})
    return str(source)


def ours(tmp_path, model, noise, width, height, **options):
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    fixed = {"prompt": PROMPTS, "max_sequence_length": LENGTH, "steps": 3, "width": width, "height": height}
    given = {
        "noise": str(tmp_path / "noise.safetensors"),
        "output": str(tmp_path / "o.png"),
        "overwrite": True,
        **fixed,
        **options,
    }
    return [Image.open(path) for path in generate(model=model, **given)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_pipeline_with_euler_steps_equals_diffusers(tmp_path, shift):
    """SanaPipeline leaves the spacing to the scheduler, where FluxPipeline gives it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    source, pipe = random_pipeline(tmp_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe.scheduler.save_pretrained(source / "scheduler")
    noise = philox.normal(0, shape=(2, 8, 8, 16))
    same_images(tmp_path, opened(source, instruction=False), noise, None, plain_images(pipe, noise))


@pytest.mark.parametrize(
    ("change", "size", "cfg", "instruction"),
    [
        ({}, (32, 32), 4.5, True),
        ({"qk_norm": "rms_norm_across_heads"}, (64, 32), 2.0, False),
        ({"out_channels": 16, "interpolation_scale": 1.0}, (32, 64), 1.0, True),
        ({"patch_size": 2, "timestep_scale": 0.001, "norm_elementwise_affine": True}, (32, 64), 3.0, True),
    ],
)
def test_the_pipeline_equals_diffusers(tmp_path, change, size, cfg, instruction):
    source, pipe = random_pipeline(tmp_path, **change)
    width, height = size
    noise = philox.normal(0, shape=(2, 8, height // 4, width // 4))
    told = {} if instruction else {"complex_human_instruction": None}
    theirs = pipe(
        **{"prompt": PROMPTS, "negative_prompt": "Gray", "guidance_scale": cfg, "num_inference_steps": 3, **told},
        **{"width": width, "height": height, "latents": torch.from_numpy(noise), "max_sequence_length": LENGTH},
        **{"use_resolution_binning": False, "clean_caption": False, "output_type": "np"},
    ).images
    found = ours(tmp_path, opened(source, instruction=instruction), noise, *size, cfg_scale=cfg, negative_prompt="Gray")
    for image, wanted in zip(found, theirs, strict=True):
        assert_same_image(IMAGE, image, wanted * 255)


def test_the_sprint_pipeline_equals_diffusers(tmp_path):
    source, pipe = random_pipeline(tmp_path, "SanaSprintPipeline", qk_norm="rms_norm_across_heads")
    noise = philox.normal(0, shape=(2, 8, 8, 16))
    theirs = pipe(
        **{"prompt": PROMPTS, "guidance_scale": 4.5, "num_inference_steps": 1, "intermediate_timesteps": None},
        **{"width": 64, "height": 32, "latents": torch.from_numpy(noise), "max_sequence_length": LENGTH},
        **{"use_resolution_binning": False, "clean_caption": False, "output_type": "np"},
    ).images
    found = ours(tmp_path, opened(source), noise, 64, 32, steps=1)
    for image, wanted in zip(found, theirs, strict=True):
        assert_same_image("SanaSprintPipeline image (of 255)", image, wanted * 255)


def test_binned_images_equal_those_of_diffusers(tmp_path):
    """A model of 512 px draws 300 x 170 at 672 x 384, and what comes out is scaled and cut."""
    levels = {"encoder_block_out_channels": (4, 4, 4, 4, 8, 8), "decoder_block_out_channels": (4, 4, 4, 4, 8, 8)}
    levels |= {f"{half}_layers_per_block": (1,) * 6 for half in ("encoder", "decoder")}
    levels |= {f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")}
    levels |= {f"{half}_qkv_multiscales": ((),) * 6 for half in ("encoder", "decoder")}
    wide = {"encoder_out_shortcut": False, "decoder_in_shortcut": False}
    source, pipe = random_pipeline(tmp_path, vae={**VAE, **levels, **wide}, sample_size=16)
    noise = philox.normal(0, shape=(1, 8, 12, 21))
    theirs = pipe(
        **{"prompt": PROMPTS[:1], "guidance_scale": 1.0, "num_inference_steps": 2, "width": 300, "height": 170},
        **{"latents": torch.from_numpy(noise), "max_sequence_length": LENGTH, "clean_caption": False},
        **{"output_type": "np"},
    ).images
    model = opened(source, resolution_binning=True)
    found = ours(tmp_path, model, noise, 300, 170, steps=2, cfg_scale=1.0, prompt=PROMPTS[:1])
    for image, wanted in zip(found, theirs, strict=True):
        assert image.size == (300, 170)
        assert_same_image(IMAGE, image, wanted * 255)


def test_sizes_are_those_of_diffusers():
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
    from diffusers.pipelines.sana import pipeline_sana as sana

    tables = {
        16: alpha.ASPECT_RATIO_512_BIN,
        32: alpha.ASPECT_RATIO_1024_BIN,
        64: sigma.ASPECT_RATIO_2048_BIN,
        128: sana.ASPECT_RATIO_4096_BIN,
    }
    for sample_size, table in tables.items():
        for width in (100, 333, 512, 1000, 1024, 1500, 2048):
            for height in (99, 480, 512, 768, 1024, 1999, 4000):
                rows, columns = PixArtImageProcessor.classify_height_width_bin(height, width, table)
                assert binned(width, height, sample_size) == (columns, rows), (width, height, sample_size)
    assert binned(96, 64, 8) == (96, 64)


@pytest.mark.parametrize("size", [(64, 64), (50, 31), (90, 40), (33, 120), (128, 96)])
def test_scaling_and_cutting_equals_diffusers(size):
    from diffusers.image_processor import PixArtImageProcessor

    pixels = philox.normal(2, shape=(72, 96, 3))
    found = data.fitted(pixels, *size)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(torch.from_numpy(pixels).permute(2, 0, 1)[None], *size)
    assert np.abs(found - theirs[0].permute(1, 2, 0).numpy()).max() <= 1e-4


def test_prompts_are_put_under_the_instruction_and_negatives_are_not(tmp_path):
    source, pipe = random_pipeline(tmp_path)
    model = load(opened(source))
    asked, negative = model.encode_prompts(["A Dog "], LENGTH, ["A Dog "]).prompts
    for prompt, instruction in ((asked, INSTRUCTION.split("\n")), (negative, None)):
        embeds, mask, _, _ = pipe.encode_prompt(
            ["A Dog "], False, max_sequence_length=LENGTH, complex_human_instruction=instruction
        )
        with torch.no_grad():
            text = pipe.transformer.caption_norm(pipe.transformer.caption_projection(embeds))
        kept = mask[0].numpy().astype(bool)
        assert relative_error(prompt["text"][0, mx.array(np.flatnonzero(kept))], text[0].numpy()[kept]) <= 1e-4
        assert np.array_equal(np.array(prompt["bias"][0, 0, 0]) == 0, kept)
    alone = model.encode_prompts(["A Dog "], LENGTH).prompts[0]
    assert all(np.array_equal(np.array(alone[key]), np.array(asked[key])) for key in asked)


def test_a_prompt_that_is_too_long_is_said(tmp_path):
    model = load(opened(random_pipeline(tmp_path)[0]))
    found = model.encode_prompts(["a dog", "word " * 50], LENGTH, ["gray " * 50])
    assert found.truncated == [False, True, True]
    assert all(prompt["text"].shape[1] == LENGTH for prompt in found.prompts)


def test_blank_prompts_are_of_the_shapes_and_types_of_encoded_ones(tmp_path):
    model = load(opened(random_pipeline(tmp_path)[0]))
    blank, real = model.blank_prompt(LENGTH), model.encode_prompts(["a"], LENGTH).prompts[0]
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}


def test_defaults_are_those_of_the_paper():
    family = families()["sana"]
    plain, sprint = (SanaTransformer2DConfig(guidance_embeds=guided) for guided in (False, True))
    assert family.defaults(plain)["resolution"] == 1024
    assert family.defaults(plain)["train_resolution"] == 512
    assert (family.defaults(plain)["steps"], family.defaults(plain)["cfg_scale"]) == (20, 4.5)
    assert (family.defaults(sprint)["steps"], family.defaults(sprint)["cfg_scale"]) == (2, 1.0)


def plain_images(pipe, noise):
    """Three steps at 64 x 32, without CFG and instruction."""
    made = pipe(
        **{"prompt": PROMPTS, "guidance_scale": 1.0, "num_inference_steps": 3, "width": 64, "height": 32},
        **{"latents": torch.from_numpy(noise), "max_sequence_length": LENGTH, "complex_human_instruction": None},
        **{"use_resolution_binning": False, "clean_caption": False, "output_type": "np"},
    )
    return made.images * 255


def test_diffusers_loads_our_export_and_gives_our_images(tmp_path):
    pytest.importorskip("peft")
    source, pipe = random_pipeline(tmp_path)
    model = opened(source, instruction=False)
    loaded, noise = load(model), philox.normal(0, shape=(2, 8, 8, 16))
    (tmp_path / "a").mkdir()
    tree = random_tree(loaded, [0, 2], b_scale=0.3)
    save_adapter(tmp_path / "a", tree, loaded, {"family": "sana", "scale": 0.5, "rank": 3})
    plain = plain_images(pipe, noise)
    exported = export(adapter_path=str(tmp_path / "a"), output=str(tmp_path / "lora.safetensors"))
    pipe.load_lora_weights(str(tmp_path), weight_name=exported.name)
    theirs = plain_images(pipe, noise)
    assert np.abs(theirs - plain).max() > 10
    for adapter in ("a", exported.name):
        same_images(tmp_path, model, noise, tmp_path / adapter, theirs)


def test_a_lora_of_diffusers_and_peft_gives_the_same_images_here(tmp_path):
    pytest.importorskip("peft")
    from diffusers import SanaPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source, pipe = random_pipeline(tmp_path)
    noise = philox.normal(0, shape=(2, 8, 8, 16))
    modules = [f"{a}.{name}" for a in ("attn1", "attn2") for name in ("to_q", "to_v", "to_out.0")]
    modules += ["ff.conv_inverted", "ff.conv_point"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer))
    SanaPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=state)
    same_images(tmp_path, opened(source, instruction=False), noise, tmp_path / "theirs", plain_images(pipe, noise))


def same_images(tmp_path, model, noise, adapter, theirs):
    adapters = [str(adapter)] if adapter else []
    found = ours(tmp_path, model, noise, 64, 32, steps=3, cfg_scale=1.0, adapter_path=adapters)
    what = "SANA LoRA to and from diffusers + peft, image (of 255)" if adapter else IMAGE
    for image, wanted in zip(found, theirs, strict=True):
        assert_same_image(what, image, wanted)
