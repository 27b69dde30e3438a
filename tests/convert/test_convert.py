"""Conversion: what comes out equals what went in, whatever the layout; what is wrong is refused by name."""

import json
import shutil
from dataclasses import asdict

import mlx.core as mx
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.encoders import autoencoder_kl
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.converters.table import Component, Row
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.registry import open_model, read_config
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from mlx_blockskip.tasks.checkpoint.convert import notes as convert_notes
from support.compare import relative_error, same_bits
from support.models import assets
from support.models import convert as convert_directory
from support.tasks import drive

SOURCE = assets() / "tiny-flux"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path):
    """A copy of tiny-flux to damage."""
    return shutil.copytree(SOURCE, tmp_path / "hf")


def converted(tmp_path, source=SOURCE, name="mlx", **options):
    return convert(hf_path=str(source), mlx_path=str(tmp_path / name), **options)


def test_every_tensor_equals_its_source(tmp_path):
    path = converted(tmp_path, dtype="float32")
    for component in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        ours, theirs = Shards(path / component), open_source(SOURCE / component)
        assert set(theirs.tensors) == set(ours.names)
        for name in theirs.tensors:
            a, b = ours.load([name])[name], theirs.read(name).astype(mx.float32)
            assert same_bits(a, b.transpose(0, 2, 3, 1) if b.ndim == 4 else b), name


def test_the_directory_is_as_documented(tmp_path):
    path = converted(tmp_path, dtype="float32")
    config = read_config(path)
    assert config["family"] == "flux1"
    assert config["defaults"]["max_sequence_length"] == 24
    assert config["components"] == ["transformer", "text_encoder", "text_encoder_2", "vae"]
    for extra in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json", "README.md"):
        assert (path / extra).is_file(), extra
    index = files.read_json(path / "transformer" / "model.safetensors.index.json")
    shards = set(index["weight_map"].values())
    assert shards == {f"block-{i:03d}.safetensors" for i in range(12)} | {"rest.safetensors"}
    assert {p.name for p in (path / "transformer").glob("*.safetensors")} == shards
    for file, checksum in index["metadata"]["sha256"].items():
        assert files.sha256(path / "transformer" / file) == checksum
    block = files.read_header(path / "transformer" / "block-004.safetensors")
    assert all(name.startswith("single_transformer_blocks.0.") for name in block.entries)
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "layout", ["sharded", "sharded without index", "with fp16 beside", "legacy names", "tied name"]
)
def test_other_layouts_of_the_same_weights_give_the_same_model(tmp_path, source, layout):
    folder = source / "transformer"
    tensors = files.load_lazily(folder / WEIGHTS)
    mx.eval(tensors)
    if layout.startswith("sharded"):
        names = sorted(tensors)
        (folder / WEIGHTS).unlink()
        weight_map = {}
        for i in range(3):
            shard = f"model-{i + 1:05d}-of-00003.safetensors"
            files.save_tensors(folder / shard, {name: tensors[name] for name in names[i::3]})
            weight_map |= dict.fromkeys(names[i::3], shard)
        if layout == "sharded":
            files.write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": weight_map})
    elif layout == "with fp16 beside":
        files.save_tensors(folder / "diffusion_pytorch_model.fp16.safetensors", {k: v * 0 for k, v in tensors.items()})
    elif layout == "tied name":
        t5 = source / "text_encoder_2" / "model.safetensors"
        held = files.load_lazily(t5)
        held["encoder.embed_tokens.weight"] = held.pop("shared.weight")
        files.save_tensors(t5, held)
    else:
        clip = source / "text_encoder" / "model.safetensors"
        held = {f"text_model.{k}": v for k, v in files.load_lazily(clip).items()}
        held["text_model.embeddings.position_ids"] = mx.arange(77)[None]
        files.save_tensors(clip, held)
        t5 = source / "text_encoder_2" / "model.safetensors"
        held = files.load_lazily(t5)
        files.save_tensors(t5, {**held, "encoder.embed_tokens.weight": held["shared.weight"]})
    one, two = converted(tmp_path, name="one"), converted(tmp_path, source, name="two")
    assert open_model(one).identity == open_model(two).identity


