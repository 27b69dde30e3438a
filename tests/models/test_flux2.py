"""FLUX.2 against diffusers: the transformer in every branch, gradients of LoRA, sampling, whole pipelines."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import generate
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models import flow
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.flux2 import transformer as net
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.vae import kl_flux2
from mlx_blockskip.tasks.sampling.denoise import Request, sample
from support import flux2
from support.compare import PIPELINE, assert_parity, assert_same_image, relative_error, same_bits
from support.gradients import assert_gradients_equal
from support.models import convert, random_tree

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


def opened(path, **parts):
    """(the pipeline, the same as a model of ours)"""
    pipe = flux2.random_pipeline(path / "hf", **parts)
    return pipe, open_model(convert(path / "hf", path / "mlx", "flux2"))


def velocity(model, latents, sigma, prompt, guidance=1.0, masks=None):
    context = model.context(mx.array(sigma), prompt, latents.shape[1:3], guidance)
    sample = Batch(model.embed(latents, prompt), context, masks=masks or {})
    forward(model.stack, model.reader, [sample])
    return model.final_layer(sample.state, context, model.final_modulation(context))


def inputs(config, size, text_length=7, batch=2):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, *size, config.in_channels), np.float32)
    embeds = rng.standard_normal((batch, text_length, config.joint_attention_dim), np.float32)
    return latents, embeds, np.linspace(0.3, 0.9, batch, dtype=np.float32)


def theirs_for(reference, latents, embeds, sigma, guidance=None):
    """The reference's output as a map."""
    from diffusers import Flux2KleinPipeline

    batch, rows, columns, channels = latents.shape
    maps = torch.from_numpy(latents).permute(0, 3, 1, 2)
    found = reference(
        hidden_states=torch.from_numpy(latents.reshape(batch, rows * columns, channels)),
        encoder_hidden_states=torch.from_numpy(embeds),
        timestep=torch.from_numpy(sigma),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(maps),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(torch.from_numpy(embeds)),
        guidance=None if guidance is None else torch.full((batch,), guidance),
    ).sample
    return found.reshape(batch, rows, columns, -1)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (4, 4)),
        ({"guidance_embeds": True, "timestep_guidance_channels": 256}, (3, 5)),
        ({"axes_dims_rope": (2, 6, 4, 4), "num_attention_heads": 3, "mlp_ratio": 2.5, "rope_theta": 100}, (2, 3)),
        ({"in_channels": 8, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8), "eps": 1e-2}, (1, 7)),
        ({"num_layers": 0, "joint_attention_dim": 48}, (4, 2)),
        ({"num_single_layers": 0}, (4, 2)),
    ],
)
def test_equals_diffusers_on_random_configs(tmp_path, changes, size):
    pipe, model = opened(tmp_path, transformer=flux2.random_transformer(**changes))
    reference = pipe.transformer
    latents, embeds, sigma = inputs(reference.config, size)
    guidance = 3.5 if reference.config.guidance_embeds else None
    ours = velocity(model, mx.array(latents), sigma, {"prompt_embeds": mx.array(embeds)}, guidance or 1.0)
    with torch.no_grad():
        theirs = theirs_for(reference, latents, embeds, sigma, guidance)
    assert_parity("FLUX.2 transformer", ours, theirs.numpy())


def test_gradients_of_lora_equal_those_of_torch(tmp_path):
    """Of every target, through all blocks; PEFT's layers add the same factors."""
    pytest.importorskip("peft")
    pipe, model = opened(tmp_path)
    given, tree = inputs(pipe.transformer.config, (3, 4)), random_tree(model, model.stack.path, rank=3)
    prompt = {"prompt_embeds": mx.array(given[1])}
    assert_gradients_equal("FLUX.2", model, pipe.transformer, tree, given, theirs_for, prompt)


def test_the_image_to_text_mask_cuts_image_from_text_only(tmp_path):
    _, model = opened(tmp_path)
    latents, embeds, sigma = (mx.array(x) for x in inputs(model.config, (3, 4)))
    prompts = [{"prompt_embeds": embeds}, {"prompt_embeds": embeds[::-1]}]
    everywhere = dict.fromkeys(model.stack.path, IMAGE_TO_TEXT)
    masked = [velocity(model, latents, sigma, prompt, masks=everywhere) for prompt in prompts]
    plain = [velocity(model, latents, sigma, prompt) for prompt in prompts]
    assert same_bits(*masked)
    assert relative_error(*plain) > 1e-2


