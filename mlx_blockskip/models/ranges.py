"""What the numbers of settings may be: of a command's options, of a model's own defaults, of what an adapter records.

The upper ends are far beyond what is of use, and far below what a machine chokes on.
"""

from typing import Annotated

from mlx_blockskip.engine.ranges import Range, Sizes

SEEDS = 2**64
MOST_STEPS = 1_000_000

Side = Annotated[int, Range(1, 8192)]
"""Pixels."""
TextTokens = Annotated[int, Range(1, 4096)]
DrawingSteps = Annotated[int, Range(1, 1000)]
CfgScale = Annotated[float, Range(0, 100)]
Guidance = Annotated[float, Range(0, 100)]
Images = Annotated[int, Range(1, 10_000)]
ImagesOrNone = Annotated[int, Range(0, 10_000)]
Seed = Annotated[int, Range(0, SEEDS - 1)]
"""ComfyUI's are of 64 bits."""
Strength = Annotated[float, Range(-100, 100)]
"""Of an adapter; a negative one takes away what it adds."""

Rank = Annotated[int, Range(1, 1024)]
Scale = Annotated[float, Range(0, 1000, above=True)]
Steps = Annotated[int, Range(1, MOST_STEPS)]
StepsOrNone = Annotated[int, Range(0, MOST_STEPS)]
Batch = Annotated[int, Range(1, 1024)]
LearningRate = Annotated[float, Range(0, 1_000_000, above=True)]
"""Far above what trains: a run that diverges says so."""
WeightDecay = Annotated[float, Range(0, 100)]
Norm = Annotated[float, Range(0, 1_000_000_000)]
PriorWeight = Annotated[float, Range(0, 1000)]
LogitMean = Annotated[float, Range(-10, 10)]
LogitDeviation = Annotated[float, Range(0, 10, above=True)]

Share = Annotated[float, Range(0, 1, below=True)]
ShareOfSome = Annotated[float, Range(0, 1, above=True, below=True)]
BlocksOrNone = Annotated[int, Range(0, 1000)]
Few = Annotated[int, Range(1, 1000)]
Days = Annotated[float, Range(0, 100_000)]

DiskBytes = Annotated[str, Sizes(1, 2**50)]
MemoryBudget = Annotated[str, Sizes(0, 2**50, words=("auto", "any"))]
"""0 asks for the least that is possible."""
Memory = Annotated[str, Sizes(1, 2**50, words=("auto",))]