def test_old_attention_names_and_shapes_of_the_vae_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model.save_pretrained(tmp_path / "new")
    tensors = files.load_lazily(tmp_path / "new" / WEIGHTS)
    mx.eval(tensors)
    old = {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in tensors.items():
        for new, legacy in names.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, legacy)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor
    (tmp_path / "old").mkdir()
    files.save_tensors(tmp_path / "old" / WEIGHTS, old)
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    made = autoencoder_kl("vae", AutoencoderKLConfig.read(tmp_path / "new" / "config.json"))
    found = []
    for name in ("new", "old"):
        source = open_source(tmp_path / name)
        run.check_rows(made, source)
        (tmp_path / f"{name}-mlx").mkdir()
        list(write.write_component(made, source, tmp_path / f"{name}-mlx", write.Precision("float32")))
        found.append(Shards(tmp_path / f"{name}-mlx"))
    assert found[0].checksums == found[1].checksums


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("modulation", ["none", "8"])
def test_quantizes_the_linear_layers_of_blocks_and_nothing_else(tmp_path, bits, modulation):
    path = converted(tmp_path, quantize=True, q_bits=bits, q_modulation=modulation, q_group_size=32, dtype="float32")
    shards = Shards(path / "transformer")
    quantized = {name.removesuffix(".scales") for name in shards.names if name.endswith(".scales")}
    wanted = {"attn.to_q", "ff.net.2"} | ({"norm1.linear"} if modulation == "8" else set())
    assert {name.removeprefix("transformer_blocks.0.") for name in quantized} >= wanted
    assert ("transformer_blocks.0.norm1.linear" in quantized) == (modulation == "8")
    assert all("transformer_blocks." in name for name in quantized)
    name = "single_transformer_blocks.3.proj_out"
    parts = shards.load(shards.under(name + "."))
    whole = open_source(SOURCE / "transformer").read(f"{name}.weight").astype(mx.float32)
    ours = mx.dequantize(*(parts[f"{name}.{p}"] for p in ("weight", "scales", "biases")), group_size=32, bits=bits)
    assert relative_error(ours, whole) < {4: 0.15, 6: 0.04, 8: 0.01}[bits]
    assert not any(n.endswith(".scales") for n in Shards(path / "vae").names)
    assert any(n.endswith(".scales") for n in Shards(path / "text_encoder_2").names)
    assert read_config(path)["quantization"]["bits"] == bits


def test_the_group_size_falls_back_and_is_recorded():
    precision = write.Precision("float32", bits=4, group_size=64)
    groups = [precision.group_for(Row("x", (8, width), "linear")) for width in (128, 96, 5600, 40)]
    assert groups == [64, 32, 32, 0]


def test_dtypes(tmp_path):
    path = converted(tmp_path, dtype="float16")
    kinds = {
        component: Shards(path / component).load([name])[name].dtype
        for component, name in (
            ("transformer", "proj_out.weight"),
            ("text_encoder_2", "shared.weight"),
            ("vae", "decoder.conv_in.weight"),
        )
    }
    assert kinds == {"transformer": mx.float16, "text_encoder_2": mx.bfloat16, "vae": mx.bfloat16}


