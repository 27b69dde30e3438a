"""Adapter files of other tools: whether each style x layer x variant draws what the merged model draws, and what
adapters of all layers take at full width. Prints Markdown tables.

    python examples/bench/adapters.py            # the first table: about 6 minutes on 2 cores
    python examples/bench/adapters.py --width    # the second: 10 minutes; 4 GB of disk for files of zeros

First table, on tiny-flux in float32: every file is in a tool's names, and an image of it (64 x 64, 2 steps) is
held against one of a model whose weights numpy changed, by the formula of the adapter's paper. A cell is the largest
difference of a pixel, of 255; "refused" is a sentence with the tensor's name.

Second table, on blocks of FLUX.1-dev's width: the peak of MLX memory of three steps at 256 x 256, budget 0, the
adapter counted, and the processor seconds of a step beside those without one, each in a process of its own.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_blockskip import generate
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX, Shards
from mlx_blockskip.tasks.checkpoint.resolve import resolve

Parts = dict[str, np.ndarray]
Kind = Callable[[np.ndarray, int], tuple[Parts, np.ndarray]]

BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
LAYERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "q, k, v": ("double_blocks.1.img_attn.qkv", "", tuple(f"{BLOCK}.attn.to_{part}" for part in "qkv")),
    "linear1": ("single_blocks.2.linear1", "",
                (*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp")),
    "feed-forward": ("double_blocks.1.img_mlp.2", f"{BLOCK}.ff.net.2", (f"{BLOCK}.ff.net.2",)),
    "modulation": ("double_blocks.1.img_mod.lin", f"{BLOCK}.norm1.linear", (f"{BLOCK}.norm1.linear",)),
    "outside": ("img_in", "x_embedder", ("x_embedder",)),
    "norm": ("double_blocks.1.img_attn.norm.query_norm", f"{BLOCK}.attn.norm_q", (f"{BLOCK}.attn.norm_q",)),
}  # fmt: skip
"""Theirs; diffusers' where it is one layer; the layers of ours, from top to bottom."""

DOWN_UP = ("lora_down.weight", "lora_up.weight")
STYLES = {
    "diffusers, PEFT": ("transformer.{}", ("lora_A.weight", "lora_B.weight"), False),
    "no prefix, adapter's name": ("{}", ("lora_A.default.weight", "lora_B.default.weight"), False),
    "base_model.model.": ("base_model.model.{}", ("lora_A.weight", "lora_B.weight"), False),
    "ComfyUI, BFL": ("diffusion_model.{}", DOWN_UP, True),
    "kohya": ("lora_unet_{_}", DOWN_UP, True),
    "OneTrainer": ("lora_transformer_{_}", DOWN_UP, False),
    "LyCORIS": ("lycoris_{_}", DOWN_UP, False),
    "mflux": ("transformer.{}", ("lora_A", "lora_B"), False),
    "mlx-examples": ("{}", ("lora_a", "lora_b"), True),
}
"""A layer's name, the factors' names, and whether layers are called as Black Forest Labs do."""


def draw(seed: int, *shape: int, size: float = 0.3) -> np.ndarray:
    return np.asarray(philox.normal(seed, 5, *shape, shape=shape), np.float32) * np.float32(size)


