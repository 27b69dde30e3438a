"""Checksums of what every task makes of the bundled models, so that a change that should change nothing shows it.

    python examples/bench/golden.py --write before.json     # before the change
    python examples/bench/golden.py --against before.json   # after it

Adapters are summed over their tensors by name, images over their pixels, tables over their numbers. In float32, and on
one machine only: another BLAS or processor gives other last bits.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # sums depend on how a product is split

import mlx_blockskip
from mlx_blockskip import evaluate, generate, load, select, train

# isort: split

import mlx.core as mx
import numpy as np
from PIL import Image

HEDGEHOG = Path(mlx_blockskip.__path__[0]) / "assets" / "subjects" / "hedgehog"
SHORT: dict[str, Any] = {
    "data": str(HEDGEHOG), "iters": 4, "rank": 2, "learning_rate": 1e-3, "batch_size": 2, "resolution": 64,
    "train_resolution": 32, "steps_per_save": 2, "class_images": 0, "seed": 3,
}  # fmt: skip
PRIOR = {"class_prompt": ["a penguin", "a trophy on a green background"], "class_images": 3}
TRAINING: dict[str, dict[str, Any]] = {
    "base": {},
    "base, least memory": {"memory_budget": "0"},
    "fresh": {"residuals": "fresh", "refresh": 2},
    "none": {"residuals": "none"},
    "prior preservation": PRIOR,
    "probe": {"plan": "auto"},
    "inner runs": {"plan": "inner.json", "grad_accumulation": 2},
    "plain LoRA": {"skip_ratio": 0.0, "lora_targets": "attention", "scale": 2.0},
    "schedule": {"lr_schedule": "cosine", "warmup": 2, "weight_decay": 0.1, "clip": 0.01},
    **{f"patches: {mode}": {"patch_mode": mode} for mode in ("dynamic", "high-to-low", "random", "resize", "none")},
}
DRAWN: dict[str, Any] = {"steps": 3, "width": 128, "height": 96}
LEFT_OUT = ("model_identity", "identities", "data", "settings", "adapters", "encoder", "probe", "checksum")


def of_tensors(path: Path) -> str:
    """Over names, shapes and bytes, in the order of the names."""
    state = hashlib.sha256()
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    for name, value in sorted(tensors.items()):
        state.update(f"{name} {value.shape} {value.dtype}".encode() + np.array(value).tobytes())
    return state.hexdigest()[:16]


def of_images(paths: list[Path]) -> str:
    """Over the pixels, one image after the other."""
    state = hashlib.sha256()
    for path in paths:
        with Image.open(path) as image:
            state.update(np.asarray(image.convert("RGB")).tobytes())
    return state.hexdigest()[:16]


def of_table(path: Path) -> str:
    """Over all values of a JSON file but what names files and models."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if key not in LEFT_OUT}
        if isinstance(value, list):
            return [kept(item) for item in value]
        return None if isinstance(value, str) and value.endswith(".png") else value

    text = json.dumps(kept(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_model(model: str, out: Path, report: Callable[[str, str], None]) -> None:
    """Every task on one model."""
    depth = load(model).stack.depth
    runs = [[0, 1], [2, 3], [depth - 1, depth]]
    (out / "inner.json").write_text(json.dumps({"depth": depth, "runs": runs}))
    adapter = out / "base"
    for name, options in TRAINING.items():
        directory = out / name.replace(" ", "-").replace(":", "").replace(",", "")
        given = {**options, "plan": str(out / "inner.json")} if name == "inner runs" else options
        train(model=model, adapter_path=str(directory), **{**SHORT, **given})
        report(f"{model}: train, {name}: adapter", of_tensors(directory / "adapters.safetensors"))
        if name == "prior preservation":
            made = sorted((directory / "class_images").glob("*.png"))
            report(f"{model}: train, {name}: class images", of_images(made))
        if name == "probe":
            report(f"{model}: train, {name}: selection", of_table(directory / "selection.json"))
    prompts = ["a sks toy on a red background", "a penguin"]
    for name, options in (
        ("base model", {}),
        ("adapter", {"adapter_path": [str(adapter)], "lora_scale": [0.8], "cfg_scale": 2.5, "negative_prompt": "red"}),
        ("least memory", {"memory_budget": "0", "n_images": 2}),
    ):
        target = out / f"{name.replace(' ', '-')}.png"
        images = generate(model=model, prompt=prompts, output=str(target), overwrite=True, **DRAWN, **options)
        report(f"{model}: generate, {name}", of_images(images))
    for method, options in (("probe", {"data": str(HEDGEHOG), "resolution": 64}), ("generate", DRAWN)):
        target = out / f"{method}.json"
        select(
            model=model, method=method, adapter_path=[str(adapter)], output=str(target), overwrite=True,
            memory_budget="0", **{"prompt": [] if method == "probe" else prompts[:1], **options},
        )  # fmt: skip
        report(f"{model}: select, {method}", of_table(target))
    found = evaluate(adapter_path=str(adapter), n_images=1, subject_kind="plain", **DRAWN)
    report(f"{model}: evaluate", of_table(found.report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="JSON file to keep the checksums in")
    parser.add_argument("--against", type=Path, help="JSON file to compare with")
    parser.add_argument("--models", nargs="+", default=["tiny-flux", "tiny-sana"])
    options = parser.parse_args()
    before = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, str] = {}
    started = time.perf_counter()

    def report(name: str, checksum: str) -> None:
        found[name] = checksum
        verdict = "" if not before else "  same" if before.get(name) == checksum else "  DIFFERS"
        print(f"{checksum}  {name}{verdict}", flush=True)

    for model in options.models:
        with tempfile.TemporaryDirectory() as directory:
            of_model(model, Path(directory), report)
    print(f"{len(found)} checksums in {time.perf_counter() - started:.0f} s")
    if options.write:
        options.write.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(before.get(name) != checksum for name, checksum in found.items())) if before else 0


if __name__ == "__main__":
    sys.exit(main())
