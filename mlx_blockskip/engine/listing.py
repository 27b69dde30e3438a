"""What a directory holds as its user sees it: hidden files, files that are still in iCloud, spellings of a name."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

PLACEHOLDER = ".icloud"


def visible(path: Path, pattern: str = "*") -> list[Path]:
    """What matches a glob pattern in a directory, sorted, but for hidden files and what is in hidden directories.

    `*` matches them too, and macOS keeps a hidden `._name` beside each file on disks without extended attributes.
    """
    found = ((p, p.relative_to(path).parts) for p in path.glob(pattern))
    return sorted(p for p, parts in found if not any(part.startswith(".") for part in parts))


def companion(path: Path) -> Path:
    """The file that macOS keeps beside this one on disks without extended attributes (exFAT, shares)."""
    return path.with_name(f"._{path.name}")


def in_icloud(path: Path) -> bool:
    """Whether only a placeholder of this file is here: `.name.icloud`."""
    return path.with_name(f".{path.name}{PLACEHOLDER}").exists() and not path.exists()


def awaited(directory: Path) -> list[Path]:
    """The files of which only a placeholder is in a directory, under their own names."""
    found = (p.with_name(p.name[1 : -len(PLACEHOLDER)]) for p in directory.glob(f".?*{PLACEHOLDER}"))
    return sorted(path for path in found if in_icloud(path))


def alike(name: str) -> str:
    """What all spellings of a name have in common that a Mac's disk takes for one: case, and letters with their accents
    in one piece or two.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def by_spelling(paths: Iterable[Path]) -> dict[str, Path]:
    """Paths by their names and by `alike` of them; where several are alike, one of them."""
    paths = list(paths)
    return {alike(path.name): path for path in reversed(paths)} | {path.name: path for path in paths}


def spelled(path: Path, known: dict[str, Path]) -> Path:
    """The path as its directory spells it, by `by_spelling` of what is there; itself where nothing there is alike."""
    return known.get(path.name) or known.get(alike(path.name)) or path
