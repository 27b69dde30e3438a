"""Z-Image against diffusers: the transformer in every branch, gradients of LoRA, whole pipelines."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import generate
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.models.z_image import transformer as net
from mlx_blockskip.tasks.sampling.denoise import Request, sample
from support import flux2, z_image
from support.compare import PIPELINE, assert_parity, assert_same_image, relative_error, same_bits
from support.gradients import assert_gradients_equal
from support.models import convert, random_tree

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


def opened(path, **parts):
    """(the pipeline, the same as a model of ours)"""
    pipe = z_image.random_pipeline(path / "hf", **parts)
    return pipe, open_model(convert(path / "hf", path / "mlx", "z_image"))


def velocity(model, latents, sigma, prompt, masks=None):
    context = model.context(mx.array(sigma), prompt, latents.shape[1:3], 1.0)
    sample = Batch(model.embed(latents, prompt), context, masks=masks or {})
    forward(model.stack, model.reader, [sample])
    return model.final_layer(sample.state, context, model.final_modulation(context))


def inputs(config, size, text_length=7, batch=2):
    """Latents, states of a language model, noise levels."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, *size, config.in_channels), np.float32)
    states = rng.standard_normal((batch, text_length, config.cap_feat_dim), np.float32)
    return latents, states, np.linspace(0.3, 0.9, batch, dtype=np.float32)


def theirs_for(reference, latents, states, sigma):
    """The reference's velocity, in the direction that the pipeline gives it."""
    images = [torch.from_numpy(image).permute(2, 0, 1)[:, None] for image in latents]
    texts = [state if isinstance(state, torch.Tensor) else torch.from_numpy(state) for state in states]
    found = reference(images, torch.from_numpy(1 - sigma), texts, return_dict=False)[0]
    return -torch.stack(found)[:, :, 0].permute(0, 2, 3, 1)


def refined(model, states):
    """A prompt of these states."""
    return {"prompt_embeds": mx.concatenate(model._refined([mx.array(state[None]) for state in states]))}


@pytest.mark.parametrize(
    ("changes", "size", "text"),
    [
        ({}, (8, 16), 7),
        ({"n_refiner_layers": 2, "in_channels": 16, "norm_eps": 1e-2, "rope_theta": 10000.0}, (6, 10), 45),
        ({"n_heads": 3, "n_kv_heads": 3, "axes_dims": (4, 8, 4), "qk_norm": False, "t_scale": 10.0}, (2, 14), 32),
        ({"n_layers": 0, "cap_feat_dim": 40}, (4, 6), 33),
        ({"n_refiner_layers": 0, "dim": 288, "axes_dims": (48, 48, 48)}, (4, 4), 3),
    ],
)
def test_equals_diffusers_on_random_configs(tmp_path, changes, size, text):
    text_encoder = flux2.random_text_encoder(num_hidden_layers=2, hidden_size=changes.get("cap_feat_dim", 24)).model
    pipe, model = opened(tmp_path, transformer=z_image.random_transformer(**changes), text_encoder=text_encoder)
    latents, states, sigma = inputs(pipe.transformer.config, size, text)
    ours = velocity(model, mx.array(latents), sigma, refined(model, states))
    with torch.no_grad():
        theirs = theirs_for(pipe.transformer, latents, states, sigma)
    assert_parity("Z-Image transformer", ours, theirs.numpy())


