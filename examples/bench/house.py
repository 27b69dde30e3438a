"""Figures of the code's own structure: how many functions a run enters, rooms and their imports, the longest files.

    python examples/bench/house.py [--memory-budget 0]

Own functions are those defined below mlx_blockskip/ (and convert/), each counted once, without lambdas and
comprehensions.
"""

import argparse
import ast
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_blockskip
from mlx_blockskip import generate, train
from mlx_blockskip.events import Step

ROOT = Path(mlx_blockskip.__path__[0])
HEDGEHOG = ROOT / "assets" / "subjects" / "hedgehog"
FOLDERS = str(ROOT), str(ROOT.parent / "convert")


class Entered:
    """The own functions that are entered, as `file:name`, from `begin` on."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._known: dict[CodeType, tuple[str, str] | None] = {}

    def begin(self) -> None:
        self.seen = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self._known:
            own = code.co_filename.startswith(FOLDERS) and not code.co_name.startswith("<")
            self._known[code] = (code.co_filename, code.co_qualname) if own else None
        if (name := self._known[code]) is not None:
            self.seen.add(name)

    def __str__(self) -> str:
        return f"{len(self.seen)} functions in {len({file for file, _ in self.seen})} files"


def counted(budget: str) -> None:
    """Print what `train` enters before its first step and in its second, and what `generate` enters."""
    entered, before, step = Entered(), "", ""

    def watch(event: object) -> None:
        nonlocal before, step
        if isinstance(event, Step) and event.phase == "train" and event.done == 2:
            entered.begin()
        elif isinstance(event, Step) and event.phase == "train" and event.done == 3:
            step = str(entered)

    import mlx_blockskip.tasks.train.train as command

    run = command.run

    def begun(*arguments: Any) -> float:
        nonlocal before
        before = str(entered)
        return run(*arguments)

    command.run = begun
    settings: dict[str, Any] = {
        "data": str(HEDGEHOG), "iters": 4, "rank": 2, "class_images": 0, "memory_budget": budget, "steps_per_save": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        train(adapter_path=f"{directory}/warm", **settings)  # the model is converted, modules are imported
        sys.setprofile(entered)
        train(adapter_path=f"{directory}/a", **settings, on_event=watch)
        print(f"train, before the loop: {before}")
        print(f"train, one step: {step}")
        entered.begin()
        generate(prompt=["a penguin"], steps=2, output=f"{directory}/a.png", overwrite=True, memory_budget=budget)
        sys.setprofile(None)
        print(f"generate: {entered}")


def rooms() -> None:
    """Print the rooms of tasks/ and the imports among them, and those that close a circle."""
    folder = ROOT / "tasks"
    edges: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in imported(node):
                other = module.split(".")[2] if module.count(".") >= 2 else ""
                if module.startswith("mlx_blockskip.tasks.") and other != room:
                    edges[room, other] += 1
    names = {path.name.removesuffix(".py") for path in folder.iterdir()} - {"__init__", "__pycache__"}
    print(f"tasks/: {len(names)} rooms, {len(edges)} imports among them, {floors(names, set(edges))} floors")
    circles = [(a, b) for a, b in edges if reaches(b, a, set(edges))]
    print("imports that close a circle: " + (", ".join(f"{a} -> {b}" for a, b in sorted(circles)) or "none"))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def reaches(start: str, end: str, edges: set[tuple[str, str]]) -> bool:
    """Whether imports lead from one room to another."""
    seen, waiting = set(), [start]
    while waiting:
        if (room := waiting.pop()) == end:
            return True
        if room not in seen:
            seen.add(room)
            waiting += [b for a, b in edges if a == room]
    return False


def floors(names: set[str], edges: set[tuple[str, str]]) -> int:
    """The longest chain of imports."""

    def below(room: str, path: frozenset[str]) -> int:
        return 1 + max((below(b, path | {b}) for a, b in edges if a == room and b not in path), default=0)

    return max(below(name, frozenset({name})) for name in names)


def longest(count: int = 6, limit: int = 300) -> None:
    """Print the longest files, and the lines of tasks/memory."""
    folders = [Path(folder) for folder in FOLDERS if Path(folder).is_dir()]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py")}
    print(f"files above {limit} lines: {sum(n > limit for n in lines.values())} of {len(lines)}")
    for path, number in sorted(lines.items(), key=lambda item: -item[1])[:count]:
        print(f"  {number} {path.relative_to(ROOT.parent)}")
    print(f"tasks/memory: {sum(n for path, n in lines.items() if path.parent == ROOT / 'tasks' / 'memory')} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory-budget", default="auto", help="of the runs that are counted")
    counted(parser.parse_args().memory_budget)
    rooms()
    longest()


if __name__ == "__main__":
    main()
