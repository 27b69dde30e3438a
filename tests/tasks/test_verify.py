"""`verify` finds whatever is not as it was written, names it, and finds nothing in what is whole."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import on_every
from typer.testing import CliRunner

from mlx_blockskip import verify
from mlx_blockskip.cli import app
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from mlx_blockskip.tasks.train import precompute
from support.models import HEDGEHOG, assets, prepared, random_tree
from support.models import convert as convert_directory

INDEX = "model.safetensors.index.json"


def problems(path):
    """(file's path inside, tensor, expected, actual) of each."""
    found = verify(path=str(path))
    assert found.healthy == (not found.problems)
    return [(str(p.file.relative_to(path)), p.tensor, p.expected, p.actual) for p in found.problems]


@pytest.fixture
def model(tiny_sana, tmp_path):
    return shutil.copytree(tiny_sana, tmp_path / "model")


@pytest.fixture
def adapter(tiny_flux, tmp_path):
    opened = open_model(tiny_flux)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", random_tree(opened, (1,), rank=2), opened, {"family": "flux1", "rank": 2})
    return tmp_path / "adapter"


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(bytes(content))


@on_every
def test_what_is_whole_has_no_problems(family_model, tmp_path):
    found = verify(path=str(family_model))
    assert (found.kind, found.problems) == ("model", ())
    assert found.nbytes == sum(p.stat().st_size for p in family_model.rglob("*.safetensors"))
    assert found.files == len(list(family_model.rglob("*.safetensors")))
    assert bool(found.notes) == ("toy" in str(family_model))  # a family without a converter


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_and_encoders_are_whole_too(tmp_path, bits):
    path = convert_directory(assets() / "tiny-flux", tmp_path / "m", bits=bits, modulation_bits=8, dtype="bfloat16")
    assert problems(path) == []
    index = files.read_json(path / "transformer" / INDEX)
    index["metadata"]["group_sizes"]["transformer_blocks.0.attn.to_q"] = 64 // 2
    files.write_json(path / "transformer" / INDEX, index)
    assert ("transformer/model.safetensors.index.json", None) in [p[:2] for p in problems(path)]
    (path / "manifest.json").unlink()
    name, said = "transformer_blocks.0.attn.to_q.weight", f"{bits} bits in groups of 64"
    shape, record = problems(path)
    assert shape[:3] == ("transformer/block-000.safetensors", name, "a shape of [128, 128]")
    assert (record[:2], record[3]) == (("config.json", f"transformer.{name}"), said)


def test_an_encoder(tmp_path):
    from mlx_blockskip import convert

    path = convert(hf_path=str(assets() / "tiny-clip"), mlx_path=str(tmp_path / "clip"))
    assert verify(path=str(path)).kind == "encoder"
    assert problems(path) == []
    flip(next((path / "text").glob("*.safetensors")), -1)
    ((file, _, expected, _),) = problems(path)
    assert file.startswith("text/")
    assert expected.startswith("sha256")


def test_a_bit_anywhere_in_a_weight_file_is_found(model):
    """In the length of the header, the header, the first and the last tensor, and places between."""
    shard = model / "transformer" / "block-001.safetensors"
    whole, size = shard.read_bytes(), shard.stat().st_size
    length = int.from_bytes(whole[:8], "little")
    places = [0, 7, 8, 9, length // 2, 8 + length - 1, 8 + length, size - 1]
    places += [int(x) for x in np.random.Generator(np.random.Philox(0)).integers(8, size, 12)]
    for number, place in enumerate(places):
        flip(shard, place, number % 8)
        (first, *_) = problems(model)
        assert first[:2] == ("transformer/block-001.safetensors", None)
        assert first[2] == f"sha256 {files.read_json(shard.parent / INDEX)['metadata']['sha256'][shard.name]}"
        assert first[3] == files.sha256(shard)
        shard.write_bytes(whole)
    assert problems(model) == []


def test_every_problem_of_a_model_is_named(model):
    folder = model / "transformer"
    (folder / "block-000.safetensors").unlink()
    cut = folder / "block-001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    files.save_tensors(folder / "stray.safetensors", {"x": mx.zeros(1)})
    index = files.read_json(folder / INDEX)
    held = index["weight_map"].pop("proj_out.bias")
    index["weight_map"]["new.bias"] = held
    files.write_json(folder / INDEX, index)
    shutil.rmtree(model / "text_encoder")
    found = problems(model)
    assert ("transformer/block-000.safetensors", None, "a file", "none") in found
    assert any(f == "transformer/block-001.safetensors" and e.startswith("sha256") for f, _, e, _ in found)
    assert (f"transformer/{held}", "new.bias", "a tensor", "none") in found
    assert (f"transformer/{held}", "proj_out.bias", f"no tensor that {INDEX} does not name", "one") in found
    assert ("transformer/stray.safetensors", None, f"no file that {INDEX} does not name", "one") in found
    assert any(f == f"text_encoder/{INDEX}" and a == "no such file" for f, _, _, a in found)


def test_shapes_are_held_against_the_configs(model):
    path = model / "vae" / "config.json"
    config = files.read_json(path)
    files.write_json(path, config | {"in_channels": 4})
    assert any(t and t.startswith("encoder.conv_in.") and "shape" in e for _, t, e, _ in problems(model))
    files.write_json(path, config | {"scaling_factor": "much"})
    assert any(f == "vae/config.json" and "scaling_factor" in a for f, _, _, a in problems(model))
    path.write_text("{")
    assert any(f == "vae/config.json" for f, _, _, _ in problems(model))
    files.write_json(path, config)
    (model / "config.json").write_text("[")
    assert problems(model)[0][0] == "config.json"


def test_an_adapter(adapter):
    assert verify(path=str(adapter)).kind == "adapter"
    assert (problems(adapter), verify(path=str(adapter)).notes) == ([], ())
    factors = adapter / "adapters.safetensors"
    flip(factors, -3)
    ((file, tensor, expected, actual),) = problems(adapter)
    assert (file, tensor) == ("adapters.safetensors", None)
    assert expected == f"sha256 {files.read_json(adapter / 'adapter_config.json')['sha256'][file]}"
    assert actual == files.sha256(factors)
    factors.unlink()
    assert problems(adapter) == [("adapters.safetensors", None, "a file", "none")]


def test_an_adapter_of_an_earlier_version_goes_by_shapes_and_values(adapter):
    config = files.read_json(adapter / "adapter_config.json")
    del config["sha256"]
    files.write_json(adapter / "adapter_config.json", config)
    (note,) = verify(path=str(adapter)).notes
    assert "records no checksum" in note
    file = adapter / "adapters.safetensors"
    held = files.load_lazily(file)
    mx.eval(held)
    first = next(name for name in held if name.endswith("lora_a"))
    other = first.replace("lora_a", "lora_b")
    cases = (
        ({first: held[first] * mx.inf}, (first, "finite factors")),
        ({other: mx.zeros((3, 8))}, (other, "rank 2")),
        ({other: None}, (first, "its other factor")),
        ({"what": mx.zeros(3)}, ("what", "a factor lora_a (in, r) or lora_b (r, out)")),
    )
    for change, wanted in cases:
        files.save_tensors(file, {k: v for k, v in {**held, **change}.items() if v is not None})
        assert wanted in [(tensor, expected) for _, tensor, expected, _ in problems(adapter)]
    files.save_tensors(file, held)
    (adapter / "checkpoints" / "step-000001").mkdir(parents=True)
    moments = adapter / "checkpoints" / "step-000001" / "moments.safetensors"
    files.save_tensors(moments, {"m/1/x": mx.array([1.0, mx.nan])})
    assert problems(adapter) == [
        ("checkpoints/step-000001/moments.safetensors", "m/1/x", "finite values", "1 that are not")
    ]


def test_a_residual_cache(toy, tmp_path):
    fixed = {"model": str(toy), "data": str(HEDGEHOG), "resolution": 64, "train_resolution": 32, "class_images": 0}
    fixed |= {"adapter_path": str(tmp_path / "a"), "iters": 9, "rank": 2, "batch_size": 2}
    job = prepared(TrainSettings(**fixed, skip_first=1, skip_last=1))
    path = job.cache / "chunk-0000.safetensors"
    precompute.compute_chunk(job, range(2, 6), path, "x", {})
    found = verify(path=str(job.cache))
    assert (found.kind, found.problems) == ("cache", ())
    held = files.load_lazily(path)
    mx.eval(held)
    metadata = files.read_header(path).metadata
    cases = (
        ({"2.target": held["2.target"] * mx.nan}, metadata, "2.target", "finite values"),
        ({"3.entry.image": None}, metadata, "3.entry.image", "a tensor"),
        ({"4.weight": mx.zeros(1)}, metadata, "4.weight", "2 samples"),
        ({"5.captions": mx.array([0, 77], mx.int32)}, metadata, "5.captions", "prompts that the chunk has"),
        ({}, None, None, "a fingerprint in its metadata"),
    )
    for change, said, tensor, expected in cases:
        files.save_tensors(path, {k: v for k, v in {**held, **change}.items() if v is not None}, said)
        assert [p[:3] for p in problems(job.cache)] == [("chunk-0000.safetensors", tensor, expected)]
    path.write_bytes(path.read_bytes()[:-8])
    assert problems(job.cache)[0][2] == "a whole file"


def test_other_directories_are_refused(tmp_path):
    for path, match in (
        ("", "PATH: no such directory"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "holds no model, adapter or residual cache"),
        (assets() / "tiny-flux", "is in Hugging Face layout, which records no checksums"),
        (assets() / "tiny-clip", "holds no model"),
    ):
        with pytest.raises(UserError, match=match):
            verify(**({"path": str(path)} if path else {}))


def test_the_status_and_the_document(model):
    run = CliRunner().invoke(app, ["verify", str(model)])
    assert run.exit_code == 0, run.output
    assert "as it was written" in run.output
    flip(next((model / "vae").glob("*.safetensors")), -1)
    run = CliRunner().invoke(app, ["verify", str(model)])
    assert run.exit_code == 1
    assert "sha256" in run.output
    run = CliRunner().invoke(app, ["verify", str(model), "--json"])
    document = json.loads(run.stdout)
    assert (run.exit_code, document["healthy"], document["kind"], len(document["problems"])) == (1, False, "model", 1)
    assert set(document["problems"][0]) == {"file", "tensor", "expected", "actual"}
