"""Download from the Hub only what is converted: never a second copy of the same weights, nor one that is larger than
the precision asked for needs.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import vision
from mlx_blockskip.converters.run import load_table, read_components
from mlx_blockskip.converters.source import PICKLED
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.write import Precision, default_dtype, size_of
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models import schedulers
from mlx_blockskip.models.registry import find_family
from mlx_blockskip.tasks.checkpoint import hub_cache, hub_files
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.hub_errors import UnreachableError, speaking
from mlx_blockskip.tasks.checkpoint.hub_files import INDEX, choose
from mlx_blockskip.tasks.checkpoint.transfer import get, transfer

CONVERTER = "SFconvertbot"
"""The Hub's account that offers safetensors of pickled weights, as pull requests."""

PATIENCE = 10.0
"""Seconds that the Hub has to answer a question in."""


ANY = Precision("")
"""Whatever is usual for the kind of checkpoint."""


@dataclass(frozen=True)
class Needs:
    """What of a repo is converted, by its config files. folders: as `hub_files.choose` takes them."""

    components: Sequence[Component]
    folders: Mapping[str, str | None]
    copied: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint. index: the file that says what it is. dtype: what it is converted to where nothing is said.
    configs: `(directory with the index) -> config files that are read beside it`. needs: `(directory with the config
    files, dtype) -> Needs`. Both raise UserError where this one is not supported.
    """

    index: str
    what: str
    dtype: Callable[[], str]
    configs: Callable[[Path], list[str]]
    needs: Callable[[Path, str], Needs]


def family_of(top: Path) -> str:
    """The name of the family of a pipeline in diffusers' layout."""
    return find_family(files.read_json(top / INDEX)).name


def _configs_of_pipeline(top: Path) -> list[str]:
    folders = load_table(family_of(top)).FOLDERS
    return [*(f"{folder}/config.json" for folder in folders), f"scheduler/{schedulers.FILE}"]


def _needs_of_pipeline(top: Path, dtype: str) -> Needs:
    components = read_components(top, family_of(top))
    folders = {part.folder: (part.dtypes or {}).get(dtype, dtype) for part in components}
    return Needs(components, folders, load_table(family_of(top)).COPIED)


def _needs_of_encoder(top: Path, dtype: str) -> Needs:
    if vision.kind_of(top) is None:
        raise UserError(f"{top / 'config.json'}: has no model_type, so it is not an image encoder; choose another repo")
    components = [component for component, _ in vision.read_components(top)]
    return Needs(components, {"": dtype}, beside=vision.PLAIN)


PIPELINE = Layout(INDEX, "a pipeline in diffusers' layout", default_dtype, _configs_of_pipeline, _needs_of_pipeline)
ENCODER = Layout(
    "config.json", "an image encoder in transformers' layout", lambda: "float32", lambda top: [], _needs_of_encoder
)


def look_up(repo: Repo) -> Any:
    """The Hub's ModelInfo with file sizes. Raises UserError, its UnreachableError where no answer comes."""
    from huggingface_hub import HfApi

    with speaking(repo.name, repo.revision):
        return HfApi().model_info(repo.name, revision=repo.revision, files_metadata=True, timeout=PATIENCE)


def found(repo: Repo, layouts: Sequence[Layout]) -> tuple[Repo, Any]:
    """`look_up`, and under which revision: for an image encoder of which a repo has pickled files only, that of the
    pull request in which the Hub's own conversion to safetensors waits.
    """
    info = look_up(repo)
    names = [file.rfilename for file in info.siblings or []]
    safe = any(name.endswith(".safetensors") for name in names)
    pickled = any(name.endswith(PICKLED) for name in names)
    if ENCODER not in layouts or repo.revision or INDEX in names or safe or not pickled:
        return repo, info
    return _in_safetensors(repo) or (repo, info)


def _in_safetensors(repo: Repo) -> tuple[Repo, Any] | None:
    from huggingface_hub import HfApi

    with speaking(repo.name):
        offers = list(HfApi().get_repo_discussions(repo.name, author=CONVERTER, discussion_type="pull_request"))
    for offer in offers:
        if offer.git_reference and offer.status != "closed":
            offered = Repo(repo.name, offer.git_reference)
            info = look_up(offered)
            if any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
                return offered, info
    return None


def fetch(
    repo: Repo,
    info: Any,
    layouts: Sequence[Layout] = (PIPELINE,),
    precision: Precision = ANY,
    target: Path | None = None,
) -> Path:
    """A local snapshot at `info`'s commit, of a checkpoint in the first of the layouts whose index the repo has.

    precision: of what it is converted to; a variant that has less is not taken. target: where that will be, for which
    there has to be room too. Raises UserError with the reason and the way out.
    """
    found = plan(repo, info, layouts, precision)
    if need := sum(found.missing[name] for name in found.names):
        wanted = in_full(precision, found.layout)
        _room(repo, need, target, sum(size_of(component, wanted) for component in found.needs.components))
        emit(Note(f"Downloading {repo.name} ({gib(need)}) from the Hub"))
    if absent := {name: found.sizes[name] for name in found.names if not (found.top / name).exists()}:
        transfer(repo.name, info.sha, absent)
    hub_cache.record(repo, info.sha)
    return only(found.top, found.names)


@dataclass(frozen=True)
class Plan:
    """Which files of a commit are converted. top: its snapshot, which has the config files already. sizes: bytes of
    every file of the repo; missing: those that are not here.
    """

    layout: Layout
    top: Path
    needs: Needs
    names: Sequence[str]
    sizes: Mapping[str, int]
    missing: Mapping[str, int]


