"""What this machine is: only what this computer itself says, without the network, names of users or secrets."""

import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.display import memory
from mlx_blockskip.engine import awake, disk, environment, files, limits
from mlx_blockskip.engine.system import asked, obstacle, power, translated
from mlx_blockskip.events import Table
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory
from mlx_blockskip.tasks.memory.limit import AUTO, budget_of

VARIABLES = (
    *environment.WANTED,
    *("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_METAL_FAST_SYNCH", "OPENBLAS_NUM_THREADS"),
)
"""Environment variables that change results or speed. Only these are shown: others may hold secrets."""


@dataclass(frozen=True)
class Machine:
    """memory, recommended (by Metal for one program; None elsewhere), budget (--memory-budget auto), disk_free: bytes.
    disk_speed: bytes a second, None where it was not measured. translated: Python runs under Rosetta. unsupported: why
    no other command runs here; None where they do. gpu: Metal's name of its architecture. power: mains, battery or
    unknown. caffeinate: whether long runs can keep it awake. logged_in: whether there is a token of the Hub.
    environment: VARIABLES that are set.
    """

    chip: str
    memory: int
    recommended: int | None
    budget: int
    system: str
    architecture: str
    translated: bool
    unsupported: str | None
    python: str
    mlx: str
    device: str
    gpu: str
    power: str
    caffeinate: bool
    disk_free: int
    disk_speed: float | None
    logged_in: bool
    environment: dict[str, str]

    @property
    def on_a_mac(self) -> bool:
        return self.system.startswith("macOS")

    @property
    def computes_on(self) -> str:
        """What MLX computes on."""
        return f"{self.device} {self.gpu}".strip()


def examine(*, timed: bool) -> Machine:
    """This machine. timed: measure the disk's speed, which takes a second or two."""
    found = limits.machine()
    return Machine(
        chip=chip(),
        memory=found.memory,
        recommended=found.recommended,
        budget=budget_of(AUTO) or 0,
        system=system(),
        architecture=platform.machine(),
        translated=translated(),
        unsupported=obstacle(),
        python=platform.python_version(),
        mlx=version("mlx"),
        device="GPU" if mx.metal.is_available() else "CPU",
        gpu=str(mx.device_info().get("architecture", "")) if mx.metal.is_available() else "",
        power=power(),
        caffeinate=awake.available(),
        disk_free=files.free_space(cache_directory()),
        disk_speed=disk_speed() if timed else None,
        logged_in=logged_in(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def chip() -> str:
    """What the processor calls itself."""
    if sys.platform == "darwin":
        return asked("sysctl", "-n", "machdep.cpu.brand_string") or "unknown"
    return model_name(_read(Path("/proc/cpuinfo"))) or platform.processor() or "unknown"


def model_name(cpuinfo: str) -> str | None:
    """The first processor's name in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), None)


def system() -> str:
    """The operating system and its version."""
    if sys.platform == "darwin":
        build = asked("sw_vers", "-buildVersion")
        return f"macOS {platform.mac_ver()[0]}{f' ({build})' if build else ''}"
    return f"{platform.system()} {platform.release()}"


def logged_in() -> bool:
    """Whether a token of the Hub is stored here. Nothing of the token itself is kept."""
    from huggingface_hub import get_token

    return get_token() is not None


def disk_speed() -> float | None:
    """Bytes a second that are read where converted models are kept, or else where temporary files are; None where
    neither can be written.
    """
    near = next(path for path in (cache_directory(), *cache_directory().parents) if path.is_dir())
    for place in (near, Path(tempfile.gettempdir())):
        try:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                return disk.read_speed(Path(directory))
        except OSError:
            continue
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def advice(machine: Machine) -> list[str]:
    """What of this machine should be changed first."""
    found = []
    if machine.unsupported is not None:
        found.append(machine.unsupported)
    if machine.device == "CPU":
        found.append("MLX has no Metal here: everything works on the CPU, too slowly for FLUX.1 or SANA")
    if machine.power == "battery":
        found.append("the machine runs on battery: plug it in before a long run")
    if machine.on_a_mac and not machine.caffeinate:
        found.append("caffeinate is not found: long runs do not keep this Mac awake")
    if not machine.logged_in:
        found.append("not logged in to the Hub: `hf auth login` before FLUX.1-dev, whose licence has to be accepted")
    return found


def table(machine: Machine) -> Table:
    """The machine for a person."""
    speed = "not measured" if machine.disk_speed is None else f"{machine.disk_speed / 1e9:.1f} GB/s"
    recommended = "-" if machine.recommended is None else memory(machine.recommended)
    rows = {
        "chip": machine.chip,
        "memory": memory(machine.memory),
        "Metal recommends": recommended,
        "memory budget (auto)": memory(machine.budget),
        "system": machine.system,
        "architecture": f"{machine.architecture}, {'translated' if machine.translated else 'native'}",
        "Python, MLX": f"{machine.python}, {machine.mlx}",
        "MLX computes on": machine.computes_on,
        "power": machine.power,
        **({"caffeinate": "found" if machine.caffeinate else "not found"} if machine.on_a_mac else {}),
        "disk": f"{memory(machine.disk_free)} free, {speed}",
        "logged in to the Hub": "yes" if machine.logged_in else "no",
        **{name: machine.environment.get(name, "not set") for name in environment.WANTED},
        **{name: value for name, value in machine.environment.items() if name not in VARIABLES[:2]},
    }
    return Table("This machine", ("what", "is"), tuple(rows.items()))
