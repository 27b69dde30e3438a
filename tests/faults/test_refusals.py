"""What the system refuses at any place of a run is one sentence with the path, loses nothing, and is gone on from."""

import random

import pytest

from support import faults
from support.scenes import content

NAMES = ("train", "class images", "generate", "convert", "fuse", "evaluate", "select", "stream", "export", "fresh")
READS = ("unread", "gone", "short", "flipped")


def sentences(ended) -> list[str]:
    return [line for line in ended.text.splitlines() if line.startswith("mlx-blockskip: ")]


@pytest.mark.parametrize("kind", faults.REFUSED)
def test_a_change_that_is_refused_is_a_sentence_and_the_same_command_goes_on(world, long, kind):
    rng, tried, names = random.Random(kind), 0, rng_names(kind, long, 3)
    for name in names:
        scene = world.scenes[name]
        whole, places = world.whole(scene)
        for at in rng.sample(range(1, len(places) + 1), min(len(places), long)):
            directory = world.begin(scene)
            ended = world.play(scene, directory, kind=kind, at=at)
            where = f"{name} {kind} at {at}, {places[at - 1]}: {ended.text}"
            assert ended.code in (0, 1), where
            assert "Traceback" not in ended.text, where
            assert scene.untouched(directory), where
            if ended.code:
                (said,) = sentences(ended)
                assert "; " in said, where
                assert "blockskip-tmp" not in said, where
                again = world.play(scene, directory)
                assert again.code == 0, f"{where}: {again.text}"
            assert content(directory) == whole, where
            tried += 1
    print(f"{kind}: {tried} places")


@pytest.mark.parametrize("kind", READS)
def test_a_file_that_cannot_be_read_or_is_another_meanwhile_is_a_sentence(world, long, kind):
    """Where the file is the tool's own and not damaged for good, the same command then ends in the same bytes."""
    rng, tried = random.Random(kind), 0
    for name in rng_names(kind, long, 1, READING):
        scene = world.scenes[name]
        directory = world.begin(scene)
        places = world.play(scene, directory, kind="unread", at=0).places
        for at in rng.sample(range(1, len(places) + 1), min(len(places), long)):
            directory = world.begin(scene)
            ended = world.play(scene, directory, kind=kind, at=at)
            where = f"{name} {kind} at {at}, {places[at - 1]}: {ended.text}"
            assert ended.code in (0, 1), where
            assert "Traceback" not in ended.text, where
            again = world.play(scene, directory)
            assert again.code in (0, 1), f"{where}: {again.text}"
            assert "Traceback" not in again.text, f"{where}: {again.text}"
            if ended.code == 0 or again.code == 0:
                assert scene.untouched(directory), where
            tried += 1
    print(f"{kind}: {tried} places")


@pytest.mark.parametrize("name", ["train", "convert"])
def test_without_locks_everything_works_and_is_said(world, name):
    scene = world.scenes[name]
    whole, _ = world.whole(scene)
    directory = world.begin(scene)
    ended = world.play(scene, directory, locks=False)
    assert ended.code == 0, ended.text
    assert ("no locks" in ended.text) == (name == "train")
    assert content(directory) == whole


READING = ("train", "class images", "select", "evaluate")


def rng_names(seed, long, count, names=NAMES):
    """Which commands: some of them, or with `--long` all."""
    return names if long > 1 else random.Random(seed).sample(names, count)
