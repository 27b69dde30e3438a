"""Back to diffusers: the tensors that went in come out, diffusers opens the folder, and its images are ours."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import convert, generate
from mlx_blockskip.converters import hf, write
from mlx_blockskip.converters.encoders import autoencoder_kl, clip_text, t5_encoder
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.differences import LowRank
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Added, Shards
from mlx_blockskip.events import Note
from mlx_blockskip.models.registry import open_model, read_config
from mlx_blockskip.models.text.clip import CLIPTextConfig
from mlx_blockskip.models.text.t5 import T5Config
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from mlx_blockskip.settings import ConvertSettings
from mlx_blockskip.tasks.checkpoint import convert as task
from support.compare import assert_same_image, same_bits
from support.flux import checkpoint, random_transformer
from support.golden import GOLDEN, PROMPTS
from support.models import assets
from support.models import convert as convert_directory
from support.sana import VAE, random_pipeline
from support.tasks import drive

FOLDERS = {
    "flux1": ("transformer", "text_encoder", "text_encoder_2", "vae"),
    "sana": ("transformer", "text_encoder", "vae"),
}


def back(source, target, **options):
    return convert(hf_path=str(source), mlx_path=str(target), to="hf", **options)


def assert_same_tensors(ours, theirs, folders, dtype=mx.float32):
    """The same names, shapes and bits; theirs in `dtype`."""
    for folder in folders:
        found, wanted = open_source(ours / folder), open_source(theirs / folder)
        assert set(found.tensors) == set(wanted.tensors)
        for name in wanted.tensors:
            assert same_bits(found.read(name), wanted.read(name).astype(dtype)), (folder, name)


@pytest.mark.parametrize("family", ["flux1", "sana"])
def test_a_bundled_model_comes_back_bit_for_bit(tmp_path, request, family):
    name = {"flux1": "tiny-flux", "sana": "tiny-sana"}[family]
    source, model = assets() / name, request.getfixturevalue(name.replace("-", "_"))
    made = back(model, tmp_path / "hf")
    assert_same_tensors(made, source, FOLDERS[family])
    for folder in FOLDERS[family]:
        own, theirs = (files.read_json(path / folder / "config.json") for path in (made, source))
        assert own == theirs | ({"dtype": "float32"} if "dtype" in theirs else {})
        held = {p.name for p in (made / folder).iterdir()}
        assert held == {p.name for p in (source / folder).iterdir()}
    assert files.read_json(made / "model_index.json") == files.read_json(source / "model_index.json")
    assert files.read_json(made / "defaults.json") == files.read_json(source / "defaults.json")
    again = convert(hf_path=str(made), mlx_path=str(tmp_path / "again"), dtype="float32")
    assert open_model(again).shards.checksums == open_model(model).shards.checksums
    assert read_config(again)["defaults"] == read_config(model)["defaults"]
    half = back(model, tmp_path / "half", dtype="float16")
    assert_same_tensors(half, source, ("transformer",), mx.float16)
    assert files.read_json(half / "text_encoder" / "config.json").get("dtype", "float16") != "float32"


@pytest.mark.parametrize(
    ("pipeline", "change"),
    [
        ("SanaPipeline", {"patch_size": 2, "norm_elementwise_affine": True, "qk_norm": "rms_norm_across_heads"}),
        ("SanaSprintPipeline", {"qk_norm": "rms_norm_across_heads", "attention_bias": True}),
    ],
)
def test_random_sana_models_come_back_bit_for_bit(tmp_path, pipeline, change):
    pytest.importorskip("diffusers")
    source, _ = random_pipeline(tmp_path, pipeline, vae={**VAE, "upsample_block_type": "interpolate"}, **change)
    made = back(convert_directory(source, tmp_path / "mlx", "sana"), tmp_path / "back")
    assert_same_tensors(made, source, FOLDERS["sana"])


def test_random_flux_models_come_back_bit_for_bit(tmp_path):
    """With the convolutions of the VAE that are 1 x 1 today, and those that once were."""
    diffusers = pytest.importorskip("diffusers")
    options = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 2}
    vae = diffusers.AutoencoderKL(**options, use_quant_conv=True, use_post_quant_conv=True)
    source = checkpoint(tmp_path / "hf", transformer=random_transformer(guidance_embeds=True), vae=vae)
    made = back(convert_directory(source, tmp_path / "mlx"), tmp_path / "back")
    assert_same_tensors(made, source, FOLDERS["flux1"])
    assert open_source(made / "vae").shape("quant_conv.weight") == (8, 8, 1, 1)
    assert open_source(made / "vae").shape("decoder.mid_block.attentions.0.to_q.weight") == (8, 8)


def test_names_and_shapes_are_those_of_the_reference_classes_of_today(tmp_path):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 40}
    t5 = {"num_layers": 1, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 40}
    for name, model, config_class, rows in (
        ("kl", diffusers.AutoencoderKL(latent_channels=4), AutoencoderKLConfig, autoencoder_kl),
        ("clip", transformers.CLIPTextModel(transformers.CLIPTextConfig(**small)), CLIPTextConfig, clip_text),
        ("t5", transformers.T5EncoderModel(transformers.T5Config(**t5, feed_forward_proj="gated-gelu")), T5Config,
         t5_encoder),
    ):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        held = open_source(tmp_path / name)
        made = rows(name, config_class.read(tmp_path / name / "config.json"))
        assert {row.name: row.current_shape() for row in made.rows} == {n: held.shape(n) for n in held.tensors}


def test_diffusers_opens_it_and_its_images_are_ours(tmp_path, tiny_flux):
    torch = pytest.importorskip("torch")
    from diffusers import DiffusionPipeline

    made = back(tiny_flux, tmp_path / "hf")
    pipe = DiffusionPipeline.from_pretrained(made, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPTS[:2], num_inference_steps=2, width=64, height=96, max_sequence_length=24, output_type="np",
        latents=torch.from_numpy(np.array(GOLDEN["96x64.packed"][:2])),
    ).images  # fmt: skip
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": GOLDEN["96x64.latents"][:2]})
    ours = generate(
        model=str(tiny_flux), prompt=PROMPTS[:2], noise=str(tmp_path / "noise.safetensors"), width=64, height=96,
        steps=2, cfg_scale=1.0, output=str(tmp_path / "o.png"),
    )  # fmt: skip
    for path, wanted in zip(ours, theirs, strict=True):
        assert_same_image("written back for diffusers", Image.open(path), wanted * 255)


def test_diffusers_opens_sana_in_several_files(tmp_path, tiny_sana, monkeypatch):
    torch = pytest.importorskip("torch")
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(hf, "SHARD_BYTES", 1 << 20)
    made = back(tiny_sana, tmp_path / "hf")
    shards = sorted(p.name for p in (made / "transformer").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    index = files.read_json(made / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(shards)
    assert (made / "text_encoder" / "model.safetensors.index.json").is_file()
    assert_same_tensors(made, assets() / "tiny-sana", FOLDERS["sana"])
    pipe = DiffusionPipeline.from_pretrained(made, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise, prompt = philox.normal(0, shape=(1, *_latents(tiny_sana))), "a cat face on a pink background"
    theirs = pipe(
        prompt=prompt, num_inference_steps=2, width=64, height=64, guidance_scale=1.0, output_type="np",
        latents=torch.from_numpy(noise), use_resolution_binning=False, clean_caption=False, max_sequence_length=24,
        complex_human_instruction=None,
    ).images  # fmt: skip
    files.save_tensors(tmp_path / "noise.safetensors", {"noise": mx.array(noise)})
    (ours,) = generate(
        model=str(tiny_sana), prompt=[prompt], noise=str(tmp_path / "noise.safetensors"), width=64, height=64, steps=2,
        cfg_scale=1.0, max_sequence_length=24, output=str(tmp_path / "o.png"),
    )  # fmt: skip
    assert_same_image("written back for diffusers", Image.open(ours), theirs[0] * 255)


def _latents(model):
    height, width, channels = open_model(model).latent_shape(64, 64)
    return channels, height, width


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantized_layers_are_made_whole_and_that_is_said(tmp_path, bits):
    model = convert_directory(assets() / "tiny-flux", tmp_path / "mlx", bits=bits, group_size=32, dtype="bfloat16")
    settings = ConvertSettings(hf_path=str(model), mlx_path=str(tmp_path / "hf"), to="hf")
    made, events = drive(task.convert, settings)
    (note,) = (event.message for event in events if isinstance(event, Note))
    assert "quantized layers are made whole" in note
    found, stored = open_source(made / "transformer"), Shards(model / "transformer")
    name = "single_transformer_blocks.3.proj_out"
    packed, scales, biases = (stored.load([f"{name}.{p}"])[f"{name}.{p}"] for p in ("weight", "scales", "biases"))
    wanted = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
    assert same_bits(found.read(f"{name}.weight"), wanted.astype(mx.bfloat16))
    plain = "x_embedder.weight"
    assert same_bits(found.read(plain), stored.load([plain])[plain])
    assert set(found.tensors) == set(open_source(assets() / "tiny-flux" / "transformer").tensors)
    assert files.read_json(made / "text_encoder" / "config.json")["dtype"] == "bfloat16"


def test_a_part_of_one_tensor_is_in_memory(tmp_path, tiny_flux, monkeypatch):
    monkeypatch.setattr(write, "PART_BYTES", 1 << 16)
    (part, *_) = hf.open_parts(tiny_flux, "flux1")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert list(hf.write_part(part, tmp_path)) == ["diffusion_pytorch_model.safetensors"]
    assert mx.get_peak_memory() - before < 8 * (1 << 16) < sum(entry.nbytes for entry in part.entries()) / 30


def test_what_cannot_be_written_back_is_refused(tmp_path, tiny_flux, monkeypatch):
    for options, match in (
        ({"quantize": True}, "--quantize"),
        ({"revision": "main"}, "--revision"),
        ({"hf_path": str(tmp_path / "nowhere")}, "no such directory"),
        ({"hf_path": str(assets() / "tiny-flux")}, "is not an MLX model directory"),
        ({"mlx_path": str(tmp_path)}, "already exists"),
    ):
        given = {"hf_path": str(tiny_flux), "mlx_path": str(tmp_path / "hf"), "to": "hf", **options}
        with pytest.raises(UserError, match=match):
            convert(**given)
    copy = convert_directory(assets() / "tiny-flux", tmp_path / "copy")
    monkeypatch.setattr(files, "free_space", lambda path: 1000)
    with pytest.raises(UserError, match="are needed"):
        back(copy, tmp_path / "hf")
    monkeypatch.undo()
    config = copy / "vae" / "config.json"
    held = files.read_json(config)
    files.write_json(config, held | {"layers_per_block": 2})
    with pytest.raises(UserError, match=r"resnets\.1\.norm1\.weight.* is not as its config\.json says"):
        back(copy, tmp_path / "hf")
    files.write_json(config, held)
    shard = copy / "transformer" / "block-003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"block-003\.safetensors: is not what was converted"):
        back(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_scalar_and_rows_of_a_tensor_are_read(tmp_path):
    tensors = {"one": mx.array(2.5), "rows.weight": mx.arange(12.0).reshape(4, 3)}
    files.save_tensors(tmp_path / "rest.safetensors", tensors)
    files.write_json(tmp_path / "config.json", {})
    files.write_json(
        tmp_path / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "rest.safetensors")}
    )
    added = Added(LowRank(mx.ones((3, 1)), mx.array([[0.0, 1.0, 2.0, 3.0]])))
    whole = Whole(Shards(tmp_path), {"rows": added})
    assert same_bits(whole.read("one", 0, 1), tensors["one"])
    assert same_bits(whole.read("rows.weight", 1, 3), tensors["rows.weight"][1:3] + mx.array([[1.0], [2.0]]))
