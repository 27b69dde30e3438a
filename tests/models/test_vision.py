"""Image encoders against transformers: preprocessing, networks, and both together from checkpoints of every branch."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import convert
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.vision import patches, preprocess, vit
from mlx_blockskip.models.vision.encoder import open_encoder
from support.compare import assert_parity, record, relative_error
from support.models import assets
from support.vision import CLIP_VISION, pictures, random_encoder, save


def opened(source, target, **options):
    return open_encoder(convert(hf_path=str(source), mlx_path=str(target), **options))


def unit(features):
    values = features.numpy() if hasattr(features, "numpy") else features
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def inputs(encoder, images):
    """What the encoder's preprocessing makes of images, as torch has it."""
    import torch

    return [torch.from_numpy(preprocess.pixels(image, encoder.how).transpose(2, 0, 1).copy())[None] for image in images]


def class_tokens(reference, encoder, images, **options):
    import torch

    with torch.no_grad():
        return np.concatenate([unit(reference(x, **options).last_hidden_state[:, 0]) for x in inputs(encoder, images)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_vit_equals_transformers(tmp_path, bias, act):
    pytest.importorskip("torch")
    reference = random_encoder("vit", qkv_bias=bias, hidden_act=act)
    encoder = opened(save(reference, tmp_path / "hf", "vit"), tmp_path / "mlx")
    images = pictures()
    assert_parity("DINO", encoder.embed_images(images), class_tokens(reference, encoder, images))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("crop", [(32, 32), (48, 48), (24, 40), (16, 32)])
def test_dinov2_equals_transformers(tmp_path, swiglu, bias, crop):
    pytest.importorskip("torch")
    reference = random_encoder("dinov2", use_swiglu_ffn=swiglu, qkv_bias=bias)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 50},
        "crop_size": {"height": crop[0], "width": crop[1]},
    }
    encoder = opened(save(reference, tmp_path / "hf", "dinov2", processor), tmp_path / "mlx")
    images = pictures()
    assert_parity("DINOv2", encoder.embed_images(images), class_tokens(reference, encoder, images))


@pytest.mark.parametrize("size", [(48, 40), (16, 16), (33, 47)])
def test_vit_in_another_size_equals_transformers(tmp_path, size):
    pytest.importorskip("torch")
    reference = random_encoder("vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": size[0], "width": size[1]}}
    encoder = opened(save(reference, tmp_path / "hf", "vit", processor), tmp_path / "mlx")
    images = pictures()
    theirs = class_tokens(reference, encoder, images, interpolate_pos_encoding=True)
    assert_parity("DINO", encoder.embed_images(images), theirs)


TEXTS = ["a red apple on a blue background", "", "hedgehog", "word " * 200]


def clip_features(reference, source, encoder, images, texts):
    import torch
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(source))(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        seen = [reference.get_image_features(x).pooler_output for x in inputs(encoder, images)]
        said = reference.get_text_features(**tokens).pooler_output
        return unit(torch.cat(seen)), unit(said)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [20, 512])
@pytest.mark.parametrize("eos", [2, 2221])
def test_clip_equals_transformers(tmp_path, act, projection, eos):
    pytest.importorskip("torch")
    reference = random_encoder("clip", hidden_act=act, projection_dim=projection, eos=eos)
    source = save(reference, tmp_path / "hf", "clip")
    encoder = opened(source, tmp_path / "mlx")
    images = pictures()
    seen, said = clip_features(reference, source, encoder, images, TEXTS)
    assert seen.shape == (4, projection)
    assert_parity("CLIP vision", encoder.embed_images(images), seen)
    assert_parity("CLIP text", encoder.embed_texts(TEXTS), said)


