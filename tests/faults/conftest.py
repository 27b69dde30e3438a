"""What the tests of faults have in common: small runs of every command in processes of their own."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import forked, hub_repos, scenes
from support.hub_server import environment, running
from support.scenes import Scene, content


@dataclass
class World:
    """Where the scenes are played."""

    base: Path
    server: forked.Server
    scenes: dict[str, Scene]
    wholes: dict[str, tuple[dict[str, bytes], list[str]]] = field(default_factory=dict)

    def play(self, scene: Scene, directory: Path, **how) -> forked.Ended:
        env = {"TMPDIR": str(directory / "tmp"), **how.pop("env", {})}
        (directory / "tmp").mkdir(exist_ok=True)
        return self.server.run(scene.argv, directory, env=env, **how)

    def begin(self, scene: Scene, name: str = "trial") -> Path:
        """A directory as the user has it."""
        directory = self.base / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        scene.begin(directory)
        return directory

    def whole(self, scene: Scene) -> tuple[dict[str, bytes], list[str]]:
        """What is there after a run that nothing happens to, and the places at which it changes something."""
        if scene.name not in self.wholes:
            directory = self.begin(scene, "whole")
            ended = self.play(scene, directory)
            assert ended.code == 0, ended.text
            assert scene.untouched(directory)
            self.wholes[scene.name] = content(directory), ended.places
        return self.wholes[scene.name]


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    with running() as hub, forked.server(base / "server", environment(hub, base / "hf")) as server:
        hub.add(scenes.REPO, hub_repos.flux_dev())
        found = World(base, server, scenes.scenes(base / "base"))
        first = found.scenes["train"].argv
        adapter = [str(base / "base" / "adapter") if word == "a" else word for word in first]
        assert server.run(adapter, base).code == 0
        yield found


@pytest.fixture
def long(request):
    """How many times as many trials are made."""
    return request.config.getoption("--long")