def test_memory_stays_at_about_one_tensor(tmp_path):
    """A checkpoint many times the allowed peak, in one shard."""
    folder = tmp_path / "hf" / "big"
    folder.mkdir(parents=True)
    tensors = {f"blocks.{i}.w.weight": philox.normal(0, i, shape=(512, 1024)) for i in range(32)}
    entries = [files.TensorEntry(name, t.shape, "F32") for name, t in tensors.items()]
    with files.SafetensorsWriter(folder / WEIGHTS, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    files.write_json(folder / "config.json", {})
    from mlx_blockskip.converters.encoders import block_of

    made = Component(
        "big",
        tuple(Row(name, (512, 1024), "linear") for name in tensors),
        block=lambda name: block_of(r"blocks\.\d+\.", name),
    )
    one = 512 * 1024 * 4
    for quantized in (0, 4):
        (tmp_path / f"mlx{quantized}").mkdir()
        mx.set_cache_limit(0)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        list(
            write.write_component(
                made, open_source(folder), tmp_path / f"mlx{quantized}", write.Precision("bfloat16", quantized)
            )
        )
        assert mx.get_peak_memory() - before < 3 * one < 32 * one / 8


@pytest.mark.parametrize("fix", ["none", "first", "second", "pointwise", "conv"])
@pytest.mark.parametrize("bits", [0, 4])
def test_a_large_tensor_goes_in_parts_and_gives_the_same_file(tmp_path, monkeypatch, bits, fix):
    if fix == "conv":
        row = Row("blocks.0.w.weight", (4096, 2, 2, 128), "plain", fix)
    else:
        row = Row("blocks.0.w.weight", (4096, 512), "linear", fix)
    shape = {"first": (8192, 512), "second": (8192, 512), "pointwise": (4096, 512, 1, 1)}.get(fix, row.their_shape())
    folder = tmp_path / "hf"
    folder.mkdir()
    theirs = mx.array(philox.normal(0, 1, shape=shape))
    files.save_tensors(folder / WEIGHTS, {row.name: theirs})
    files.write_json(folder / "config.json", {})
    made, source = Component("big", (row,), block=lambda name: None), open_source(folder)
    written, peaks = [], []
    for part in (1 << 30, 1 << 18):
        monkeypatch.setattr(write, "PART_BYTES", part)
        target = tmp_path / str(part)
        target.mkdir()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        list(write.write_component(made, source, target, write.Precision("bfloat16", bits)))
        peaks.append(mx.get_peak_memory() - before)
        written.append((target / "rest.safetensors").read_bytes())
    assert written[0] == written[1]
    assert peaks[1] < peaks[0] / 8
    if not bits:
        own = theirs.transpose(0, 2, 3, 1) if fix == "conv" else theirs[4096:] if fix == "second" else theirs[:4096]
        ours = mx.load(str(target / "rest.safetensors"))[row.name]
        assert same_bits(ours, own.reshape(row.shape).astype(mx.bfloat16))


@pytest.mark.parametrize("fix", ["none", "first", "second", "pointwise", "conv"])
@pytest.mark.parametrize("part", [1 << 30, 1 << 10])
def test_what_is_stored_in_the_wanted_type_keeps_its_bits_and_gets_our_layout(tmp_path, monkeypatch, fix, part):
    row = Row("w", (16, 3, 3, 8), "plain", fix) if fix == "conv" else Row("w", (16, 8), "plain", fix)
    shape = {"first": (32, 8), "second": (32, 8), "pointwise": (16, 8, 1, 1)}.get(fix, row.their_shape())
    theirs = mx.array(philox.normal(0, 1, shape=shape)).astype(mx.bfloat16)
    files.save_tensors(tmp_path / WEIGHTS, {"w": theirs})
    files.write_json(tmp_path / "config.json", {})
    monkeypatch.setattr(write, "PART_BYTES", part)
    (tmp_path / "mlx").mkdir()
    made = Component("t", (row,), block=lambda name: None)
    list(write.write_component(made, open_source(tmp_path), tmp_path / "mlx", write.Precision("bfloat16")))
    own = theirs.transpose(0, 2, 3, 1) if fix == "conv" else theirs[16:] if fix == "second" else theirs[:16]
    shards = Shards(tmp_path / "mlx")
    assert same_bits(shards.load(["w"])["w"], own.reshape(row.shape))
    assert shards.checksums == {"rest.safetensors": files.sha256(tmp_path / "mlx" / "rest.safetensors")}


def pickled(source):
    (source / "transformer" / WEIGHTS).rename(source / "transformer" / "diffusion_pytorch_model.bin")


def leaving(source):
    index = {"weight_map": {"proj_out.weight": "../../evil.safetensors"}}
    files.write_json(source / "transformer" / f"{WEIGHTS}.index.json", index)


def renamed(source):
    path = source / "transformer" / WEIGHTS
    tensors = files.load_lazily(path)
    mx.eval(tensors)
    tensors["proj_in.weight"] = tensors.pop("proj_out.weight")
    files.save_tensors(path, tensors)


def added(source):
    path = source / "transformer" / WEIGHTS
    files.save_tensors(path, {**files.load_lazily(path), "surprise": mx.zeros((1,))})


def reshaped(source):
    config = files.read_json(source / "transformer" / "config.json")
    files.write_json(source / "transformer" / "config.json", {**config, "joint_attention_dim": 64})


def truncated(source):
    path = source / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def no_shard(source):
    index = {"weight_map": {"proj_out.weight": "gone.safetensors"}}
    files.write_json(source / "transformer" / f"{WEIGHTS}.index.json", index)


def doubled(source):
    shutil.copy(source / "transformer" / WEIGHTS, source / "transformer" / "second.safetensors")


def no_config(source):
    (source / "vae" / "config.json").write_text("{broken")


def config_is_a_list(source):
    files.write_json(source / "vae" / "config.json", [1])


def value_is_null(source):
    config = files.read_json(source / "transformer" / "config.json")
    files.write_json(source / "transformer" / "config.json", {**config, "num_layers": None})


def index_is_a_list(source):
    files.write_json(source / "model_index.json", [1])


def integers(source):
    path = source / "transformer" / WEIGHTS
    tensors = files.load_lazily(path)
    files.save_tensors(path, {**tensors, "proj_out.bias": tensors["proj_out.bias"].astype(mx.int32)})


def no_index(source):
    (source / "model_index.json").unlink()


def other_pipeline(source):
    (source / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def no_tokenizer(source):
    shutil.rmtree(source / "tokenizer_2")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (pickled, "pickled"),
        (leaving, "leaves the folder"),
        (renamed, "lacks proj_out.weight"),
        (added, "unexpected surprise"),
        (reshaped, r"wrongly shaped context_embedder.weight \(F16 .* instead of floats \[128, 64\]\)"),
        (integers, r"wrongly shaped proj_out.bias \(I32"),
        (config_is_a_list, "vae/config.json: holds a list"),
        (value_is_null, "transformer/config.json: num_layers is null, where a whole number of at least 0 is needed"),
        (index_is_a_list, "model_index.json: holds a list"),
        (truncated, "cut off"),
        (no_shard, "gone.safetensors"),
        (doubled, "second.safetensors"),
        (no_config, "config.json"),
        (no_index, "model_index.json"),
        (other_pipeline, "StableDiffusionPipeline is not supported"),
        (no_tokenizer, "tokenizer_2"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left_behind(tmp_path, source, damage, match):
    damage(source)
    with pytest.raises(UserError, match=match):
        converted(tmp_path, source)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_an_existing_target_is_refused_and_kept(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        converted(tmp_path)
    assert (tmp_path / "mlx" / "mine").read_text() == "precious"


def test_the_disk_must_have_room(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda path: 1000)
    with pytest.raises(UserError, match="are needed"):
        converted(tmp_path)


@pytest.mark.parametrize("precision", [write.Precision("float16"), write.Precision("float32", 6, 32, 8)])
def test_the_room_that_is_asked_for_is_what_is_written(tmp_path, precision):
    path = convert_directory(SOURCE, tmp_path / "mlx", **asdict(precision))
    asked = sum(write.size_of(component, precision) for component, _ in run.open_checkpoint(SOURCE, "flux1"))
    written = [files.read_header(shard).entries.values() for shard in path.rglob("*.safetensors")]
    assert asked == sum(entry.nbytes for entries in written for entry in entries)


def test_layers_that_the_group_size_does_not_divide_are_recorded_and_said(tmp_path):
    widths = {"a": 128, "b": 96, "c": 40, "d": 64}
    rows = [Row(f"blocks.0.{name}.weight", (64, width), "linear") for name, width in widths.items()]
    made = Component("t", tuple(rows), block=lambda name: "blocks.0.")
    precision = write.Precision("float32", bits=4, group_size=64)
    expected = {"t/blocks.0.b": 32, "t/blocks.0.c": 0}
    assert write.exceptions(made, precision) == expected
    assert write.exceptions(made, write.Precision("float32")) == {}
    source = tmp_path / "t"
    source.mkdir()
    files.save_tensors(source / WEIGHTS, {row.name: mx.ones(row.shape) for row in rows})
    opened = open_source(source)
    config = write.model_config(tmp_path, "flux1", precision, [(made, opened)], "here")
    assert config["quantization"] == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "t.blocks.0.b": {"group_size": 32, "bits": 4}, "t.blocks.0.c": False,
    }  # fmt: skip
    smaller, whole = (note.message for note in drive(convert_notes, [made], precision)[1])
    assert "1 layers have inputs that 64 does not divide, and get groups of 32: t/blocks.0.b" in smaller
    assert "stay whole: t/blocks.0.c" in whole
    files.write_json(source / "config.json", {})
    (tmp_path / "out").mkdir()
    list(write.write_component(made, opened, tmp_path / "out", precision))
    shards = Shards(tmp_path / "out")
    assert shards.group_sizes == {"blocks.0.a": 64, "blocks.0.b": 32, "blocks.0.d": 64}
    assert shards.load(["blocks.0.c.weight"])["blocks.0.c.weight"].dtype == mx.float32
    assert sum(shards.nbytes([name]) for name in shards.names) == write.size_of(made, precision)


def test_an_mlx_directory_is_not_converted_again(tmp_path):
    path = converted(tmp_path)
    with pytest.raises(UserError, match="is an MLX model directory already"):
        converted(tmp_path, path, name="again")


def test_an_old_format_or_another_directory_is_refused(tmp_path):
    path = converted(tmp_path)
    files.write_json(path / "config.json", {**read_config(path), "format": 2})
    with pytest.raises(UserError, match="format 2"):
        open_model(path)
    with pytest.raises(UserError, match="not an MLX model directory"):
        open_model(SOURCE / "vae")
