"""How long conversion takes beside a plain copy of the same file, with the memory that it takes.

    python examples/bench/convert_speed.py [--folder DIRECTORY] [--rounds 3]

Three single blocks of FLUX.1-dev at full width with what lies around them (0.91 GiB of random bfloat16) are converted
to bfloat16 and to 4 bit, and copied with `cp`, each once a round; the fastest of the rounds counts. All are timed until
what they wrote is on the disk. Checksums of what is written are a part of conversion.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import numpy as np

from mlx_blockskip.converters import flux1, write
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.converters.table import Component
from mlx_blockskip.engine import disk, files
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig

CONFIG = {"num_layers": 0, "num_single_layers": 3, "guidance_embeds": True}


def write_source(folder: Path, component: Component) -> Path:
    """The component's tensors in one file; every 8 MiB are alike."""
    files.write_json(folder / "config.json", CONFIG)
    header, size = files.encode_header([files.TensorEntry(row.name, row.shape, "BF16") for row in component.rows])
    normal = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    block = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for start in range(len(header), size, len(block)):
            file.write(block[: size - start])
    disk.flush_tree(folder)
    return folder / "model.safetensors"


def seconds(work: Callable[[Path], object], target: Path) -> float:
    """Of filling a new directory, until it is on the disk."""
    target.mkdir()
    started = time.perf_counter()
    work(target)
    disk.flush_tree(target)
    taken = time.perf_counter() - started
    shutil.rmtree(target)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; the system's folder for temporary files by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    component = flux1.transformer("transformer", FluxTransformer2DConfig(**CONFIG))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "hf").mkdir()
        file = write_source(folder / "hf", component)
        source = open_source(folder / "hf")

        def converted(bits: int) -> Callable[[Path], object]:
            precision = write.Precision("bfloat16", bits)
            return lambda target: list(write.write_component(component, source, target, precision))

        jobs: dict[str, Callable[[Path], object]] = {
            "cp": lambda target: subprocess.run(["cp", str(file), str(target)], check=True),
            "to bfloat16": converted(0),
            "to 4 bit": converted(4),
        }
        best = dict.fromkeys(jobs, float("inf"))
        peaks = dict.fromkeys(jobs, 0)
        for _ in range(options.rounds):
            for job, work in jobs.items():
                mx.reset_peak_memory()
                best[job] = min(best[job], seconds(work, folder / "out"))
                peaks[job] = max(peaks[job], mx.get_peak_memory())
        print(f"{file.stat().st_size / 2**30:.2f} GiB of bfloat16, fastest of {options.rounds} rounds\n")
        print("| | s | beside cp | MLX's peak, MiB |")
        print("|---|---|---|---|")
        for job, taken in best.items():
            print(f"| {job} | {taken:.2f} | {taken / best['cp']:.2f} | {peaks[job] / 2**20:.0f} |")


if __name__ == "__main__":
    main()
