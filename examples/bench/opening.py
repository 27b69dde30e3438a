"""How long a bundled model takes to open from a warm cache, and `mlx-blockskip --help`: the least of several processes.

    python examples/bench/opening.py [--runs 7] [--model tiny-flux]

The first process of each kind is not counted: it converts the model, and leaves compiled modules for the others.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

OPEN = """
import time
from mlx_blockskip import load
began = time.perf_counter()
import mlx_blockskip.tasks.checkpoint.resolve
imported = time.perf_counter()
load({model!r})
print(imported - began, time.perf_counter() - imported)
"""


def run(*arguments: str, cache: str) -> tuple[float, str]:
    """Seconds of a process from its start to its end, and what it printed."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--model", default="tiny-flux")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        code = OPEN.format(model=given.model)
        runs = [map(float, run("-c", code, cache=cache)[1].split()) for _ in range(given.runs + 1)][1:]
        imported, opened = zip(*runs, strict=True)
        helped = [run("-m", "mlx_blockskip", "--help", cache=cache)[0] for _ in range(given.runs + 1)][1:]
    print(f"modules that opening needs, imported: {min(imported):.3f} s")
    print(f"{given.model} opened after the imports: {min(opened):.3f} s (bound 0.3)")
    print(f"mlx-blockskip --help, the whole process: {min(helped):.3f} s (bound 0.5)")


if __name__ == "__main__":
    main()
