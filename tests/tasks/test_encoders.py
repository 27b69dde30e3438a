"""Which encoder pictures are compared with; the Hub is a small server on the loopback."""

import pytest

from mlx_blockskip import convert
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, listening
from mlx_blockskip.tasks.checkpoint import encoders, hub, hub_cache
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.encoders import clip_encoder, vision_encoder
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory
from support.hub_repos import folder, recast
from support.models import assets
from support.tasks import drive


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("choose", "name"), [(vision_encoder, "tiny-dino"), (clip_encoder, "tiny-clip")])
def test_a_small_model_gets_the_encoder_of_the_package(tiny_flux, choose, name):
    encoder, events = drive(choose, None, tiny_flux)
    assert encoder.path.parent == cache_directory()
    assert encoder.path.name.startswith(f"{name}-float32")
    assert any(isinstance(e, Note) and str(encoder.path) in e.message for e in events)
    again, events = drive(choose, name, tiny_flux)
    assert (again.identity, events) == (encoder.identity, [])


@pytest.mark.parametrize(
    ("choose", "repo"),
    [(vision_encoder, "facebook/dino-vits16"), (clip_encoder, "openai/clip-vit-base-patch32")],
)
def test_another_model_gets_one_from_the_hub(tmp_path, hub_server, choose, repo):
    (tmp_path / "transformer").mkdir()
    with (tmp_path / "transformer" / "block-000.safetensors").open("wb") as file:
        file.truncate(encoders.SMALL)
    hub_server.add(repo, {"README.md": b""})
    with pytest.raises(UserError, match=f"{repo}: has no config.json, so it is not an image encoder"):
        drive(choose, None, tmp_path)


def test_every_way_to_name_one_gives_the_same(tmp_path, tiny_flux):
    named, _ = drive(vision_encoder, "tiny-clip", tiny_flux)
    there, _ = drive(vision_encoder, str(assets() / "tiny-clip"), tiny_flux)
    path = convert(hf_path=str(assets() / "tiny-clip"), mlx_path=str(tmp_path / "mlx"))
    opened, events = drive(clip_encoder, str(path), tiny_flux)
    assert named.identity == there.identity == opened.identity
    assert events == []


def test_what_is_none_is_refused(tmp_path, tiny_flux):
    with pytest.raises(UserError, match="no such encoder; give a directory, a repo id .*tiny-dino, tiny-clip; did you"):
        drive(vision_encoder, "tinydino", tiny_flux)
    with pytest.raises(UserError, match="is not an MLX encoder directory"):
        drive(vision_encoder, str(tiny_flux), tiny_flux)
    with pytest.raises(UserError, match="is not an MLX encoder directory"):
        drive(vision_encoder, str(assets() / "tiny-flux"), tiny_flux)
    with pytest.raises(UserError, match="tiny-dino: embeds images only"):
        drive(clip_encoder, "tiny-dino", tiny_flux)


BESIDE = dict.fromkeys(("flax_model.msgpack", "onnx/model.safetensors", "tf_model.h5", "vocab.json"), b"{}")


@pytest.fixture
def clip_files():
    found = folder(assets() / "tiny-clip")
    return {**found, **BESIDE, "model.fp16.safetensors": recast(found["model.safetensors"], "fp16")}


def test_a_repo_is_downloaded_and_converted_and_that_is_said_first(hub_server, clip_files, tiny_flux):
    hub_server.add("someone/clip", clip_files)
    told = []
    with listening(lambda event: told.append((event, hub_server.fetched()))):
        clip_encoder("someone/clip", tiny_flux)
    said, fetched = told[0]
    assert "Downloading someone/clip" in said.message
    assert fetched == {"config.json"}
    assert hub_server.fetched() == {*folder(assets() / "tiny-clip"), "vocab.json"}
    hub_server.forget()
    _, events = drive(clip_encoder, "someone/clip", tiny_flux)
    assert (events, hub_server.fetched()) == ([], set())


def offer(number, status):
    """A pull request as the API lists it."""
    author, day = {"name": hub.CONVERTER}, "2024-01-01T00:00:00.000Z"
    kept = {"num": number, "title": "safetensors", "status": status, "isPullRequest": True}
    return {**kept, "author": author, "createdAt": day, "repo": {"name": "someone/clip", "type": "model"}}


def test_pickled_weights_are_taken_from_the_hubs_own_conversion(hub_server, clip_files, tmp_path, tiny_flux):
    pickled = {name: data for name, data in clip_files.items() if not name.endswith(".safetensors")}
    pickled["pytorch_model.bin"] = b"pickled"
    main = hub_server.add("someone/clip", pickled)
    offered = hub_server.add("someone/clip", {**clip_files, **pickled}, branch="refs/pr/7")
    hub_server.repos["someone/clip"].offers = [offer(3, "closed"), offer(7, "open")]
    path = clip_encoder("someone/clip", tiny_flux).path
    assert files.read_json(path / "config.json")["source"] == f"someone/clip@{offered}"
    assert convert(hf_path="someone/clip", mlx_path=str(tmp_path / "mlx"))
    refs = hub_cache.folder("someone/clip") / "refs"
    assert {str(p.relative_to(refs)): p.read_text() for p in refs.rglob("*") if p.is_file()} == {"refs/pr/7": offered}
    hub_server.repos["someone/clip"].offers = []
    assert hub.found(Repo("someone/clip"), (hub.ENCODER,))[1].sha == main


def test_another_model_is_refused_before_its_weights_are_downloaded(hub_server, clip_files, tiny_flux):
    hub_server.add("someone/llama", {**clip_files, "config.json": b'{"model_type": "llama"}'})
    hub_server.add("someone/other", {**clip_files, "config.json": b"{}"})
    with pytest.raises(UserError, match="'llama' is not supported"):
        drive(vision_encoder, "someone/llama", tiny_flux)
    with pytest.raises(UserError, match="has no model_type"):
        drive(vision_encoder, "someone/other", tiny_flux)
    assert hub_server.fetched() == {"config.json"}
