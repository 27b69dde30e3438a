"""Whole pipelines: the same noise gives the image that diffusers gives."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import generate
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import flow, schedulers
from support.compare import PIPELINE, assert_parity, assert_same_image, relative_error
from support.flux import checkpoint, random_transformer
from support.golden import GOLDEN, PROMPTS, STEPS

HALVES = slice(0, None, 2), slice(1, None, 2)
"""Of the prompts; each case takes one, so that each prompt is drawn in both sizes, in one of them with guidance."""


@pytest.mark.parametrize(
    ("size", "cfg", "which"),
    [("128x128", 1.0, HALVES[0]), ("128x128", 3.0, HALVES[1]), ("96x64", 1.0, HALVES[1]), ("96x64", 3.0, HALVES[0])],
)
def test_images_equal_the_stored_ones(tiny_flux, tmp_path, size, cfg, which):
    stored = np.array(GOLDEN[f"{size}.image_{STEPS}_steps" + ("_cfg3" if cfg > 1 else "")])[which]
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": GOLDEN[f"{size}.latents"][which]})
    height, width = stored.shape[1:3]
    paths = generate(
        model=str(tiny_flux),
        prompt=PROMPTS[which],
        noise=str(tmp_path / "noise.safetensors"),
        width=width,
        height=height,
        steps=STEPS,
        cfg_scale=cfg,
        output=str(tmp_path / "out.png"),
    )
    for path, image in zip(paths, stored, strict=True):
        assert_same_image("FluxPipeline image (of 255), tiny-flux", Image.open(path), image.astype(np.float64) * 255)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 64},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 3.0},
    ],
)
def test_the_pipeline_equals_diffusers_with_guidance_cfg_and_shifting(tmp_path, scheduler):
    torch = pytest.importorskip("torch")
    from diffusers import FluxPipeline

    source = checkpoint(tmp_path / "hf", transformer=random_transformer(guidance_embeds=True, in_channels=64))
    config = files.read_json(source / "scheduler" / "scheduler_config.json")
    files.write_json(source / "scheduler" / "scheduler_config.json", {**config, **scheduler})
    pipe = FluxPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = philox.normal(0, shape=(2, 16, 10, 6))
    prompts = ["a dog on a red background", "two cats"]
    packed = pipe._pack_latents(torch.from_numpy(noise), 2, 16, 10, 6)
    theirs = pipe(
        prompt=prompts,
        negative_prompt=["gray", "gray"],
        true_cfg_scale=2.0,
        guidance_scale=4.0,
        num_inference_steps=3,
        height=80,
        width=48,
        latents=packed,
        max_sequence_length=24,
        output_type="np",
    ).images
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    paths = generate(
        model=str(source),
        prompt=prompts,
        negative_prompt="gray",
        cfg_scale=2.0,
        guidance=4.0,
        steps=3,
        height=80,
        width=48,
        noise=str(tmp_path / "noise.safetensors"),
        output=str(tmp_path / "o.png"),
    )
    for path, image in zip(paths, theirs, strict=True):
        assert_same_image("FluxPipeline image (of 255)", Image.open(path), image * 255)


def test_final_latents_equal_the_stored_ones(tiny_flux):
    from mlx_blockskip.models.flux1 import transformer as net
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.sampling.denoise import Request, sample

    model = open_model(tiny_flux)
    prompts = model.encode_prompts(PROMPTS, 24).prompts
    latents = GOLDEN["96x64.latents"].transpose(0, 2, 3, 1)
    requests = [Request(p, None, latents[i : i + 1]) for i, p in enumerate(prompts)]
    *_, final = sample(model, requests, steps=STEPS, cfg_scale=1.0, guidance=None)
    assert_parity(
        "FluxPipeline latents, tiny-flux",
        net.pack(mx.concatenate(final)),
        GOLDEN[f"96x64.final_latents_{STEPS}_steps"],
        PIPELINE,
    )


def make(tmp_path, name, **options):
    fixed = {"model": "tiny-flux", "prompt": ["a dog on red"], "steps": 2, "width": 64, "height": 64}
    return generate(**{**fixed, "output": str(tmp_path / name), **options})


def test_a_png_makes_itself_again(tmp_path):
    first = make(tmp_path, "a.png", prompt=["a dog on red", "a cat"], n_images=2, seed=5)
    assert [p.name for p in first] == ["a-01.png", "a-02.png", "a-03.png", "a-04.png"]
    (again,) = generate(from_image=str(first[2]), output=str(tmp_path / "b.png"))
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first[2])))
    record = json.loads(Image.open(first[2]).text["mlx-blockskip"])
    assert (record["prompt"], record["seed"]) == (["a cat"], 7)
    (other,) = generate(from_image=str(first[2]), seed=0, output=str(tmp_path / "c.png"))
    record = json.loads(Image.open(other).text["mlx-blockskip"])
    assert (record["prompt"], record["seed"]) == (["a cat"], 0), "which was given, though it is the default"


def test_an_image_does_not_depend_on_the_others_or_on_the_budget(tmp_path):
    together = make(tmp_path, "a.png", prompt=["a dog on red", "a cat"])
    (alone,) = make(tmp_path, "b.png", prompt=["a cat"], seed=1, memory_budget="0")
    assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(together[1])))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 70}, "multiples of 16; the nearest is 64 x 64"),
        ({"prompt": []}, "--prompt"),
        ({"output": "x.jpg"}, r"\.png"),
        ({"steps": 0}, "--steps 0"),
        ({"noise": "missing.safetensors"}, "no such file"),
        ({"lora_scale": [1.0]}, "--lora-scale"),
        ({"adapter_path": ["nowhere"]}, "nowhere"),
        ({"model": "nothing-here"}, "no such model"),
        ({"memory_budget": "much"}, "not a size"),
        ({"prompt_file": "missing.txt"}, "missing.txt"),
        ({"n_images": 0}, "--n-images 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        make(tmp_path, "a.png", **options)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "option",
    [
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
        *("invert_sigmas", "stochastic_sampling", "shift_terminal"),
    ],
)
def test_scheduler_options_that_are_not_implemented_are_refused_by_name(option):
    with pytest.raises(UserError, match=option):
        schedulers.parse({option: True})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0},
    ],
)
@pytest.mark.parametrize("tokens", [16, 1000, 4096])
def test_sigmas_equal_diffusers(config, tokens):
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    reference = FlowMatchEulerDiscreteScheduler(**config)
    c = reference.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=mu if c.use_dynamic_shifting else None)
    ours = flow.euler_sigmas(schedulers.FlowMatchEulerDiscreteConfig.from_dict(dict(c)), 7, tokens)
    assert relative_error(ours, reference.sigmas.numpy()) <= 1e-6