@pytest.mark.parametrize("tokens", [16, 4096, 4300, 4301, 9000])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_sampler_equals_that_of_the_pipeline(tokens, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from mlx_blockskip.models import schedulers
    from support.models import assets

    reference = FlowMatchEulerDiscreteScheduler.from_pretrained(assets() / "chat-tokenizer" / "scheduler")
    mu = compute_empirical_mu(tokens, steps)
    assert relative_error(net.empirical_mu(tokens, steps), mu) <= 1e-9
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = flow.sampler(schedulers.read(assets() / "chat-tokenizer"), steps, tokens, mu=net.empirical_mu)
    assert_parity("FLUX.2's sigmas", np.append(ours.times, 0), reference.sigmas.numpy(), 1e-6)


@pytest.mark.parametrize(
    ("size", "cfg", "distilled", "parts"),
    [
        ((64, 64), 4.0, False, {}),
        ((96, 32), 2.5, False, {"vae": {"decoder_block_out_channels": (4, 8)}}),
        ((32, 64), 1.0, True, {"text_encoder": {"num_hidden_layers": 36, "num_key_value_heads": 4}}),
    ],
    ids=["square with CFG", "wide with CFG", "distilled, of 36 layers"],
)
def test_the_pipeline_equals_diffusers(tmp_path, size, cfg, distilled, parts):
    """Whole, a batch of two from the same noise: prompts, sampler, guidance, and the pictures."""
    make = {"vae": flux2.random_autoencoder, "text_encoder": flux2.random_text_encoder}
    pipe = flux2.random_pipeline(tmp_path / "hf", distilled, **{name: make[name](**own) for name, own in parts.items()})
    taps = (9, 18, 27) if "text_encoder" in parts else flux2.TAPS
    (width, height), prompts, length = size, ["a small cat", "two red dogs"], 40
    noise = philox.normal(0, shape=(2, 16, height // 4, width // 4))
    options = {
        "prompt": prompts, "num_inference_steps": 3, "guidance_scale": cfg, "width": width, "height": height,
        "latents": torch.from_numpy(noise), "max_sequence_length": length, "text_encoder_out_layers": taps,
    }  # fmt: skip
    theirs = pipe(**options, output_type="np").images
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    found = generate(
        model=str(tmp_path / "hf"), prompt=prompts, max_sequence_length=length, steps=3, width=width, height=height,
        cfg_scale=cfg, memory_budget="any", noise=str(tmp_path / "noise.safetensors"), output=str(tmp_path / "o.png"),
    )  # fmt: skip
    for path, wanted in zip(found, theirs, strict=True):
        assert_same_image("Flux2KleinPipeline image (of 255)", Image.open(path), wanted * 255)


@pytest.mark.parametrize(("layers", "taps"), [(4, flux2.TAPS), (36, (9, 18, 27))])
def test_prompts_equal_those_of_the_pipeline(tmp_path, layers, taps):
    pipe, model = opened(tmp_path, text_encoder=flux2.random_text_encoder(num_hidden_layers=layers))
    prompts, length = ["a small cat", "word " * 30, ""], 40
    encoded = model.encode_prompts(prompts[:2], length, prompts[2:])
    assert encoded.truncated == [False, True, False]
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt(prompts, max_sequence_length=length, text_encoder_out_layers=taps)
    blank = model.blank_prompt(length)["prompt_embeds"]
    for prompt, theirs in zip(encoded.prompts, wanted, strict=True):
        assert (prompt["prompt_embeds"].shape, prompt["prompt_embeds"].dtype) == (blank.shape, blank.dtype)
        assert_parity("FLUX.2's prompts", prompt["prompt_embeds"][0], theirs.numpy())


def test_latents_equal_those_of_the_pipeline(tmp_path):
    pipe, model = opened(tmp_path)
    pixels = philox.normal(3, shape=(2, 3, 24, 40)) / 2
    posterior = model.encode_images(mx.array(pixels.transpose(0, 2, 3, 1)))
    still = model.draw_latents(posterior, mx.zeros((2, 6, 10, 16)))
    assert still.shape[1:] == model.latent_shape(40, 24)
    with torch.no_grad():
        wanted = pipe._encode_vae_image(torch.from_numpy(pixels), None)
    assert_parity("FLUX.2's latents", still.transpose(0, 3, 1, 2), wanted.numpy())
    noise = philox.normal(4, shape=(2, 16, 6, 10))
    with torch.no_grad():
        dist = pipe.vae.encode(torch.from_numpy(pixels)).latent_dist
        drawn = pipe._patchify_latents(dist.mean) + pipe._patchify_latents(dist.std) * torch.from_numpy(noise)
        mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
        wanted = (drawn - mean) / torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + 1e-4)
    ours = model.draw_latents(posterior, mx.array(noise.transpose(0, 2, 3, 1)))
    assert_parity("FLUX.2's latents", ours.transpose(0, 3, 1, 2), wanted.numpy())


def test_a_distilled_model_is_told_by_the_pipeline_alone(tmp_path):
    flux2.random_pipeline(tmp_path / "base")
    flux2.random_pipeline(tmp_path / "distilled", distilled=True)
    base, distilled = (
        open_model(convert(tmp_path / name, tmp_path / f"{name}-mlx", "flux2")).defaults
        for name in ("base", "distilled")
    )
    assert (base.steps, base.cfg_scale, base.max_sequence_length) == (50, 4.0, 512)
    assert (distilled.steps, distilled.cfg_scale, distilled.max_sequence_length) == (4, 1.0, 512)
    files.write_json(tmp_path / "distilled" / "defaults.json", {"steps": 8})
    own = open_model(convert(tmp_path / "distilled", tmp_path / "own", "flux2")).defaults
    assert (own.steps, own.cfg_scale) == (8, 1.0)


def test_quantized_and_bfloat16_models_run_and_stay_near(tmp_path):
    parts = {"attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8)}
    pipe = flux2.random_pipeline(tmp_path / "hf", transformer=flux2.random_transformer(**parts))
    latents, embeds, sigma = inputs(pipe.transformer.config, (3, 4))
    with torch.no_grad():
        wanted = theirs_for(pipe.transformer, latents, embeds, sigma).numpy()
    for bits, bound in ((4, 0.5), (8, 0.1), (0, 0.05)):
        made = convert(
            tmp_path / "hf", tmp_path / f"{bits}", "flux2", dtype="bfloat16", bits=bits, modulation_bits=bits
        )
        prompt = {"prompt_embeds": mx.array(embeds).astype(mx.bfloat16)}
        ours = velocity(open_model(made), mx.array(latents), sigma, prompt)
        assert ours.dtype == mx.bfloat16
        assert relative_error(ours.astype(mx.float32), wanted) <= bound


@pytest.mark.parametrize(
    "change", [{"axes_dims_rope": (32, 32, 32)}, {"axes_dims_rope": (32, 48, 48)}, {"axes_dims_rope": (8, 8, 8, 8)}]
)
def test_axes_that_do_not_make_a_head_are_refused(change):
    with pytest.raises(UserError, match="axes_dims_rope .* is not attention_head_dim 128 in four axes"):
        net.Flux2Transformer2DConfig(**change)


def test_states_that_float16_cannot_hold_are_clipped_as_in_diffusers(tmp_path, monkeypatch):
    """Of text after a double block, of all tokens after a single one."""
    endless = mx.array([float("inf"), 1.0, -float("inf")])
    assert net._clipped(endless.astype(mx.float16)).tolist() == [65504, 1, -65504]
    assert same_bits(net._clipped(endless), endless)
    _, model = opened(tmp_path)
    latents, embeds, sigma = inputs(model.config, (3, 4))
    seen = []
    monkeypatch.setattr(net, "_clipped", lambda x: seen.append(x.shape[1]) or x)
    velocity(model, mx.array(latents), sigma, {"prompt_embeds": mx.array(embeds)})
    assert seen == [7, 7, 19, 19, 19]


def test_final_latents_equal_those_of_the_pipeline(tmp_path):
    """Two prompts from the same noise, with guidance; theirs are no longer in patches, and not normalised."""
    pipe, model = opened(tmp_path)
    prompts, length = ["a small cat", "two red dogs"], 40
    noise = philox.normal(0, shape=(2, 16, 6, 10))
    theirs = pipe(
        prompt=prompts, num_inference_steps=3, guidance_scale=3.0, width=40, height=24, output_type="latent",
        latents=torch.from_numpy(noise), max_sequence_length=length, text_encoder_out_layers=flux2.TAPS,
    ).images  # fmt: skip
    *encoded, negative = model.encode_prompts(prompts, length, [""]).prompts
    start = mx.array(noise.transpose(0, 2, 3, 1))
    requests = [Request(prompt, negative, start[i : i + 1]) for i, prompt in enumerate(encoded)]
    *_, latents = sample(model, requests, steps=3, cfg_scale=3.0, guidance=1.0)
    ours = kl_flux2.unscale(mx.concatenate(latents), model._statistics(), model.vae_config)
    found = kl_flux2.unpatchify(ours).transpose(0, 3, 1, 2)
    assert_parity("Flux2KleinPipeline, final latents", found, theirs.numpy(), PIPELINE)