def test_tiny_clip_equals_transformers(tmp_path):
    pytest.importorskip("torch")
    from transformers import CLIPModel

    source = assets() / "tiny-clip"
    reference = CLIPModel.from_pretrained(str(source)).float().eval()
    encoder = opened(source, tmp_path / "mlx", dtype="float32")
    images = pictures((64, 64), (128, 128), (90, 130))
    seen, said = clip_features(reference, source, encoder, images, TEXTS)
    assert_parity("tiny-clip", encoder.embed_images(images), seen)
    assert_parity("tiny-clip", encoder.embed_texts(TEXTS), said)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CONFIGS = {
    "dino-vits16": ("ViT", {"size": 224, "image_mean": MEAN, "image_std": STD, "resample": 3}),
    "vit": ("ViT", {"size": {"height": 30, "width": 50}}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "image_mean": MEAN}),
    "clip": ("CLIP", {"size": 48, "crop_size": 48, "do_center_crop": True, "resample": 3}),
    "clip now": ("CLIP", {"size": {"shortest_edge": 41}, "crop_size": {"height": 40, "width": 33}}),
    "padded": ("CLIP", {"size": {"shortest_edge": 21}, "crop_size": {"height": 50, "width": 47}}),
    "not resized": ("CLIP", {"do_resize": False, "crop_size": 31}),
    "lanczos": ("ViT", {"size": 40, "resample": 1}),
    "not normalised": ("CLIP", {"size": 40, "crop_size": 40, "do_normalize": False}),
    "levels": ("ViT", {"size": 40, "do_rescale": False, "do_normalize": False}),
    "by default": ("CLIP", {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessing_equals_transformers(name):
    pytest.importorskip("torch")
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    kind, config = CONFIGS[name]
    classes = {"ViT": ViTImageProcessorPil, "CLIP": CLIPImageProcessorPil, "Bit": BitImageProcessorPil}
    how = preprocess.parse({"image_processor_type": f"{kind}ImageProcessor", **config})
    sizes = ((48, 48), (70, 41), (40, 90), (20, 33), (301, 300), (31, 32))
    for image in [*pictures(*sizes), pictures()[1].convert("RGBA"), pictures()[2].convert("L")]:
        options = {"do_convert_rgb": True}
        theirs = np.array(classes[kind](**config)(image, **options)["pixel_values"][0]).transpose(1, 2, 0)
        ours = preprocess.pixels(image, how)
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        record("preprocessing", float(np.abs(ours - theirs).max()), 1 / 255)


def test_what_a_config_leaves_out_and_what_is_not_implemented():
    with pytest.raises(UserError, match="'PixtralImageProcessor' is not implemented"):
        preprocess.parse({"image_processor_type": "PixtralImageProcessor"})
    with pytest.raises(UserError, match="longest_edge"):
        preprocess.parse({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 3}})


@pytest.mark.parametrize("config", [{"size": "big"}, {"image_mean": [1, 2]}, {"resample": 99}, [1]])
def test_a_broken_preprocessing_is_named(tmp_path, config):
    path = tmp_path / "preprocessor_config.json"
    whole = {"image_processor_type": "ViTImageProcessor", **config} if isinstance(config, dict) else config
    files.write_json(path, whole)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        preprocess.read(path)


@pytest.mark.parametrize(("before", "after"), [(4, 9), (9, 4), (37, 16), (5, 5), (1, 3)])
def test_interpolation_equals_torch(before, after):
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 1, before, 1, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.functional.interpolate(x, size=(after, 1), mode="bicubic", align_corners=False)
    assert relative_error(patches.bicubic(before, after) @ x[0, 0].numpy(), theirs[0, 0].numpy()) < 1e-5


def test_positions_are_left_alone_in_the_trained_size_and_refused_where_they_have_no_square():
    table = mx.arange(2 * 7).reshape(7, 2)
    assert patches.positions(table, (2, 3), (2, 3)) is table
    with pytest.raises(UserError, match="2 x 3 patches was given 4 x 4"):
        patches.positions(table, (2, 3), (4, 4))


def test_an_image_does_not_depend_on_the_others_and_memory_changes_nothing(tmp_path):
    path = convert(hf_path=str(assets() / "tiny-clip"), mlx_path=str(tmp_path / "mlx"))
    images = pictures()
    together = open_encoder(path).embed_images(images)
    alone = open_encoder(path)
    for i in (2, 0, 3, 1):
        np.testing.assert_array_equal(alone.embed_images([images[i]])[0], together[i])
    streamed = open_encoder(path, budget=0)
    np.testing.assert_array_equal(streamed.embed_images(images), together)
    alone.release()
    np.testing.assert_array_equal(alone.embed_images(images), together)


def test_many_images_go_in_several_sweeps(tmp_path):
    path = convert(hf_path=str(assets() / "tiny-clip"), mlx_path=str(tmp_path / "mlx"))
    images = pictures() * 9
    found = open_encoder(path).embed_images(images)
    np.testing.assert_array_equal(found, np.tile(found[:4], (9, 1)))


def test_embeddings_are_of_unit_length_in_float32_and_there_may_be_none(tmp_path):
    encoder = opened(assets() / "tiny-clip", tmp_path / "mlx")
    for found in (encoder.embed_images(pictures()), encoder.embed_texts(["a cat", "a dog"])):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, 96)


