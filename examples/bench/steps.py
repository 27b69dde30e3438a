"""What the benchmarks share: the machine in a line, a process's memory, a model of zeros, a training step.

The models are hollow (`mlx_blockskip.converters.hollow`): real names, shapes and types over sparse files of zeros.
Memory and time depend on none of the values; what a disk takes to deliver the weights is not in the seconds.
"""

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx_blockskip  # noqa: F401  (OpenBLAS goes before mlx.core)

MIB, GIB = 2**20, 2**30
HEAD_DIM = 128
STATUS = Path("/proc/self/status")


def machine(*packages: str) -> str:
    """Platform, processor, cores, versions and the commit that is checked out."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.platform()}, {_processor()}, {os.cpu_count()} cores; {versions}; commit {commit}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def resident() -> int:
    """Bytes of this process in memory (where /proc tells: elsewhere the highest so far)."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Bytes of this process, the highest since `reset_peak_resident`, or since its start where that cannot be."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (highest if sys.platform == "darwin" else highest * 1024)


def reset_peak_resident() -> bool:
    """Measure from here (Linux); False where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def transformer_config(width: int, doubles: int, singles: int) -> dict[str, Any]:
    """FLUX.1-dev's, in another size; its class takes them all as arguments."""
    from mlx_blockskip.models import presets

    published = presets.configs(presets.folders()["flux1-dev"])["transformer"]
    size = {"num_layers": doubles, "num_single_layers": singles, "num_attention_heads": width // HEAD_DIM}
    return {key: value for key, value in published.items() if not key.startswith("_")} | size


def hollow_model(target: Path, transformer: dict[str, Any], dtype: str, bits: int = 0) -> None:
    """A model directory of zeros with this transformer; its encoders and VAE are tiny-flux's. bits: 0 for none"""
    from mlx_blockskip.converters.hollow import write_hollow
    from mlx_blockskip.converters.write import Precision
    from mlx_blockskip.engine import files

    tiny = Path(str(resources.files("mlx_blockskip") / "assets" / "tiny-flux"))
    others = {name: files.read_json(tiny / name / "config.json") for name in ("text_encoder", "text_encoder_2", "vae")}
    write_hollow(target, "flux1", {"transformer": transformer, **others}, Precision(dtype, bits), tiny)


class Record(NamedTuple):
    """What a training step takes of a sample: tokens where the retained blocks begin, modulation ahead of time."""

    tokens: Any
    context: Any
    modulations: Any
    head: Any
    target: Any


class Trainer:
    """A model, and a LoRA with its optimizer's state, as `train --memory-budget` has them; moments are in files."""

    def __init__(self, path: Path, budget: int, retained: Sequence[int], rank: int):
        from mlx_blockskip import lora
        from mlx_blockskip.engine import limits
        from mlx_blockskip.models.flux1 import FAMILY
        from mlx_blockskip.models.registry import open_model
        from mlx_blockskip.settings import TrainSettings
        from mlx_blockskip.tasks.train.checkpoints import State
        from mlx_blockskip.tasks.train.moments import Moments

        limits.bound(budget)
        self.model: Any = open_model(path, budget)
        self.retained = retained
        tree = lora.init(self.model.reader, retained, FAMILY.lora_targets["all"], rank, seed=0)
        self.state = State(tree, Moments(path / "moments"))
        self.settings = TrainSettings(learning_rate=1e-4, iters=1000)

    @property
    def parameters(self) -> int:
        """Parameters that train."""
        return sum(value.size for factors in self.state.tree.values() for value in factors.values())

    def embed(self, text: int, size: tuple[int, int]) -> tuple[Any, Any]:
        """Tokens and context of a sample of zeros with so many text tokens and latents of this size."""
        import mlx.core as mx

        model, config = self.model, self.model.config
        latents = mx.zeros((1, *size, config.in_channels // 4))
        prompt = {
            "prompt_embeds": mx.zeros((1, text, config.joint_attention_dim), model.dtype),
            "pooled": mx.zeros((1, config.pooled_projection_dim), model.dtype),
        }
        tokens, context = model.embed(latents, prompt), model.context(mx.array([0.5]), prompt, size, 1.0)
        mx.eval(tokens, context.temb)
        return tokens, context

    def prepare(self, text: int, size: tuple[int, int]) -> Record:
        """What a record holds: embedded tokens, and one sweep over the modulation weights."""
        import mlx.core as mx

        from mlx_blockskip.engine.sweep import modulations

        tokens, context = self.embed(text, size)
        head = self.model.final_modulation(context)
        mx.eval(head)
        (found,) = modulations(self.model.stack, self.model.reader, [context], self.retained)
        self.model.release()
        target = mx.zeros((1, *size, self.model.config.in_channels // 4))
        return Record(tokens, context._replace(temb=None), found, head, target)

    def step(self, record: Record, bridge: Any = None) -> float:
        """One optimizer step on one sample, as in `tasks/train.py`: there and back, clipping, AdamW. The loss."""
        import mlx.core as mx

        from mlx_blockskip.engine import sweep
        from mlx_blockskip.tasks.train import optimizer

        def loss(_: int, tokens: Any) -> mx.array:
            velocity = self.model.final_layer(tokens, record.context, record.head)
            return mx.mean(mx.square(velocity.astype(mx.float32) - record.target))

        grads: optimizer.Grads = {}
        sample = sweep.Batch(record.tokens, record.context, record.modulations.__getitem__)
        losses = sweep.backward(
            self.model.stack, self.model.reader, [sample], self.retained,
            trainable=self.state.tree, loss=loss, on_grad=grads.__setitem__, bridge=bridge,
        )  # fmt: skip
        optimizer.update(self.state, grads, self.settings, optimizer.global_norm(grads))
        self.state.step += 1
        return float(losses[0])
