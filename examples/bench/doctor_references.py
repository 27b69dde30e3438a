"""Compute what `mlx-blockskip doctor` compares with, in float32 on the CPU backend, and store it in the package.

    OPENBLAS_NUM_THREADS=1 python examples/bench/doctor_references.py

Writes mlx_blockskip/assets/doctor/references.safetensors. To be run again only where results are meant to change.
"""

import tempfile
from pathlib import Path

import mlx_blockskip  # noqa: F401  (before mlx.core is imported: it opens OpenBLAS)

# isort: split

import mlx.core as mx
from safetensors.numpy import save_file

from mlx_blockskip.tasks.doctor import checks
from mlx_blockskip.tasks.doctor.workshop import references_path

LARGEST = 300 << 10


def main() -> None:
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as directory:
        found = checks.references(Path(directory))
    target = references_path()
    target.parent.mkdir(exist_ok=True)
    save_file(dict(sorted(found.items())), target)
    size = target.stat().st_size
    print(f"{target}: {len(found)} arrays, {size / 1024:.0f} KiB")
    assert size < LARGEST, "too large for the package"


if __name__ == "__main__":
    main()
