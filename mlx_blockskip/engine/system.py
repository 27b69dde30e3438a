"""What the operating system says of the machine, asked without MLX: where that cannot work, it is said first."""

import platform
import subprocess
import sys

from mlx_blockskip.engine.errors import UserError

LEAST_MACOS = 14

PATIENCE = 5.0
"""Seconds that a command of the system may take."""


def unsupported(system: str, machine: str, translated: bool, macos: str) -> str | None:
    """Why nothing can run here, and the way out; None where it can, as on Linux and what else is no Mac.

    system, machine: as `platform` names them (Darwin, arm64). translated: Python runs under Rosetta. macos: its
    version.
    """
    if system != "Darwin":
        return None
    if translated:
        return "this Python is translated by Rosetta, and MLX needs a native one: install an arm64 Python and use that"
    if machine != "arm64":
        return f"this Mac's processor is {machine}: MLX needs Apple silicon; Linux works for trying, on the CPU"
    major = macos.partition(".")[0]
    if major.isdecimal() and 10 < int(major) < LEAST_MACOS:  # 10.16 is what macOS 11 to 26 may call itself
        return f"macOS {macos} is too old: MLX needs macOS {LEAST_MACOS} or later; update it in System Settings"
    return None


def obstacle() -> str | None:
    """`unsupported` of this machine."""
    system, machine = platform.system(), platform.machine()
    return unsupported(system, machine, machine == "x86_64" and translated(), platform.mac_ver()[0])


def require() -> None:
    """Raises UserError where nothing can run on this machine."""
    if (reason := obstacle()) is not None:
        raise UserError(reason)


def is_mac() -> bool:
    return sys.platform == "darwin"


def translated() -> bool:
    """Whether this process runs under Rosetta."""
    return is_mac() and asked("sysctl", "-n", "sysctl.proc_translated") == "1"


def power() -> str:
    """What the machine runs on: mains, battery or unknown."""
    return source_of(asked("pmset", "-g", "batt") or "") if is_mac() else "unknown"


def source_of(answer: str) -> str:
    """mains, battery or unknown, by the answer of `pmset -g batt`."""
    first = answer.partition("\n")[0]
    return "mains" if "'AC Power'" in first else "battery" if "'Battery Power'" in first else "unknown"


def asked(*command: str) -> str | None:
    """What a command of the system prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
