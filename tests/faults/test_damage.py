"""Files that are not what was written, and files that go while they are read: the result is the same, or a sentence."""

import random
import shutil

import pytest

from support import faults
from support.scenes import content

WAYS = faults.SPOILED


def sentence(ended) -> bool:
    """Whether a command ended in one, or well."""
    return ended.code in (0, 1) and "Traceback" not in ended.text


def kinds(paths) -> dict[str, list]:
    """Files by what they are: their names without numbers."""
    found: dict[str, list] = {}
    for path in paths:
        name = "".join("#" if letter.isdigit() else letter for letter in path.name)
        found.setdefault(f"{path.parent.name.split('-')[0]}/{name}", []).append(path)
    return found


def left_files(directory):
    """What a stopped run has left, but for what is the user's."""
    return [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in ("mine.txt", ".mine", "log.jsonl")]


@pytest.mark.parametrize("name", ["class images", "fresh", "evaluate", "select"])
def test_what_a_stopped_run_left_is_used_only_where_it_is_whole(world, long, name):
    """Of each kind of file one is damaged; the same command ends in the same bytes, or says which file is damaged."""
    if long == 1 and name != "class images":
        pytest.skip("by --long")
    scene = world.scenes[name]
    whole, places = world.whole(scene)
    late = max(i for i, place in enumerate(places, 1) if place.startswith("os.rename")) - (1 if name == "select" else 0)
    stopped = world.begin(scene, "stopped")
    assert world.play(scene, stopped, kind="kill", at=late).code == -9
    rng, tried, same = random.Random(name), 0, 0
    for kind, paths in kinds(left_files(stopped)).items():
        for way in WAYS if long > 1 else [rng.choice(WAYS[1:])]:
            for _ in range(long):
                directory = world.base / "trial"
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(stopped, directory)
                path = rng.choice(paths)
                faults.spoil(directory / path.relative_to(stopped), way, rng.random())
                ended = world.play(scene, directory)
                where = f"{kind} {way}: {ended.text}"
                assert sentence(ended), where
                assert scene.untouched(directory), where
                found = {n: held for n, held in content(directory).items() if ".damaged/" not in n}  # set apart
                unread = str(path.relative_to(stopped)) if {"step-000004", "samples"} & set(path.parts) else None
                assert ended.code == 1 or all(found.get(n) == whole[n] for n in whole if n != unread), where
                assert ended.code == 1 or found.keys() - {unread} == whole.keys() - {unread}, where
                tried, same = tried + 1, same + (ended.code == 0)
    print(f"{name}: {tried} files damaged, {same} times the same bytes, {tried - same} times a sentence")
    assert same >= tried * 0.7


@pytest.mark.parametrize("made", ["convert", "train", "probe"])
def test_what_was_written_is_read_only_where_it_is_as_it_was_written(world, long, made):
    """A model, an adapter, a selection: the command that reads it gives the same, or says which file is damaged."""
    directory, scene = world.base / "read", world.scenes[made]
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(made_by(world, scene), directory)
    toy, drawn = world.scenes["generate"].argv[2], ("--prompt", "a", "--steps", "1", "--width", "32", "--height", "32")
    files = [p for p in left_files(directory) if not p.name.upper().startswith(("LICENSE", "README"))]
    if made == "convert":
        argv = ("generate", "--model", str(directory / "m"), *drawn)
    elif made == "train":
        argv = ("generate", "--model", toy, "--adapter-path", str(directory / "a"), *drawn)
        files = [p for p in files if p.parent.name == "a"]
    else:
        plan, again = directory / "a" / "selection.json", list(scene.argv)
        again[again.index("auto")] = str(plan)
        argv, files = tuple(again), [plan]
    rng, out = random.Random(made), world.base / "out"
    expected, tried, refused = results(world, argv, out), 0, 0
    for paths in list(kinds(files).values())[:: 1 if long > 1 else 3]:
        for way in WAYS if long > 1 else ["flipped"]:
            for _ in range(long):
                path = rng.choice(paths)
                before = path.read_bytes()
                faults.spoil(path, way, rng.random())
                found = results(world, argv, out)
                path.write_bytes(before)
                assert found in (None, expected), f"{path.name} {way}"
                tried, refused = tried + 1, refused + (found is None)
    print(f"{made}: {tried} files damaged, {refused} refused")


def made_by(world, scene):
    """The directory of a whole run."""
    world.wholes.pop(scene.name, None)
    world.whole(scene)
    return world.base / "whole"


def results(world, argv, out):
    """What a command writes into an empty directory; None where it ended in a sentence."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    ended = world.server.run(argv, out)
    assert sentence(ended), ended.text
    return content(out) if ended.code == 0 else None
