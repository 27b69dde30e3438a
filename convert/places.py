"""Where a checkpoint lies that its user names by another folder."""

from pathlib import Path

from mlx_blockskip.engine import listing
from mlx_blockskip.engine.errors import UserError


def checkpoint_folder(path: Path) -> Path:
    """The folder with the files: of the Hub's cache folder `models--owner--name` the snapshot of its main branch, else
    the newest; of any other folder that folder.

    Raises UserError where the cache folder has no snapshot.
    """
    snapshots = path / "snapshots"
    if not (snapshots.is_dir() and path.name.startswith("models--")):
        return path
    main = path / "refs" / "main"
    if main.is_file() and (snapshot := snapshots / main.read_text(encoding="utf-8").strip()).is_dir():
        return snapshot
    found = [folder for folder in listing.visible(snapshots) if folder.is_dir()]
    if not found:
        raise UserError(f"{path}: is the Hub's cache without a downloaded snapshot; run `hf download` for this repo")
    return max(found, key=lambda folder: folder.stat().st_mtime)
