"""An ablation's raw results: one JSON file a model, a line for each row, subject and seed.

`{"rows": {"base, phoenix, 0": {"row": "base", "subject": "phoenix", "seed": 0, "top-1": ...}, ...}, "tuning": ...}`
"""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from mlx_blockskip.engine.files import atomic_file

FILE = "results.json"
ROWS, TUNING = "rows", "tuning"
"""What a file holds: the ablation itself, and what learning rates and steps were chosen from."""

Result = dict[str, Any]


def key(row: str, subject: str, seed: int) -> str:
    return f"{row}, {subject}, {seed}"


class Stored:
    """The results of one part of OUT/results.json. What is put is on disk when `put` returns, the file always whole."""

    def __init__(self, directory: Path, part: str = ROWS):
        self.path = directory / FILE
        self.all: dict[str, dict[str, Result]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.own = self.all.setdefault(part, {})
        self.lock = Lock()

    def put(self, result: Result) -> None:
        with self.lock:
            self.own[key(result["row"], result["subject"], result["seed"])] = result
            with atomic_file(self.path) as temporary:
                temporary.write_text(lines(self.all))


def lines(parts: dict[str, dict[str, Result]]) -> str:
    """JSON with a line for each result, sorted by key."""
    written = []
    for part, results in parts.items():
        own = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(results.items())]
        written.append(f"{json.dumps(part)}: {{\n" + ",\n".join(own) + "\n}")
    return "{\n" + ",\n".join(written) + "\n}\n"
