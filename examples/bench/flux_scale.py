"""A model at full width, phase by phase: peak of MLX memory, and of private memory beside it. Prints Markdown.

    python examples/bench/flux_scale.py WORK [--model flux1-dev|flux2-klein-base-4b|z-image|sana-1.6b] [--full-depth]

Models are hollow: zeros in sparse files, since memory does not depend on the values of weights. Points of full width
(few blocks, so that they take minutes and not hours) are measured with --memory-budget 0, the least that is possible,
each once and in a process of its own, and kept in WORK/points. What they take is also predicted, by `engine.planner`,
from one traced block of a kind; the prediction then gives the cells of the table at full depth (19 + 38 in FLUX.1).
--full-depth measures some of those cells too (about 10 minutes each on two cores): they are held out, nothing is fitted
to them. Conversion is measured on two blocks of a kind: it has a part of one tensor in memory at a time.

A last table predicts a lower bound for Metal, where nothing was measured: the same work with products and convolutions
that give arrays of the right shapes and take nothing beside, where the CPU backend unfolds convolutions and turns
weights into float32. What a command buffer keeps until it has run is not counted, nor what the gradients of Metal's
norms take beside; attention's scores, which Metal's forward pass does not need, are.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from steps import GIB, MIB, machine

RANK = 16


@dataclass(frozen=True)
class Model:
    """What is measured of a preset.

    depths: the config's names for numbers of blocks. full: those of the preset. pixels: a side of one token. text:
    tokens of a prompt. read: those that its encoder reads. side: of a training patch; s_max is twice that. encoded,
    drawn: sides of images. samples: records of a chunk, of which some wait in one sweep. limits: GiB that a phase may
    take, in 4 bit and in bfloat16. The rest are points, with the plan or what waits.
    """

    bundled: str
    depths: tuple[str, ...]
    full: tuple[int, ...]
    pixels: int
    text: int
    read: int
    side: int
    encoded: int
    drawn: int
    samples: int
    plans: tuple[tuple[int, int], ...]
    limits: dict[str, tuple[float, float]]
    train: tuple[dict, ...]
    held_out: tuple[dict, ...]
    precompute: tuple[dict, ...]
    generate: tuple[dict, ...]


def klein(name: str) -> Model:
    """FLUX.2 klein: the same points in both sizes."""
    depth, skipped, train = ((5, 20), 12, (0.45, 0.75)) if name.endswith("4b") else ((8, 24), 16, (0.7, 1.25))
    phases = ("convert", "encode prompts", "encode images", "precompute", "generate", "decode")
    return Model(
        bundled="chat-tokenizer", depths=("num_layers", "num_single_layers"), full=depth, pixels=16, text=512, read=512,
        side=256, encoded=512, drawn=1024, samples=64, plans=((skipped, 0), (skipped // 2,) * 2, (0, skipped)),
        limits={**dict.fromkeys(phases, (1.25, 1.25)), "train": train},
        train=(
            {"bits": 0, "depth": (1, 1), "n": 0, "m": 1},
            {"bits": 0, "depth": (1, 1), "n": 1, "m": 0},
            {"bits": 4, "depth": (1, 1), "n": 0, "m": 1},
        ),
        held_out=({"bits": 0, "depth": depth, "n": skipped, "m": 0},),
        precompute=({"bits": 0, "depth": (1, 1), "samples": 8},),
        generate=({"bits": 0, "depth": (1, 1), "side": 512}, {"bits": 4, "depth": (1, 1), "side": 1024}),
    )  # fmt: skip


PROMPT = " ".join(["a photo of sks dog"] * 32)
"""As long as any model reads: the number of text tokens may depend on it."""

MODELS = {
    "flux1-dev": Model(
        bundled="tiny-flux", depths=("num_layers", "num_single_layers"), full=(19, 38), pixels=16, text=512, read=512,
        side=256, encoded=512, drawn=1024, samples=64, plans=((28, 0), (14, 14), (0, 28)),
        limits={
            "convert": (0.6, 1.0), "encode prompts": (0.6, 1.0), "encode images": (0.6, 0.6),
            "precompute": (0.6, 1.0), "train": (0.6, 1.0), "generate": (0.6, 1.0), "decode": (1.0, 1.0),
        },
        train=(
            {"bits": 0, "depth": (1, 1), "n": 0, "m": 1},
            {"bits": 0, "depth": (1, 1), "n": 1, "m": 0},
            {"bits": 0, "depth": (2, 2), "n": 0, "m": 2},
            {"bits": 0, "depth": (2, 2), "n": 1, "m": 1},
            {"bits": 0, "depth": (2, 2), "n": 2, "m": 0, "text": 64},
            {"bits": 4, "depth": (1, 1), "n": 0, "m": 1},
            {"bits": 4, "depth": (1, 1), "n": 1, "m": 0},
        ),
        held_out=(
            {"bits": 0, "depth": (19, 38), "n": 0, "m": 28},
            {"bits": 0, "depth": (19, 38), "n": 28, "m": 0},
            {"bits": 4, "depth": (19, 38), "n": 0, "m": 28},
        ),
        precompute=(
            {"bits": 0, "depth": (1, 1), "samples": 8},
            {"bits": 0, "depth": (1, 1), "samples": 24},
            {"bits": 4, "depth": (1, 1), "samples": 8},
        ),
        generate=(
            {"bits": 0, "depth": (1, 1), "side": 512},
            {"bits": 0, "depth": (1, 1), "side": 1024},
            {"bits": 4, "depth": (1, 1), "side": 1024},
        ),
    ),
    **{name: klein(name) for name in ("flux2-klein-base-4b", "flux2-klein-base-9b")},
    "z-image": Model(
        bundled="chat-tokenizer", depths=("n_layers",), full=(30,), pixels=16, text=512, read=512, side=256,
        encoded=512, drawn=1024, samples=64, plans=((15, 0), (7, 8), (0, 15)),
        limits={
            **dict.fromkeys(("convert", "encode prompts", "encode images", "precompute", "generate", "decode"),
                            (1.25, 1.25)),
            "train": (0.45, 0.75),
        },
        train=(
            {"bits": 0, "depth": (2,), "n": 0, "m": 1},
            {"bits": 0, "depth": (2,), "n": 1, "m": 0},
            {"bits": 4, "depth": (2,), "n": 0, "m": 1},
        ),
        held_out=({"bits": 0, "depth": (30,), "n": 15, "m": 0},),
        precompute=({"bits": 0, "depth": (2,), "samples": 8},),
        generate=({"bits": 0, "depth": (2,), "side": 512}, {"bits": 4, "depth": (2,), "side": 1024}),
    ),
    "sana-1.6b": Model(
        bundled="tiny-sana", depths=("num_layers",), full=(20,), pixels=32, text=300, read=530, side=512,
        encoded=512, drawn=1024, samples=64, plans=((10, 0), (5, 5), (0, 10)),
        limits={**dict.fromkeys(
            ("convert", "encode prompts", "encode images", "precompute", "train", "generate", "decode"), (0.45, 0.45)
        )},
        train=(
            {"bits": 0, "depth": (2,), "n": 0, "m": 1},
            {"bits": 0, "depth": (2,), "n": 1, "m": 0},
            {"bits": 4, "depth": (2,), "n": 0, "m": 1},
        ),
        held_out=(
            {"bits": 0, "depth": (20,), "n": 0, "m": 10},
            {"bits": 0, "depth": (20,), "n": 10, "m": 0},
        ),
        precompute=({"bits": 0, "depth": (2,), "samples": 8}, {"bits": 0, "depth": (2,), "samples": 24}),
        generate=({"bits": 0, "depth": (2,), "side": 1024}, {"bits": 4, "depth": (2,), "side": 1024}),
    ),
}  # fmt: skip


def configs_of(name: str, depth: Sequence[int]) -> dict:
    """The preset's configs with so many blocks of each kind."""
    from mlx_blockskip.models import presets

    preset = presets.configs(presets.folders()[name])
    depths = dict(zip(MODELS[name].depths, depth, strict=True))
    return {**preset, "transformer": {**preset["transformer"], **depths}}


