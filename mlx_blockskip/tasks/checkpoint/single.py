"""`convert` of single files: which family they are of, and where what they have not is from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_blockskip.converters import run, singles, write
from mlx_blockskip.converters.places import checkpoint_folder
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.views import View
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.settings import ConvertSettings
from mlx_blockskip.tasks.checkpoint.address import repo_named
from mlx_blockskip.tasks.checkpoint.hub import PIPELINE, Needs, download
from mlx_blockskip.tasks.checkpoint.recognise import family_of

SHOWN = 3
Writing = Callable[[Path], Iterator[tuple[str, str]]]
"""Fills a directory; yields (component, shard) as they are done."""


def plan(places: Sequence[Path], settings: ConvertSettings, precision: Precision) -> tuple[list[Component], Writing]:
    """What there is to write, and how. places: single files, or folders of shards. Raises UserError."""
    opened = {place: singles.opened(place) for place in places}
    known = {place: singles.kinds(place, views) for place, views in opened.items()}
    for place, kinds in known.items():
        if not kinds:
            raise UserError(_unknown(place, opened[place]))
    base = _base(places[0], settings.base, known, precision)
    family = family_of(base).name
    for place, kinds in known.items():
        if family not in kinds:
            raise UserError(f"{place}: is of {' or '.join(kinds)}, and {base} is of {family}; give another --base")
    networks = singles.networks_of(family)
    model = singles.assemble(base, family, [singles.held(place, views, networks) for place, views in opened.items()])
    for note in model.notes:
        emit(Note(note))

    def writing(target: Path) -> Iterator[tuple[str, str]]:
        return write.write_model(base, target, family, precision, model.parts, settings.hf_path)

    return [component for component, _ in model.parts], writing


def _unknown(place: Path, views: Mapping[str, View]) -> str:
    """Why a file is not read that is in safetensors format."""
    if any("lora" in name.lower() for name in views):
        return f"{place}: is a LoRA, which is no model; give it to generate as --adapter-path"
    shown = ", ".join(list(views)[:SHOWN]) or "nothing"
    return f"{place}: holds {shown}, which is no network of a supported family in a known layout; get another file"


def _base(
    first: Path, base: str | None, known: Mapping[Path, Mapping[str, Sequence[str]]], precision: Precision
) -> Path:
    """The directory that has the rest: the one that is given, else the one that the file lies in."""
    if base is None:
        folder = first.parent
        if (folder / "model_index.json").is_file():
            return folder
        family = next(iter(known[first]))
        example = getattr(run.load_table(family), "BASE", "owner/name")
        raise UserError(f"{first}: has no tokenizers and no scheduler; give a checkpoint that has, as --base {example}")
    path = checkpoint_folder(Path(base).expanduser())
    if path.is_dir():
        return path
    repo = repo_named(base)
    if repo is None:
        raise UserError(f"--base: {base} is no directory, and not a repo id such as owner/name")
    held = {folder for kinds in known.values() for folders in kinds.values() for folder in folders}

    def without_these(top: Path, dtype: str) -> Needs:
        """What is needed of the base: all but the weights that files have."""
        needs = PIPELINE.needs(top, dtype)
        folders = {folder: None if folder in held else own for folder, own in needs.folders.items()}
        components = [component for component in needs.components if component.folder not in held]
        return replace(needs, components=components, folders=folders)

    return download(repo, (replace(PIPELINE, needs=without_these),), precision)
