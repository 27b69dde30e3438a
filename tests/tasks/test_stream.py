"""`convert --stream`: the same bytes as by a download, without its room, and stopped anywhere it goes on."""

import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import write
from mlx_blockskip.engine import disk, files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Step, listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint import hub_cache, stream
from support import hub_repos
from support.hub_server import Failure, without_naps
from support.tasks import drive

REPO = "someone/flux"
OPTIONS = {"hf_path": REPO, "dtype": "bfloat16", "quantize": True}


@pytest.fixture(scope="module")
def dev():
    return hub_repos.flux_dev()


@pytest.fixture(scope="module")
def usual(dev, tmp_path_factory):
    """What the usual conversion of the same files makes."""
    source = tmp_path_factory.mktemp("source")
    for name, data in dev.items():
        if name not in hub_repos.SINGLE:
            path = source / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    return content(convert(**{**OPTIONS, "hf_path": str(source)}, mlx_path=str(source.parent / "usual")))


@pytest.fixture
def repo(hub_server, dev, monkeypatch):
    without_naps(monkeypatch)
    hub_server.add(REPO, dev)
    return hub_server


def content(path):
    """Every file, but for where it came from and what is copied of the repo's own pages."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "config.json"}


def streamed(target, **options):
    return convert(**{**OPTIONS, **options}, mlx_path=str(target), stream=True)


def test_the_bytes_are_those_of_a_download_and_only_they_take_room(repo, dev, usual, tmp_path):
    path, events = drive(streamed, tmp_path / "mlx")
    assert content(path) == usual
    assert open_model(path).identity
    weights = {name: len(data) for name, data in dev.items() if name.endswith(".safetensors")}
    taken = sum(repo.bytes[name] for name in weights if name not in hub_repos.SINGLE)
    needed = sum(size for name, size in weights.items() if name not in hub_repos.SINGLE)
    assert needed <= taken < needed + 600 * stream.WINDOW
    assert not set(hub_repos.SINGLE) & repo.fetched()
    kept = hub_cache.folder(REPO)
    assert not [p for p in kept.rglob("*") if p.is_file() and p.stat().st_size > 500_000]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("mlx")] == ["mlx"]
    assert any(isinstance(event, Note) and "of disk" in event.message for event in events)


class KilledError(Exception):
    pass


def at(monkeypatch, place, name, number):
    """Have the call of this number of a function raise."""
    real, calls = getattr(place, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise KilledError
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, counted)


@pytest.mark.parametrize(
    ("place", "name", "number"),
    [
        (stream.OnHub, "_fetch", 3),  # a header
        (stream.OnHub, "_fetch", 20),  # a tensor
        (write, "_write_shard", 6),  # shards are there
        (disk, "flush_tree", 1),  # all is there
    ],
)
def test_stopped_anywhere_it_goes_on(repo, usual, tmp_path, monkeypatch, place, name, number):
    monkeypatch.setattr(stream, "WINDOW", 1 << 20)
    with monkeypatch.context() as patched:
        at(patched, place, name, number)
        with pytest.raises(KilledError):
            streamed(tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "mlx.streaming").rglob("model/**/*.safetensors")}
    assert bool(done) == (name != "_fetch" or number > 3)
    path = streamed(tmp_path / "mlx")
    assert content(path) == usual
    was = {p.relative_to(tmp_path / "mlx.streaming" / "model"): stamp for p, stamp in done.items()}
    assert {p: (path / p).stat().st_mtime_ns for p in was} == was


def test_another_commit_or_precision_begins_anew(repo, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 1 << 20)
    with monkeypatch.context() as patched:
        at(patched, write, "_write_shard", 6)
        with pytest.raises(KilledError):
            streamed(tmp_path / "mlx", q_bits=8)
    assert content(streamed(tmp_path / "mlx")) == usual


def test_a_tensor_is_fetched_ahead_and_not_beyond_its_end(monkeypatch):
    fetched = []
    monkeypatch.setattr(stream, "WINDOW", 10)
    monkeypatch.setattr(stream, "AHEAD", 100)
    monkeypatch.setattr(stream.OnHub, "_fetch", lambda self, a, b: fetched.append((a, b)) or bytes(range(a, b)))
    remote = stream.OnHub("a/b", "c", "d", 250, lambda: None)
    remote.ends_of_tensors([20, 170, 180])
    assert remote.read(20, 30) == bytes(range(20, 50))
    assert remote.read(50, 70) == bytes(range(50, 120))
    assert remote.read(120, 50) == bytes(range(120, 170))
    assert remote.read(170, 5) == bytes(range(170, 175))
    assert remote.read(245, 5) == bytes(range(245, 250))
    assert fetched == [(20, 120), (120, 170), (170, 180), (245, 250)]


def test_ctrl_c_is_heard_while_the_hub_is_waited_for(repo, tmp_path):
    repo.delay = 0.05

    def stop(event):
        if isinstance(event, Step):
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt), listening(told.append), listening(stop):
        streamed(tmp_path / "mlx")
    assert "the same command goes on from there" in told[-1].message


def test_a_hub_that_fails_in_the_middle_is_a_sentence(repo, tmp_path):
    name = "text_encoder/model.safetensors"
    repo.failures.append(Failure(503, "Service Unavailable", where=name))
    with pytest.raises(UserError, match="trouble of its own .*the same command goes on from there"):
        streamed(tmp_path / "mlx")


def test_room_is_asked_for_before(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda path: 1_000_000)
    with pytest.raises(UserError, match="GiB are needed and 0.0 GiB are free; choose another disk"):
        streamed(tmp_path / "mlx")
    assert not [name for name in repo.fetched() if name.endswith(".safetensors")]


def test_what_is_here_is_not_streamed(repo, tmp_path):
    with pytest.raises(UserError, match="--stream: .* is on this disk already"):
        streamed(tmp_path / "mlx", hf_path=str(tmp_path))


def test_a_foreign_working_directory_is_left_alone(repo, tmp_path):
    (tmp_path / "mlx.streaming").mkdir()
    (tmp_path / "mlx.streaming" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which mlx-blockskip did not make"):
        streamed(tmp_path / "mlx")
