"""The Hub's own cache on this disk: what lies there, whoever downloaded it, and by which names it is found offline."""

from collections.abc import Iterable
from pathlib import Path

from mlx_blockskip.engine import files
from mlx_blockskip.tasks.checkpoint.address import Repo


def root() -> Path:
    """Where the client keeps its downloads: HF_HUB_CACHE, else HF_HOME's."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def folder(repo: str) -> Path:
    """Where a repo's blobs, snapshots and refs are."""
    return root() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """Where a commit's files are, under their own names."""
    return folder(repo) / "snapshots" / commit


def names_in(path: Path) -> list[str]:
    """The files of a snapshot, by their names in the repo. A link to what is gone is none."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def record(repo: Repo, commit: str) -> None:
    """Have the branch or tag lead to this commit, as the client does for whom it downloads by name."""
    path = folder(repo.name) / "refs" / repo.branch
    if repo.commit is None and not (path.is_file() and path.read_text(encoding="utf-8").strip() == commit):
        with files.atomic_file(path, durable=False) as temporary:
            temporary.write_text(commit, encoding="utf-8")


def snapshots(repo: Repo) -> list[Path]:
    """The snapshots that may stand for the repo without the Hub: the one that its revision leads to first; without a
    revision, then all others, the newest first.
    """
    found = []
    ref = folder(repo.name) / "refs" / repo.branch
    commit = repo.commit or (ref.read_text(encoding="utf-8").strip() if ref.is_file() else None)
    if commit:
        found.append(snapshot(repo.name, commit))
    if repo.revision is None:
        others = [path for path in (folder(repo.name) / "snapshots").glob("*") if path.is_dir()]
        found += sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def blob_sizes(repo: str, etags: Iterable[str | None]) -> dict[str | None, int]:
    """Bytes that are here of each blob, of some only a part."""
    blobs = folder(repo) / "blobs"
    found: dict[str | None, int] = {None: 0}
    for etag in filter(None, etags):
        whole, part = blobs / etag, blobs / f"{etag}.incomplete"
        path = whole if whole.is_file() else part
        found[etag] = path.stat().st_size if path.is_file() else 0
    return found
