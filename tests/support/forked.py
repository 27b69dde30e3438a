"""The command line in processes of their own, without the seconds that its imports take: a server that has imported
everything, and has not used MLX, is forked for each.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNCAUGHT = 70
SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: -9 where it was killed, UNCAUGHT where an exception came out. places: of the file
    system that it changed, or read, where they are counted.
    """

    code: int
    text: str
    places: list[str]


class Server:
    """Runs commands, one after the other."""

    def __init__(self, directory: Path, env: Mapping[str, str]):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        code = "import sys; sys.path.insert(0, sys.argv[1]); from support import forked; forked.serve()"
        env = {**os.environ, **env, "MLX_BLOCKSKIP_CACHE": str(directory / "models"), "MLX_BLOCKSKIP_KEEP_AWAKE": "0"}
        tests = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, tests], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, argv: Sequence[str], cwd: Path, **how: Any) -> Ended:
        """kind, at: see `Faults`, of what lies below `cwd`. env: more of the environment. locks: whether there are."""
        log = self.directory / "log"
        log.unlink(missing_ok=True)
        request = {"argv": list(argv), "cwd": str(cwd), "log": str(log), "out": str(self.directory / "out"), **how}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        text = (self.directory / "out").read_text(errors="replace")
        return Ended(code, text, json.loads(log.read_text()) if log.exists() else [])

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def server(directory: Path, env: Mapping[str, str]) -> Iterator[Server]:
    """env: more of the environment, such as where the Hub is, which its client reads once."""
    found = Server(directory, env)
    try:
        yield found
    finally:
        found.close()


def serve() -> None:
    """Of the server's process: a line of JSON in for each command, how it ended as a number out."""
    import mlx_blockskip.cli
    from mlx_blockskip.commands import TASKS
    from mlx_blockskip.models import registry
    from support import toy

    for name in (
        *TASKS.values(),
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "huggingface_hub.file_download",
    ):
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    registry.families()["toy"] = toy.FAMILY
    os.fsync = lambda handle: None
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _run(request, mlx_blockskip.cli.main)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _run(request: dict[str, Any], main: Any) -> None:
    """Of a forked process: run the command and end."""
    from support.faults import Faults, without_locks

    signal.alarm(SECONDS)
    with open(request["out"], "wb") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    os.chdir(request["cwd"])
    os.environ.update(request.get("env", {}))
    if not request.get("locks", True):
        without_locks()
    faults = Faults(request["cwd"], request.get("kind", "count"), request.get("at", 0), request["log"])
    faults.install()
    sys.argv = ["mlx-blockskip", *request["argv"]]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = UNCAUGHT
    faults.count()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
