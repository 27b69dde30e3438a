"""Published checkpoints by their own config files: opened, and every kind of block run once on weights of zeros."""

import math

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip.converters import vision
from mlx_blockskip.converters.run import read_components
from mlx_blockskip.engine import files
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models import flow, presets
from mlx_blockskip.models.vision import preprocess
from mlx_blockskip.models.vision.encoder import KINDS
from support.published import HUB, family_of, hollow

BLOCKS = {
    "flux1-dev": {"transformer": 57, "text_encoder": 12, "text_encoder_2": 24},
    "flux1-schnell": {"transformer": 57, "text_encoder": 12, "text_encoder_2": 24},
    "flux2-klein-4b": {"transformer": 25, "text_encoder": 36},
    "flux2-klein-9b": {"transformer": 32, "text_encoder": 36},
    "flux2-klein-base-4b": {"transformer": 25, "text_encoder": 36},
    "flux2-klein-base-9b": {"transformer": 32, "text_encoder": 36},
    "sana-0.6b": {"transformer": 28, "text_encoder": 26},
    "sana-1.6b": {"transformer": 20, "text_encoder": 26},
    "sana1.5-1.6b": {"transformer": 20, "text_encoder": 26},
    "sana1.5-4.8b": {"transformer": 60, "text_encoder": 26},
    "sana-sprint-1.6b": {"transformer": 20, "text_encoder": 26},
    "z-image": {"transformer": 34, "text_encoder": 36},
    "z-image-turbo": {"transformer": 34, "text_encoder": 36},
}
SIBLINGS = {
    "flux2-klein-base-4b": (24, 50, 4.0),
    "flux2-klein-4b": (24, 4, 1.0),
    "flux2-klein-base-9b": (32, 50, 4.0),
    "flux2-klein-9b": (32, 4, 1.0),
}
"""Heads, steps and guidance of models whose blocks differ in nothing but their size; one of them is run."""
TURBO = "z-image-turbo"
"""Has the blocks of z-image."""
TEXT = 8
LATENTS = {"flux1": (4, 4, 16), "flux2": (2, 2, 128), "sana": (2, 2, 32), "z_image": (4, 4, 16)}


def test_every_preset_is_tested_here():
    assert set(BLOCKS) == set(presets.folders())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_tables_have_every_block_at_full_depth(name):
    components = {c.folder: c for c in read_components(presets.folders()[name], family_of(name).name)}
    found = {f: len({c.block(row.name) for row in c.rows} - {None}) for f, c in components.items() if f != "vae"}
    assert found == BLOCKS[name]


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
@pytest.mark.parametrize("folder", ["transformer", "text_encoder_2"])
def test_the_tables_have_as_many_tensors_and_bytes_as_the_checkpoints_indexes_say(name, folder):
    (path,) = (HUB / f"black-forest-labs--FLUX.1-{name.removeprefix('flux1-')}" / folder).glob("*.summary.json")
    index = files.read_json(path)
    rows = {c.folder: c.rows for c in read_components(presets.folders()[name], "flux1")}[folder]
    assert len(rows) == index["tensors"]
    assert 2 * sum(math.prod(row.shape) for row in rows) == index["metadata"]["total_size"]


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in (*list(SIBLINGS)[1:], TURBO)])
def test_a_block_of_every_kind_runs(name, tmp_path):
    model = hollow(name, tmp_path / "m")
    assert len(set(model.stack.kinds)) == len(model.stack.kinds)
    height, width, channels = LATENTS[family_of(name).name]
    assert model.latent_shape(256, 256)[2] == channels
    assert model.vae_factor == {"flux1": 8, "flux2": 16, "sana": 32, "z_image": 8}[family_of(name).name]
    prompt = model.blank_prompt(TEXT)
    latents = mx.zeros((1, height, width, channels))
    context = model.context(mx.array([0.5]), prompt, (height, width), model.defaults.guidance)
    sample = Batch(model.embed(latents, prompt), context)
    forward(model.stack, model.reader, [sample])
    velocity = model.final_layer(sample.state, context, model.final_modulation(context))
    assert velocity.shape == latents.shape
    assert bool(mx.all(mx.isfinite(velocity)))
    sampler = model.sampler(model.defaults.steps, (height, width), lambda step, shape: mx.zeros(shape))
    assert len(sampler.times) == model.defaults.steps
    assert flow.training_shift(model.scheduler) > 0


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_open_and_have_defaults_of_their_own(name, tmp_path):
    model = hollow(name, tmp_path / "m")
    assert (model.config.num_attention_heads, model.defaults.steps, model.defaults.cfg_scale) == SIBLINGS[name]
    assert model.config.joint_attention_dim == 3 * model.text_config.hidden_size
    assert model.latent_shape(256, 256) == (16, 16, 128)
    assert model.stack.kinds == ("double", "single")


