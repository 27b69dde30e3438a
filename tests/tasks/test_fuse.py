"""Fusing: the model that comes out draws what base and adapter draw together, and nothing else of it has changed."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import on_every
from PIL import Image

from mlx_blockskip import fuse, generate, lora
from mlx_blockskip.converters import write
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.rounding import dithered
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.events import Warning
from mlx_blockskip.models.registry import open_model, read_config
from mlx_blockskip.settings import FuseSettings
from mlx_blockskip.tasks.checkpoint import fuse as task
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from support.compare import same_bits
from support.models import assets, random_tree
from support.models import convert as convert_directory
from support.tasks import drive
from support.toy import make_toy

LEVELS = 1
"""Of 255: a float32 model that is fused and one with its adapter beside it differ by rounding, and so may a pixel."""


KINDS = ("weight", "scales", "biases")


def adapter(path, model, blocks=(1, 2), scale=0.5, seed=0, size=0.2, **recorded):
    opened = open_model(model)
    tree = random_tree(opened, blocks, seed=seed, b_scale=size)
    path.mkdir()
    family = read_config(model)["family"]
    save_adapter(path, tree, opened, {"family": family, "scale": scale, "base_model": str(model), **recorded})
    return path


def image(tmp_path, model, adapters=(), strengths=()):
    (path,) = generate(
        model=str(model), prompt=["a red apple on a red background"], width=64, height=64, steps=2,
        adapter_path=[str(a) for a in adapters], lora_scale=list(strengths), output=str(tmp_path / "image.png"),
    )  # fmt: skip
    found = np.asarray(Image.open(path), np.float64)
    path.unlink()
    return found


def fused(target, adapters, strengths=(), **options):
    return fuse(adapter_path=[str(a) for a in adapters], lora_scale=list(strengths), save_path=str(target), **options)


@on_every
def test_a_fused_model_draws_what_base_and_adapters_draw(tmp_path, family_model):
    """Every family; two adapters that overlap, with strengths of their own."""
    one, two = adapter(tmp_path / "one", family_model), adapter(tmp_path / "two", family_model, (2, 3), 1.0, 7)
    made = fused(tmp_path / "fused", [one, two], [1.0, 0.5])
    wanted = image(tmp_path, family_model, [one, two], [1.0, 0.5])
    assert np.abs(image(tmp_path, family_model) - wanted).max() > 10 * LEVELS
    assert np.abs(image(tmp_path, made) - wanted).max() <= LEVELS


def test_only_what_an_adapter_changes_is_written_anew(tmp_path, tiny_flux):
    one = adapter(tmp_path / "one", tiny_flux, (1, 4), captions=["a hedgehog"])
    made = fused(tmp_path / "fused", [one])
    before, after = Shards(tiny_flux / "transformer"), Shards(made / "transformer")
    changed = {file for file in before.checksums if before.checksums[file] != after.checksums[file]}
    assert changed == {"block-001.safetensors", "block-004.safetensors"}
    for path in tiny_flux.rglob("*"):
        own = made / path.relative_to(tiny_flux)
        if path.suffix == ".safetensors" and path.name not in changed:
            assert own.read_bytes() == path.read_bytes(), path
        assert own.exists(), path
    for file, checksum in after.checksums.items():
        assert files.sha256(made / "transformer" / file) == checksum
    assert before.names == after.names
    own, base = read_config(made), read_config(tiny_flux)
    (said,) = own.pop("fused")
    assert own == base
    assert said["adapter"] == str(one)
    assert (said["scale"], said["captions"]) == (0.5, ["a hedgehog"])
    assert said["factors"] == lora.checksum(random_tree(open_model(tiny_flux), (1, 4), b_scale=0.2))
    again = fused(tmp_path / "again", [adapter(tmp_path / "two", made, (0,))])
    assert [one["scale"] for one in read_config(again)["fused"]] == [0.5, 0.5]


def test_weights_are_added_in_float32_and_rounded_once(tmp_path, tiny_flux):
    base = convert_directory(assets() / "tiny-flux", tmp_path / "half", dtype="bfloat16")
    one = adapter(tmp_path / "one", base, (1,))
    made = fused(tmp_path / "fused", [one])
    factors = lora.layers(random_tree(open_model(base), (1,), b_scale=0.2), open_model(base).stack)
    module = "transformer_blocks.1.ff.net.2"
    a, b = factors[module]
    stored = Shards(base / "transformer").load([f"{module}.weight"])[f"{module}.weight"]
    wanted = dithered(stored.astype(mx.float32) + (b * 0.5).T @ a.T)
    assert same_bits(Shards(made / "transformer").load([f"{module}.weight"])[f"{module}.weight"], wanted)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantized_base_is_quantized_again_or_written_whole(tmp_path, dequantize):
    base = convert_directory(
        assets() / "tiny-flux", tmp_path / "q", bits=8, group_size=32, modulation_bits=8, dtype="bfloat16"
    )
    one = adapter(tmp_path / "one", base, (1,), 1.0, size=1.0)
    made = fused(tmp_path / "fused", [one], dequantize=dequantize)
    before, after = (Whole(Shards(path / "transformer")) for path in (base, made))
    opened = open_model(base)
    a, b = lora.layers(random_tree(opened, (1,), b_scale=1.0), opened.stack)["transformer_blocks.1.attn.to_q"]
    name = "transformer_blocks.1.attn.to_q.weight"
    packed, *others = (before.shards.part(name.replace("weight", kind), 0, 128) for kind in KINDS)
    exact = mx.dequantize(packed, *(x.astype(mx.float32) for x in others), group_size=32, bits=8)
    wanted = dithered(exact + b.T @ a.T)
    if dequantize:
        assert same_bits(after.read(name, 0, 128), wanted)
        assert not [n for n in after.shards.names if n.endswith(".scales")]
        assert not [n for n in Shards(made / "text_encoder_2").names if n.endswith(".scales")]
        assert read_config(made)["quantization"] is None
        assert after.shards.group_sizes == {}
        other = "transformer_blocks.3.ff.net.2.weight"
        assert same_bits(after.read(other, 0, 128), before.read(other, 0, 128))
    else:
        assert after.quantized(name) == before.quantized(name) == (32, 8)
        for kind, value in zip(KINDS, mx.quantize(wanted, group_size=32, bits=8), strict=True):
            assert same_bits(after.shards.part(name.replace("weight", kind), 0, 128), value)
        assert read_config(made)["quantization"] == read_config(base)["quantization"]
        assert after.shards.group_sizes == before.shards.group_sizes
    drawn, known = image(tmp_path, made), image(tmp_path, base, [one])
    assert np.abs(drawn - known).mean() < 0.3 * np.abs(image(tmp_path, base) - known).mean()


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path, monkeypatch):
    """Beside the factors of the adapter, which are counted."""
    monkeypatch.setattr(write, "PART_BYTES", 1 << 12)
    peaks = []
    for depth in (4, 24):
        base = make_toy(tmp_path / f"toy-{depth}", depth=depth)
        tree = random_tree(open_model(base), range(depth))
        model = open_model(base)
        mx.eval(tree)
        whole = Whole(model.reader.shards, lora.Adapter(tree).layers(model.stack))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        task.write_fused(base, tmp_path / f"fused-{depth}", whole, read_config(base), False)
        peaks.append(mx.get_peak_memory() - before)
        assert Shards(tmp_path / f"fused-{depth}" / "transformer").identity != model.reader.shards.identity
    assert peaks[1] <= peaks[0] + (1 << 10)
    assert peaks[1] < 8 * (1 << 12)


def test_fused_for_diffusers(tmp_path, tiny_flux):
    one = adapter(tmp_path / "one", tiny_flux, (1, 6), 1.0)
    made = fused(tmp_path / "hf", [one], to="hf")
    ours = Shards(fused(tmp_path / "mlx", [one]) / "transformer")
    theirs = open_source(made / "transformer")
    assert set(theirs.tensors) == set(ours.names)
    for name in ours.names:
        assert same_bits(theirs.read(name), ours.load([name])[name]), name
    assert files.read_any_json(made / "fused.json") == read_config(tmp_path / "mlx")["fused"]
    assert np.abs(image(tmp_path, made) - image(tmp_path, tiny_flux, [one])).max() <= LEVELS


def test_a_lora_file_of_diffusers_is_fused_with_the_model_named(tmp_path, tiny_flux):
    from mlx_blockskip import export

    one = adapter(tmp_path / "one", tiny_flux)
    exported = export(adapter_path=str(one), output=str(tmp_path / "lora.safetensors"))
    with pytest.raises(UserError, match="does not say which model it is for; give --model"):
        fused(tmp_path / "fused", [exported])
    made = fused(tmp_path / "fused", [exported], model=str(tiny_flux))
    assert np.abs(image(tmp_path, made) - image(tmp_path, tiny_flux, [one])).max() <= LEVELS


def test_what_does_not_belong_together_is_refused_in_a_sentence(tmp_path, tiny_flux, tiny_sana, toy):
    one = adapter(tmp_path / "one", tiny_flux)
    bare = shutil.copytree(one, tmp_path / "bare")
    files.write_json(bare / "adapter_config.json", {"scale": 1.0})
    small = shutil.copytree(one, tmp_path / "small")
    files.write_json(small / "adapter_config.json", files.read_json(small / "adapter_config.json") | {"sha256": {}})
    name = "transformer_blocks.1.attn.to_q.lora_a"
    held = files.load_lazily(small / "adapters.safetensors")
    mx.eval(held)
    files.save_tensors(small / "adapters.safetensors", held | {name: mx.zeros((8, 3))})
    for options, match in (
        ({"adapters": [one], "model": str(tiny_sana)}, "is an adapter for flux1, and the model is one of sana"),
        ({"adapters": [bare], "model": str(toy)}, "no block|no layer"),
        ({"adapters": [small]}, "do not fit a layer of 128 -> 128"),
        ({"adapters": [one], "strengths": [1.0, 2.0]}, "--lora-scale is given 2 times for 1"),
        ({"adapters": [tmp_path / "none"], "model": str(tiny_flux)}, "no such adapter"),
    ):
        with pytest.raises(UserError, match=match):
            fused(tmp_path / "fused", **options)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="already exists; choose another --save-path"):
        fused(tmp_path / "there", [one])
    other = adapter(tmp_path / "other", tiny_flux, base_model_identity="another")
    settings = FuseSettings(adapter_path=[str(other)], save_path=str(tmp_path / "fused"))
    _, events = drive(task.fuse, settings)
    assert ["was trained on another model" in e.message for e in events if isinstance(e, Warning)] == [True]


def test_a_damaged_shard_is_not_copied(tmp_path, tiny_flux):
    base = shutil.copytree(tiny_flux, tmp_path / "base")
    one = adapter(tmp_path / "one", base)
    shard = base / "vae" / "rest.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"vae/rest\.safetensors: is not what was converted"):
        fused(tmp_path / "fused", [one])
    assert not (tmp_path / "fused").exists()
