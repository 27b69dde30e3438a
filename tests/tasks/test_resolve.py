"""What a user may call a model; the Hub is played by stand-ins, without a network."""

import errno
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from mlx_blockskip import convert
from mlx_blockskip.converters import flux1
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, listening
from mlx_blockskip.tasks.checkpoint import hub
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory, resolve
from support.models import assets
from support.tasks import drive


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))


def test_a_bundled_model_is_converted_once_and_that_is_said():
    path, events = drive(resolve, "tiny-flux")
    assert any(isinstance(e, Note) and str(path) in e.message for e in events)
    assert path.parent == cache_directory()
    assert drive(resolve, "tiny-flux") == (path, [])
    assert drive(resolve, str(path)) == (path, [])


def test_bundled_models_are_in_float32_on_every_device_and_the_users_own_in_bfloat16_on_metal(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    assert files.read_json(resolve("tiny-flux") / "config.json")["dtype"] == "float32"
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "tiny-flux"):  # a directory of the user's wins over the bundled name
        shutil.copytree(assets() / "tiny-flux", tmp_path / name)
        assert files.read_json(resolve(name) / "config.json")["dtype"] == "bfloat16"


def test_a_directory_that_changes_is_converted_again(tmp_path):
    source = shutil.copytree(assets() / "tiny-flux", tmp_path / "mine")
    first, _ = drive(resolve, str(source))
    config = source / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    second, _ = drive(resolve, str(source))
    assert first != second


def test_a_name_that_is_nothing_is_one_clear_error():
    with pytest.raises(UserError, match="no such model; give a directory, a repo id"):
        drive(resolve, "./nowhere/at/all")


def test_a_name_that_is_nearly_right_gets_a_hint(tmp_path):
    (tmp_path / "my-flux-dev").mkdir()
    with pytest.raises(UserError, match="did you mean .*my-flux-dev"):
        drive(resolve, str(tmp_path / "my-flux-dv"))
    with pytest.raises(UserError, match=r"did you mean tiny-flux\?"):
        drive(resolve, "tinyflux")


def test_two_processes_do_not_convert_the_same_model(tmp_path):
    refused = []

    def again(event):
        if refused:  # the last ones come when the model is there
            return
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            resolve("tiny-flux")
        refused.append(event)

    with listening(again):  # the conversion is under way
        resolve("tiny-flux")
    assert refused
    other = shutil.copytree(assets() / "tiny-flux", tmp_path / "other.v1")
    drive(resolve, str(other))
    drive(resolve, str(shutil.copytree(other, tmp_path / "other.v2")))
    assert {p.suffix for p in cache_directory().glob("other*") if p.is_file()} == {".lock"}
    assert len(list(cache_directory().glob("other*.lock"))) == 2


def test_what_a_killed_conversion_left_is_removed_and_nothing_else():
    path, _ = drive(resolve, "tiny-flux")
    shutil.rmtree(path)
    leftover, other = (path.with_name(f".{name}.x1.tmp") for name in (path.name, "another-model"))
    leftover.mkdir()
    other.mkdir()
    assert drive(resolve, "tiny-flux")[0] == path
    assert not leftover.exists()
    assert other.exists()


FILES = (
    *("model_index.json", "flux1-dev.safetensors", "ae.safetensors", "transformer/config.json", "README.md"),
    *("transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "text_encoder/model.safetensors"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "tokenizer_2/spiece.model"),
    *("scheduler/scheduler_config.json", "vae/model.onnx", "transformer/x.safetensors.index.json"),
)


def test_only_what_is_converted_is_downloaded():
    kept = hub.chosen(FILES, flux1.FOLDERS, flux1.COPIED)
    assert len(kept) == len(set(kept))
    assert set(kept) == set(FILES) - {
        "flux1-dev.safetensors",
        "ae.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "vae/model.onnx",
    }


SHARDED = "transformer/model.fp16-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["vae/m.safetensors", "vae/m.fp16.safetensors"], ["vae/m.safetensors"]),
        (["vae/m.fp16.safetensors"], ["vae/m.fp16.safetensors"]),
        (["transformer/model.safetensors", SHARDED], ["transformer/model.safetensors"]),
        ([SHARDED, "transformer/model.safetensors.index.fp16.json"], None),
        (["vae/m.safetensors", "text_encoder/m.fp16.safetensors"], None),
        (["controlnet/m.safetensors", "loras/subject.safetensors", "vae/old/m.safetensors"], []),
    ],
)
def test_one_variant_of_each_component_and_no_other_folder(there, taken):
    assert sorted(hub.chosen(there, flux1.FOLDERS, flux1.COPIED)) == sorted(there if taken is None else taken)


def info(size, sha="abc", names=FILES):
    return SimpleNamespace(sha=sha, siblings=[SimpleNamespace(rfilename=name, size=size) for name in names])


