"""Making a chunk's records: told as it goes, the same however many wait together, and only where they are not there."""

import pytest

from mlx_blockskip.events import PhaseEnd, Step
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train import precompute
from support.models import HEDGEHOG, prepared
from support.tasks import drive

BATCHES = range(2, 6)


@pytest.fixture
def job(toy, tmp_path):
    fixed = {"model": str(toy), "data": str(HEDGEHOG), "resolution": 64, "train_resolution": 32, "class_images": 0}
    fixed |= {"adapter_path": str(tmp_path / "a"), "iters": 9, "rank": 2, "batch_size": 2}
    return prepared(TrainSettings(**fixed, skip_first=1, skip_last=1))


def made(job, expected="x", name="chunk-0000.safetensors"):
    """(the file of the chunk, what was told)."""
    path = job.cache / name
    _, events = drive(precompute.compute_chunk, job, BATCHES, path, expected, {})
    return path, events


def told(events, phase):
    return [event.done for event in events if isinstance(event, Step) and event.phase == phase]


def test_micro_batches_are_told_as_they_are_done_and_images_too(job, monkeypatch):
    monkeypatch.setattr(precompute, "together", lambda size: 3)
    path, events = made(job)
    assert told(events, "precompute") == [3, 4]
    assert told(events, "encode images") == [2, 4, 6, 8]
    assert [p.name for p in job.cache.glob("*.safetensors")].count("latents.safetensors") == 0
    assert path.is_file()


def test_a_chunk_is_made_only_where_it_is_not_there(job):
    path, _ = made(job)
    before = path.read_bytes()
    _, events = made(job)
    assert not [event for event in events if isinstance(event, PhaseEnd)]
    _, events = made(job, "y")
    assert told(events, "precompute")[-1] == 4
    assert len(path.read_bytes()) == len(before)


def test_records_do_not_depend_on_how_many_wait_together(job, monkeypatch):
    files = []
    for size in (1, 3, 9):
        monkeypatch.setattr(precompute, "together", lambda _, size=size: size)
        assert sorted(i for group in precompute._groups(job, BATCHES) for i in group) == list(BATCHES)
        assert max(map(len, precompute._groups(job, BATCHES))) == min(size, 4)
        files.append(made(job, name=f"{size}.safetensors")[0].read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_of_encoded_images_as_many_stay_as_there_is_room_for(job, monkeypatch, limit):
    monkeypatch.setattr(precompute, "POSTERIOR_BYTES", limit)
    known, seen, draws = {}, set(), [job.samples.draw(k) for k in range(12)]
    for draw in draws:
        precompute._latents(job.samples, draw, known)
        seen.add((draw.image, draw.patch))
        assert (draw.image, draw.patch) in known
        assert len(known) == (1 if limit == 0 else len(seen))
    assert len(seen) > 1