def lora(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    (rows, width), r = weight.shape, 4
    a, b = draw(seed, r, width), draw(seed + 1, rows, r)
    return {"a": a, "b": b}, b @ a


def with_alpha(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    parts, delta = lora(weight, seed)
    return {**parts, "alpha": np.array(6.0, np.float32)}, delta * 1.5


def dora(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    parts, delta = lora(weight, seed)
    lengths = np.abs(draw(seed + 2, len(weight))) + 1
    changed = weight + delta
    new = changed * (lengths / np.linalg.norm(changed, axis=1))[:, None]
    return {**parts, "dora_scale": lengths[:, None]}, new - weight


def lokr(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    rows, width = weight.shape
    one, two = draw(seed, 4, 4), draw(seed + 1, rows // 4, width // 4)
    return {"lokr_w1": one, "lokr_w2": two}, np.kron(one, two)


def loha(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    rows, width = weight.shape
    a, b, c, d = draw(seed, rows, 4), draw(seed + 1, 4, width), draw(seed + 2, rows, 4), draw(seed + 3, 4, width)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, (a @ b) * (c @ d)


def full(weight: np.ndarray, seed: int) -> tuple[Parts, np.ndarray]:
    delta = draw(seed, *weight.shape, size=0.1)
    return {"diff": delta}, delta


KINDS: dict[str, Kind] = {
    "LoRA": lora, "with alpha": with_alpha, "DoRA": dora, "LoKr": lokr, "LoHa": loha, "difference": full,
}  # fmt: skip


def weights_of(shards: Shards, modules: Sequence[str]) -> np.ndarray:
    """Their weights, one below the other; those of a norm as one column."""
    found = [np.array(shards.load([f"{module}.weight"])[f"{module}.weight"]) for module in modules]
    return np.concatenate([weight.reshape(len(weight), -1) for weight in found])


def changed_model(source: Path, target: Path, modules: Sequence[str], delta: np.ndarray) -> Path:
    """A copy of a model in which these layers' weights have `delta` added: with numpy, in new shards."""
    shutil.copytree(source, target)
    folder = target / "transformer"
    shards, index = Shards(folder), files.read_json(folder / INDEX)
    first = 0
    for module in modules:
        name = f"{module}.weight"
        file = folder / shards.weight_map[name]
        held = files.load_lazily(file)
        mx.eval(held)
        rows = held[name].shape[0]
        part = delta[first : first + rows].reshape(held[name].shape)
        files.save_tensors(file, {**held, name: mx.array(np.array(held[name]) + part)}, {"format": "mlx"})
        index["metadata"]["sha256"][file.name] = files.sha256(file)
        first += rows
    files.write_json(folder / INDEX, index)
    return target


def written(path: Path, style: str, layer: str, parts: Parts) -> bool:
    """A file in a tool's style; False where the tool has no such layer."""
    name, factors, bfl = STYLES[style]
    theirs, ours, _ = LAYERS[layer]
    called = theirs if bfl else ours
    if not called:
        return False
    layer_name = name.replace("{_}", called.replace(".", "_")).replace("{}", called)
    bare = factors[0] in ("lora_A", "lora_a")
    tensors = {}
    for key, value in parts.items():
        part = {"a": factors[0], "b": factors[1]}.get(key, key)
        stored = value.T if bare and key in ("a", "b") else value
        tensors[f"{layer_name}.{part}"] = mx.array(
            np.ascontiguousarray(stored.squeeze(1) if layer == "norm" else stored)
        )
    files.save_tensors(path, tensors)
    return True


def picture(model: Path, adapter: Path | None, target: Path) -> np.ndarray:
    (made,) = generate(
        model=str(model), prompt=["a cat"], adapter_path=[str(adapter)] if adapter else [], width=64, height=64,
        steps=2, output=str(target),
    )  # fmt: skip
    found = np.asarray(Image.open(made), int)
    made.unlink()
    return found


def cells(work: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Of every style and layer, what came of each kind."""
    source = resolve("tiny-flux")
    shards, plain = Shards(source / "transformer"), picture(source, None, work / "p.png")
    known: dict[tuple[str, str], tuple[Parts, np.ndarray]] = {}
    for layer, (_, _, modules) in LAYERS.items():
        weight = weights_of(shards, modules)
        for number, (kind, make) in enumerate(KINDS.items()):
            if layer == "norm" and kind != "difference":
                continue
            parts, delta = make(weight, 10 * number)
            merged = changed_model(source, work / "merged", modules, delta)
            known[layer, kind] = parts, picture(merged, None, work / "m.png")
            if np.abs(known[layer, kind][1] - plain).max() <= 2:
                raise SystemExit(f"{kind} of {layer}: changes nothing, so it shows nothing")
            shutil.rmtree(merged)
    for style in STYLES:
        for layer in LAYERS:
            row = {kind: cell(source, work, style, layer, known.get((layer, kind))) for kind in KINDS}
            if set(row.values()) != {"-"}:
                yield style, layer, row


def cell(source: Path, work: Path, style: str, layer: str, known: tuple[Parts, np.ndarray] | None) -> str:
    """How far the image is from that of the merged model, or the refusal; a dash where a tool has no such thing."""
    if known is None or not written(work / "a.safetensors", style, layer, known[0]):
        return "-"
    try:
        return str(np.abs(picture(source, work / "a.safetensors", work / "a.png") - known[1]).max())
    except UserError as error:
        return f"refused: {error}"


def table() -> None:
    print("| style | layer |", " | ".join(KINDS), "|\n|---|---|" + "---|" * len(KINDS))
    with tempfile.TemporaryDirectory() as work:
        for style, layer, row in cells(Path(work)):
            print(f"| {style} | {layer} |", " | ".join(row.values()), "|", flush=True)


WIDE = ("none", "LoRA", "DoRA", "LoKr")
SIDE = 256


def hollow(work: Path, bits: int, depth: tuple[int, int]) -> Path:
    """Blocks of FLUX.1-dev's width that hold zeros."""
    from flux_scale import hollow as make

    return make({"model": "flux1-dev", "bits": bits, "depth": depth, "work": str(work)})


def wide_file(path: Path, kind: str, model: Path) -> None:
    """An adapter of all linear layers of the blocks, rank 16; LoKr of 16 x 16 and the rest."""
    from mlx_blockskip.converters.lora_layers import Layers
    from mlx_blockskip.models.registry import open_model

    tensors: dict[str, mx.array] = {}
    for module, shape in Layers(open_model(model).reader.shards).shapes.items():
        if len(shape) != 2 or "blocks" not in module:
            continue
        rows, width = shape
        if kind == "LoKr":
            parts = {"lokr_w1": (16, 16), "lokr_w2": (rows // 16, width // 16)}
        else:
            parts = {"lora_A.weight": (16, width), "lora_B.weight": (rows, 16)}
            if kind == "DoRA":
                parts["lora_magnitude_vector"] = (rows,)
        tensors |= {f"transformer.{module}.{part}": mx.ones(size, mx.bfloat16) * 1e-3 for part, size in parts.items()}
    files.save_tensors(path, tensors)


def child(job: Mapping[str, str]) -> None:
    """One row of the second table, printed as JSON: bytes, and processor seconds of a step after the first."""
    from mlx_blockskip import lora as lora_trees
    from mlx_blockskip.engine import limits, memory
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.checkpoint.adapters import load_adapters
    from mlx_blockskip.tasks.sampling.denoise import Request, sample, seeded_noise

    limits.bound(0)
    model = open_model(Path(job["model"]), 0)
    adapter = load_adapters(model, [job["file"]] if job["file"] else [], [])
    request = Request(model.blank_prompt(64), None, seeded_noise(model, 0, SIDE, SIDE))
    memory.settled()
    memory.mark()
    seconds = []
    with lora_trees.worn(model, adapter) as tree:
        began = time.process_time()
        for _ in sample(model, [request], steps=3, cfg_scale=1.0, guidance=3.5, trainable=tree):
            seconds.append(time.process_time() - began)
            began = time.process_time()
    print(json.dumps({"peak": memory.since_mark(), "step": min(seconds[1:])}))


def wide(work: Path) -> None:
    print(f"{platform.platform()}, {os.cpu_count()} cores\n")
    print("| blocks | weights | adapter | file MiB | peak MiB | step / without |\n|---|---|---|---|---|---|")
    for bits, depth in ((0, (1, 1)), (0, (3, 3)), (4, (1, 1)), (4, (3, 3))):
        model, without = hollow(work, bits, depth), 0.0
        for kind in WIDE:
            path = work / f"{kind}-{depth[0]}.safetensors"
            if kind != "none":
                wide_file(path, kind, model)
            job = {"model": str(model), "file": str(path) if kind != "none" else "", "work": str(work)}
            done = subprocess.run(
                [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, check=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            without = without or found["step"]
            size = path.stat().st_size / 2**20 if path.exists() else 0
            print(
                f"| {depth[0]} + {depth[1]} | {bits or 'bf16'}{' bit' if bits else ''} | {kind} | {size:.0f} | "
                f"{found['peak'] / 2**20:.0f} | {found['step'] / without:.2f} |",
                flush=True,
            )
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
    elif given.width:
        with tempfile.TemporaryDirectory() as scratch:
            wide(given.work or Path(scratch))
    else:
        table()


if __name__ == "__main__":
    main()
