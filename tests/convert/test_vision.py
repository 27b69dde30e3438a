"""Conversion of image encoders: every naming gives the same directory; what is wrong is refused by name."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import vision
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.vision.encoder import open_encoder
from support.compare import same_bits
from support.models import assets
from support.vision import PROCESSORS, pictures, random_encoder, save

SOURCE = assets() / "tiny-clip"
WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path):
    """A copy of tiny-clip to damage."""
    return shutil.copytree(SOURCE, tmp_path / "hf")


def converted(source, target, **options):
    return convert(hf_path=str(source), mlx_path=str(target), **options)


def held(folder):
    tensors = files.load_lazily(folder / WEIGHTS)
    mx.eval(tensors)
    return tensors


def changed(folder, **changes):
    """The config with these keys replaced; None removes one."""
    config = {**files.read_json(folder / "config.json"), **changes}
    files.write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def test_every_tensor_of_tiny_clip_equals_its_source(tmp_path):
    path = converted(SOURCE, tmp_path / "mlx")
    theirs = held(SOURCE)
    theirs.pop("logit_scale")
    for tower in ("vision", "text"):
        shards = Shards(path / tower)
        for name, tensor in shards.load(shards.names).items():
            there = theirs.pop(name if name in theirs else f"{tower}_model.{name}").astype(mx.float32)
            assert same_bits(tensor, there.transpose(0, 2, 3, 1) if there.ndim == 4 else there), name
    assert not theirs


def test_the_directory_is_as_documented(tmp_path):
    path = converted(SOURCE, tmp_path / "mlx")
    config = files.read_json(path / "config.json")
    assert (config["format"], config["encoder"], config["dtype"]) == (1, "clip", "float32")
    assert config["components"] == ["vision", "text"]
    assert config["quantization"] is None
    for name in (
        "preprocessor_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "README.md",
    ):
        assert (path / name).is_file(), name
    index = files.read_json(path / "vision" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {f"block-{i:03d}.safetensors" for i in range(6)} | {"rest.safetensors"}
    for file, checksum in index["metadata"]["sha256"].items():
        assert files.sha256(path / "vision" / file) == checksum
    assert files.read_json(path / "text" / "config.json")["eos_token_id"] == 2221


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("vit", {}), ("vit", {"qkv_bias": False}), ("dinov2", {}), ("dinov2", {"use_swiglu_ffn": True}), ("clip", {})],
)
def test_the_hubs_names_and_those_of_transformers_give_the_same_encoder(tmp_path, kind, changes):
    pytest.importorskip("torch")
    model = random_encoder(kind, **changes)
    hub, now = save(model, tmp_path / "hub", kind), save(model, tmp_path / "now", kind, save_original_format=False)
    names = set(held(hub))
    assert kind == "clip" or "encoder.layer.0.attention.attention.query.weight" in names
    assert kind == "clip" or names != set(held(now))
    headed = shutil.copytree(hub, tmp_path / "headed")
    with_head = {f"{kind}.{name}": x for name, x in held(hub).items()} | {"classifier.weight": mx.zeros((2, 24))}
    files.save_tensors(headed / WEIGHTS, with_head if kind != "clip" else held(hub))
    first, *others = (open_encoder(converted(source, tmp_path / f"{source.name}-mlx")) for source in (hub, now, headed))
    assert [other.identity for other in others] == [first.identity] * 2
    assert np.isfinite(first.embed_images(pictures())).all()


@pytest.mark.parametrize(("kind", "changes"), [("vit", {}), ("dinov2", {"use_swiglu_ffn": True}), ("dinov2", {})])
def test_our_names_are_the_hubs_again(tmp_path, kind, changes):
    pytest.importorskip("torch")
    source = save(random_encoder(kind, **changes), tmp_path / "hf", kind)
    shards = Shards(converted(source, tmp_path / "mlx") / "vision")
    ours = {vision.hub_name(name, kind) for name in shards.names}
    unused = {"embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"}
    assert ours == set(held(source)) - unused


SWIGLU = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
LARGE = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "patch_size": 14,
    },
}


@pytest.mark.parametrize(
    ("kind", "config", "unused"),
    [
        ("vit", {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}, 2),
        ("vit", {"patch_size": 8}, 2),
        ("dinov2", {"image_size": 518}, 1),
        ("dinov2", {"image_size": 518, **SWIGLU}, 1),
        ("clip", {}, 1),
        ("clip", LARGE, 1),
    ],
    ids=["dino-vits16", "dino-vitb8", "dinov2-base", "dinov2-giant", "clip-vit-base-patch32", "clip-vit-large-patch14"],
)
def test_the_rows_fit_the_published_sizes(kind, config, unused):
    torch = pytest.importorskip("torch")
    import transformers

    configs = {"vit": "ViTConfig", "dinov2": "Dinov2Config", "clip": "CLIPConfig"}
    with torch.device("meta"):
        made = getattr(transformers, configs[kind])(**config)
        model = getattr(transformers, configs[kind].replace("Config", "Model"))(made)
    left = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for component, _ in vision.components(kind, config):
        for row in component.rows:
            name = next(name for name in (row.name, *row.aliases) if name in left)
            assert row.fits(left.pop(name)), row
    assert len(left) == unused, left


def test_what_old_checkpoints_hold_besides_is_ignored(tmp_path, source):
    whole = converted(source, tmp_path / "one")
    extra = {f"{tower}_model.embeddings.position_ids": mx.arange(5)[None] for tower in ("vision", "text")}
    files.save_tensors(source / WEIGHTS, {**held(source), **extra})
    assert open_encoder(converted(source, tmp_path / "two")).identity == open_encoder(whole).identity


def test_a_config_of_differences_only_is_completed(tmp_path, source):
    whole = converted(source, tmp_path / "one")
    config = files.read_json(source / "config.json")
    text, seen = config["text_config"], config["vision_config"]
    for part in (text, seen):
        for key in ("hidden_act", "layer_norm_eps", "num_channels", "max_position_embeddings"):
            part.pop(key, None)
    dropped = {"num_hidden_layers": seen.pop("num_hidden_layers")}
    changed(source, text_config=text, vision_config=seen, vision_config_dict=dropped)
    assert open_encoder(converted(source, tmp_path / "two")).identity == open_encoder(whole).identity


@pytest.mark.parametrize("layout", ["old", "nameless", "inside processor_config.json"])
def test_preprocessing_is_found_wherever_it_is_written(tmp_path, layout):
    pytest.importorskip("torch")
    source = save(random_encoder("clip"), tmp_path / "hf", "clip")
    expected = open_encoder(converted(source, tmp_path / "one")).how
    file, config = source / "preprocessor_config.json", dict(PROCESSORS["clip"])
    if layout != "old":
        config.pop("feature_extractor_type")
    if layout == "inside processor_config.json":
        file.unlink()
        files.write_json(source / "processor_config.json", {"image_processor": config})
    else:
        files.write_json(file, config)
    assert open_encoder(converted(source, tmp_path / "two")).how == expected


def test_quantization_does_not_apply(tmp_path):
    with pytest.raises(UserError, match="is an image encoder, which is not quantized"):
        converted(SOURCE, tmp_path / "mlx", quantize=True)
    assert not (tmp_path / "mlx").exists()


def lacking(source):
    tensors = held(source)
    del tensors["visual_projection.weight"]
    files.save_tensors(source / WEIGHTS, tensors)


def added(source):
    files.save_tensors(source / WEIGHTS, {**held(source), "surprise": mx.zeros((1,))})


def reshaped(source):
    changed(source, projection_dim=95)


def other_type(source):
    changed(source, model_type="resnet")


def nameless(source):
    changed(source, model_type=None)


def of_a_wrong_type(source):
    changed(source, vision_config={"num_hidden_layers": "many"})


def heads_that_do_not_divide(source):
    changed(source, vision_config={"num_attention_heads": 5})


def other_activation(source):
    changed(source, text_config={**files.read_json(source / "config.json")["text_config"], "hidden_act": "swish"})


def no_preprocessing(source):
    (source / "preprocessor_config.json").unlink()


def other_processor(source):
    files.write_json(source / "preprocessor_config.json", {"image_processor_type": "PixtralImageProcessor"})


def no_tokenizer(source):
    (source / "tokenizer.json").unlink()


def pickled(source):
    (source / WEIGHTS).rename(source / "pytorch_model.bin")


def truncated(source):
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lacking, "lacks visual_projection.weight"),
        (added, "unexpected surprise"),
        (reshaped, r"wrongly shaped visual_projection.weight .* \[95, 128\]"),
        (other_type, "model_type 'resnet' is not supported; the image encoders are vit, dinov2, clip"),
        (nameless, "has no model_index.json"),
        (of_a_wrong_type, "config.json: vision_config: num_hidden_layers is .many., where a whole number"),
        (heads_that_do_not_divide, "config.json: vision_config: num_attention_heads 5 does not divide hidden_size 768"),
        (other_activation, "config.json: text_config: hidden_act=.swish. is not implemented"),
        (no_preprocessing, "preprocessor_config.json: no such file"),
        (other_processor, "PixtralImageProcessor"),
        (no_tokenizer, "its tokenizer .* is missing or not whole"),
        (pickled, "pickled"),
        (truncated, "cut off"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left_behind(tmp_path, source, damage, match):
    damage(source)
    with pytest.raises(UserError, match=match):
        converted(source, tmp_path / "mlx")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_an_mlx_encoder_is_not_converted_again(tmp_path):
    path = converted(SOURCE, tmp_path / "mlx")
    with pytest.raises(UserError, match="is an MLX model directory already"):
        converted(path, tmp_path / "again")