def family_of(name: str):  # type: ignore[no-untyped-def]
    from mlx_blockskip.engine import files
    from mlx_blockskip.models import presets
    from mlx_blockskip.models.registry import find_family

    return find_family(files.read_json(presets.folders()[name] / "model_index.json"))


def hollow(job: dict, encoders: bool = False) -> Path:
    """A hollow model. encoders: text encoders at full depth."""
    from mlx_blockskip.converters.hollow import write_hollow
    from mlx_blockskip.converters.write import Precision
    from mlx_blockskip.tasks.checkpoint.resolve import bundled

    name, bits, depth = job["model"], job["bits"], job["depth"]
    blocks = "-".join(str(count) for count in depth)
    target = Path(job["work"]) / f"{name}-{bits or 16}-bit-{blocks}{'-encoders' if encoders else ''}"
    if not target.exists():
        family, configs = family_of(name), configs_of(name, depth)
        if not encoders:
            configs = {**family.shallow(configs), "transformer": configs["transformer"]}
        source = bundled(MODELS[name].bundled)
        write_hollow(target, family.name, configs, Precision("bfloat16", bits), source, scheduler=configs["scheduler"])
    return target


def make_source(target: Path, name: str) -> None:
    """A checkpoint of zeros in Hugging Face layout, two blocks of each kind, for conversion."""
    import shutil

    from mlx_blockskip.converters.run import components_of, load_table
    from mlx_blockskip.engine import files
    from mlx_blockskip.models import presets
    from mlx_blockskip.tasks.checkpoint.resolve import bundled

    tiny, family = bundled(MODELS[name].bundled), family_of(name).name
    configs = configs_of(name, [2] * len(MODELS[name].depths))
    for folder, key in (("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_layers")):
        if folder in configs:
            configs[folder] = {**configs[folder], key: 2}
    with files.atomic_directory(target) as out:
        for folder in load_table(family).COPIED:
            shutil.copytree(tiny / folder, out / folder)
        shutil.copyfile(presets.folders()[name] / "model_index.json", out / "model_index.json")
        for component in components_of(family, configs):
            inside = out / component.folder
            files.write_json(inside / "config.json", configs[component.folder])
            file = "model" if component.folder.startswith("text") else "diffusion_pytorch_model"
            entries = [files.TensorEntry(row.name, row.their_shape(), "BF16") for row in component.rows]
            header, size = files.encode_header(entries)
            (inside / f"{file}.safetensors").write_bytes(header)
            os.truncate(inside / f"{file}.safetensors", size)


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

        return cast(mx.array, forward(x))

    def conv2d(x: mx.array, weight: mx.array, stride: int = 1, padding: int | tuple[int, int] = 0, **_) -> mx.array:  # type: ignore[no-untyped-def]
        across = (padding, padding) if isinstance(padding, int) else padding
        x = mx.pad(x[..., :1], [(0, 0), *((side, side) for side in across), (0, 0)])
        height, width = ((side - kernel) // stride + 1 for side, kernel in zip(x.shape[1:3], weight.shape[1:3]))
        some = x[:, : height * stride : stride, : width * stride : stride][:, :height, :width]
        return mx.broadcast_to(some, (x.shape[0], height, width, weight.shape[0])) * 0

    layers.matmul = lambda x, weight, bias=None: product(x, weight.shape[0])  # type: ignore[assignment]
    layers.quantized_matmul = lambda x, packed, *_: product(x, packed.shape[0])  # type: ignore[assignment]
    mx.conv2d = conv2d


def child(job: dict) -> dict:
    """One point, in a process of its own."""
    import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)
    from mlx_blockskip.engine import limits
    from mlx_blockskip.events import PhaseEnd, listening

    if job.get("metal"):
        without_scratch()
    private = PrivateMemory()
    found: dict[str, int] = {}
    # MLX waits busily at its limit; a VAE takes minutes that way, so it gets what its row allows
    limits.bound(
        int(MODELS[job["model"]].limits[job["phase"]][1] * GIB) if job["phase"] in ("encode images", "decode") else 0
    )

    def keep(event: object) -> None:
        if isinstance(event, PhaseEnd):
            found[event.phase] = max(found.get(event.phase, 0), event.peak_memory)

    started = time.perf_counter()
    if job["phase"] == "convert":
        from mlx_blockskip import convert

        source = Path(job["work"]) / f"source-{job['model']}"
        if not source.exists():
            make_source(source, job["model"])
        convert(
            hf_path=str(source), mlx_path=f"{source}-{job['bits']}", quantize=job["bits"] > 0,
            dtype="bfloat16", on_event=keep,
        )  # fmt: skip
    elif job["phase"] in ("train", "precompute"):
        train(job, keep)
    elif job["phase"] == "records":
        found = records(job)
    else:
        from mlx_blockskip.tasks.phases import phase

        with listening(keep), phase(job["phase"]):
            direct(job)
    return {"peaks": found, "private": private.highest, "seconds": time.perf_counter() - started}


