"""What diffusers computed from tiny-flux, stored in tests/golden."""

import json
from pathlib import Path

import mlx_blockskip  # noqa: F401
from mlx_blockskip.engine import files

PATH = Path(__file__).parents[1] / "golden" / "golden.safetensors"
GOLDEN = files.load_lazily(PATH)
METADATA = files.read_header(PATH).metadata
PROMPTS: list[str] = json.loads(METADATA["prompts"])
STEPS = int(METADATA["scheduler_steps"])
