"""Block selection: does the probe, which generates nothing, agree with Algorithm 1? Prints Markdown.

    python examples/bench/selection.py WORK [--model tiny-sana] [SUBJECT_DIR ...]

For each subject a plain LoRA is trained; then images are made with the first n and with the last m blocks masked
(`select --method generate`, DINO), and velocities compared (`select --method probe`), with the adapter and on the base
model. Without subjects it takes two from the repository and draws two (examples/ablation/subjects.py). What is in WORK
is not made again. The last rows are over all subjects.
"""

import argparse
import json
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from steps import machine

from mlx_blockskip import select, train
from mlx_blockskip.blockskip.plan import budget
from mlx_blockskip.blockskip.selection import Distances, mean
from mlx_blockskip.data import load_dataset

HERE = Path(__file__).resolve().parent
COLOURS = ("red", "blue", "gray", "brown", "yellow", "green")
RATIOS = (0.3, 0.4, 0.5)
TRAINING = {"skip_ratio": 0.0, "iters": 200, "class_images": 0, "steps_per_save": 0}


def subjects(work: Path, given: list[str]) -> list[Path]:
    """The folders to take."""
    if given:
        return [Path(path) for path in given]
    sys.path.append(str(HERE.parent / "ablation"))
    from subjects import draw

    drawn = [draw(work / "subjects", name) for name in ("polar-bear", "phoenix")]
    return [
        Path(str(files("mlx_blockskip") / "assets" / "subjects" / "hedgehog")),
        HERE.parents[1] / "tests" / "subjects" / "teapot",
        *drawn,
    ]


def once(path: Path, make) -> dict:  # type: ignore[no-untyped-def]
    """What is in a selection's file, and how long it took to make."""
    seconds = path.with_suffix(".seconds")
    if not seconds.exists():
        began = time.perf_counter()
        make()
        seconds.write_text(f"{time.perf_counter() - began:.1f}")
    return {**json.loads(path.read_text()), "seconds": float(seconds.read_text())}


def measure(work: Path, subject: Path, model: str) -> dict[str, dict]:
    """The selections of one subject, by method."""
    adapter, out = work / f"{subject.name}-lora", work / subject.name
    out.mkdir(parents=True, exist_ok=True)
    if not (adapter / "adapters.safetensors").exists():
        train(model=model, data=str(subject), adapter_path=str(adapter), **TRAINING)
    captions = " ".join(example.caption for example in load_dataset(subject).examples)
    prompts = [f"a sks toy on a {colour} background" for colour in COLOURS if colour not in captions][:2]
    common = {"model": model, "adapter_path": [str(adapter)]}
    wanted = {
        "generate": {"method": "generate", "prompt": prompts, "n_images": 2, **common},
        "probe": {"method": "probe", "data": str(subject), **common},
        "probe, base": {"model": model, "method": "probe", "data": str(subject)},
    }
    found = {}
    for name, options in wanted.items():
        path = out / f"{name.replace(', ', '-')}.json"
        found[name] = once(path, lambda options=options, path=path: select(output=str(path), **options))
    return found


def table_of(record: dict) -> Distances:
    return Distances(tuple(record["first"]), tuple(record["last"]))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, the mean of theirs for equal values."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(a: Distances, b: Distances) -> float:
    """Rank correlation over all (n, m)."""
    return float(np.corrcoef(ranks(a.table.ravel()), ranks(b.table.ravel()))[0, 1])


def row(name: str, method: str, table: Distances, reference: Distances, depth: int, seconds: float) -> str:
    plans = [table.best(budget(ratio, depth)) for ratio in RATIOS]
    correlation = "" if table is reference else f"{spearman(table, reference):.2f}"
    return f"| {name} | {method} | {correlation} | {' | '.join(f'({n}, {m})' for n, m in plans)} | {seconds:.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("subject", nargs="*")
    parser.add_argument("--model", default="tiny-flux", help="each wants a WORK of its own")
    given = parser.parse_intermixed_args()
    target = given.work
    print(f"{machine('mlx')}\n")
    print("| subject | method | Spearman | 30 % | 40 % | 50 % | seconds |\n|---|---|---|---|---|---|---|")
    everything: dict[str, list[tuple[Distances, float]]] = {}
    for one in subjects(target, given.subject):
        results = measure(target, one, given.model)
        tables = {method: table_of(record) for method, record in results.items()}
        for method, record in results.items():
            everything.setdefault(method, []).append((tables[method], record["seconds"]))
            line = row(one.name, method, tables[method], tables["generate"], record["depth"], record["seconds"])
            print(line, flush=True)
    means = {method: mean([table for table, _ in found]) for method, found in everything.items()}
    for method, found in everything.items():
        total = sum(seconds for _, seconds in found)
        print(row("all", method, means[method], means["generate"], record["depth"], total))
    curves = {method: {"first": table.first, "last": table.last} for method, table in means.items()}
    (target / "means.json").write_text(json.dumps(curves, indent=1))