def photos(work: Path) -> Path:
    """A directory with one picture and no caption, so that the prompt is its caption."""
    import shutil

    from mlx_blockskip.tasks.checkpoint.resolve import bundled

    found = work / "photos"
    found.mkdir(exist_ok=True, parents=True)
    shutil.copy(next((bundled("subjects") / "hedgehog").glob("*.png")), found / "1.png")
    return found


def settings_of(job: dict):  # type: ignore[no-untyped-def]
    from mlx_blockskip.settings import TrainSettings

    return TrainSettings(
        model=str(hollow(job)), data=str(photos(Path(job["work"]))), prompt=PROMPT, iters=1,
        rank=RANK, batch_size=1, memory_budget="0", max_sequence_length=job["text"], train_resolution=job["side"],
        resolution=2 * job["side"], skip_first=job.get("n", 0), skip_last=job.get("m", 0),
        adapter_path=f"{job['work']}/adapter-{os.getpid()}", patch_mode="resize",  # an image is encoded once
    )  # fmt: skip


def train(job: dict, keep) -> None:  # type: ignore[no-untyped-def]
    """A training run of one step; for "precompute" only a chunk of `samples` records."""
    from mlx_blockskip.events import listening

    if job["phase"] == "train":
        from mlx_blockskip.tasks.train import train as task

        with listening(keep):
            task.train(settings_of(job))
        return
    from mlx_blockskip.tasks.train.precompute import compute_chunk

    run = prepared({**job, "n": sum(job["depth"]) - 1})
    chunk = run.directory / "chunk.safetensors"
    with listening(keep):
        compute_chunk(run, range(job["samples"]), chunk, "", {})