@pytest.mark.parametrize(("layers", "faint"), [(0, ("x_embedder", "x_pad_token")), (1, ("to_q", "to_k"))])
def test_what_is_nearly_zero_is_normed_as_in_diffusers(tmp_path, layers, faint):
    """So that the epsilons of the last norm and of the heads' matter."""
    transformer = z_image.random_transformer(n_layers=layers, n_refiner_layers=0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if any(part in name for part in faint):
                parameter.mul_(2e-3)
    pipe, model = opened(tmp_path, transformer=transformer)
    latents, states, sigma = inputs(pipe.transformer.config, (6, 10))
    ours = velocity(model, mx.array(latents), sigma, refined(model, states))
    with torch.no_grad():
        theirs = theirs_for(pipe.transformer, latents, states, sigma)
    assert_parity("Z-Image transformer", ours, theirs.numpy())


def test_prompts_of_different_lengths_are_as_in_one_batch_of_the_reference(tmp_path):
    """Through the language model and both refiners; there the shorter one is masked, here each is alone."""
    pipe, model = opened(tmp_path)
    prompts, length = ["a small cat", "word " * 30, ""], 48
    encoded = model.encode_prompts(prompts[:2], length, prompts[2:])
    assert encoded.truncated == [False, True, False]
    assert [p["prompt_embeds"].shape[1] for p in encoded.prompts] == [32, 64, 32]
    blank = model.blank_prompt(length)["prompt_embeds"]
    assert blank.shape == encoded.prompts[1]["prompt_embeds"].shape
    assert blank.dtype == encoded.prompts[1]["prompt_embeds"].dtype
    latents, _, sigma = inputs(pipe.transformer.config, (6, 10), batch=3)
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        theirs = theirs_for(pipe.transformer, latents, texts, sigma)
    for i, prompt in enumerate(encoded.prompts):
        ours = velocity(model, mx.array(latents[i : i + 1]), sigma[i : i + 1], prompt)
        assert_parity("Z-Image's prompts", ours, theirs[i : i + 1].numpy())


def test_tables_of_one_size_stay_for_every_length(tmp_path):
    """Both branches of guidance ask for theirs in every step."""
    _, model = opened(tmp_path)
    prompts = [{"prompt_embeds": mx.zeros((1, length, 48))} for length in (32, 64)]
    first, second, again = (model.context(mx.array([0.5]), prompts[i], (4, 8), 1.0) for i in (0, 1, 0))
    assert first.cos is again.cos
    assert first.cos.shape == (64, 12)
    assert second.cos.shape == (96, 12)
    model.context(mx.array([0.5]), prompts[0], (8, 8), 1.0)
    assert len(model._rope) == 1


def test_gradients_of_lora_equal_those_of_torch(tmp_path):
    """Of every target, through refiner and main blocks, with tokens that fill up, against PEFT's layers."""
    pytest.importorskip("peft")
    pipe, model = opened(tmp_path)
    tree = random_tree(model, range(model.stack.depth), rank=3)
    tree = {-1: random_tree(model, [0], rank=3, seed=1)[0], **tree}
    given = inputs(pipe.transformer.config, (6, 10))
    prompt = refined(model, given[1])
    grads = assert_gradients_equal("Z-Image", model, pipe.transformer, tree, given, theirs_for, prompt)
    assert min(grads) == -1, "and the refiner's"


def test_the_image_to_text_mask_cuts_image_from_text_only(tmp_path):
    _, model = opened(tmp_path)
    latents, states, sigma = (mx.array(x) for x in inputs(model.config, (6, 10)))
    prompts = [refined(model, states), refined(model, states[::-1])]
    everywhere = dict.fromkeys(model.stack.path, IMAGE_TO_TEXT)
    masked = [velocity(model, latents, sigma, prompt, masks=everywhere) for prompt in prompts]
    plain = [velocity(model, latents, sigma, prompt) for prompt in prompts]
    assert same_bits(*masked)
    assert relative_error(*plain) > 1e-2
    refiner = {i: IMAGE_TO_TEXT for i in model.stack.path if i < 0}
    assert same_bits(velocity(model, latents, sigma, prompts[0], masks=refiner), plain[0]), "which sees no text"


def test_attention_takes_fewer_rows_than_its_scores_have_room_for(tmp_path, monkeypatch):
    assert [net.query_rows(1, 30, keys) for keys in (288, 768, 4608)] == [256, 256, 121]
    assert net.query_rows(4, 30, 768) == 182
    _, model = opened(tmp_path)
    latents, states, sigma = inputs(model.config, (6, 10))
    prompt, seen = refined(model, states), []
    real = net.attention
    monkeypatch.setattr(net, "attention", lambda *a, **k: (seen.append(k["query_chunk"]), real(*a, **k))[1])
    whole = velocity(model, mx.array(latents), sigma, prompt)
    monkeypatch.setattr(net, "QUERY_ROWS", 7)
    assert relative_error(velocity(model, mx.array(latents), sigma, prompt), whole) <= 1e-5
    assert set(seen) == {256, 7}


def test_patches_come_back_without_the_tokens_that_fill_up():
    latents = mx.array(philox.normal(1, shape=(2, 6, 10, 4)))
    tokens = net.patchify(latents)
    assert tokens.shape == (2, 15, 16)
    filled = net.filled(tokens, mx.ones((1, 16)))
    assert filled.shape == (2, 32, 16)
    assert same_bits(net.unpatchify(filled, (6, 10)), latents)


@pytest.mark.parametrize(
    ("size", "guidance", "turbo"),
    [((32, 32), 4.0, False), ((44, 60), 1.5, False), ((32, 64), 0.0, True)],
    ids=["square with CFG", "wide with CFG", "Turbo"],
)
def test_the_pipeline_equals_diffusers(tmp_path, size, guidance, turbo):
    """Whole, two prompts of different lengths from the same noise: sampler, guidance, and the pictures."""
    pipe = z_image.random_pipeline(tmp_path / "hf", turbo)
    (width, height), prompts, length = size, ["a small cat", "two red dogs that sleep in the sun"], 64
    noise = philox.normal(0, shape=(2, 4, height // 2, width // 2))
    options = {
        "prompt": list(prompts), "num_inference_steps": 3, "guidance_scale": guidance, "width": width,
        "height": height, "latents": torch.from_numpy(noise), "max_sequence_length": length,
    }  # fmt: skip
    theirs = pipe(**options, output_type="np").images
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    found = generate(
        model=str(tmp_path / "hf"), prompt=prompts, max_sequence_length=length, steps=3, width=width, height=height,
        cfg_scale=1 + guidance, memory_budget="any", noise=str(tmp_path / "noise.safetensors"),
        output=str(tmp_path / "o.png"),
    )  # fmt: skip
    for path, wanted in zip(found, theirs, strict=True):
        assert_same_image("ZImagePipeline image (of 255)", Image.open(path), wanted * 255)


def test_final_latents_equal_those_of_the_pipeline(tmp_path):
    """Two prompts of different lengths from the same noise, with guidance and tokens that fill up."""
    pipe, model = opened(tmp_path)
    prompts, length = ["a small cat", "two red dogs that sleep in the sun"], 64
    noise = philox.normal(0, shape=(2, 4, 14, 10))
    theirs = pipe(
        prompt=list(prompts), num_inference_steps=4, guidance_scale=3.0, width=20, height=28, output_type="latent",
        latents=torch.from_numpy(noise), max_sequence_length=length,
    ).images  # fmt: skip
    *encoded, negative = model.encode_prompts(prompts, length, [""]).prompts
    start = mx.array(noise.transpose(0, 2, 3, 1))
    requests = [Request(prompt, negative, start[i : i + 1]) for i, prompt in enumerate(encoded)]
    *_, latents = sample(model, requests, steps=4, cfg_scale=4.0, guidance=1.0)
    found = mx.concatenate(latents).transpose(0, 3, 1, 2)
    assert_parity("ZImagePipeline, final latents", found, theirs.numpy(), PIPELINE)


@pytest.mark.parametrize("change", [{"axes_dims": (64, 64)}, {"axes_dims": (32, 32, 32)}, {"n_heads": 20}])
def test_axes_that_do_not_make_a_head_are_refused(change):
    with pytest.raises(UserError, match="axes_dims .* for n_heads .* is not dim 3840 in three axes"):
        net.ZImageTransformer2DConfig(**change)


@pytest.mark.parametrize("change", [{"all_patch_size": [2, 4]}, {"all_f_patch_size": [2]}, {"siglip_feat_dim": 1152}])
def test_other_patches_and_omni_are_refused(change):
    (name,) = change
    with pytest.raises(UserError, match=f"{name}=.* is not implemented"):
        net.ZImageTransformer2DConfig.from_dict(change)


def test_turbo_is_told_by_its_scheduler_alone(tmp_path):
    z_image.random_pipeline(tmp_path / "base")
    z_image.random_pipeline(tmp_path / "turbo", turbo=True)
    base, turbo = (
        open_model(convert(tmp_path / name, tmp_path / f"{name}-mlx", "z_image")).defaults for name in ("base", "turbo")
    )
    assert (base.steps, base.cfg_scale, base.max_sequence_length) == (50, 5.0, 512)
    assert (turbo.steps, turbo.cfg_scale, turbo.max_sequence_length) == (8, 1.0, 512)


def test_quantized_and_bfloat16_models_run_and_stay_near(tmp_path):
    parts = {"dim": 64, "axes_dims": (16, 8, 8)}
    pipe = z_image.random_pipeline(tmp_path / "hf", transformer=z_image.random_transformer(**parts))
    latents, states, sigma = inputs(pipe.transformer.config, (6, 10))
    with torch.no_grad():
        wanted = theirs_for(pipe.transformer, latents, states, sigma).numpy()
    for bits, bound in ((4, 0.5), (8, 0.1), (0, 0.05)):
        made = convert(
            tmp_path / "hf", tmp_path / f"{bits}", "z_image", dtype="bfloat16", bits=bits, modulation_bits=bits
        )
        model = open_model(made)
        ours = velocity(model, mx.array(latents), sigma, refined(model, states))
        assert ours.dtype == mx.bfloat16
        assert relative_error(ours.astype(mx.float32), wanted) <= bound
