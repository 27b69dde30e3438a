"""A command that is killed just before a change of the file system, and given again, ends in the same bytes: nothing of
the tool's is left over, and nothing of the user's is touched.
"""

import random

import pytest

from support.scenes import content

SCENES = {
    "train": 3, "train in files": 1, "fresh": 2, "class images": 3, "probe": 2, "select": 1, "generate": 1,
    "convert": 3, "stream": 1, "fuse": 1, "export": 1, "evaluate": 2,
}  # fmt: skip
"""Trials of each command: 21 in all. By `--long` so many times as many."""

KILLS = 3
"""Of a trial: the second and the third meet what the one before has left."""


def chosen(places: list[str], count: int, seed: str) -> list[int]:
    """Numbers of places, in equal parts of the run; a write is rarer than what gives, takes or changes a name."""
    weight = [0.02 if place.startswith("write") else 1.0 for place in places]
    rng, total, found, passed = random.Random(seed), sum(weight), [], 0.0
    marks = sorted((i + rng.random()) * total / count for i in range(count))
    for number, one in enumerate(weight, 1):
        passed += one
        while marks and passed >= marks[0]:
            found.append(number)
            marks.pop(0)
    return sorted(set(found))


@pytest.mark.parametrize("name", SCENES)
def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(world, long, name):
    scene = world.scenes[name]
    whole, places = world.whole(scene)
    kills = chosen(places, KILLS * SCENES[name] * long, name)
    trials = len(kills) // KILLS
    done = 0
    for number in range(trials):
        directory, ats = world.begin(scene), kills[number::trials]
        where = f"killed at {ats} of {len(places)}, {[places[at - 1] for at in ats]}"
        for at in ats:
            ended = world.play(scene, directory, kind="kill", at=at)
            assert ended.code in (0, -9), f"{where}: {ended.text}"
            assert scene.untouched(directory), where
            if ended.code == 0:
                break
            done += 1
        else:
            ended = world.play(scene, directory)
        assert ended.code == 0, f"{where}: {ended.text}"
        assert scene.untouched(directory), where
        found = content(directory)
        assert found.keys() == whole.keys(), where
        assert [file for file in found if found[file] != whole[file]] == [], where
    assert done >= trials, "a run that goes on has less to do, and may end before the place"
    print(f"{name}: {done} kills in {trials} trials")


def test_places_are_spread_over_a_run():
    places = ["write x"] * 500 + ["os.rename x"] * 10
    found = chosen(places, 12, "seed")
    assert len(found) > 9
    assert found[0] <= 500 < found[-3]