def prepared(job: dict):  # type: ignore[no-untyped-def]
    """The set-up of a training run."""
    from mlx_blockskip.data import load_dataset
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.defaults import train_config
    from mlx_blockskip.tasks.skipping.choice import even_plan, known_plan
    from mlx_blockskip.tasks.train.setup import prepare

    settings = settings_of(job)
    model = open_model(Path(settings.model), 0)
    dataset = load_dataset(Path(settings.data), settings.prompt)
    plan = known_plan(settings, model) or even_plan(settings, model)
    return prepare(train_config(settings, model), Path(settings.adapter_path), model, dataset, plan, ample=False)


def records(job: dict) -> dict[str, int]:
    """Bytes on disk of one sample's record, and of what is kept once a prompt."""
    run = prepared(job)
    prompt = run.model.prompt_conditioning(run.samples.caption(0))
    return {"sample": next(iter(run.layouts.values())).nbytes, "prompt": sum(array.nbytes for array in prompt.values())}


def direct(job: dict) -> None:
    """Phases that are one call of a model."""
    import mlx.core as mx

    from mlx_blockskip.models.registry import open_model

    encoders = job["phase"] == "encode prompts"
    model = open_model(hollow(job, encoders), 0)
    side = job.get("side", 0)
    if encoders:
        own = {**model.defaults.own, "instruction": False}  # its tokens are counted in `read`
        model.defaults = replace(model.defaults, own=own)
        mx.eval([list(p.values()) for p in model.encode_prompts([PROMPT], job["text"]).prompts])
    elif job["phase"] == "encode images":
        mx.eval(model.encode_images(mx.zeros((1, side, side, 3))))
    elif job["phase"] == "decode":
        mx.eval(model.decode(mx.zeros((1, *model.latent_shape(side, side)))))
    else:
        from mlx_blockskip.tasks.sampling.denoise import Request, sample, seeded_noise

        request = Request(model.blank_prompt(job["text"]), None, seeded_noise(model, 0, side, side))
        list(sample(model, [request], steps=1, cfg_scale=1.0, guidance=3.5))


