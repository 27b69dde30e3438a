"""How fast a walk reads the weights of blocks, beside what `dd` reads of the same files. Prints a Markdown table.

    python examples/bench/reading.py [WORK]

Blocks of FLUX.1's layout in 4 bit, random bytes in real files (1.8 GiB, in a temporary directory below WORK, which says
what disk is measured). A walk hands out each block and does nothing with it, with a memory budget of 0: no block stays,
and none is read while another is at work. `dd` reads each file with one block of the file's size. Both take turns over
several rounds after one to warm up; a ratio is the median over rounds of the ratio within a round. "Cold" means that
the system was told to forget the files (posix_fadvise), and is left out where that cannot be (macOS).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from steps import GIB, hollow_model, machine, transformer_config

DEPTH = 2, 10
"""Double and single blocks."""

WIDTH = 3072
SYNCED = 1 << 24


def fill(path: Path) -> None:
    """Random bytes in place of a safetensors file's zeros: holes are read faster than data."""
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for _ in range(0, path.stat().st_size - file.tell(), SYNCED):
            file.write(os.urandom(min(SYNCED, path.stat().st_size - file.tell())))
        file.flush()
        os.fsync(file.fileno())


def forget(paths: Sequence[Path]) -> None:
    """Have the system drop what it keeps of these files."""
    from mlx_blockskip.engine import disk

    for path in paths:
        with path.open("rb") as file:
            disk.past_memory(file.fileno())


def copied(paths: Sequence[Path]) -> None:
    """Read each file by one block of its size."""
    for path in paths:
        command = ["dd", f"if={path}", "of=/dev/null", f"bs={path.stat().st_size}"]
        subprocess.run(command, check=True, capture_output=True)


def seconds(run: Callable[[], None], before: Callable[[], None]) -> float:
    before()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compared(
    walk: Callable[[], None], dd: Callable[[], None], before: Callable[[], None], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of the walk and of dd in each round, the first of which is left out."""
    found = []
    for number in range(rounds + 1):
        turns = (walk, dd) if number % 2 else (dd, walk)
        taken = {run: seconds(run, before) for run in turns}
        found.append((taken[walk], taken[dd]))
    return found[1:]


def main(work: Path | None, rounds: int) -> None:
    print(f"{machine('mlx')}\n")
    with tempfile.TemporaryDirectory(dir=work) as directory:
        target = Path(directory) / "model"
        hollow_model(target, transformer_config(WIDTH, *DEPTH), "bfloat16", 4)

        from mlx_blockskip.models.registry import open_model

        reader = open_model(target, 0).reader
        blocks = reader.stack.path
        names = sorted({reader.shards.weight_map[name] for index in blocks for name in reader.names(index)})
        paths = [reader.shards.path / name for name in names]
        for path in paths:
            fill(path)
        size = sum(reader.nbytes(index) for index in blocks)

        def walk() -> None:
            for _, weights in reader.walk(blocks):
                del weights

        print(f"{len(paths)} files, {size / GIB:.2f} GiB of weights; medians of {rounds} rounds\n")
        print("| page cache | walk, GiB/s | dd, GiB/s | walk / dd |\n|---|---|---|---|")
        states: dict[str, Callable[[], None]] = {"warm": lambda: None}
        if sys.platform == "linux":
            states["cold"] = lambda: forget(paths)
        for name, before in states.items():
            taken = compared(walk, lambda: copied(paths), before, rounds)
            speeds = [size / GIB / statistics.median(column) for column in zip(*taken, strict=True)]
            ratio = statistics.median(dd / own for own, dd in taken)
            print(f"| {name} | {speeds[0]:.2f} | {speeds[1]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.work, arguments.rounds)