def plan(repo: Repo, info: Any, layouts: Sequence[Layout], precision: Precision = ANY) -> Plan:
    """What of a commit is converted, by its config files, which are downloaded. Raises UserError where it is nothing
    that is supported.
    """
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    layout = next((layout for layout in layouts if layout.index in sizes), None)
    if layout is None:
        raise UserError(
            f"{repo.name}: has no {' and no '.join(layout.index for layout in layouts)}, so it is not "
            f"{' or '.join(layout.what for layout in layouts)}; choose another repo"
        )
    top = hub_cache.snapshot(repo.name, info.sha)
    get(repo.name, info.sha, [layout.index])
    get(repo.name, info.sha, [name for name in layout.configs(top) if name in sizes])
    needs, missing = layout.needs(top, in_full(precision, layout).dtype), _missing(repo, info)
    return Plan(layout, top, needs, choose(missing, needs.folders, needs.copied, needs.beside), sizes, missing)


def in_full(precision: Precision, layout: Layout) -> Precision:
    """The precision with the layout's own dtype where it says none."""
    return replace(precision, dtype=precision.dtype or layout.dtype())


def download(
    repo: Repo, layouts: Sequence[Layout] = (PIPELINE,), precision: Precision = ANY, target: Path | None = None
) -> Path:
    """A local snapshot of a checkpoint; without an answer from the Hub, the one that was downloaded before.

    Raises UserError with the Hub's reason and the way out.
    """
    try:
        place, info = found(repo, layouts)
    except UnreachableError as error:
        kept = downloaded_before(repo, layouts, precision)
        if kept is None:
            raise
        emit(Note(f"{error}; using what was downloaded before: {kept}"))
        return kept
    return fetch(place, info, layouts, precision, target)


def downloaded_before(repo: Repo, layouts: Sequence[Layout] = (PIPELINE,), precision: Precision = ANY) -> Path | None:
    """A snapshot in the Hub's own cache that has all that is converted, whoever downloaded it; None where there is
    none. What else the repo has may be missing.
    """
    for top in hub_cache.snapshots(repo):
        for layout in layouts:
            if (names := held(top, layout, precision)) is not None:
                return only(top, names)
    return None


def held(top: Path, layout: Layout, precision: Precision = ANY) -> list[str] | None:
    """The files of a snapshot that are converted, where all of them are there; else None."""
    there = dict.fromkeys(hub_cache.names_in(top), 0)
    try:
        if layout.index not in there:
            return None
        needs = layout.needs(top, in_full(precision, layout).dtype)
    except UserError:
        return None
    names = choose(there, needs.folders, needs.copied, needs.beside)
    whole = all(
        any(copy.whole and set(copy.files) <= set(names) for copy in hub_files.copies(_inside(names, folder)))
        for folder, dtype in needs.folders.items()
        if dtype is not None
    )
    copied = all(any(name.startswith(f"{folder}/") for name in names) for folder in needs.copied)
    return names if whole and copied else None


def only(top: Path, names: Sequence[str]) -> Path:
    """The snapshot, if of its weights it holds these alone; else a directory of links to these files, which lasts as
    long as the process: a copy of which a part was downloaded is not read in place of a whole one.
    """
    folders = {name.rpartition("/")[0] for name in names if _of_weights(name)}
    others = [name for name in hub_cache.names_in(top) if name not in names and _of_weights(name)]
    if not any(name.rpartition("/")[0] in folders for name in others):
        return top
    kept = tempfile.TemporaryDirectory(prefix="mlx-blockskip-")
    _views.append(kept)
    view = Path(kept.name) / top.name
    for name in names:
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        (view / name).symlink_to((top / name).resolve())
    return view


_views: list[tempfile.TemporaryDirectory] = []
"""Held so that they are removed when the process ends, and not before."""


def _of_weights(name: str) -> bool:
    return hub_files.WEIGHTS.fullmatch(name.rpartition("/")[2]) is not None


def _inside(names: Sequence[str], folder: str) -> list[str]:
    return [name for name in names if name.rpartition("/")[0] == folder]


def _missing(repo: Repo, info: Any) -> dict[str, int]:
    """Bytes that would have to be downloaded, by file: what is here of it does not count, of whatever commit it is."""
    etags = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    here = hub_cache.blob_sizes(repo.name, etags.values())
    return {file.rfilename: max(0, (file.size or 0) - here[etags[file.rfilename]]) for file in info.siblings or []}


def _room(repo: Repo, need: int, target: Path | None, converted: int) -> None:
    """Raise UserError where the download has no room, or the converted model beside it."""
    cache, free = hub_cache.root(), files.free_space(hub_cache.root())
    if need > free:
        raise UserError(
            f"{repo.name}: needs {gib(need)} and {cache} has {gib(free)} free; free some, or set HF_HOME to another "
            "disk"
        )
    if target is None:
        return
    same = _device(target) == _device(cache)
    both, there = converted + (need if same else 0), files.free_space(target)
    if both > there:
        raise UserError(
            f"{repo.name}: needs {gib(converted)} converted{f' beside {gib(need)} downloaded' if same else ''}, and "
            f"{target.parent} has {gib(there)} free; free some, or choose another disk for one of them (HF_HOME, "
            "MLX_BLOCKSKIP_CACHE or --mlx-path)"
        )


def _device(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev


def gib(count: int) -> str:
    """Bytes as a user reads them in a sentence."""
    return f"{count / 2**30:.1f} GiB"
