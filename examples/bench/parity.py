"""Print the worst error of every network and pipeline against diffusers, transformers and peft, as a Markdown table.

    python examples/bench/parity.py

Runs those tests (extras `dev` and `parity` installed), which hold the bounds, and prints what they measured.
"""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = ("models", "test_pipeline.py", "test_flow.py", "convert")

if __name__ == "__main__":
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-c",
        str(root / "pyproject.toml"),
        "--rootdir",
        str(root),
        "-n",
        "2",
    ]
    done = subprocess.run([*command, *TESTS], cwd=root / "tests", stdout=subprocess.PIPE, text=True)
    peers = ", ".join(f"{name} {version(name)}" for name in ("mlx", "torch", "diffusers", "transformers", "peft"))
    print(f"{platform.platform()}, {platform.machine()}, {peers}\n")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    sys.exit(done.returncode)
