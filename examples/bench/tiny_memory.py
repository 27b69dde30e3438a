"""Peak of MLX memory in each phase on tiny-flux, streamed and resident. Prints a Markdown table."""

import platform
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from mlx_blockskip import generate, train
from mlx_blockskip.events import PhaseEnd


def peaks(budget: str | None, out: Path) -> dict[str, int]:
    """Bytes by phase of a short training run and one image."""
    found: dict[str, int] = {}

    def keep(event: object) -> None:
        if isinstance(event, PhaseEnd):
            found[event.phase] = max(found.get(event.phase, 0), event.peak_memory)

    data = str(files("mlx_blockskip") / "assets" / "subjects" / "hedgehog")
    train(data=data, adapter_path=str(out / "a"), iters=8, class_images=4, memory_budget=budget, on_event=keep)
    generate(
        prompt=["a sks toy on a red background"],
        adapter_path=[str(out / "a")],
        memory_budget=budget,
        output=str(out / "o.png"),
        overwrite=True,
        on_event=keep,
    )
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        peaks(None, Path(directory) / "warm")  # converts the model
        resident = peaks(None, Path(directory) / "resident")
        streamed = peaks("0", Path(directory) / "streamed")
    print(f"{platform.platform()}, {platform.machine()}, mlx {version('mlx')}\n")
    print("| phase | resident, MiB | streamed, MiB |\n|---|---|---|")
    for phase, count in resident.items():
        print(f"| {phase} | {count / 2**20:.1f} | {streamed[phase] / 2**20:.1f} |")
