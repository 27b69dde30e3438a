"""The same LoRA training work by diffusers + peft and by this project, side by side, as Markdown tables.

    python examples/bench/peers.py [--threads N] [--full-depth]

Needs the extra `parity`. FLUX.1's width (24 heads x 128), 1 + 2 and 2 + 4 blocks (double + single), all of them
trained: LoRA of rank 16 in float32 on every linear layer of the blocks but modulation, weights in bfloat16, 512 text
and 256 image tokens, batch 1, clipping and AdamW. diffusers runs on PyTorch's CPU backend with gradient checkpointing
and autocast to bfloat16 (which takes less memory than none). This project streams the blocks with a memory budget of 0,
moments in files; its steps include what it otherwise computes ahead (embedders and modulation). MLX's CPU backend has
no fast product in bfloat16 and goes through float32, so its seconds say nothing of Metal.

Each runs in a process of its own, and its peak is that of the steps: on Linux the high-water mark is reset after
loading. Weights are random there and zeros here (in sparse files, so the seconds hold no disk), which changes neither
memory nor work. Seconds are medians; CPU seconds, of all threads, suffer less from what else the machine does, least
with --threads 1 (threads that wait for others spin).

A straight line through both depths is carried to FLUX.1's 19 + 38; blocks come one double to two single, so it is the
same line by blocks, by parameters, or by products. For this project it goes through MLX's own peaks, which waver less
than a process's memory, and the most that the process took beside them is added. --full-depth also runs this project's
step there, once with all blocks and once with 50 % skipped, about 27 times the work of the smallest depth's step. What
skips still needs its records: one forward sweep through all blocks for each sample, which is not in its seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from steps import GIB, Trainer, hollow_model, machine, peak_resident, reset_peak_resident, resident, transformer_config

WIDTH, RANK = 3072, 16
TEXT, LATENTS = 512, (32, 32)
DEPTHS = ((1, 2), (2, 4))
FULL = (19, 38)
SKIP_HALF = (14, 15)
TIMES = 3
THEIRS, OURS = "diffusers + peft", "mlx-blockskip"


def main(threads: int, full_depth: bool) -> None:
    os.environ.update(OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    print(f"{machine('mlx', 'torch', 'diffusers', 'peft')}; threads: {threads}\n", flush=True)
    runs = {(side, depth): measure(side, depth) for depth in DEPTHS for side in (THEIRS, OURS)}
    print_table([row(side, depth, result) for (side, depth), result in runs.items()])
    print("\nCarried to full depth along the straight line through both (extrapolated, not measured):\n")
    print_lines({side: [runs[side, depth] for depth in DEPTHS] for side in (THEIRS, OURS)})
    if full_depth:
        print("\nMeasured at full depth, one step without a warm-up:\n", flush=True)
        print_table([row(OURS, FULL, measure(OURS, FULL, skip, times=1), skip) for skip in ((0, 0), SKIP_HALF)])


def measure(side: str, depth: tuple[int, int], skip: tuple[int, int] = (0, 0), times: int = TIMES) -> dict[str, Any]:
    """Run one side at one depth in a process of its own."""
    job = {"side": side, "config": transformer_config(WIDTH, *depth), "skip": skip, "times": times}
    if side == THEIRS:
        job["targets"] = targets(*depth)
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed at depth {depth} (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def targets(doubles: int, singles: int) -> list[str]:
    """Every linear layer of the blocks but modulation, by its full name, as this project's `--lora-targets all`."""
    from mlx_blockskip.models.flux1 import FAMILY

    chosen = FAMILY.lora_targets["all"]
    blocks = [(f"transformer_blocks.{i}", "double") for i in range(doubles)]
    blocks += [(f"single_transformer_blocks.{i}", "single") for i in range(singles)]
    return [f"{prefix}.{module}" for prefix, kind in blocks for module in chosen[kind]]


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Memory and seconds of one side; sizes in bytes."""
    return theirs(job) if job["side"] == THEIRS else ours(job)


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    imported = resident()
    with torch.device("meta"):
        model = FluxTransformer2DModel(**job["config"]).to(torch.bfloat16)  # type: ignore[attr-defined]
    model = model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=job["targets"]))
    cast_training_params(model, dtype=torch.float32)
    model.enable_gradient_checkpointing()
    model.train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    inputs = torch_inputs(job["config"])
    target = torch.randn(inputs["hidden_states"].shape)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(**inputs, return_dict=False)[0]
        torch.nn.functional.mse_loss(velocity.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**timed(step, job["times"]), "imported": imported, "trained": sum(p.numel() for p in factors)}


def torch_inputs(config: dict[str, Any]) -> dict[str, Any]:
    """One sample: packed latents, prompt, noise level, guidance and position ids."""
    import torch

    rows, columns = LATENTS[0] // 2, LATENTS[1] // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return {
        "hidden_states": torch.randn(1, rows * columns, config["in_channels"], dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, TEXT, config["joint_attention_dim"], dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.ones(1, dtype=torch.bfloat16),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def ours(job: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_blockskip.events import Event, PhaseEnd, listening
    from mlx_blockskip.models.family import Tokens
    from mlx_blockskip.tasks.phases import phase

    imported = resident()
    depth = job["config"]["num_layers"] + job["config"]["num_single_layers"]
    first, last = job["skip"]

    def bridge(_: int, start: int, stop: int, tokens: Tokens) -> Tokens:
        """What a record does for the blocks that were skipped at the end."""
        left, right = mx.zeros_like(tokens.image), mx.zeros_like(tokens.image)
        return Tokens(right + (tokens.image - left), tokens.text)

    with tempfile.TemporaryDirectory() as work:
        hollow_model(Path(work) / "model", job["config"], "bfloat16")
        trainer = Trainer(Path(work) / "model", 0, range(first, depth - last), RANK)
        mx.eval(trainer.state.tree)
        ends: list[Event] = []
        with listening(ends.append), phase("train"):
            found = timed(lambda: trainer.step(trainer.prepare(TEXT, LATENTS), bridge), job["times"])
        found["mlx"] = next(event.peak_memory for event in ends if isinstance(event, PhaseEnd))
        found["read"] = trainer.model.reader.bytes_read / (job["times"] + (job["times"] > 1))
    return {**found, "imported": imported, "trained": trainer.parameters}


def timed(step: Any, times: int) -> dict[str, Any]:
    """Peak and median seconds of `times` steps, after one to warm up where there are several."""
    loading, apart = peak_resident(), reset_peak_resident()
    seconds, cpu = [], []
    for _ in range(times + (times > 1)):
        started, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    medians = {"seconds": statistics.median(seconds[-times:]), "cpu": statistics.median(cpu[-times:])}
    return {"loading": loading, "apart": apart, "peak": peak_resident(), **medians}


def row(side: str, depth: tuple[int, int], found: dict[str, Any], skip: tuple[int, int] = (0, 0)) -> list[str]:
    blocks = f"{depth[0]} + {depth[1]}" + (f", {sum(skip)} skipped" if sum(skip) else "")
    loading = gib(found["loading"]) + ("" if found["apart"] else " (in the peak)")
    sizes = [gib(found[key]) if key in found else "-" for key in ("peak", "mlx", "read")]
    times = [f"{found[key]:.1f}" for key in ("seconds", "cpu")]
    return [side, blocks, f"{found['trained'] / 1e6:.1f} M", gib(found["imported"]), loading, *sizes, *times]


def print_table(rows: list[list[str]]) -> None:
    names = ("", "blocks", "trained", "after imports, GiB", "peak of loading, GiB", "peak resident, GiB")
    print_rows((*names, "MLX's own peak, GiB", "weights read a step, GiB", "seconds a step", "CPU seconds"), rows)


def print_lines(sides: dict[str, list[dict[str, Any]]]) -> None:
    """Both sides at full depth, by the line through the two depths.

    Where MLX tells its own peaks, the line is through them, and the most that the process took beside them is added.
    """
    rows = []
    for side, (small, large) in sides.items():
        full = {key: carried(small[key], large[key]) for key in ("peak", "mlx", "seconds", "cpu") if key in small}
        if "mlx" in full:
            full["peak"] = full["mlx"] + max(found["peak"] - found["mlx"] for found in (small, large))
        sizes = [gib(full[key]) if key in full else "-" for key in ("peak", "mlx")]
        rows.append([side, f"{FULL[0]} + {FULL[1]}", *sizes, f"{full['seconds']:.0f}", f"{full['cpu']:.0f}"])
    names = ("", "blocks", "peak resident, GiB", "MLX's own peak, GiB", "seconds a step", "CPU seconds")
    print_rows(names, rows)


def carried(small: float, large: float) -> float:
    """The straight line through both depths at full depth."""
    first, second = (doubles for doubles, _ in DEPTHS)
    return small + (large - small) * (FULL[0] - first) / (second - first)


def print_rows(names: tuple[str, ...], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows), flush=True)


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--full-depth", action="store_true")
    parser.add_argument("--child", type=json.loads)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child)))
    else:
        main(arguments.threads, arguments.full_depth)
