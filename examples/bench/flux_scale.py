"""FLUX.1-dev at full width, phase by phase: peak of MLX memory, and of private memory beside it. Prints Markdown.

    python examples/bench/flux_scale.py WORK

WORK gets a random checkpoint of FLUX.1-dev's architecture at full width, 2 + 2 blocks deep (T5-XXL with 2 layers,
CLIP-L and the VAE whole), about 5 GiB, and its conversions. Prompts, images and conversion need one block at a time,
so their peaks are those of full depth. A training step is carried there by a law: it has in memory one block's weights
and what the work on it takes (a + b x tokens by kind, fitted), and, from shapes, each retained block's input, LoRA
factors and gradients; AdamW's moments are in files. Each point runs once, in a process of its own, with
--memory-budget 0 (the least that is possible), and is kept in WORK/points.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

MIB = 2**20
DEPTH = (2, 2)
FULL = (19, 38)
WIDTH, RANK = 3072, 16
CONFIGS = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": DEPTH[0],
        "num_single_layers": DEPTH[1], "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "projection_dim": 768,
    },
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
        "num_layers": 2, "num_heads": 64, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
        "is_gated_act": True, "dense_act_fn": "gelu_new", "pad_token_id": 0, "eos_token_id": 1,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "act_fn": "silu", "latent_channels": 16,
        "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    },
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "num_train_timesteps": 1000,
}  # fmt: skip


def make_source(target: Path) -> None:
    """A random checkpoint in Hugging Face layout, in bfloat16, one tensor in memory at a time."""
    import shutil
    from importlib import resources

    import mlx.core as mx
    from mlx_blockskip.converters.flux1 import components

    from mlx_blockskip.engine import files

    tiny = Path(str(resources.files("mlx_blockskip") / "assets" / "tiny-flux"))
    with files.atomic_directory(target) as out:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(tiny / name, out / name)
        files.write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
        shutil.copyfile(tiny / "model_index.json", out / "model_index.json")
        for component in components(CONFIGS):
            folder = out / component.folder
            files.write_json(folder / "config.json", CONFIGS[component.folder])
            model = "model" if component.folder.startswith("text") else "diffusion_pytorch_model"
            entries = [files.TensorEntry(row.name, row.their_shape(), "BF16") for row in component.rows]
            with files.SafetensorsWriter(folder / f"{model}.safetensors", entries) as writer:
                for i, row in enumerate(component.rows):
                    key = mx.random.key(i)
                    values = mx.random.normal(row.their_shape(), mx.bfloat16, scale=0.02, key=key)
                    writer.write(row.name, values + (1 if len(row.shape) == 1 else 0))


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


def child(job: dict) -> dict:
    """One point, in a process of its own."""
    import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)
    from mlx_blockskip.events import PhaseEnd

    private = PrivateMemory()
    found: dict[str, int] = {}

    def keep(event: object) -> None:
        if isinstance(event, PhaseEnd):
            found[event.phase] = max(found.get(event.phase, 0), event.peak_memory)

    started = time.perf_counter()
    if job["phase"] == "convert":
        from mlx_blockskip import convert

        convert(hf_path=job["source"], mlx_path=job["model"], quantize=job["bits"] > 0, dtype="bfloat16", on_event=keep)
    elif job["phase"] == "train":
        from mlx_blockskip import train

        train(
            model=job["model"], data=job["data"], prompt="a photo of sks dog", adapter_path=job["out"], iters=1,
            batch_size=1, rank=RANK, memory_budget="0", max_sequence_length=job["text"], patch_mode="dynamic",
            train_resolution=job["side"], resolution=2 * job["side"], skip_first=job["n"], skip_last=job["m"],
            on_event=keep,
        )  # fmt: skip
    else:
        from mlx_blockskip.tasks import phases

        with phases.phase(job["phase"]) as track:
            direct(job)
        found[job["phase"]] = track.end.peak_memory
    return {"peaks": found, "private": private.highest, "seconds": time.perf_counter() - started}


def direct(job: dict) -> None:
    """Phases that are one call of a model."""
    import mlx.core as mx

    from mlx_blockskip.models.registry import open_model

    model = open_model(Path(job["model"]), 0)
    side = job.get("side", 0)
    if job["phase"] == "encode prompts":
        mx.eval([list(p.values()) for p in model.encode_prompts(["a photo of sks dog"], job["text"]).prompts])
    elif job["phase"] == "encode images":
        mx.eval(model.encode_images(mx.zeros((1, side, side, 3))))
    elif job["phase"] == "decode":
        mx.eval(model.decode(mx.zeros((1, *model.latent_shape(side, side)))))
    else:
        from mlx_blockskip.tasks.sampling import Request, sample, seeded_noise

        prompt = {
            "prompt_embeds": mx.zeros((1, job["text"], 4096), model.dtype),
            "pooled": mx.zeros((1, 768), model.dtype),
        }
        request = Request(prompt, None, seeded_noise(model, 0, side, side))
        list(sample(model, [request], steps=1, cfg_scale=1.0, guidance=3.5))


def measure(job: dict) -> dict:
    """Run one point, or read it where it was measured before."""
    kept = Path(job["work"]) / "points" / (f"{job['phase']}-" + "-".join(
        str(job[key]) for key in ("bits", "text", "side", "n", "m") if key in job
    ) + ".json")  # fmt: skip
    if kept.exists():
        return json.loads(kept.read_text())
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{job['phase']} failed")
    result = json.loads(done.stdout.splitlines()[-1])
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({**result, "job": job}))
    shown = ", ".join(f"{phase} {peak / MIB:.0f}" for phase, peak in result["peaks"].items())
    print(f"<!-- {kept.stem}: {shown} MiB, {result['seconds']:.0f} s -->", file=sys.stderr, flush=True)
    return result


# (text tokens, side of the training patch, n, m) of 2 + 2 blocks; the last two are held out of the fit
TRAIN = (
    (64, 64, 3, 0), (64, 64, 0, 3), (64, 64, 2, 0), (64, 64, 0, 2), (192, 128, 3, 0), (192, 128, 0, 3),
    (320, 128, 3, 0), (128, 64, 0, 2),
)  # fmt: skip
HELD_OUT = 2
BODY = {"double": 432 * MIB, "single": 216 * MIB}
"""Bytes of a block without its modulation, in bfloat16."""


def lora_bytes(kind: str) -> int:
    """Float32 factors of rank RANK in every linear layer of a block but its modulation."""
    square, wide = 2 * WIDTH, 5 * WIDTH
    widths = 8 * square + 4 * wide if kind == "double" else 3 * square + wide + 6 * WIDTH
    return 4 * RANK * widths


def tokens(text: int, side: int) -> int:
    return text + (side // 16) ** 2


def retained(n: int, m: int, depth: tuple[int, int]) -> list[str]:
    kinds = ["double"] * depth[0] + ["single"] * depth[1]
    return kinds[n : len(kinds) - m]


def known(kinds: list[str], count: int) -> float:
    """What a training step has in memory that follows from shapes: factors and gradients, and each block's input."""
    return sum(2 * lora_bytes(kind) + 2 * count * WIDTH for kind in kinds)


