"""Downloads, with the real client of the Hub and a small server on the loopback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from mlx_blockskip import convert
from mlx_blockskip.cli import app
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Phase, Step, listening
from mlx_blockskip.tasks.checkpoint import hub, hub_cache, transfer
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory, resolve
from support import hub_repos
from support.hub_server import TOKEN, Failure, environment, git_sha, sha256, without_naps
from support.tasks import drive

DEV = "black-forest-labs/FLUX.1-dev"
UNREAD = {"flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", ".gitattributes"}
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_naps(monkeypatch):
    without_naps(monkeypatch)


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def dev():
    return hub_repos.flux_dev()


@pytest.fixture
def repo(hub_server, dev):
    hub_server.add(DEV, dev)
    return Repo(DEV)


def weights_of(path: Path) -> dict[str, str]:
    """The checksum of every file of weights."""
    return {str(p.relative_to(path)): files.sha256(p) for p in sorted(path.rglob("*.safetensors"))}


def test_of_a_repo_as_flux_dev_only_what_is_needed_is_downloaded_and_once(hub_server, repo, dev):
    path, events = drive(hub.download, repo)
    assert hub_server.fetched() == set(dev) - UNREAD
    assert all(hub_server.bytes[name] == len(dev[name]) for name in hub_server.fetched())
    assert all((path / name).read_bytes() == dev[name] for name in hub_server.fetched())
    (phase,) = [event for event in events if isinstance(event, Phase)]
    steps = [event.done for event in events if isinstance(event, Step)]
    assert (phase.name, phase.unit) == ("download", "B")
    assert steps == sorted(steps)
    assert steps[-1] == phase.total
    hub_server.forget()
    assert drive(hub.download, repo) == (path, [])
    assert hub_server.fetched() == set()


def test_nothing_is_drawn_but_the_one_bar(hub_server, repo, tmp_path):
    run = command(hub_server, tmp_path, "convert", "--hf-path", DEV, "--mlx-path", str(tmp_path / "mlx"))
    hub_server.breaks[SHARD] = [100_000]
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert "%|" not in out + err
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("download:")]


@pytest.mark.parametrize("after", [[0], [65_536, 1, 100_000]])
def test_a_broken_connection_goes_on_from_where_it_was(hub_server, repo, dev, after):
    hub_server.breaks[SHARD] = list(after)
    path = hub.download(repo)
    assert (path / SHARD).read_bytes() == dev[SHARD]
    assert hub_server.bytes[SHARD] <= len(dev[SHARD]) + len(after) * constants.DOWNLOAD_CHUNK_SIZE
    assert sum(path.endswith("00002-of-00003.safetensors") for _, path in hub_server.requests if "cdn" in path) == (
        len(after) + 1
    )


def test_a_stopped_download_keeps_what_is_there_and_goes_on_from_there(hub_server, repo, dev):
    hub_server.delay = 0.02
    total = sum(len(data) for name, data in dev.items() if name not in UNREAD and name.endswith(".safetensors"))

    def stop(event):
        if isinstance(event, Step) and event.done > total / 3:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    stopped: list[float] = []
    told = []
    with pytest.raises(KeyboardInterrupt), listening(told.append), listening(stop):
        hub.download(repo)
    assert time.monotonic() - stopped[0] < 1
    assert "goes on from there" in told[-1].message
    hub_server.delay = 0
    parts = list(hub_cache.folder(DEV).rglob("*.incomplete"))
    sizes = {p.stat().st_size for p in parts if len(p.name.partition(".")[0]) == 64}  # those with a checksum
    assert max(sizes) > 100_000
    hub_server.forget()
    path = hub.download(repo)
    assert (path / SHARD).read_bytes() == dev[SHARD]
    assert sizes <= {start for _, start in hub_server.starts}
    assert not list(hub_cache.folder(DEV).rglob("*.incomplete"))


def test_a_part_that_is_another_file_is_fetched_anew(hub_server, repo, dev):
    blobs = hub_cache.folder(DEV) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(dev[SHARD])}.incomplete").write_bytes(b"x" * 1000)
    (blobs / f"{git_sha(dev['model_index.json'])}.incomplete").write_bytes(b"y" * 10)
    path = hub.download(repo)
    assert (path / SHARD).read_bytes() == dev[SHARD]
    assert (path / "model_index.json").read_bytes() == dev["model_index.json"]


def command(server, home: Path, *arguments: str, **more: str) -> subprocess.Popen:
    env = {**os.environ, **environment(server, home / "hf"), "MLX_BLOCKSKIP_CACHE": str(home / "cache"), **more}
    line = [sys.executable, "-P", "-c", "from mlx_blockskip.cli import main; main()", *arguments]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_a_download_within_a_second(hub_server, repo, tmp_path):
    hub_server.delay = 0.3  # half a minute
    run = command(hub_server, tmp_path, "convert", "--hf-path", DEV, "--mlx-path", str(tmp_path / "mlx"))
    while len(hub_server.fetched() & {SHARD}) == 0 and run.poll() is None:
        time.sleep(0.02)
    pressed = time.monotonic()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert run.returncode == 130, err
    assert time.monotonic() - pressed < 2  # with the end of the process, on a busy machine
    assert "the same command goes on from there" in out
    assert list((tmp_path / "hf").rglob("*.incomplete"))


@pytest.mark.parametrize("called", [DEV, f"https://huggingface.co/{DEV}/tree/main"])
def test_everything_is_found_offline_once_it_was_downloaded(hub_server, repo, offline, called):
    snapshot = hub.download(repo)
    offline()
    path, events = drive(resolve, called)
    assert (path / "config.json").is_file()
    assert str(snapshot) in events[0].message
    assert drive(resolve, called)[0] == path
    shutil.rmtree(snapshot)
    assert drive(resolve, called)[0] == path


@pytest.mark.parametrize(
    "patterns",
    [
        {"allow_patterns": ["*.json", "*.txt", "transformer/*", "text_encoder*/*", "vae/*", "tokenizer*/*"]},
        {"ignore_patterns": ["flux1-dev.safetensors", "ae.safetensors", "*.jpg"]},
        {},
    ],
    ids=["diffusers", "exclude", "all"],
)
def test_what_others_downloaded_is_used(hub_server, repo, offline, patterns):
    theirs = huggingface_hub.snapshot_download(DEV, **patterns)
    hub_server.forget()
    path, _ = drive(hub.download, repo)
    assert hub_server.fetched() <= {"README.md", "LICENSE.md"}
    assert path == Path(theirs)
    offline()
    (hub_cache.folder(DEV) / "refs" / "main").unlink(missing_ok=True)
    assert drive(hub.download, repo)[0] == path


def test_a_snapshot_that_lacks_a_shard_is_not_enough_offline(hub_server, repo, offline):
    path = hub.download(repo)
    offline()
    (path / SHARD).unlink()
    with pytest.raises(UserError, match=r"could not be reached.*offline mode"):
        hub.download(repo)


def test_an_older_snapshot_that_is_whole_is_better_than_a_newer_that_is_not(hub_server, repo, dev, offline):
    whole = hub.download(repo)
    hub_server.add(DEV, {**dev, SHARD: dev[SHARD] + b"\0"})
    huggingface_hub.snapshot_download(DEV, allow_patterns=["*.json"])
    offline()
    assert drive(hub.download, repo)[0] == whole


def test_what_an_older_commit_has_too_is_not_downloaded_again(hub_server, repo, dev):
    hub.download(repo)
    hub_server.forget()
    hub_server.add(DEV, {**dev, "README.md": b"new"})
    path = hub.download(repo)
    assert hub_server.fetched() == {"README.md"}
    assert (path / SHARD).read_bytes() == dev[SHARD]


def test_a_copy_of_which_a_part_lies_there_is_not_read_in_place_of_a_whole_one(hub_server, tmp_path):
    found = hub_repos.sana("bf16")
    hub_server.add("someone/sana", found)
    del found["transformer/diffusion_pytorch_model.safetensors"]
    hub_server.add("someone/sana", found)
    huggingface_hub.snapshot_download("someone/sana", allow_patterns=["*/*.json"])
    top = hub_cache.snapshot("someone/sana", hub_server.repos["someone/sana"].refs["main"])
    assert (top / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    convert(hf_path="someone/sana", mlx_path=str(tmp_path / "mlx"), dtype="bfloat16")
    assert hub_server.bytes["transformer/diffusion_pytorch_model.bf16.safetensors"]
    assert (tmp_path / "mlx" / "config.json").is_file()


def test_a_revision_is_pinned(hub_server, repo, dev, offline):
    first = hub_server.repos[DEV].refs["main"]
    hub_server.add(DEV, {**dev, "README.md": b"second"}, branch="v2")
    path = hub.download(Repo(DEV, "v2"))
    assert (path / "README.md").read_bytes() == b"second"
    old = hub.download(Repo(DEV, first))
    assert old.name == first
    offline()
    assert hub.download(Repo(DEV, "v2")) == path
    with pytest.raises(UserError, match="could not be reached"):
        hub.download(Repo(DEV, "v3"))


def test_one_commit_is_converted_once_however_it_is_called(hub_server, repo):
    sha = hub_server.repos[DEV].refs["main"]
    path = resolve(DEV)
    again = [f"{DEV}@main", f"{DEV}@{sha}", "flux1-dev", "FLUX.1-dev", f"https://huggingface.co/{DEV}", f"hf.co/{DEV}"]
    assert {resolve(name) for name in again} == {path}
    assert len([p for p in cache_directory().iterdir() if p.is_dir()]) == 1
    assert files.read_json(path / "config.json")["source"] == f"{DEV}@{sha}"


@pytest.mark.parametrize(
    ("variants", "dtype", "ends"),
    [
        ((), "bfloat16", ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors"]),
        (("bf16", "fp16"), "bfloat16", [".bf16.safetensors"]),
        (("fp16",), "bfloat16", ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors"]),
        (("bf16", "fp16"), "float16", [".fp16.safetensors"]),
        (("bf16", "fp16"), "float32", ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors"]),
    ],
)
def test_of_sana_the_smallest_copy_that_is_precise_enough_is_downloaded(hub_server, variants, dtype, ends):
    hub_server.add("someone/sana", hub_repos.sana(*variants))
    hub.download(Repo("someone/sana"), precision=Precision(dtype))
    fetched = {name for name in hub_server.fetched() if name.startswith("transformer/") and "safetensors" in name}
    weights = sorted(name for name in fetched if name.endswith(".safetensors"))
    assert weights == sorted(f"transformer/diffusion_pytorch_model{end}" for end in ends)


def test_the_bf16_copy_gives_what_the_whole_one_gives_in_bfloat16(hub_server, tmp_path):
    for name, found in (("whole", hub_repos.sana()), ("small", hub_repos.sana("bf16"))):
        hub_server.add(f"someone/{name}", found)
        convert(hf_path=f"someone/{name}", mlx_path=str(tmp_path / name), dtype="bfloat16", quantize=True)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "small")


def test_room_for_the_download_and_for_what_is_made_of_it_is_asked_for_before(hub_server, repo, dev, monkeypatch):
    need = sum(len(data) for name, data in dev.items() if name not in UNREAD)
    monkeypatch.setattr(files, "free_space", lambda path: need - 10_000)
    with pytest.raises(UserError, match=r"needs .* GiB and .* GiB free; free some, or set HF_HOME"):
        resolve(DEV)
    monkeypatch.setattr(files, "free_space", lambda path: need + 1000)
    with pytest.raises(UserError, match=r"converted beside .* downloaded, and .* free"):
        resolve(DEV)
    assert SHARD not in hub_server.fetched()


def test_what_is_not_implemented_is_refused_before_weights_are_downloaded(hub_server, dev):
    config = dev["transformer/config.json"].replace(b'"patch_size": 1', b'"patch_size": 2')
    hub_server.add(DEV, {**dev, "transformer/config.json": config})
    with pytest.raises(UserError, match="patch_size=2 is not implemented"):
        hub.download(Repo(DEV))
    assert not [name for name in hub_server.fetched() if name.endswith(".safetensors")]


def test_a_repo_that_is_no_pipeline_or_another_one_is_refused_before_its_weights_are_downloaded(hub_server):
    hub_server.add(
        "someone/sd", {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', **hub_repos.SINGLE}
    )
    hub_server.add("someone/weights", hub_repos.SINGLE)
    with pytest.raises(UserError, match="StableDiffusionPipeline is not supported"):
        hub.download(Repo("someone/sd"))
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        hub.download(Repo("someone/weights"))
    assert hub_server.fetched() == {"model_index.json"}


LICENCE = f"accept its licence at https://huggingface.co/{DEV}, then run `hf auth login`"
TOO_OFTEN = Failure(429, "We had to rate limit you", headers={"Retry-After": "42"})
REFUSALS = {
    "gated": (Failure(403, "Access is restricted", "GatedRepo"), rf"is gated .Access is restricted.; {LICENCE}"),
    "absent": (Failure(404, "Repository not found", "RepoNotFound"), "no such repo on the Hub .*Repository not found"),
    "private": (Failure(401, "Invalid username or password."), "no such repo .*private repo run `hf auth login`"),
    "revision": (Failure(404, "Invalid rev id", "RevisionNotFound"), "has no revision .*; see"),
    "wrong token": (
        Failure(401, "Invalid credentials"),
        "does not take your token .Invalid credentials.; run `hf auth",
    ),
    "expired": (Failure(401, 'User Access Token "laptop" is expired'), 'not take your token .*"laptop" is expired'),
    "forbidden": (Failure(403, "Your token lacks the right to read"), "refuses this .*lacks the right.*hf auth login"),
    "too often": (TOO_OFTEN, "too often .*rate limit.*again in 42 s"),
    "down": (Failure(503, "Service Unavailable"), "trouble of its own .503 Service Unavailable.; try again later"),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_the_hubs_own_reason_is_said_and_the_way_out(hub_server, repo, kind, where):
    failure, said = REFUSALS[kind]
    failure.where, failure.times = where, 10**9
    hub_server.failures.append(failure)
    with pytest.raises(UserError, match=said) as caught:
        hub.download(repo)
    assert isinstance(caught.value, hub.UnreachableError) == (kind in ("too often", "down"))


@pytest.mark.parametrize("place", ["environment", "file"])
def test_no_token_is_ever_shown(hub_server, repo, tmp_path, monkeypatch, place):
    if place == "file":
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "token").write_text(TOKEN)
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.token = TOKEN
    hub.download(repo)
    assert hub_server.tokens_elsewhere == []
    for message in (f"the token {TOKEN} is expired", "Invalid credentials: hf_abcdefghijkLMNOP"):
        hub_server.failures[:] = [Failure(401, message)]
        for more in ((), ("--debug",)):
            result = CliRunner().invoke(app, ["convert", "--hf-path", DEV, "--mlx-path", str(tmp_path / "x"), *more])
            shown = f"{result.output} {result.exception}"
            assert "does not take your token" in shown
            assert TOKEN not in shown
            assert "hf_abc" not in shown


def test_a_hub_that_has_trouble_does_not_keep_from_what_is_here(hub_server, repo):
    path, _ = drive(resolve, DEV)
    hub_server.failures.append(Failure(503, "Service Unavailable"))
    found, events = drive(resolve, DEV)
    assert found == path
    assert [type(event) for event in events] == [Note]
    assert "using what was converted before" in events[0].message
    with pytest.raises(UserError, match="trouble of its own"):
        drive(resolve, "someone/else")
    with pytest.raises(UserError, match="trouble of its own"):
        drive(resolve, f"{DEV}@v2")


def test_a_repo_is_converted_once_a_commit_and_then_its_download_may_go(hub_server, repo, dev):
    path, _ = drive(resolve, DEV)
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert drive(resolve, DEV) == (path, [])
    hub_server.add(DEV, {**dev, "README.md": b"new"})
    assert drive(resolve, DEV)[0] != path


def test_a_broken_file_is_said_by_the_thread_that_waits(hub_server, repo, monkeypatch):
    monkeypatch.setattr(transfer, "_fetch_blob", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.download(repo)


def test_a_full_disk_in_the_middle_is_a_sentence(hub_server, repo, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_fetch_blob", full)
    with pytest.raises(UserError, match=r"cannot be stored .*No space left.*set HF_HOME"):
        hub.download(repo)
