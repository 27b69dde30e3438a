"""What a user may call a model; the Hub is played by stand-ins, without a network."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from support.models import assets

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note
from mlx_blockskip.tasks import hub
from mlx_blockskip.tasks.resolve import cache_directory, resolve


def drive(task):
    events = []
    while True:
        try:
            events.append(next(task))
        except StopIteration as done:
            return done.value, events


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))


def test_a_bundled_model_is_converted_once_and_that_is_said():
    path, events = drive(resolve("tiny-flux"))
    assert any(isinstance(e, Note) and str(path) in e.message for e in events)
    assert path.parent == cache_directory()
    assert drive(resolve("tiny-flux")) == (path, [])
    assert drive(resolve(str(path))) == (path, [])


def test_a_directory_that_changes_is_converted_again(tmp_path):
    source = shutil.copytree(assets() / "tiny-flux", tmp_path / "mine")
    first, _ = drive(resolve(str(source)))
    config = source / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    second, _ = drive(resolve(str(source)))
    assert first != second


def test_a_name_that_is_nothing_is_one_clear_error():
    with pytest.raises(UserError, match="no such model; give a directory, a repo id"):
        drive(resolve("./nowhere/at/all"))


FILES = (
    *("model_index.json", "flux1-dev.safetensors", "ae.safetensors", "transformer/config.json", "README.md"),
    *("transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "text_encoder/model.safetensors"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "tokenizer_2/spiece.model"),
    *("scheduler/scheduler_config.json", "vae/model.onnx", "transformer/x.safetensors.index.json"),
)


def test_only_what_is_converted_is_downloaded():
    kept = {name for name in FILES if hub.wanted(name)}
    assert kept == set(FILES) - {
        "flux1-dev.safetensors",
        "ae.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "vae/model.onnx",
    }


def info(size):
    return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name, size=size) for name in FILES])


def test_a_repo_is_downloaded_at_its_commit_and_converted(monkeypatch):
    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(assets() / "tiny-flux")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **options: info(10))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path, _ = drive(resolve("someone/flux"))
    assert (path / "config.json").is_file()
    assert asked["revision"] == "abc"
    assert "flux1-dev.safetensors" not in asked["allow_patterns"]


def test_the_disk_must_have_room_for_a_download(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **options: info(10**18))
    with pytest.raises(UserError, match=r"GiB free; free some, or set HF_HOME"):
        drive(hub.download("someone/flux"))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (errors.GatedRepoError, "accept its licence at https://huggingface.co/someone/flux, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "no such repo on the Hub"),
        (errors.RevisionNotFoundError, "no revision"),
        (errors.HfHubHTTPError, "could not be reached"),
        (OSError, "could not be reached"),
    ],
)
def test_the_hubs_refusals_say_the_way_out(monkeypatch, kind, match):
    def refuse(self, repo, **options):
        if kind is OSError:
            raise OSError("no route")
        raise kind("refused", response=SimpleNamespace(headers={}, status_code=403, request=None))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match=match):
        drive(hub.download("someone/flux"))