def fit(points: list[tuple[list[str], int, int]]) -> dict[str, list[float]]:
    """A block's weights and the work on it, a + b x tokens by kind, by least squares over (retained, tokens, peak)."""
    import numpy as np

    law = {}
    for kind in BODY:
        own = [(count, peak - known(kinds, count)) for kinds, count, peak in points if largest(kinds) == kind]
        x = np.array([[1.0, count] for count, _ in own])
        law[kind] = np.linalg.lstsq(x, np.array([rest for _, rest in own], float), rcond=None)[0].tolist()
    return law


def largest(kinds: list[str]) -> str:
    """The kind whose block decides the peak."""
    return "double" if "double" in kinds else "single"


def predicted(law: dict[str, list[float]], kinds: list[str], count: int) -> float:
    a, b = law[largest(kinds)]
    return a + b * count + known(kinds, count)


def row(name: str, limit: tuple[float, float], four: str, bf16: str) -> str:
    return f"| {name} | {four} | {limit[0]:g} | {bf16} | {limit[1]:g} |"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def cell(result: dict, phase: str) -> str:
    return f"{gib(result['peaks'][phase])} ({gib(result['private'])})"


def main(work: Path) -> None:
    from importlib import resources

    work.mkdir(parents=True, exist_ok=True)
    source = work / "source"
    if not source.exists():
        make_source(source)
    models = {0: str(work / "bf16"), 4: str(work / "4-bit")}
    data = str(resources.files("mlx_blockskip") / "assets" / "subjects" / "hedgehog")

    def point(phase: str, bits: int, **job: object) -> dict:
        return measure({"phase": phase, "bits": bits, "work": str(work), "model": models[bits], **job})

    converted = {bits: point("convert", bits, source=str(source)) for bits in models}
    encoded = {bits: point("encode prompts", bits, text=512 if bits == 0 else 64) for bits in models}
    images = point("encode images", 0, side=512)
    decoded = point("decode", 0, side=1024)
    trained = [
        point("train", 0, data=data, out=str(work / "adapter"), text=text, side=side, n=n, m=m)
        for text, side, n, m in TRAIN
    ]
    measured = [
        (retained(n, m, DEPTH), tokens(text, side), result["peaks"]["train"])
        for (text, side, n, m), result in zip(TRAIN, trained, strict=True)
    ]
    law = fit(measured[:-HELD_OUT])
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores, mlx {version('mlx')}, CPU backend\n")
    print("Peak of MLX memory, GiB (private memory of the process beside it), --memory-budget 0\n")
    print("| phase | 4-bit | at most | bf16 | at most |\n|---|---|---|---|---|")
    print(row("convert", (0.75, 0.75), cell(converted[4], "convert"), cell(converted[0], "convert")))
    four = cell(encoded[4], "encode prompts") + " at 64 tokens"
    print(row("prompt encoding, 512 tokens", (0.75, 1.25), four, cell(encoded[0], "encode prompts")))
    shown = cell(images, "encode images")
    print(row("image encoding, 512 px", (1.0, 1.0), "the same weights", shown))
    shown = cell(decoded, "decode")
    print(row("decoding, 1024 px", (1.5, 1.5), "the same weights", shown))
    for n, m in ((28, 0), (14, 14), (0, 28)):
        kinds = retained(n, m, FULL)
        whole = predicted(law, kinds, 768)
        smaller = BODY[largest(kinds)] * (1 - 4.5 / 16)
        print(
            row(
                f"training step, (n, m) = ({n}, {m})",
                (1.25, 1.5),
                f"{gib(whole - smaller)} fitted",
                f"{gib(whole)} fitted",
            )
        )
    print(
        "\n| training points, bf16, 2 + 2 blocks | tokens | measured, MiB | by the law, MiB | |\n|---|---|---|---|---|"
    )
    for i, (kinds, count, peak) in enumerate(measured):
        by_law = predicted(law, kinds, count)
        held = f"held out, {100 * (by_law / peak - 1):+.1f} %" if i >= len(measured) - HELD_OUT else "fitted"
        print(f"| {' + '.join(kinds)} | {count} | {peak / MIB:.0f} | {by_law / MIB:.0f} | {held} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
    else:
        main(arguments.work)
