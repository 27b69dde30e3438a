"""What a user may call a model; the Hub is played by stand-ins, without a network."""

import errno
import os
import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors

from mlx_blockskip import convert
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, listening
from mlx_blockskip.tasks.checkpoint import hub
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory, resolve
from mlx_blockskip.tasks.running import running
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
    leftover, theirs = (path.with_name(f".{path.name}.x1.{end}") for end in ("blockskip-tmp", "tmp"))
    leftover.mkdir()
    theirs.mkdir()
    said = []
    with listening(said.append), running("generate"):
        assert resolve("tiny-flux") == path
    assert not leftover.exists()
    assert any(str(leftover) in event.message for event in said if isinstance(event, Note))
    assert theirs.exists()


NO_ROUTE = errors.HfHubHTTPError.__bases__[0]("no route")
"""What the HTTP library of huggingface_hub raises where there is no network: in some versions no OSError."""


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (NO_ROUTE, r"could not be reached \(no route\); try again when online"),
        (OSError("no route"), r"could not be reached \(no route\); try again when online"),
        (errors.OfflineModeIsEnabled("offline mode"), "could not be reached"),
        (errors.HFValidationError("bad name"), r"not a repo id \(bad name\)"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be stored .*set HF_HOME"),
    ],
)
def test_every_way_to_fail_is_one_sentence(monkeypatch, error, match):
    def fail(self, repo, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match=match):
        drive(hub.download, Repo("someone/flux"))


def test_a_closed_port_is_an_unreachable_hub(monkeypatch):
    """The real client, with no stand-in: port 9 of this machine refuses."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.UnreachableError, match="could not be reached"):
        hub.look_up(Repo("someone/flux"))


def test_a_revision_may_follow_the_name_when_converting(tmp_path, monkeypatch):
    asked = []

    def download(repo, *more):
        asked.append(repo)
        return assets() / "tiny-dino"

    monkeypatch.setattr("mlx_blockskip.tasks.checkpoint.convert.download", download)
    convert(hf_path="someone/flux@v2", mlx_path=str(tmp_path / "one"))
    convert(hf_path="someone/flux", revision="v3", mlx_path=str(tmp_path / "two"))
    assert asked == [Repo("someone/flux", "v2"), Repo("someone/flux", "v3")]
