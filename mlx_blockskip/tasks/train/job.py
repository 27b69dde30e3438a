"""A training run under way: what it goes by, and what changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.blockskip.records import Layout
from mlx_blockskip.engine.stack import Stack
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.tasks.defaults import TrainConfig
from mlx_blockskip.tasks.train.begin import Given
from mlx_blockskip.tasks.train.samples import TrainingSamples

CACHE = "cache"
CACHE_FILES = (
    *("prompts.safetensors", "latents.safetensors", "chunk-*.safetensors", "chunk-*.json"),
    *("adapter.safetensors", "moments", "gradients", "inputs"),
)
"""What the cache in an adapter directory holds while a run is under way."""


@dataclass
class Job:
    """What a run goes by. stack: the model's, with the LoRA's scale. ample: weights, activations and moments all stay
    in memory. given: the adapter that the run began with. identity: all that a resumed run has to have in common with
    this one. layouts: of records, by the lengths of their prompts. chunk_length: micro-batches per chunk.
    """

    config: TrainConfig
    directory: Path
    model: DiffusionModel
    stack: Stack
    plan: SkipPlan
    samples: TrainingSamples
    ample: bool
    given: Given = field(default_factory=Given)
    identity: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    chunk_length: int = 0

    @property
    def cache(self) -> Path:
        return self.directory / CACHE

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Inside, blocks that are read stay in memory, where it is ample."""
        reader = self.model.reader
        budget, reader.budget = reader.budget, None if self.ample else reader.budget
        try:
            yield
        finally:
            reader.budget = budget
