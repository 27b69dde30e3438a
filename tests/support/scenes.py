"""Small runs of every command that writes, for what may happen to them on the way."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from support import hub_repos
from support.models import HEDGEHOG
from support.toy import make_toy

SENTINEL = b"the user's own\n"
REPO = "someone/flux"


@dataclass(frozen=True)
class Scene:
    """A command line, run in a directory of its own. folders: that hold a file of the user's from the start. hidden:
    those that this tool fills, where it takes nothing visible of another. reads: what is copied into it and read there.
    """

    name: str
    argv: tuple[str, ...]
    folders: tuple[str, ...] = (".",)
    hidden: tuple[str, ...] = ()
    reads: Mapping[str, Path] = field(default_factory=dict)

    def begin(self, directory: Path) -> None:
        """Make the directory as a user has it."""
        for folder in (*self.folders, *self.hidden):
            place = directory / folder
            place.mkdir(parents=True, exist_ok=True)
            (place / (".mine" if folder in self.hidden else "mine.txt")).write_bytes(SENTINEL)
        for name, source in self.reads.items():
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, directory / name)

    def untouched(self, directory: Path) -> bool:
        """Whether what is the user's is as it was."""
        places = [directory / f / "mine.txt" for f in self.folders] + [directory / f / ".mine" for f in self.hidden]
        return all(place.is_file() and place.read_bytes() == SENTINEL for place in places)


def content(directory: Path) -> dict[str, bytes]:
    """Every file; of a log, which has times, that it is there."""
    found = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file() or p.is_symlink()}
    return {name: b"" if name.endswith("log.jsonl") else path.read_bytes() for name, path in found.items()}


def photos(directory: Path) -> Path:
    """Two small ones, with captions."""
    directory.mkdir()
    for number in (1, 2):
        with Image.open(HEDGEHOG / f"0{number}.png") as image:
            image.resize((64, 64)).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text("a sks toy")
    return directory


def scenes(base: Path) -> dict[str, Scene]:
    """The scenes by name; what they read is made in `base`."""
    base.mkdir(parents=True, exist_ok=True)
    toy, pictures = make_toy(base / "toy"), photos(base / "photos")
    checkpoint = base / "checkpoint"
    for name, data in hub_repos.flux_dev().items():
        if name not in hub_repos.SINGLE:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(data)
    (base / "prompts.txt").write_text("a {} on red\n")
    (base / "others.txt").write_text("a cat\n")
    small = ("--memory-budget", "any")
    drawn = ("--steps", "1", "--width", "32", "--height", "32", *small)
    train = (
        *("train", "--model", str(toy), "--data", str(pictures), "--adapter-path", "a", "--resume", "--rank", "2"),
        *("--learning-rate", "1e-3", "--train-resolution", "32", "--resolution", "64", "--batch-size", "1"),
        *("--steps-per-save", "2", "--iters", "5", "--cache-limit", "30KB"),
    )
    ends, plain = ("--skip-first", "1", "--skip-last", "1", *small), ("--class-images", "0")
    fresh = ("--residuals", "fresh", "--refresh", "2", "--clip", "0.01")
    class_images = ("--class-prompt", "a toy", "--class-images", "3", "--steps-per-sample", "4")
    compared = ("--vision-model", "tiny-dino", "--clip-model", "tiny-clip")
    adapter = ("--model", str(toy), "--adapter-path", str(base / "adapter"))
    own, filled = (".", "a", "a/checkpoints"), ("a/cache",)
    masked = ("--method", "generate", "--prompt", "a", "--distance", "clip", "--skip-ratio", "0.2")
    templates = ("--prompts", str(base / "prompts.txt"), "--drift-prompts", str(base / "others.txt"))
    written = ("--output", "new/x.png", "--overwrite")
    scored = ("--n-images", "1", "--subject", "sks toy", "--output", "e")
    converted = ("--mlx-path", "m", "--quantize", "--dtype", "bfloat16")
    lines: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
        "train": ((*train, *ends, *plain), own, filled),
        "train in files": ((*train, *ends[:4], *plain, "--memory-budget", "0"), own, filled),
        "fresh": ((*train, *ends, *plain, *fresh), own, filled),
        "class images": ((*train, *ends, *class_images), (*own, "a/samples"), (*filled, "a/class_images")),
        "probe": ((*train, *plain, *small, "--plan", "auto", "--skip-ratio", "0.4"), own, filled),
        "select": (
            ("select", "--model", str(toy), *masked, *compared[2:], *drawn, "--output", "s.json", "--overwrite"),
            (".",), ("s_images",),
        ),
        "generate": (
            (*("generate", "--model", str(toy), "--prompt", "a", "--n-images", "2"), *drawn, *written),
            (".", "new"), (),
        ),
        "convert": (("convert", "--hf-path", str(checkpoint), *converted), (".",), ()),
        "stream": (("convert", "--hf-path", REPO, *converted, "--stream"), (".",), ()),
        "fuse": (("fuse", *adapter, "--save-path", "f"), (".",), ()),
        "export": (("export", *adapter[2:], "--output", "x", "--format", "mlx"), (".",), ()),
        "evaluate": (
            ("evaluate", *adapter, "--data", str(pictures), *templates, *scored, *compared, *drawn),
            (".", "e", "e/images"), (),
        ),
    }  # fmt: skip
    return {name: Scene(name, *line) for name, line in lines.items()}
