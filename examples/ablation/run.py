"""The paper's ablations (its tables 1, 2 and 11) in small: what each part of the method does to learning.

    python examples/ablation/run.py OUT [--model tiny-sana] [--full] [--jobs 2] [--tune]

Every row is trained for the same number of steps on subjects that the model never saw and that were not used to choose
learning rate, steps or plan: those were fixed on the hedgehog and the teapot (--tune prints what they were chosen
from, and works in OUT/tuning). The raw results stay in OUT/results.json, a line for each row, subject and seed, and
what is there is not run again. Writes OUT/table.md, table.png and pictures.png beside it and prints an estimate of the
time first. --full takes more subjects and seeds.
Needs Noto Color Emoji (Debian: fonts-noto-color-emoji).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from measures import Known, colour, likeness
from PIL import Image
from results import ROWS, TUNING, Stored, key
from subjects import SUBJECTS, draw
from table import pictures, table

from mlx_blockskip import generate, load, train
from mlx_blockskip.data import load_dataset
from mlx_blockskip.events import PhaseEnd
from mlx_blockskip.tasks.checkpoint.encoders import clip_encoder, vision_encoder
from mlx_blockskip.tasks.checkpoint.resolve import resolve

HERE = Path(__file__).resolve().parent
SEEDS, PROMPTS = 3, 4
SIDE, SMALL_SIDE = 128, 64
COMMON = {"batch_size": 4, "rank": 16, "class_images": 0, "resolution": SIDE, "steps_per_save": 0}
FIXED = {
    "tiny-flux": {"learning_rate": 2e-3, "iters": 200},
    "tiny-sana": {"learning_rate": 5e-4, "iters": 200},
}
"""By model, what was fixed on the tuning subjects."""

WHOLE = {"patch_mode": "none", "train_resolution": SIDE}
SMALL = {"train_resolution": SMALL_SIDE}
HALF = {"skip_ratio": 0.5, **WHOLE}
PLAIN, SKIPPED = "plain LoRA, 128 px", "50 % skipped"


def rows(depth: int, plan: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Training options by row. plan: the n and m recorded for 50 %."""
    half, n, m = depth // 2, plan["n"], plan["m"]
    middle, kept = [[depth // 4, depth // 4 + half]], [[0, n], [depth - 1 - m, depth - 1]]
    return {
        PLAIN: {"skip_ratio": 0.0, **WHOLE},
        "resize to 64": {"skip_ratio": 0.0, "patch_mode": "resize", **SMALL},
        "dynamic patches": {"skip_ratio": 0.0, "patch_mode": "dynamic", **SMALL},
        "high-to-low patches": {"skip_ratio": 0.0, "patch_mode": "high-to-low", **SMALL},
        "random patches": {"skip_ratio": 0.0, "patch_mode": "random", **SMALL},
        "30 % skipped": {"skip_ratio": 0.3, **WHOLE},
        "40 % skipped": {"skip_ratio": 0.4, **WHOLE},
        SKIPPED: HALF,
        "50 %, fresh residuals": {**HALF, "residuals": "fresh"},
        "50 %, no residuals": {**HALF, "residuals": "none"},
        "50 %, first only": {"skip_first": half, "skip_last": 0, **WHOLE},
        "50 %, last only": {"skip_first": 0, "skip_last": half, **WHOLE},
        f"50 %, (n, m) = ({half - 1}, 1)": {"skip_first": half - 1, "skip_last": 1, **WHOLE},
        "50 %, the middle (HollowedNet)": {"plan": {"depth": depth, "runs": middle}, **WHOLE},
        "50 %, dynamic patches": {"skip_ratio": 0.5, "patch_mode": "dynamic", **SMALL},
        "50 %, fresh every 20 steps": {**HALF, "residuals": "fresh", "refresh": 20},
        "50 %, fresh every 5 steps": {**HALF, "residuals": "fresh", "refresh": 5},
        "50 %, rank 32": {**HALF, "rank": 32},
        "50 %, the last block kept": {"plan": {"depth": depth, "runs": kept}, **WHOLE},
    }


def tuning(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Learning rates and steps, of plain LoRA and of half the blocks."""
    return {
        f"{name}, {rate:g}, {iters} steps": {**table[name], "learning_rate": rate, "iters": iters}
        for name in (PLAIN, SKIPPED)
        for rate, iters in ((5e-4, 200), (1e-3, 200), (2e-3, 200), (1e-3, 300))
    }


COLOURS = ("red", "blue", "gray", "purple", "brown", "yellow", "green", "cyan")
DRIFT = (
    "a ghost on a blue background",
    "a penguin on a red background",
    "a sunflower on a purple background",
    "a trophy on a green background",
    "a tractor on a white background",
    "a strawberry on a gray background",
)


def chosen_subjects(out: Path, full: bool, tuning: bool) -> list[Path]:
    """Folders: two to tune on; else those that were drawn for this."""
    if tuning:
        hedgehog = Path(str(files("mlx_blockskip") / "assets" / "subjects" / "hedgehog"))
        return [hedgehog, HERE.parents[1] / "tests" / "subjects" / "teapot"]
    return [draw(out / "subjects", name) for name in list(SUBJECTS)[: None if full else 4]]


def prompts_for(subject: Path) -> list[str]:
    """On colours that the subject was not shown on."""
    captions = " ".join(example.caption for example in load_dataset(subject).examples)
    return [f"a sks toy on a {c} background" for c in COLOURS if c not in captions][:PROMPTS]


def images(
    out: Path, model: str, prompts: Sequence[str], seeds: int, adapter: Path | None, side: int = SIDE
) -> list[Image.Image]:
    """`seeds` images a prompt."""
    given = [str(adapter)] if adapter else []
    paths = generate(
        model=model, prompt=list(prompts), n_images=seeds, adapter_path=given, width=side, height=side,
        output=str(out / "image.png"), overwrite=True,
    )  # fmt: skip
    found = [Image.open(path).copy() for path in paths]
    for path in paths:
        path.unlink()
    return found


def one(out: Path, name: str, options: dict[str, Any], subject: Path, seed: int, model: str) -> dict[str, Any]:
    """Train a row on a subject and measure it. Without options: the model as it is."""
    work = out / "work" / f"{slug(name)}-{subject.name}-{seed}"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was stopped
    work.mkdir(parents=True)
    found: dict[str, Any] = {"row": name, "subject": subject.name, "seed": seed, "model": model}
    adapter, began = None, time.perf_counter()
    if options:
        adapter = work / "adapter"
        plan = options.get("plan")
        if isinstance(plan, dict):
            (work / "plan.json").write_text(json.dumps(plan))
            options = {**options, "plan": str(work / "plan.json")}
        how = {**COMMON, **FIXED[model], **options}
        ends: list[PhaseEnd] = []
        train(
            model=model, data=str(subject), adapter_path=str(adapter), seed=seed,
            on_event=lambda event: ends.append(event) if isinstance(event, PhaseEnd) else None, **how,
        )  # fmt: skip
        own = [end for end in ends if end.phase == "train"]
        found |= {
            "peak": max(end.peak_memory for end in own),
            "seconds a step": sum(end.seconds for end in own) / how["iters"],
            "training seconds": time.perf_counter() - began,
        }
    prompts = prompts_for(subject)
    shown, others = images(work, model, prompts, SEEDS, adapter), images(work, model, DRIFT, 1, adapter)
    for group, kind in ((shown, "subject"), (others, "drift")):
        for i, image in enumerate(group):
            image.save(work / f"{kind}-{i:02d}.png")
    opened = resolve(model)
    dino, clip = vision_encoder(None, opened), clip_encoder(None, opened)
    known = Known.of(subject)
    ranks = known.ranks(shown)
    asked = [prompt.split(" on a ")[1].split()[0] for prompt in prompts for _ in range(SEEDS)]
    texts = [prompt.replace("sks ", "") for prompt in prompts for _ in range(SEEDS)]
    kept = sorted((out / "work" / f"base-{subject.name}-{seed}").glob("drift-*.png"))
    before = [Image.open(path) for path in kept] if kept else images(work, model, DRIFT, 1, None)
    return found | {
        "top-1": sum(rank == 0 for rank in ranks) / len(ranks),
        "rank": float(np.median(ranks)),
        "DINO": known.similarity(dino, shown),
        "CLIP-I": known.similarity(clip, shown),
        "CLIP-T": float((clip.embed_images(shown) * clip.embed_texts(texts)).sum(axis=1).mean()),
        "colour": sum(colour(image) == c for image, c in zip(shown, asked, strict=True)) / len(shown),
        "kept": likeness(dino, before, others),
        "seconds": time.perf_counter() - began,
        **in_small(work, model, prompts, adapter, known),
    }


def in_small(work: Path, model: str, prompts: Sequence[str], adapter: Path | None, known: Known) -> dict[str, float]:
    """Retrieval at the side that patches are trained at: a model that knows few sizes may not carry over from it."""
    shown = images(work, model, prompts, SEEDS, adapter, SMALL_SIDE)
    return {"top-1 at 64 px": sum(rank == 0 for rank in known.ranks(shown)) / len(shown)}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def jobs_of(
    table: dict[str, dict[str, Any]], subjects: Sequence[Path], seeds: Sequence[int], model: str
) -> Iterator[tuple[str, list[str]]]:
    """(the key of a result, the arguments of the process that makes it), the model as it is first."""
    for seed in seeds:
        for name, options in {"base": {}, **table}.items():
            for subject in subjects:
                made = [name, options, str(subject), seed, model]
                yield key(name, subject.name, seed), ["--one", json.dumps(made)]


def run(out: Path, stored: Stored, waiting: Sequence[tuple[str, list[str]]], jobs: int) -> None:
    """Make what is missing, `jobs` at a time, each in a process of its own with one BLAS thread."""
    missing = [(name, arguments) for name, arguments in waiting if name not in stored.own]
    print(f"{len(waiting) - len(missing)} of {len(waiting)} results are there already", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    known = [stored.own[name]["seconds"] for name, _ in waiting if name in stored.own]
    began = time.perf_counter()

    def make(job: tuple[str, list[str]]) -> None:
        name, arguments = job
        command = [sys.executable, __file__, str(out), *arguments]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} failed")
        stored.put(json.loads(done.stdout.splitlines()[-1]))
        known.append(stored.own[name]["seconds"])
        left = sum(other not in stored.own for other, _ in missing)
        minutes = float(np.median(known)) * left / jobs / 60
        spent = (time.perf_counter() - began) / 60
        print(f"{name}: {known[-1]:.0f} s; {spent:.0f} min gone, about {minutes:.0f} to go", file=sys.stderr)

    bases = [job for job in missing if job[0].startswith("base, ")]
    trained = [job for job in missing if job not in bases]
    if trained and len(known) < 2:  # one of each sort, for an estimate; the first of both are of one subject
        for group in (bases, trained):
            if group:
                make(group.pop(0))
    if bases or trained:
        minutes = max(known) * (len(bases) + len(trained)) / jobs / 60
        print(f"estimate: about {minutes:.0f} minutes with {jobs} processes", file=sys.stderr)
    for group in (bases, trained):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(make, group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="all subjects and three seeds")
    parser.add_argument("--tune", action="store_true", help="learning rates and steps on the two tuning subjects")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--model", choices=FIXED, default="tiny-flux", help="each wants an OUT of its own")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, options, subject, seed, model = json.loads(given.one)
        print(json.dumps(one(given.out, name, options, Path(subject), seed, model)))
        return
    opened = load(given.model)
    chosen = rows(opened.stack.depth, opened.defaults.plans["0.5"])
    out = given.out / "tuning" if given.tune else given.out
    subjects = chosen_subjects(given.out, given.full, given.tune)
    seeds = range(3) if given.full else range(1)
    waiting = list(jobs_of(tuning(chosen) if given.tune else chosen, subjects, seeds, given.model))
    stored = Stored(given.out, TUNING if given.tune else ROWS)
    run(out, stored, waiting, given.jobs)
    results = [stored.own[name] for name, _ in waiting]
    text, picture = table(results, f"{PLAIN}, 0.001, 200 steps" if given.tune else PLAIN)
    (out / "table.md").write_text(text)
    picture.save(out / "table.png", optimize=True)
    names = list(dict.fromkeys(result["row"] for result in results))
    drawn = {
        subject.name: {
            name: sorted((out / "work" / f"{slug(name)}-{subject.name}-0").glob("subject-*.png"))[::SEEDS]
            for name in names
        }
        for subject in subjects
    }
    pictures(names, drawn).quantize(256).save(out / "pictures.png", optimize=True)
    print(text)


if __name__ == "__main__":
    main()