def test_a_tower_stored_in_sixteen_bits_computes_in_float32(tmp_path):
    whole = opened(assets() / "tiny-clip", tmp_path / "whole")
    half = opened(assets() / "tiny-clip", tmp_path / "half", dtype="float16")
    images = pictures()
    assert relative_error(half.embed_images(images), whole.embed_images(images)) < 1e-5
    assert relative_error(half.embed_texts(["a cat"]), whole.embed_texts(["a cat"])) < 1e-5


def test_the_identity_tells_weights_and_preprocessing_apart(tmp_path):
    first = opened(assets() / "tiny-clip", tmp_path / "a")
    assert opened(assets() / "tiny-clip", tmp_path / "b").identity == first.identity
    file = tmp_path / "b" / "preprocessor_config.json"
    files.write_json(file, {**files.read_json(file), "resample": 2})
    with pytest.raises(UserError, match="preprocessor_config.json: is not what was written"):
        open_encoder(tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    assert open_encoder(tmp_path / "b").identity != first.identity
    assert opened(assets() / "tiny-clip", tmp_path / "c", dtype="bfloat16").identity != first.identity


def test_features_for_training_equal_the_encoders(tmp_path):
    pytest.importorskip("torch")
    encoder = opened(save(random_encoder("vit"), tmp_path / "hf", "vit"), tmp_path / "mlx")
    images = pictures()
    batch = mx.array(np.stack([preprocess.pixels(image, encoder.how) for image in images]))
    weights = encoder.shards.load(encoder.shards.names)
    ours = unit(np.array(vit.features(weights, encoder.config, batch)))
    assert relative_error(ours, encoder.embed_images(images)) < 1e-5


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(UserError, match="swish"):
        vit.ViTConfig(**CLIP_VISION, hidden_act="swish")


def test_what_is_no_encoder_directory_is_refused(tmp_path, tiny_flux):
    for path in (tmp_path, tmp_path / "nowhere", tiny_flux, assets() / "tiny-clip"):
        with pytest.raises(UserError, match="is not an MLX encoder directory"):
            open_encoder(path)
    path = convert(hf_path=str(assets() / "tiny-clip"), mlx_path=str(tmp_path / "mlx"))
    files.write_json(path / "config.json", {**files.read_json(path / "config.json"), "format": 2})
    with pytest.raises(UserError, match="format 2"):
        open_encoder(path)


def test_texts_are_refused_where_there_is_no_text_tower(tmp_path):
    pytest.importorskip("torch")
    encoder = opened(save(random_encoder("dinov2"), tmp_path / "hf", "dinov2"), tmp_path / "mlx")
    assert not encoder.has_text
    with pytest.raises(UserError, match="embeds images only"):
        encoder.embed_texts(["a cat"])


def test_any_mode_of_image_is_taken(tmp_path):
    encoder = opened(assets() / "tiny-clip", tmp_path / "mlx")
    image = pictures()[0]
    found = encoder.embed_images(
        [image.convert(mode) for mode in ("RGB", "RGBA", "P", "L", "1")] + [Image.new("L", (1, 9))]
    )
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[1])
