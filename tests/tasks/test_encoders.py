"""Which encoder pictures are compared with; the Hub is played by stand-ins, without a network."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from mlx_blockskip import convert
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, listening
from mlx_blockskip.tasks.checkpoint import encoders, hub
from mlx_blockskip.tasks.checkpoint.encoders import clip_encoder, vision_encoder
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory
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
def test_another_model_gets_one_from_the_hub(tmp_path, monkeypatch, choose, repo):
    (tmp_path / "transformer").mkdir()
    with (tmp_path / "transformer" / "block-000.safetensors").open("wb") as file:
        file.truncate(encoders.SMALL)
    asked = []
    monkeypatch.setattr(
        hub, "look_up", lambda repo, revision: asked.append(repo) or SimpleNamespace(siblings=[], sha="a")
    )
    with pytest.raises(UserError, match="has no config.json, so it is not an image encoder"):
        drive(choose, None, tmp_path)
    assert asked == [repo]


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


FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "README.md"),
    *("pytorch_model.bin", "flax_model.msgpack", "model.fp16.safetensors", "onnx/model.safetensors", "tf_model.h5"),
)


class Hub:
    """A stand-in that holds tiny-clip; its safetensors are on a pull request where `offered`."""

    def __init__(self, monkeypatch):
        self.main, self.offers, self.downloads, self.looked_up = {*FILES, "model.safetensors"}, [], [], []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "get_repo_discussions", lambda api, repo, **options: iter(self.offers)
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: None)

    def model_info(self, repo, revision=None, **options):
        self.looked_up.append(revision)
        names = self.main if revision is None else {*FILES, "model.safetensors"}
        return SimpleNamespace(
            sha=revision or "main", siblings=[SimpleNamespace(rfilename=name, size=10) for name in sorted(names)]
        )

    def snapshot(self, repo, revision=None, allow_patterns=None, local_files_only=False):
        self.downloads.append((revision, allow_patterns))
        return str(assets() / "tiny-clip")


@pytest.fixture
def fake_hub(monkeypatch):
    return Hub(monkeypatch)


def test_a_repo_is_downloaded_and_converted_and_that_is_said_first(fake_hub, tiny_flux):
    told = []
    with listening(lambda event: told.append((event, list(fake_hub.downloads)))):
        clip_encoder("someone/clip", tiny_flux)
    said, downloads = told[0]
    assert "Downloading someone/clip" in said.message
    assert [names for _, names in downloads] == [["config.json"]]
    revision, names = fake_hub.downloads[-1]
    assert revision == "main"
    wanted = {*FILES[:6], "model.safetensors"}
    assert set(names) == wanted
    before = len(fake_hub.downloads)
    _, events = drive(clip_encoder, "someone/clip", tiny_flux)
    assert (events, len(fake_hub.downloads)) == ([], before)


def test_pickled_weights_are_taken_from_the_hubs_own_conversion(fake_hub, tmp_path, tiny_flux):
    fake_hub.main = {name for name in FILES if not name.endswith(".safetensors")}
    offer = SimpleNamespace(git_reference="refs/pr/7", status="open")
    fake_hub.offers = [SimpleNamespace(git_reference="refs/pr/3", status="closed"), offer]
    drive(clip_encoder, "someone/clip", tiny_flux)
    assert fake_hub.looked_up == [None, "refs/pr/7"]
    assert fake_hub.downloads[-1][0] == "refs/pr/7"
    convert(hf_path="someone/clip", mlx_path=str(tmp_path / "mlx"))
    assert fake_hub.downloads[-1][0] == "refs/pr/7"
    info = fake_hub.model_info("someone/clip")
    fake_hub.offers = []
    assert hub.in_safetensors("someone/clip", info) is info


def test_an_encoder_is_converted_from_the_hub(fake_hub, tmp_path):
    path = convert(hf_path="someone/clip", mlx_path=str(tmp_path / "mlx"))
    assert (path / "vision" / "config.json").is_file()


def test_another_model_is_refused_before_its_weights_are_downloaded(fake_hub, tmp_path, monkeypatch, tiny_flux):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.append(options) or str(tmp_path)
    )
    with pytest.raises(UserError, match="'llama' is not supported"):
        drive(vision_encoder, "someone/llama", tiny_flux)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model_type"):
        drive(vision_encoder, "someone/other", tiny_flux)
    assert [options["allow_patterns"] for options in asked] == [["config.json"]] * 2