@pytest.mark.parametrize(("name", "steps", "guidance"), [("z-image", 50, 5.0), (TURBO, 8, 1.0)])
def test_turbo_differs_from_z_image_in_its_defaults_and_shift(name, steps, guidance, tmp_path):
    model = hollow(name, tmp_path / "m")
    assert (model.defaults.steps, model.defaults.cfg_scale) == (steps, guidance)
    assert flow.training_shift(model.scheduler) == (3.0 if name == TURBO else 6.0)
    assert (model.config.head_dim, model.config.hidden, model.size_multiple) == (128, 10240, 16)
    assert model.config.cap_feat_dim == model.text_config.hidden_size
    assert [model.stack.block(i).kind.name for i in model.stack.path] == ["refiner", "main"]
    assert model.latent_shape(256, 128) == (16, 32, 16)


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b", "sana1.5-1.6b", "z-image"])
def test_a_layer_of_every_text_encoder_runs(name, tmp_path):
    model = hollow(name, tmp_path / "m")
    (prompt,) = model.encode_prompts(["red"], TEXT).prompts
    blank = model.blank_prompt(TEXT)
    assert {key: value.shape for key, value in prompt.items()} == {key: value.shape for key, value in blank.items()}


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b"])
def test_the_vae_of_flux_runs(name, tmp_path):
    """That of SANA is held against diffusers by its shapes, in test_dc_ae.py: a run of it takes long."""
    model = hollow(name, tmp_path / "m")
    side = 2 * model.size_multiple
    shape = model.latent_shape(side, side)
    latents = model.draw_latents(model.encode_images(mx.zeros((1, side, side, 3))), mx.zeros((1, *shape)))
    assert latents.shape[1:] == shape
    assert model.decode(latents[:, :1, :1]).shape == (1, model.vae_factor, model.vae_factor, 3)


@pytest.mark.parametrize(
    ("name", "kind", "layers", "width", "heads"),
    [
        ("facebook--dino-vits16", "vit", 12, 384, 6),
        ("facebook--dino-vitb8", "vit", 12, 768, 12),
        ("facebook--dinov2-small", "dinov2", 12, 384, 6),
        ("facebook--dinov2-base", "dinov2", 12, 768, 12),
        ("openai--clip-vit-base-patch32", "clip", 12, 768, 12),
        ("openai--clip-vit-large-patch14", "clip", 24, 1024, 16),
    ],
)
def test_a_layer_of_every_image_encoder_runs(name, kind, layers, width, heads):
    assert vision.kind_of(HUB / name) == kind
    (component, config), *text = vision.read_components(HUB / name)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert len({component.block(row.name) for row in component.rows} - {None}) == layers
    assert [c.folder for c, _ in text] == (["text"] if kind == "clip" else [])
    assert all(c.eos_token_id == 2 for _, c in text)
    tower, block = KINDS[kind].tower, KINDS[kind].tower.stack(config).blocks[0]
    w = {row.name: mx.zeros(row.shape) for row in component.rows if component.block(row.name) in (None, block.prefix)}
    how = preprocess.read(HUB / name / preprocess.FILE)
    pixels = mx.array(preprocess.pixels(Image.new("RGB", (90, 70)), how))[None]
    inside = {name.removeprefix(block.prefix): x for name, x in w.items() if name.startswith(block.prefix)}
    state = block.kind.apply(inside, {}, tower.tokens(w, config, pixels), None, None, None)
    found = tower.class_token(w, config, state)
    assert found.shape == (1, width)
    assert np.isfinite(np.array(found)).all()
