"""What lies in the place of weights: each thing is named, with what to do about it."""

import os
import pickle
import shutil
import zipfile

import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters.places import checkpoint_folder
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint import resolve
from support.models import assets

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23802932552\n"


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(assets() / "tiny-flux", tmp_path / "hf")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def instead(content):
    def damage(path):
        path.write_bytes(content)

    return damage


def away(name):
    def damage(path):
        path.unlink()
        path.with_name(name).write_bytes(b"bplist00")

    return damage


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (instead(POINTER), f"{WEIGHTS}: is git-lfs's pointer to the file.*git lfs pull"),
        (instead(b"GGUF\3\0\0\0" + bytes(40)), f"{WEIGHTS}: is a GGUF file.*llama.cpp.*safetensors"),
        (instead(pickle.dumps({"a": 1}, 2)), f"{WEIGHTS}: is a pickled file.*run code"),
        (zipped, f"{WEIGHTS}: is a pickled file"),
        (instead(b"<!DOCTYPE html><html>Log in</html>"), f"{WEIGHTS}: is a web page"),
        (instead(b"\0\5\x16\7\0\2\0\0Mac OS X"), "what macOS keeps beside a file"),
        (instead(b"{}"), r"header is cut off\); get it again"),
        (away(f".{WEIGHTS}.icloud"), f"transformer/{WEIGHTS}: is in iCloud and not on this disk"),
        (away(f"{WEIGHTS}.incomplete"), f"{WEIGHTS}.incomplete: is not downloaded to its end"),
        (away("flux1-dev-Q4_K_S.gguf"), "has no safetensors file"),
        (away("diffusion_pytorch_model.bin"), "diffusion_pytorch_model.bin: is a pickled file"),
        (away(f"._{WEIGHTS}"), "transformer: has no safetensors file"),
    ],
)
def test_it_is_named(tmp_path, source, damage, match):
    damage(source / "transformer" / WEIGHTS)
    with pytest.raises(UserError, match=match):
        convert(hf_path=str(source), mlx_path=str(tmp_path / "mlx"))
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_gguf_alone_is_named(tmp_path, source):
    (source / "transformer" / WEIGHTS).unlink()
    (source / "transformer" / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=r"Q4_K_S.gguf: is a GGUF file"):
        convert(hf_path=str(source), mlx_path=str(tmp_path / "mlx"))


def test_a_config_that_is_a_pointer_or_in_icloud_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(UserError, match="git lfs pull"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").rename(tmp_path / ".config.json.icloud")
    with pytest.raises(UserError, match="iCloud"):
        files.read_json(tmp_path / "config.json")


@pytest.fixture
def cached(tmp_path, source):
    """tiny-flux as the Hub's client keeps it: two snapshots, of which the second is broken."""
    cache = tmp_path / "models--owner--name"
    for commit in ("aaaa", "bbbb"):
        shutil.copytree(source, cache / "snapshots" / commit)
        os.utime(cache / "snapshots" / commit, (0, 0))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaa")
    os.utime(cache / "snapshots" / "bbbb", (9, 9))
    return cache


def test_the_hubs_cache_folder_is_its_snapshot(tmp_path, cached, source):
    assert checkpoint_folder(source) == source
    assert checkpoint_folder(cached) == cached / "snapshots" / "aaaa"
    path = convert(hf_path=str(cached), mlx_path=str(tmp_path / "mlx"))
    assert open_model(path).identity
    (cached / "refs" / "main").write_text("cccc")
    assert checkpoint_folder(cached) == cached / "snapshots" / "bbbb"
    shutil.rmtree(cached / "snapshots")
    (cached / "snapshots").mkdir()
    with pytest.raises(UserError, match="without a downloaded snapshot"):
        checkpoint_folder(cached)


def test_it_may_be_named_as_a_model_too(cached, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))
    assert open_model(resolve.resolve(str(cached))).identity
