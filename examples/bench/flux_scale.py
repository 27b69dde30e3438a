"""FLUX.1-dev at full width, phase by phase: peak of MLX memory, and of private memory beside it. Prints Markdown.

    python examples/bench/flux_scale.py WORK [--full-depth]

Models are hollow: zeros in sparse files, since memory does not depend on the values of weights. Points of full width
(few blocks, so that they take minutes and not hours) are measured with --memory-budget 0, the least that is possible,
each once and in a process of its own, and kept in WORK/points. What they take is also predicted, by `engine.planner`,
from one traced block of a kind; the prediction then gives the cells of the table at full depth (19 + 38 blocks).
--full-depth measures some of those cells too (about 10 minutes each on two cores): they are held out, nothing is fitted
to them. Conversion is measured on 2 + 2 blocks: it has one tensor in memory at a time.

A last table predicts Metal, where nothing was measured: the same work with products and convolutions that give arrays
of the right shapes and take nothing beside, where the CPU backend unfolds convolutions and turns weights into float32.
Attention's scores, which Metal's forward pass does not need, are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from steps import GIB, MIB, machine

FULL = (19, 38)
RANK = 16
SAMPLES = 42
"""Records of 768 tokens that wait in one sweep; 64 take two."""

LIMITS = {
    "convert": (0.75, 0.75), "encode prompts": (0.75, 1.25), "encode images": (1.0, 1.0), "precompute": (1.25, 2.0),
    "train": (1.25, 1.5), "generate": (1.5, 2.0), "decode": (1.5, 1.5),
}  # fmt: skip
"""GiB that a phase may take, in 4 bit and in bfloat16."""

TRAIN = (
    {"bits": 0, "depth": (1, 1), "n": 0, "m": 1, "text": 512, "side": 256},
    {"bits": 0, "depth": (1, 1), "n": 1, "m": 0, "text": 512, "side": 256},
    {"bits": 0, "depth": (2, 2), "n": 0, "m": 2, "text": 512, "side": 256},
    {"bits": 0, "depth": (2, 2), "n": 1, "m": 1, "text": 512, "side": 256},
    {"bits": 0, "depth": (2, 2), "n": 2, "m": 0, "text": 64, "side": 256},
    {"bits": 4, "depth": (1, 1), "n": 0, "m": 1, "text": 512, "side": 256},
    {"bits": 4, "depth": (1, 1), "n": 1, "m": 0, "text": 512, "side": 256},
)
HELD_OUT = (
    {"bits": 0, "depth": FULL, "n": 0, "m": 28, "text": 512, "side": 256},
    {"bits": 0, "depth": FULL, "n": 28, "m": 0, "text": 512, "side": 256},
    {"bits": 4, "depth": FULL, "n": 0, "m": 28, "text": 512, "side": 256},
)
PRECOMPUTE = (
    {"bits": 0, "depth": (1, 1), "samples": 8, "text": 512, "side": 256},
    {"bits": 0, "depth": (1, 1), "samples": 24, "text": 512, "side": 256},
    {"bits": 4, "depth": (1, 1), "samples": 8, "text": 512, "side": 256},
)
GENERATE = (
    {"bits": 0, "depth": (1, 1), "text": 512, "side": 512},
    {"bits": 0, "depth": (1, 1), "text": 512, "side": 1024},
    {"bits": 4, "depth": (1, 1), "text": 512, "side": 1024},
)


def hollow(work: Path, bits: int, depth: tuple[int, int], encoders: bool) -> Path:
    """A hollow FLUX.1-dev. encoders: text encoders at full depth."""
    from mlx_blockskip.converters.hollow import write_hollow
    from mlx_blockskip.converters.run import Precision

    from mlx_blockskip.models.flux1.presets import PRESETS, shallow
    from mlx_blockskip.tasks.resolve import bundled

    target = work / f"{bits or 16}-bit-{depth[0]}-{depth[1]}{'-encoders' if encoders else ''}"
    if not target.exists():
        preset = PRESETS["flux1-dev"]
        configs = dict(preset if encoders else shallow(preset))
        configs["transformer"] = {**preset["transformer"], "num_layers": depth[0], "num_single_layers": depth[1]}
        write_hollow(
            target, "flux1", configs, Precision("bfloat16", bits), bundled("tiny-flux"), scheduler=preset["scheduler"]
        )
    return target


def make_source(target: Path) -> None:
    """A checkpoint of zeros in Hugging Face layout, 2 + 2 blocks, for conversion."""
    import shutil

    from mlx_blockskip.converters.flux1 import components

    from mlx_blockskip.engine import files
    from mlx_blockskip.models.flux1.presets import PRESETS
    from mlx_blockskip.tasks.resolve import bundled

    tiny, preset = bundled("tiny-flux"), dict(PRESETS["flux1-dev"])
    preset["transformer"] = {**preset["transformer"], "num_layers": 2, "num_single_layers": 2}
    preset["text_encoder_2"] = {**preset["text_encoder_2"], "num_layers": 2}
    with files.atomic_directory(target) as out:
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            shutil.copytree(tiny / name, out / name)
        shutil.copyfile(tiny / "model_index.json", out / "model_index.json")
        for component in components(preset):
            folder = out / component.folder
            files.write_json(folder / "config.json", preset[component.folder])
            file = "model" if component.folder.startswith("text") else "diffusion_pytorch_model"
            entries = [files.TensorEntry(row.name, row.their_shape(), "BF16") for row in component.rows]
            header, size = files.encode_header(entries)
            (folder / f"{file}.safetensors").write_bytes(header)
            os.truncate(folder / f"{file}.safetensors", size)


class PrivateMemory:
    """The highest private memory of this process (Linux: Anonymous of smaps_rollup), sampled; 0 elsewhere."""

    def __init__(self) -> None:
        self.highest = 0
        self._path = Path("/proc/self/smaps_rollup")
        if self._path.exists():
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in self._path.read_text().splitlines():
                if line.startswith("Anonymous:"):
                    self.highest = max(self.highest, int(line.split()[1]) * 1024)
            time.sleep(0.1)


def without_scratch() -> None:
    """From here on products and convolutions give zeros of their shapes and need nothing else."""
    import mlx.core as mx

    from mlx_blockskip.models import layers

    def product(x: mx.array, width: int) -> mx.array:
        @mx.custom_function
        def forward(x: mx.array) -> mx.array:
            return mx.broadcast_to(x[..., :1], (*x.shape[:-1], width)) * 0

        @forward.vjp
        def back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return mx.broadcast_to(cotangent[..., :1], x.shape) * 0

        return forward(x)

    def conv2d(x: mx.array, weight: mx.array, stride: int = 1) -> mx.array:
        height, width = ((side - kernel) // stride + 1 for side, kernel in zip(x.shape[1:3], weight.shape[1:3]))
        some = x[:, : height * stride : stride, : width * stride : stride, :1][:, :height, :width]
        return mx.broadcast_to(some, (x.shape[0], height, width, weight.shape[0])) * 0

    layers.matmul = lambda x, weight, bias=None: product(x, weight.shape[0])  # type: ignore[assignment]
    layers.quantized_matmul = lambda x, packed, *_: product(x, packed.shape[0])  # type: ignore[assignment]
    mx.conv2d = conv2d


def child(job: dict) -> dict:
    """One point, in a process of its own."""
    import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)
    from mlx_blockskip.engine import limits
    from mlx_blockskip.events import PhaseEnd

    if job.get("metal"):
        without_scratch()
    private = PrivateMemory()
    found: dict[str, int] = {}
    # MLX waits busily at its limit; a VAE takes minutes that way, so it gets what its row allows
    limits.bound(int(LIMITS[job["phase"]][1] * GIB) if job["phase"] in ("encode images", "decode") else 0)

    def keep(event: object) -> None:
        if isinstance(event, PhaseEnd):
            found[event.phase] = max(found.get(event.phase, 0), event.peak_memory)

    started = time.perf_counter()
    if job["phase"] == "convert":
        from mlx_blockskip import convert

        source = Path(job["work"]) / "source"
        if not source.exists():
            make_source(source)
        convert(
            hf_path=str(source), mlx_path=f"{job['work']}/converted-{job['bits']}", quantize=job["bits"] > 0,
            dtype="bfloat16", on_event=keep,
        )  # fmt: skip
    elif job["phase"] in ("train", "precompute"):
        train(job, keep)
    else:
        from mlx_blockskip.tasks.phases import phase

        with phase(job["phase"]) as track:
            direct(job)
        keep(track.end)
    return {"peaks": found, "private": private.highest, "seconds": time.perf_counter() - started}


def settings_of(job: dict):  # type: ignore[no-untyped-def]
    from mlx_blockskip.settings import TrainSettings
    from mlx_blockskip.tasks.resolve import bundled

    model = hollow(Path(job["work"]), job["bits"], tuple(job["depth"]), encoders=False)
    return TrainSettings(
        model=str(model), data=str(bundled("subjects") / "hedgehog"), prompt="a photo of sks dog", iters=1, rank=RANK,
        batch_size=1, memory_budget="0", max_sequence_length=job["text"], train_resolution=job["side"],
        resolution=2 * job["side"], skip_first=job.get("n", 0), skip_last=job.get("m", 0),
        adapter_path=f"{job['work']}/adapter-{os.getpid()}",
    )  # fmt: skip


def train(job: dict, keep) -> None:  # type: ignore[no-untyped-def]
    """A training run of one step; for "precompute" only a chunk of `samples` records."""
    from mlx_blockskip.events import finish

    if job["phase"] == "train":
        from mlx_blockskip.tasks import train as task

        finish(task.train(settings_of(job)), keep)
        return
    from mlx_blockskip.data import load_dataset
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.job import complete, prepare
    from mlx_blockskip.tasks.plans import likely_plan
    from mlx_blockskip.tasks.precompute import compute_chunk

    settings = settings_of({**job, "n": sum(job["depth"]) - 1})
    model = open_model(Path(settings.model), 0)
    settings = complete(settings, model)
    dataset, plan = load_dataset(Path(settings.data), settings.prompt), likely_plan(settings, model)
    directory = Path(settings.adapter_path)
    run = finish(prepare(settings, directory, model, dataset, plan, ample=False))
    finish(compute_chunk(run.recipe, run.layout, range(job["samples"]), directory / "chunk.safetensors", "", {}), keep)


def direct(job: dict) -> None:
    """Phases that are one call of a model."""
    import mlx.core as mx

    from mlx_blockskip.models.registry import open_model

    encoders = job["phase"] == "encode prompts"
    model = open_model(hollow(Path(job["work"]), job["bits"], tuple(job["depth"]), encoders), 0)
    side = job.get("side", 0)
    if encoders:
        mx.eval([list(p.values()) for p in model.encode_prompts(["a photo of sks dog"], job["text"]).prompts])
    elif job["phase"] == "encode images":
        mx.eval(model.encode_images(mx.zeros((1, side, side, 3))))
    elif job["phase"] == "decode":
        mx.eval(model.decode(mx.zeros((1, *model.latent_shape(side, side)))))
    else:
        from mlx_blockskip.tasks.sampling import Request, sample, seeded_noise

        request = Request(model.blank_prompt(job["text"]), None, seeded_noise(model, 0, side, side))
        list(sample(model, [request], steps=1, cfg_scale=1.0, guidance=3.5))


def predict(job: dict) -> dict[str, int]:
    """What the planner says: bytes by bits and (n, m). What a block takes beside its weights is traced in bfloat16."""
    import mlx_blockskip  # noqa: F401
    from mlx_blockskip import lora
    from mlx_blockskip.blockskip.plan import SkipPlan
    from mlx_blockskip.models.flux1 import FAMILY
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.forecast import Shape, Tracer

    if job.get("metal"):
        without_scratch()
    depth = tuple(job["depth"])
    models = {bits: open_model(hollow(Path(job["work"]), bits, depth, encoders=False), 0) for bits in (0, 4)}
    shape = Shape(job["side"], job["side"], job["text"])
    traced = Tracer(models[0], shape, RANK, lora.targets(FAMILY.lora_targets, "all"))
    found = {}
    for bits, model in models.items():
        tracer = traced.on(model)
        if job["phase"] == "generate":
            found[f"{bits}"] = tracer.generate(1).peak
        for n, m in job.get("plans", ()):
            plan = SkipPlan.ends(n, m, sum(depth))
            if job["phase"] == "train":
                found[f"{bits} {n} {m}"] = tracer.train(plan.retained).peak
            else:
                found[f"{bits} {n} {m}"] = tracer.precompute(plan, "base", job["samples"]).peak
    return found


def measure(job: dict, predicting: bool = False) -> dict:
    """Run one point, or read it where it was measured before."""
    keys = [str(job[key]).replace(" ", "") for key in sorted(job) if key not in ("phase", "work")]
    name = "-".join([*(["predicted"] if predicting else []), job["phase"].replace(" ", "-"), *keys])
    kept = Path(job["work"]) / "points" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    flag = "--predict" if predicting else "--child"
    done = subprocess.run([sys.executable, __file__, flag, json.dumps(job)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    result = json.loads(done.stdout.splitlines()[-1])
    kept.parent.mkdir(exist_ok=True, parents=True)
    kept.write_text(json.dumps({**result, "job": job}))
    print(f"<!-- {name}: {done.stdout.splitlines()[-1]} -->", file=sys.stderr, flush=True)
    return result


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def named(job: dict) -> str:
    """A point in words."""
    blocks = f"{job['bits'] or 16} bit, {job['depth'][0]} + {job['depth'][1]} blocks"
    plan = f", (n, m) = ({job['n']}, {job['m']})" if "n" in job else ""
    samples = f", {job['samples']} samples" if "samples" in job else ""
    held = ", held out" if job in HELD_OUT else ""
    return f"{blocks}{plan}, {job['text']} + {(job['side'] // 16) ** 2} tokens{samples}{held}"


def points(work: Path, full_depth: bool) -> list[tuple[str, str, dict, float]]:
    """(phase, what, measured, predicted bytes) of every point that has a prediction."""
    found = []
    wanted = [("train", job) for job in (*TRAIN, *(HELD_OUT if full_depth else ()))]
    wanted += [("precompute", job) for job in PRECOMPUTE] + [("generate", job) for job in GENERATE]
    for phase, job in wanted:
        shape = {key: job[key] for key in ("depth", "text", "side", "samples") if key in job}
        key = f"{job['bits']}"
        if phase == "train":
            shape["plans"] = [(job["n"], job["m"])]
            key += f" {job['n']} {job['m']}"
        elif phase == "precompute":
            last = sum(job["depth"]) - 1
            shape["plans"] = [(last, 0)]
            key += f" {last} 0"
        predicted = measure({**shape, "phase": phase, "work": str(work)}, True)["peaks"][key]
        found.append((phase, named(job), measure({**job, "phase": phase, "work": str(work)}), predicted))
    return found


def cells(work: Path, full_depth: bool = False, metal: bool = False) -> dict[str, dict[int, str]]:
    """What each phase takes at full depth, by bits. metal: predicted for Metal."""
    more = {"metal": True} if metal else {}
    table: dict[str, dict[int, str]] = {}

    def put(name: str, bits: int, text: str) -> None:
        table.setdefault(name, {})[bits] = text

    def measured(phase: str, bits: int, **job: object) -> str:
        result = measure({"phase": phase, "bits": bits, "work": str(work), "depth": (1, 1), **job, **more})
        return gib(result["peaks"][phase]) + ("" if metal else f" ({gib(result['private'])})")

    def predicted(phase: str, side: int, **job: object) -> dict[str, int]:
        shape = {"phase": phase, "depth": FULL, "text": 512, "work": str(work), "side": side, **job, **more}
        return measure(shape, True)["peaks"]

    plans = [(28, 0), (14, 14), (0, 28)]
    steps = predicted("train", 256, plans=plans)
    chunks = predicted("precompute", 256, plans=plans, samples=SAMPLES)
    drawing = predicted("generate", 1024)
    said = "" if metal else " predicted"
    for bits in (4, 0):
        if not metal:
            put("convert", bits, measured("convert", bits))
        put("encode prompts, 512 tokens", bits, measured("encode prompts", bits, text=512))
        put("encode images, 512 px", bits, measured("encode images", 0, side=512))
        for n, m in plans:
            put(f"precompute, 64 samples, ({n}, {m})", bits, f"{gib(chunks[f'{bits} {n} {m}'])}{said}")
        for n, m in plans:
            held = next((job for job in HELD_OUT if (job["bits"], job["n"], job["m"]) == (bits, n, m)), None)
            text = f"{gib(steps[f'{bits} {n} {m}'])}{said}"
            if full_depth and held:
                result = measure({**held, "work": str(work), "phase": "train"})
                text = f"{gib(result['peaks']['train'])} ({gib(result['private'])})"
            put(f"train, a step, ({n}, {m})", bits, text)
        put("generate, 1024 px: a step", bits, f"{gib(drawing[f'{bits}'])}{said}")
        put("decode, 1024 px", bits, measured("decode", 0, side=1024))
    return table


def main(work: Path, full_depth: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    table, found, metal = cells(work, full_depth), points(work, full_depth), cells(work, metal=True)
    print(f"{machine('mlx')}; CPU backend\n")
    print(
        "Peak of MLX memory, GiB (private memory of the process beside it), --memory-budget 0; measured or predicted\n"
    )
    print("| phase | 4-bit | at most | bf16 | at most |\n|---|---|---|---|---|")
    for name, by_bits in table.items():
        four, whole = LIMITS[name.split(",")[0]]
        print(f"| {name} | {by_bits[4]} | {four:g} | {by_bits[0]} | {whole:g} |")
    print("\n| points of full width | measured, MiB | private, MiB | predicted, MiB | |\n|---|---|---|---|---|")
    for phase, shown, result, predicted in found:
        peak = result["peaks"][phase]
        share = f"{100 * (predicted / peak - 1):+.1f} %"
        print(
            f"| {phase}: {shown} | {peak / MIB:.0f} | {result['private'] / MIB:.0f} | {predicted / MIB:.0f} | {share} |"
        )
    print("\n| predicted for Metal, GiB; not measured | 4-bit | at most | bf16 | at most |\n|---|---|---|---|---|")
    for name, by_bits in metal.items():
        four, whole = LIMITS[name.split(",")[0]]
        print(f"| {name} | {by_bits[4]} | {four:g} | {by_bits[0]} | {whole:g} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--full-depth", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--predict")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
    elif arguments.predict:
        print(json.dumps({"peaks": predict(json.loads(arguments.predict))}))
    else:
        main(arguments.work, arguments.full_depth)
