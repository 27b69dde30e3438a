"""Settings that several commands share, the groups that help shows them in, and words that they have in common."""

from dataclasses import dataclass

from mlx_blockskip.models import ranges
from mlx_blockskip.options import Settings, option

DATA, PRIOR, METHOD = "Data", "Prior preservation", "Block skipping"
LORA, OPTIMIZER, RUN, DRAWING, MEMORY = "LoRA", "Optimizer", "Run", "Drawing", "Memory"

OVERWRITE = "Replace what is there."

MODEL = "MLX model directory, Hugging Face directory, repo id, or tiny-flux, tiny-sana."


@dataclass
class ModelChoice(Settings):
    model: str = option("tiny-flux", MODEL)


@dataclass
class TextLength(Settings):
    max_sequence_length: ranges.TextTokens | None = option(None, "Text tokens, padding included.")


@dataclass
class DrawingOptions(TextLength):
    """How images are drawn; what is left open is the model's own."""

    steps: ranges.DrawingSteps | None = option(None, "Denoising steps.", group=DRAWING)
    cfg_scale: ranges.CfgScale | None = option(None, "Classifier-free guidance; 1 is none.", group=DRAWING)
    guidance: ranges.Guidance | None = option(None, "Embedded guidance of a distilled model.", group=DRAWING)
    width: ranges.Side | None = option(None, "Pixels.", group=DRAWING)
    height: ranges.Side | None = option(None, "Pixels.", group=DRAWING)


@dataclass
class MemoryOptions(Settings):
    """What a command may take of the memory, and a record of what it took."""

    memory_budget: ranges.MemoryBudget | None = option(
        "auto",
        "MLX memory to stay within, e.g. 2GB; auto: what this machine has; 0: the least that is possible.",
        group=MEMORY,
    )
    trace_memory: str | None = option(
        None, "Write a timeline of MLX memory, block by block, as PATH.json; ui.perfetto.dev draws it.", group=MEMORY
    )


@dataclass
class EncoderOptions(Settings):
    """What images are compared by."""

    vision_model: str | None = option(None, "DINO or DINOv2 to compare images with.")
    clip_model: str | None = option(None, "CLIP to compare images and texts with.")


@dataclass
class TrainSize(TextLength):
    """What decides how much a training run takes."""

    resolution: ranges.Side | None = option(
        None, "Shorter side of an image, and largest crop (s_max), in pixels.", group=METHOD
    )
    train_resolution: ranges.Side | None = option(None, "Side of a training patch (s_min), in pixels.", group=METHOD)
    rank: ranges.Rank | None = option(None, "Rank of the LoRA factors.", group=LORA)
    iters: ranges.Steps | None = option(None, "Optimizer steps.", group=RUN)
    batch_size: ranges.Batch | None = option(None, "Training samples per micro-batch.", group=RUN)
    cache_limit: ranges.DiskBytes = option("8GB", "Largest residual cache on disk.", group=RUN)
