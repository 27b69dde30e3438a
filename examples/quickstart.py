"""Teach tiny-flux a hedgehog it has never seen, and lay the same prompts and seeds before and after side by side."""

import sys
import time
from pathlib import Path

from PIL import Image

from mlx_blockskip import generate, train
from mlx_blockskip.data import grid
from mlx_blockskip.display import Plain

SUBJECT = "a sks toy on a {} background"
COLOURS = ("red", "blue", "gray", "green")
OTHERS = ("a penguin on a red background", "a trophy on a green background", "a sunflower on a purple background")


def images(out: Path, name: str, prompts: list[str], adapter: Path | None) -> list[Image.Image]:
    """One image a prompt, seed 0 and up."""
    paths = generate(
        prompt=prompts,
        adapter_path=[str(adapter)] if adapter else [],
        output=str(out / f"{name}.png"),
        overwrite=True,
        on_event=Plain().draw,
    )
    return [Image.open(path) for path in paths]


def main(out: Path, data: Path) -> None:
    """Write everything into `out`; `data` is a directory of images with captions."""
    started = time.perf_counter()
    prompts = [SUBJECT.format(colour) for colour in COLOURS] + list(OTHERS)
    before = images(out, "before", prompts, None)
    trained = train(data=str(data), adapter_path=str(out / "adapter"), on_event=Plain().draw)
    after = images(out, "after", prompts, trained.adapter_path)
    shown = [Image.open(path).convert("RGB") for path in sorted(data.glob("[!.]*.png"))]
    labels = ["before: " + ", ".join(COLOURS) + "; then prompts without the trigger", "after", "the subject's pictures"]
    sheet = out / "comparison.png"
    grid([before, after, shown], labels).save(sheet)
    print(f"comparison: {sheet}")
    print(f"run: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