def predict(job: dict) -> dict[str, int]:
    """What the planner says: bytes by bits and (n, m). What a block takes beside its weights is traced in bfloat16."""
    import mlx_blockskip  # noqa: F401
    from mlx_blockskip import lora
    from mlx_blockskip.blockskip.plan import SkipPlan
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.memory.predict import Shape, Tracer

    if job.get("metal"):
        without_scratch()
    models = {bits: open_model(hollow({**job, "bits": bits}), 0) for bits in (0, 4)}
    shape = Shape(job["side"], job["side"], job["text"])
    traced = Tracer(models[0], shape, RANK, lora.targets(family_of(job["model"]).lora_targets, "all"))
    found = {}
    for bits, model in models.items():
        tracer = traced.on(model)
        if job["phase"] == "generate":
            found[f"{bits}"] = tracer.generate(1).peak
        for n, m in job.get("plans", ()):
            plan = SkipPlan.ends(n, m, sum(job["depth"]))
            if job["phase"] == "train":
                found[f"{bits} {n} {m}"] = tracer.train(plan.retained).peak
            else:
                found[f"{bits} {n} {m}"] = tracer.precompute(plan, "base", tracer.together(job["samples"])).peak
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


def named(job: dict, tokens: int, held: bool) -> str:
    """A point in words."""
    blocks = f"{job['bits'] or 16} bit, {' + '.join(str(count) for count in job['depth'])} blocks"
    plan = f", (n, m) = ({job['n']}, {job['m']})" if "n" in job else ""
    samples = f", {job['samples']} samples" if "samples" in job else ""
    return f"{blocks}{plan}, {job['text']} + {tokens} tokens{samples}{', held out' if held else ''}"


