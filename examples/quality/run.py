"""Does a tiny model learn a subject, and does it keep the rest? Prints a Markdown table, writes a grid a subject.

    python examples/quality/run.py OUT SUBJECT_DIR [SUBJECT_DIR ...] [-- SETTING=VALUE ...]

Each picture is cut from its plain background and named by its nearest neighbour (nearest.py). Learned: of 3 seeds x
4 prompts with the trigger on new colours, how many are nearest to the subject. Kept: of 3 seeds x 8 prompts without it,
how many have the same nearest emoji as before training. Those prompts were picked so that the untrained model's own
pictures are named right in all seeds (on some backgrounds the cut fails: a yellow wheel on yellow), and none of their
things is in tiny-flux's class prompts. Settings are fields of TrainSettings; model=tiny-sana takes the other one.
"""

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import yaml
from nearest import nearest, references
from PIL import Image

from mlx_blockskip import generate, train
from mlx_blockskip.data import grid, load_dataset

COLOURS = ("red", "blue", "gray", "green", "brown", "yellow", "pink", "purple")
SEEDS = 3
OTHERS = (
    "a ghost on a blue background",
    "a penguin on a red background",
    "a sunflower on a purple background",
    "a trophy on a green background",
    "a guitar on a pink background",
    "a tractor on a white background",
    "a strawberry on a gray background",
    "a robot face on a pink background",
)


def images(out: Path, model: str, prompts: list[str], adapter: Path | None) -> list[Image.Image]:
    """SEEDS images a prompt."""
    adapters = [str(adapter)] if adapter else []
    paths = generate(
        model=model,
        prompt=prompts,
        n_images=SEEDS,
        adapter_path=adapters,
        output=str(out / "image.png"),
        overwrite=True,
    )
    return [Image.open(path).copy() for path in paths]


def measure(out: Path, subject: Path, options: dict[str, object]) -> str:
    """Train on one subject and return its row of the table."""
    captions = " ".join(example.caption for example in load_dataset(subject).examples)
    colours = [colour for colour in COLOURS if colour not in captions][:4]
    prompts = [f"a sks toy on a {colour} background" for colour in colours]
    known = references(subject)
    model = str(options.get("model", "tiny-flux"))
    before, others = images(out, model, prompts, None), images(out, model, list(OTHERS), None)
    started = time.perf_counter()
    result = train(data=str(subject), adapter_path=str(out / f"{subject.name}-adapter"), **options)
    seconds = time.perf_counter() - started
    after, kept = (images(out, model, texts, result.adapter_path) for texts in (prompts, list(OTHERS)))
    names = [[nearest(image, known) for image in group] for group in (before, after, others, kept)]
    learned = [f"{group.count('subject')}/{len(group)}" for group in names[:2]]
    same = sum(a == b for a, b in zip(names[2], names[3], strict=True))
    grid([before, after, others, kept], ["before", "after", "without the trigger, before", "after"]).save(
        out / f"{subject.name}.png"
    )
    return f"| {subject.name} | {learned[0]} | {learned[1]} | {same}/{len(others)} | {seconds:.0f} |"


if __name__ == "__main__":
    own = sys.argv[1:]
    split = own.index("--") if "--" in own else len(own)
    settings = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in own[split + 1 :])}
    target = Path(own[0])
    target.mkdir(parents=True, exist_ok=True)
    print(f"{platform.platform()}, {platform.machine()}, mlx {version('mlx')}, settings {settings or 'default'}\n")
    print("| subject | nearest to it before | after | others keep theirs | training, s |\n|---|---|---|---|---|")
    for path in own[1:split]:
        print(measure(target, Path(path), settings), flush=True)
