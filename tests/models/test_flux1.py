"""The FLUX.1 transformer against diffusers, in every branch of its config, and against the stored reference values."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.flux1 import transformer as net
from mlx_blockskip.models.registry import open_model
from support.compare import assert_parity, relative_error, same_bits
from support.flux import checkpoint, random_transformer
from support.golden import GOLDEN, PROMPTS
from support.models import convert


def velocity(model, latents, sigma, prompt, guidance=None, masks=None):
    """The network's output, packed."""
    context = model.context(mx.array(sigma), prompt, latents.shape[1:3], guidance)
    sample = Batch(model.embed(latents, prompt), context, masks=masks or {})
    forward(model.stack, model.reader, [sample])
    return net.pack(model.final_layer(sample.state, context, model.final_modulation(context)))


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 8)),
        ({"guidance_embeds": True}, (6, 10)),
        ({"axes_dims_rope": (8, 4, 4), "num_attention_heads": 3}, (4, 6)),
        ({"in_channels": 64, "attention_head_dim": 32, "axes_dims_rope": (16, 8, 8)}, (2, 14)),
        ({"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48, "pooled_projection_dim": 40}, (8, 4)),
    ],
)
def test_equals_diffusers_on_random_configs(tmp_path, changes, size):
    torch = pytest.importorskip("torch")
    reference = random_transformer(**changes)
    config = reference.config
    if config.joint_attention_dim == 128:
        model = open_model(convert(checkpoint(tmp_path / "hf", transformer=reference), tmp_path / "mlx"))
    else:  # the text encoders are not used here
        model = open_model(convert(checkpoint(tmp_path / "hf", transformer=reference), tmp_path / "mlx"))
    rng = np.random.default_rng(0)
    batch, text_length, channels = 2, 7, config.in_channels // 4
    latents = rng.standard_normal((batch, *size, channels), np.float32)
    embeds = rng.standard_normal((batch, text_length, config.joint_attention_dim), np.float32)
    pooled = rng.standard_normal((batch, config.pooled_projection_dim), np.float32)
    sigma = np.array([0.3, 0.9], np.float32)
    guidance = 3.5 if config.guidance_embeds else None

    prompt = {"prompt_embeds": mx.array(embeds), "pooled": mx.array(pooled)}
    ours = velocity(model, mx.array(latents), sigma, prompt, guidance)
    ids = np.zeros((size[0] // 2, size[1] // 2, 3), np.float32)
    ids[..., 1] = np.arange(size[0] // 2)[:, None]
    ids[..., 2] = np.arange(size[1] // 2)[None]
    with torch.no_grad():
        theirs = reference(
            hidden_states=torch.from_numpy(np.array(net.pack(mx.array(latents)))),
            encoder_hidden_states=torch.from_numpy(embeds),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(sigma),
            img_ids=torch.from_numpy(ids.reshape(-1, 3)),
            txt_ids=torch.zeros(text_length, 3),
            guidance=None if guidance is None else torch.full((batch,), guidance),
        ).sample
    assert_parity("FLUX.1 transformer", ours, theirs.numpy())


@pytest.mark.parametrize("size", ["128x128", "96x64"])
@pytest.mark.parametrize("sigma", ["0.05", "0.6", "1.0"])
def test_tiny_flux_gives_the_stored_velocity(tiny_flux, size, sigma):
    model = open_model(tiny_flux)
    latents = GOLDEN[f"{size}.latents"].transpose(0, 2, 3, 1)
    assert same_bits(net.pack(latents), GOLDEN[f"{size}.packed"])
    assert same_bits(net.unpack(net.pack(latents), latents.shape[1:3]), latents)
    prompt = {"prompt_embeds": GOLDEN["prompt_embeds"], "pooled": GOLDEN["pooled_prompt_embeds"]}
    ours = velocity(model, latents, np.full(4, float(sigma), np.float32), prompt)
    assert_parity("FLUX.1 transformer, tiny-flux", ours, GOLDEN[f"{size}.velocity@{sigma}"])


def test_prompts_give_the_stored_embeddings(tiny_flux):
    encoded = open_model(tiny_flux).encode_prompts(PROMPTS, 24)
    for i, prompt in enumerate(encoded.prompts):
        assert_parity("T5 encoder, tiny-flux", prompt["prompt_embeds"][0], GOLDEN["prompt_embeds"][i])
        assert_parity("CLIP text, tiny-flux", prompt["pooled"][0], GOLDEN["pooled_prompt_embeds"][i])
    assert not any(encoded.truncated)


def test_the_image_to_text_mask_cuts_image_from_text_only(tiny_flux):
    model = open_model(tiny_flux)
    latents = GOLDEN["96x64.latents"].transpose(0, 2, 3, 1)[:1]
    prompts = [
        {"prompt_embeds": GOLDEN["prompt_embeds"][i : i + 1], "pooled": GOLDEN["pooled_prompt_embeds"][:1]}
        for i in (0, 1)
    ]
    sigma = np.array([0.5], np.float32)
    everywhere = dict.fromkeys(range(model.stack.depth), IMAGE_TO_TEXT)
    masked = [velocity(model, latents, sigma, prompt, masks=everywhere) for prompt in prompts]
    plain = [velocity(model, latents, sigma, prompt) for prompt in prompts]
    assert same_bits(masked[0], masked[1]), "with no path from text to image, the prompt cannot matter"
    assert relative_error(plain[0], plain[1]) > 1e-2
    assert same_bits(velocity(model, latents, sigma, prompts[0], masks={}), plain[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_and_bfloat16_models_run_and_stay_near(tmp_path, bits):
    torch = pytest.importorskip("torch")
    assert torch is not None
    source = checkpoint(tmp_path / "hf")
    latents = GOLDEN["96x64.latents"].transpose(0, 2, 3, 1)[:1]
    prompt = {"prompt_embeds": GOLDEN["prompt_embeds"][:1], "pooled": GOLDEN["pooled_prompt_embeds"][:1]}
    model = open_model(convert(source, tmp_path / "q", dtype="bfloat16", bits=bits, modulation_bits=8))
    prompt = {key: value.astype(mx.bfloat16) for key, value in prompt.items()}
    ours = velocity(model, latents, np.array([0.6], np.float32), prompt)
    assert ours.dtype == mx.bfloat16
    reference = GOLDEN["96x64.velocity@0.6"][:1]
    assert relative_error(ours.astype(mx.float32), reference) <= {4: 0.5, 8: 0.1}[bits]
