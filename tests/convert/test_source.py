"""Which files of a folder are read: one variant, whole, and nothing that an index makes up."""

import os
import shutil

import mlx.core as mx
import pytest

from mlx_blockskip.converters.source import open_source, preferred, variant
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from support.models import assets
from support.published import HUB

MAIN = "diffusion_pytorch_model.safetensors"
INDEX = f"{MAIN}.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of tiny-flux' transformer folder."""
    return shutil.copytree(assets() / "tiny-flux" / "transformer", tmp_path / "transformer")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusion_pytorch_model.safetensors", ""),
        ("model-00001-of-00002.safetensors", ""),
        ("flux.fp16/model.safetensors", ""),
        ("my-fp16-model.safetensors", ""),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
        ("model.bf16.safetensors", "bf16"),
    ],
)
def test_variants_are_known_by_name(name, expected):
    assert variant(name) == expected


def add_variant(folder, index, shards=2):
    """The weights once more, sharded, as diffusers writes a variant."""
    tensors = files.load_lazily(folder / MAIN)
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        shard = f"diffusion_pytorch_model.fp16-{i + 1:05d}-of-{shards:05d}.safetensors"
        files.save_tensors(folder / shard, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], shard)
    if index:
        files.write_json(folder / index, {"weight_map": weight_map})


@pytest.mark.parametrize(
    "index",
    [
        None,
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_sharded_variant_is_read_only_where_it_is_alone(folder, index, alone):
    whole = set(open_source(folder).tensors)
    add_variant(folder, index)
    if alone:
        (folder / MAIN).unlink()
    source = open_source(folder)
    assert set(source.tensors) == whole
    assert {"fp16" in view.pieces[0].stored.path.name for view in source.tensors.values()} == {alone}


@pytest.mark.parametrize("content", [[1], {}, {"weight_map": ["a"]}, {"weight_map": {"a": None}}])
def test_an_index_that_is_none_is_refused(folder, content):
    files.write_json(folder / INDEX, content)
    with pytest.raises(UserError, match="has no weight_map of names to files|holds a list, and an object is needed"):
        open_source(folder)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "..", "/etc/passwd", "a/../../x.safetensors", "sub/x.safetensors"]
)
def test_a_shard_outside_the_folder_is_refused(folder, shard):
    files.write_json(folder / INDEX, {"weight_map": {"proj_out.weight": shard}})
    with pytest.raises(UserError, match="leaves the folder"):
        open_source(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder):
    files.write_json(folder / INDEX, {"weight_map": {"made.up": MAIN}})
    with pytest.raises(UserError, match=r"should hold made\.up"):
        open_source(folder)


def test_reading_leaves_no_file_open(folder):
    source = open_source(folder)
    before = len(os.listdir("/dev/fd"))
    kept = [source.read(name) for name in list(source.tensors)[:40]]
    assert len(os.listdir("/dev/fd")) == before
    assert all(isinstance(tensor, mx.array) for tensor in kept)


SINGLE, SHARDS = "m.safetensors", {"m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"}
INDEXED = {*SHARDS, "m.safetensors.index.json"}
HALF = {"m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors", "m.safetensors.index.fp16.json"}


@pytest.mark.parametrize(
    ("there", "read"),
    [
        ({SINGLE, *INDEXED, "m.fp16.safetensors"}, INDEXED),
        ({SINGLE, *SHARDS}, SHARDS),
        ({SINGLE, "m.safetensors.index.json", "m-00001-of-00002.safetensors"}, {SINGLE}),
        ({"m.safetensors.index.json", "m-00001-of-00002.safetensors", *HALF}, HALF),
        ({"m.safetensors.index.json", "m-00001-of-00002.safetensors"}, None),
        ({"m.bf16.safetensors", *HALF}, {"m.bf16.safetensors"}),
        ({"a.safetensors", "b.safetensors"}, None),
        (set(), None),
    ],
)
def test_of_several_copies_one_that_is_whole_is_read(there, read):
    assert preferred(there) == (there if read is None else read)


def test_the_files_of_a_published_repo_that_has_its_weights_three_times():
    listed = files.read_json(HUB / "Efficient-Large-Model--Sana_1600M_1024px_diffusers" / "files.json")["files"]
    inside = [name for name in listed if name.startswith("transformer/") and not name.endswith("config.json")]
    name = "transformer/diffusion_pytorch_model"
    shards = {f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert len(inside) == 5
    assert preferred(inside) == {*shards, f"{name}.safetensors.index.json"}


def test_a_missing_shard_without_an_index_is_named(folder):
    add_variant(folder, None)
    (folder / MAIN).unlink()
    (folder / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"fp16-00002-of-00002.safetensors: this shard is missing"):
        open_source(folder)
