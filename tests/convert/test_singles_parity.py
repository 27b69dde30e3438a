"""Single files are read as diffusers reads them: its own converters give the same tensors under the same names."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import encoder_files, singles
from mlx_blockskip.converters.flux1_files import FILES as FLUX1
from mlx_blockskip.converters.sana_files import FILES as SANA
from mlx_blockskip.engine import files, philox
from support import singles as theirs
from support.models import assets
from support.sana import random_transformer

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as peer  # noqa: E402


def ours(tmp_path, tensors, network):
    """The tensors of a file under our names, as numpy."""
    files.save_tensors(tmp_path / "x.safetensors", tensors)
    place = tmp_path / "x.safetensors"
    found = singles.held(place, singles.opened(place), {"it": network}).networks["it"]
    return {name: np.array(view.read()) for name, view in found.items()}


def in_torch(tensors):
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


def assert_same(found, reference, bare=False):
    """bare: 1 x 1 convolutions and linear layers are the same."""
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        other = tensor.numpy()
        mine = found[name].reshape(other.shape) if bare and other.size == found[name].size else found[name]
        np.testing.assert_array_equal(mine, other, err_msg=name)


def random_like(shapes):
    return {name: mx.array(philox.normal(7, i, shape=shape)) for i, (name, shape) in enumerate(shapes.items())}


def numbers(model):
    return {name: mx.array(tensor.numpy()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_transformer_of_flux(tmp_path, prefix):
    """One block of each kind of the real width, for which diffusers' converter is written, on inputs of one number."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    shapes = {name: (t.shape[0], 1) if t.ndim == 2 else tuple(t.shape) for name, t in model.state_dict().items()}
    tensors = theirs.prefixed(theirs.black_forest_labs(random_like(shapes)), prefix)
    reference = peer.convert_flux_transformer_checkpoint_to_diffusers(in_torch(tensors))
    assert_same(ours(tmp_path, tensors, FLUX1["transformer"]), reference)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_the_vae_of_flux(tmp_path, prefix):
    model = theirs.weights(assets() / "tiny-flux" / "vae")
    tensors = theirs.prefixed(theirs.latent_diffusion({n: t.astype(mx.float32) for n, t in model.items()}), prefix)
    config = files.read_json(assets() / "tiny-flux" / "vae" / "config.json")
    reference = peer.convert_ldm_vae_checkpoint(in_torch(tensors), config)
    assert_same(ours(tmp_path, tensors, FLUX1["vae"]), reference, bare=True)


def test_text_encoders_in_one_file(tmp_path):
    parts = {
        name: {n: t.astype(mx.float32) for n, t in tensors.items()}
        for name, tensors in theirs.parts_of(assets() / "tiny-flux").items()
    }
    tensors = theirs.all_in_one(parts)
    reference = peer.convert_ldm_clip_checkpoint(in_torch(tensors), "text_encoders.clip_l.transformer.text_model.")
    found = ours(tmp_path, tensors, FLUX1["text_encoder"])
    text = {name: found[f"text_model.{name}"] for name in reference}
    assert_same(text, reference)
    assert len(text) == len(parts["clip_l"])
    assert_same(
        ours(tmp_path, tensors, FLUX1["text_encoder_2"]), peer.convert_sd3_t5_checkpoint_to_diffusers(in_torch(tensors))
    )


def test_the_transformer_of_sana(tmp_path):
    tensors = theirs.nvidia(numbers(random_transformer()))
    reference = peer.convert_sana_transformer_to_diffusers(in_torch(tensors))
    assert_same(ours(tmp_path, tensors, SANA["transformer"]), reference)


def test_the_transformer_of_sana_sprint(tmp_path):
    """diffusers' loader does not know its norms and its guidance; its conversion script does."""
    model = random_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    tensors = theirs.nvidia(numbers(model))
    assert "cfg_embedder.mlp.0.weight" in tensors
    assert "blocks.0.cross_attn.k_norm.weight" in tensors
    assert_same(ours(tmp_path, tensors, SANA["transformer"]), model.state_dict())


def test_the_vae_of_sana(tmp_path):
    shapes = {name: t.shape for name, t in theirs.weights(assets() / "tiny-sana" / "vae").items()}
    tensors = theirs.efficientvit(random_like(shapes))
    reference = peer.convert_autoencoder_dc_checkpoint_to_diffusers(in_torch(tensors))
    assert reference.keys() == shapes.keys()
    assert_same(ours(tmp_path, tensors, encoder_files.AUTOENCODER_DC), reference, bare=True)


def test_sana_in_single_files_gives_the_same_directory(tmp_path):
    tiny = assets() / "tiny-sana"
    whole = convert(hf_path=str(tiny), mlx_path=str(tmp_path / "one"))
    flat = tmp_path / "flat"
    flat.mkdir()
    files.save_tensors(flat / "sana.safetensors", theirs.nvidia(theirs.weights(tiny / "transformer")))
    files.save_tensors(flat / "dc_ae.safetensors", theirs.efficientvit(theirs.weights(tiny / "vae")))
    gemma = theirs.prefixed(theirs.weights(tiny / "text_encoder"), "model.")
    files.save_tensors(flat / "gemma.safetensors", gemma | {"spiece_model": mx.zeros((9,), mx.uint8)})
    other = convert(hf_path=str(flat), mlx_path=str(tmp_path / "two"), base=str(tiny))
    shards = sorted(path.relative_to(whole) for path in whole.rglob("*/*") if path.is_file())
    assert shards == sorted(path.relative_to(other) for path in other.rglob("*/*") if path.is_file())
    assert all((whole / name).read_bytes() == (other / name).read_bytes() for name in shards)


def test_diffusers_own_loader_reads_the_same_vae_from_the_same_file(tmp_path):
    from diffusers import AutoencoderKL

    vae = theirs.weights(assets() / "tiny-flux" / "vae")
    tensors = theirs.latent_diffusion({name: tensor.astype(mx.float32) for name, tensor in vae.items()})
    found = ours(tmp_path, tensors, FLUX1["vae"])
    place = str(tmp_path / "x.safetensors")
    model = AutoencoderKL.from_single_file(place, config=str(assets() / "tiny-flux" / "vae"), local_files_only=True)
    assert_same(found, model.state_dict(), bare=True)
