"""Trace the least peaks of the known models and store them for `mlx-blockskip doctor`.

    python examples/bench/fits.py sana-0.6b sana-1.6b     # these, beside what is stored already
    python examples/bench/fits.py                         # every preset

Runs `estimate` at each model's own settings, minutes a model, and writes mlx_blockskip/assets/doctor/fits.json after
each.
"""

import argparse
import time
from importlib.metadata import version

from mlx_blockskip import estimate
from mlx_blockskip.display import Plain

# isort: split

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.models import presets
from mlx_blockskip.tasks.doctor import fits
from mlx_blockskip.tasks.estimate import Estimate


def peaks(rows: list[Estimate]) -> dict[str, dict[str, dict[str, int]]]:
    """By precision, by share of skipped blocks, and by phase, in bytes."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        found.setdefault(row.precision, {})[f"{row.ratio:g}"] = {phase.name: phase.peak for phase in row.phases}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(presets.folders()), metavar="MODEL")
    for name in parser.parse_args().models:
        started = time.perf_counter()
        rows = estimate(model=name, on_event=Plain().draw)
        backend = "Metal" if mx.metal.is_available() else "the CPU backend"
        stored = {**fits.read(), "backend": backend, "mlx": version("mlx")}
        stored["models"] = dict(sorted({**stored["models"], name: peaks(rows)}.items()))
        fits.path().parent.mkdir(exist_ok=True)
        files.write_json(fits.path(), stored)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