class Hub:
    """A stand-in: it answers or not, holds tiny-flux, and counts what it is asked for."""

    def __init__(self, monkeypatch):
        self.size, self.sha, self.names, self.error = 10, "abc", FILES, None
        self.source = assets() / "tiny-flux"
        self.cached: set[str] = set()
        self.downloads: list[list[str]] = []
        self.local = False
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **options: self.model_info())
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(
            huggingface_hub,
            "try_to_load_from_cache",
            lambda repo, name, revision: name if name in self.cached else None,
        )

    def model_info(self):
        if self.error:
            raise self.error
        return info(self.size, self.sha, self.names)

    def snapshot(self, repo, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if not self.local:
                raise errors.LocalEntryNotFoundError("nothing here")
        else:
            self.downloads.append(allow_patterns)
        return str(self.source)


@pytest.fixture
def fake_hub(monkeypatch):
    return Hub(monkeypatch)


NO_ROUTE = errors.HfHubHTTPError.__bases__[0]("no route")
"""What the HTTP library of huggingface_hub raises where there is no network: in some versions no OSError."""


def test_a_repo_is_converted_once_a_commit_and_then_its_download_may_go(fake_hub):
    path, _ = drive(resolve, "someone/flux")
    count = len(fake_hub.downloads)
    fake_hub.source = None
    assert drive(resolve, "someone/flux") == (path, [])
    assert len(fake_hub.downloads) == count
    fake_hub.source, fake_hub.sha = assets() / "tiny-flux", "def"
    assert drive(resolve, "someone/flux")[0] != path


def test_without_the_hub_what_was_converted_before_is_used_and_that_is_said(fake_hub):
    path, _ = drive(resolve, "someone/flux")
    fake_hub.error = NO_ROUTE
    found, events = drive(resolve, "someone/flux")
    assert found == path
    assert "could not be reached (no route)" in events[0].message
    assert str(path) in events[0].message
    with pytest.raises(UserError, match="try again when online"):
        drive(resolve, "someone/else")
    with pytest.raises(UserError, match="try again when online"):
        drive(resolve, "someone/flux@v2")


def test_without_the_hub_what_was_downloaded_before_is_converted(fake_hub):
    fake_hub.error, fake_hub.local = NO_ROUTE, True
    path, events = drive(resolve, "someone/flux")
    assert (path / "config.json").is_file()
    assert "downloaded before" in events[0].message
    source, events = drive(hub.download, "someone/flux")
    assert source == assets() / "tiny-flux"
    assert "downloaded before" in events[0].message


def test_what_is_not_implemented_is_refused_before_weights_are_downloaded(fake_hub, tmp_path):
    fake_hub.source = shutil.copytree(assets() / "tiny-flux", tmp_path / "hf")
    config = fake_hub.source / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"patch_size": 1', '"patch_size": 2'))
    with pytest.raises(UserError, match="patch_size=2 is not implemented"):
        drive(hub.download("someone/flux"))
    assert fake_hub.downloads == [["model_index.json"], ["scheduler/scheduler_config.json", "transformer/config.json"]]


def test_what_is_in_the_hubs_cache_needs_no_room(fake_hub):
    fake_hub.size = 10**18
    fake_hub.cached = set(FILES)
    source, events = drive(hub.download, "someone/flux")
    assert source == assets() / "tiny-flux"
    assert not events


def test_a_pipeline_that_is_not_supported_is_refused_before_its_weights_are_downloaded(fake_hub, tmp_path):
    fake_hub.source = tmp_path
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="StableDiffusionPipeline is not supported"):
        drive(hub.download, "someone/sd")
    assert fake_hub.downloads == [["model_index.json"]]
    fake_hub.names = ("flux1-dev.safetensors",)
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        drive(hub.download, "someone/weights")
    assert len(fake_hub.downloads) == 1


def test_a_revision_may_follow_the_name_when_converting(fake_hub, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "look_up", lambda repo, revision: asked.append((repo, revision)) or info(10))
    convert(hf_path="someone/flux@v2", mlx_path=str(tmp_path / "one"))
    convert(hf_path="someone/flux", revision="v3", mlx_path=str(tmp_path / "two"))
    assert asked == [("someone/flux", "v2"), ("someone/flux", "v3")]


def test_a_repo_is_downloaded_at_its_commit_and_converted(monkeypatch):
    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(assets() / "tiny-flux")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **options: info(10))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path, _ = drive(resolve, "someone/flux")
    assert (path / "config.json").is_file()
    assert asked["revision"] == "abc"
    assert "flux1-dev.safetensors" not in asked["allow_patterns"]


def test_the_disk_must_have_room_for_a_download(fake_hub):
    fake_hub.size = 10**18
    with pytest.raises(UserError, match=r"GiB free; free some, or set HF_HOME"):
        drive(hub.download, "someone/flux")


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
        drive(hub.download, "someone/flux")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (NO_ROUTE, r"could not be reached \(no route\); try again when online"),
        (errors.OfflineModeIsEnabled("offline mode"), "could not be reached"),
        (errors.HFValidationError("bad name"), r"not a repo id \(bad name\)"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be stored .*set HF_HOME"),
    ],
)
def test_every_way_to_fail_is_one_sentence(fake_hub, error, match):
    fake_hub.error = error
    with pytest.raises(UserError, match=match):
        drive(hub.download, "someone/flux")


def test_a_closed_port_is_an_unreachable_hub(monkeypatch):
    """The real client, with no stand-in: port 9 of this machine refuses."""
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", _at_closed_port(huggingface_hub.HfApi.__init__))
    with pytest.raises(hub.UnreachableError, match="could not be reached"):
        hub.look_up("someone/flux")


def _at_closed_port(init):
    def patched(self, *args, **options):
        init(self, *args, **{**options, "endpoint": "http://127.0.0.1:9"})

    return patched