def points(work: Path, name: str, full_depth: bool) -> list[tuple[str, str, dict, float]]:
    """(phase, what, measured, predicted bytes) of every point that has a prediction."""
    model, found = MODELS[name], []
    wanted = [("train", job) for job in (*model.train, *(model.held_out if full_depth else ()))]
    wanted += [("precompute", job) for job in model.precompute] + [("generate", job) for job in model.generate]
    for phase, point in wanted:
        job = {"model": name, "text": model.text, "side": model.side, **point}
        shape = {key: job[key] for key in ("model", "depth", "text", "side", "samples") if key in job}
        key = f"{job['bits']}"
        if phase == "train":
            shape["plans"] = [(job["n"], job["m"])]
            key += f" {job['n']} {job['m']}"
        elif phase == "precompute":
            last = sum(job["depth"]) - 1
            shape["plans"] = [(last, 0)]
            key += f" {last} 0"
        predicted = measure({**shape, "phase": phase, "work": str(work)}, True)["peaks"][key]
        said = named(job, (job["side"] // model.pixels) ** 2, point in model.held_out)
        found.append((phase, said, measure({**job, "phase": phase, "work": str(work)}), predicted))
    return found


def cells(work: Path, name: str, full_depth: bool = False, metal: bool = False) -> dict[str, dict[int, str]]:
    """What each phase takes at full depth, by bits. metal: a lower bound, predicted for Metal."""
    model = MODELS[name]
    more = {"metal": True} if metal else {}
    table: dict[str, dict[int, str]] = {}

    def put(row: str, bits: int, text: str) -> None:
        table.setdefault(row, {})[bits] = text

    def measured(phase: str, bits: int, **job: object) -> str:
        shape = {"model": name, "depth": (1,) * len(model.full), "work": str(work), **job, **more}
        result = measure({"phase": phase, "bits": bits, **shape})
        return gib(result["peaks"][phase]) + ("" if metal else f" ({gib(result['private'])})")

    def predicted(phase: str, side: int, **job: object) -> dict[str, int]:
        shape = {"phase": phase, "model": name, "depth": model.full, "text": model.text, "work": str(work)}
        return measure({**shape, "side": side, **job, **more}, True)["peaks"]

    steps = predicted("train", model.side, plans=model.plans)
    chunks = predicted("precompute", model.side, plans=model.plans, samples=model.samples)
    drawing = predicted("generate", model.drawn)
    said = "" if metal else " predicted"
    for bits in (4, 0):
        if not metal:
            put("convert", bits, measured("convert", bits))
        put(f"encode prompts, {model.read} tokens", bits, measured("encode prompts", bits, text=model.read))
        put(f"encode images, {model.encoded} px", bits, measured("encode images", 0, side=model.encoded))
        for n, m in model.plans:
            put(f"precompute, 64 samples, ({n}, {m})", bits, f"{gib(chunks[f'{bits} {n} {m}'])}{said}")
        for n, m in model.plans:
            held = next((job for job in model.held_out if (job["bits"], job["n"], job["m"]) == (bits, n, m)), None)
            text = f"{gib(steps[f'{bits} {n} {m}'])}{said}"
            if full_depth and held:
                job = {"model": name, "text": model.text, "side": model.side, **held, "work": str(work)}
                result = measure({**job, "phase": "train"})
                text = f"{gib(result['peaks']['train'])} ({gib(result['private'])})"
            put(f"train, a step, ({n}, {m})", bits, text)
        put(f"generate, {model.drawn} px: a step", bits, f"{gib(drawing[f'{bits}'])}{said}")
        put(f"decode, {model.drawn} px", bits, measured("decode", 0, side=model.drawn))
    return table


def main(work: Path, name: str, full_depth: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    limits = MODELS[name].limits
    table, found = cells(work, name, full_depth), points(work, name, full_depth)
    metal = cells(work, name, metal=True)
    print(f"{name}; {machine('mlx')}; CPU backend\n")
    print(
        "Peak of MLX memory, GiB (private memory of the process beside it), --memory-budget 0; measured or predicted\n"
    )
    print("| phase | 4-bit | at most | bf16 | at most |\n|---|---|---|---|---|")
    for row, by_bits in table.items():
        four, whole = limits[row.split(",")[0]]
        print(f"| {row} | {by_bits[4]} | {four:g} | {by_bits[0]} | {whole:g} |")
    print("\n| points of full width | measured, MiB | private, MiB | predicted, MiB | |\n|---|---|---|---|---|")
    for phase, shown, result, predicted in found:
        peak = result["peaks"][phase]
        share = f"{100 * (predicted / peak - 1):+.1f} %"
        print(
            f"| {phase}: {shown} | {peak / MIB:.0f} | {result['private'] / MIB:.0f} | {predicted / MIB:.0f} | {share} |"
        )
    n, m = MODELS[name].plans[1]
    job = {"phase": "records", "model": name, "bits": 0, "depth": MODELS[name].full, "text": MODELS[name].text}
    disk = measure({**job, "side": MODELS[name].side, "n": n, "m": m, "work": str(work)})["peaks"]
    print(
        f"\nRecords on disk, ({n}, {m}): {disk['sample'] / MIB:.2f} MiB a sample, {disk['prompt'] / MIB:.2f} a prompt"
    )
    print("\n| predicted for Metal, GiB: at least; not measured | 4-bit | bf16 |\n|---|---|---|")
    for row, by_bits in metal.items():
        print(f"| {row} | {by_bits[4]} | {by_bits[0]} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--model", choices=MODELS, default="flux1-dev")
    parser.add_argument("--full-depth", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--predict")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
    elif arguments.predict:
        print(json.dumps({"peaks": predict(json.loads(arguments.predict))}))
    else:
        main(arguments.work, arguments.model, arguments.full_depth)
