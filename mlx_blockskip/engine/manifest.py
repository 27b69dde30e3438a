"""Checksums of what lies beside the shards of a converted model: configs, indexes, tokenizers, the scheduler."""

from pathlib import Path

from mlx_blockskip.engine import files, listing, sealed
from mlx_blockskip.engine.errors import UserError

FILE = "manifest.json"
OPEN = ("CONFIG.JSON", "README", "LICENSE", "DEFAULTS", "MANIFEST")
"""How names at the top of the directory begin that are written anew elsewhere, or that a user may change."""
WAY_OUT = "convert the model again"


def write(directory: Path) -> None:
    """Write down what a model's directory holds but for weights, which their indexes have checksums of, and what its
    user may change.
    """
    held = [path for path in listing.visible(directory, "**/*") if path.is_file() and path.suffix != ".safetensors"]
    names = {str(path.relative_to(directory)): path for path in held}
    sums = {name: files.sha256(path) for name, path in names.items() if not name.upper().startswith(OPEN)}
    files.write_json(directory / FILE, sealed.seal({"files": sums}))


def check(directory: Path) -> None:
    """Raise DamagedError where something is not as it was written. Directories of earlier versions have no manifest."""
    for name, expected in recorded(directory).items():
        sealed.check(directory / name, expected, WAY_OUT)


def recorded(directory: Path) -> dict[str, str]:
    """The checksums by the names of files; none where there is no manifest. Raises UserError."""
    path = directory / FILE
    if not path.exists():
        return {}
    sums = sealed.opened(path, files.read_json(path), WAY_OUT, required=True).get("files")
    if not isinstance(sums, dict):
        raise UserError(f"{path}: has no checksums of files; {WAY_OUT}")
    return sums
