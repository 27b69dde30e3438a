"""Checkpoints without configs: which networks single files hold, and a whole model of them and of a base."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import copied, quantized
from mlx_blockskip.converters.layouts import Layout, Network
from mlx_blockskip.converters.run import check_rows, components_of, load_table, open_component
from mlx_blockskip.converters.source import INDEX, SHARD, Source, open_source, stored_in
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.views import View
from mlx_blockskip.engine import files, listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets, schedulers
from mlx_blockskip.models.registry import families, find_family

ENDINGS = (".safetensors", ".sft")
HARMLESS = r"(.*\.)?(logit_scale|spiece_model|scaled_fp8)"
"""What lies beside networks and is no weight of theirs."""


@dataclass(frozen=True)
class Held:
    """What a file, or a folder of shards, has of a family. networks: by folder, under our names. left: the names of
    tensors that are of none of them.
    """

    place: Path
    networks: Mapping[str, Mapping[str, View]]
    left: tuple[str, ...]


def weights_in(path: Path) -> list[Path]:
    """The single files that a path stands for, and folders with the shards of one network; none where it is something
    else: a checkpoint with an index of its own, or no checkpoint.
    """
    if path.is_file():
        return [path]
    if not path.is_dir() or (path / "model_index.json").is_file() or _says_what_it_is(path / "config.json"):
        return []
    found = [file for file in listing.visible(path) if file.suffix in ENDINGS]
    sharded = any(SHARD.fullmatch(file.name) for file in found) or any(path.glob(INDEX))
    return [path] if sharded else found


def _says_what_it_is(config: Path) -> bool:
    """Whether a folder has a config that is not that of one of diffusers' networks."""
    content = files.read_json(config) if config.is_file() else None
    return content is not None and not (isinstance(content, dict) and "_class_name" in content)


def opened(place: Path) -> dict[str, View]:
    """The tensors of a file or of a folder of shards, as they are called there. Raises UserError."""
    return dict(open_source(place).tensors) if place.is_dir() else quantized.views(stored_in(place))


def held(place: Path, views: Mapping[str, View], networks: Mapping[str, Network]) -> Held:
    """The networks of a family, by folder, among the tensors of one place. Raises UserError for two of a kind."""
    layouts: dict[str, tuple[str, Layout]] = {}
    for folder, network in networks.items():
        prefixes, layout = _recognised(views, network)
        if len(prefixes) > 1:
            shown = " and ".join(sorted(prefix or "no prefix" for prefix in prefixes))
            raise UserError(f"{place}: holds {network.what} more than once ({shown}); take out one of them")
        if layout is not None:
            layouts[folder] = prefixes.pop(), layout
    owners = sorted(((prefix, folder) for folder, (prefix, _) in layouts.items()), key=lambda owner: -len(owner[0]))
    own: dict[str, dict[str, View]] = {folder: {} for folder in layouts}
    left = []
    for name, view in views.items():
        if re.fullmatch(HARMLESS, name):
            continue
        prefix, owner = next(((p, folder) for p, folder in owners if name.startswith(p)), ("", ""))
        if owner:
            own[owner][name.removeprefix(prefix)] = view
        else:
            left.append(name)
    return Held(place, {folder: layouts[folder][1].read(tensors) for folder, tensors in own.items()}, tuple(left))


def _recognised(names: Collection[str], network: Network) -> tuple[set[str], Layout | None]:
    """The first layout that names are in, with what is put before them; none where they are in no layout."""
    for layout in network.layouts:
        if prefixes := layout.prefixes(names):
            return prefixes, layout
    return set(), None


def kinds(place: Path, views: Mapping[str, View]) -> dict[str, list[str]]:
    """What of each family is among the tensors of one place: folders by family; families of which there is nothing are
    left out.
    """
    found = {name: list(held(place, views, networks_of(name)).networks) for name in families()}
    return {name: folders for name, folders in found.items() if folders}


def networks_of(family: str) -> Mapping[str, Network]:
    """The networks of a family that are known in single files; none where its converter is not installed."""
    try:
        return getattr(load_table(family), "FILES", {})
    except UserError:
        return {}


@dataclass(frozen=True)
class Assembled:
    """A whole model. notes: what its user should know of where its parts are from."""

    parts: list[tuple[Component, Source]]
    notes: list[str]


def assemble(base: Path, family: str, places: Sequence[Held]) -> Assembled:
    """The networks that files hold, and of a base in Hugging Face layout the others and all that is copied.

    Raises UserError for a network that is there twice, or fits no config.
    """
    schedulers.read(base)
    table, notes = load_table(family), []
    owner: dict[str, Held] = {}
    for place in places:
        for folder in place.networks:
            if folder in owner:
                what = networks_of(family)[folder].what
                raise UserError(f"{place.place}: holds {what}, and so does {owner[folder].place}; give one of them")
            owner[folder] = place
        if place.left:
            shown = ", ".join(place.left[:3])
            notes.append(f"{place.place}: {len(place.left)} tensors are of no network that is read: {shown} ...")
    configs: dict[str, Any] = {name: files.read_json(base / name / "config.json") for name in table.FOLDERS}
    found = {}
    for folder, place in owner.items():
        found[folder], note = _fitted(family, configs, folder, place, base)
        configs[folder] = found[folder][1].content()
        notes += note
    parts = []
    for component in components_of(family, configs, base):
        parts.append(found.get(component.folder) or open_component(component, base))
    for name in table.COPIED:
        copied.check(base / name)
    return Assembled(parts, notes)


def _fitted(
    family: str, configs: Mapping[str, Any], folder: str, place: Held, base: Path
) -> tuple[tuple[Component, Source], list[str]]:
    """A network with the config that its tensors' names and shapes fit: that beside them, the base's, a published one,
    or the base's with what the shapes tell.
    """
    tensors, network = place.networks[folder], networks_of(family)[folder]
    own = [place.place / "config.json"] if place.place.is_dir() and (place.place / "config.json").is_file() else []
    published = [path / folder / "config.json" for path in presets.folders().values() if _family(path) == family]
    for config in (*own, base / folder / "config.json", *published):
        source = Source(place.place, tensors, config)
        try:
            component = _component(family, configs, folder, source)
            check_rows(component, source)
        except UserError:
            continue
        return (component, source), _said(source, base / folder / "config.json", configs[folder])
    given = configs[folder]
    measured = network.measured({name: view.shape for name, view in tensors.items()})
    source = Source(place.place, tensors, {**given, **measured}, f"no config of {network.what} fits")
    component = _component(family, configs, folder, source)
    check_rows(component, source)
    return (component, source), _said(source, base / folder / "config.json", given)


def _component(family: str, configs: Mapping[str, Any], folder: str, source: Source) -> Component:
    every = components_of(family, {**configs, folder: source.content()}, source.place)
    return next(component for component in every if component.folder == folder)


def _said(source: Source, base: Path, given: Mapping[str, Any]) -> list[str]:
    """What is said where a network's config is not the base's."""
    if source.config == base:
        return []
    content = source.content()
    keys = sorted(k for k in content if not k.startswith("_") and k in given and content[k] != given[k])
    other = ", ".join(f"{key} {json.dumps(content[key])} for {json.dumps(given[key])}" for key in keys)
    beside = f"; scheduler and tokenizers are those of {base.parents[1]}"
    return [f"{source.place}: is not of the size that {base} gives ({other or 'other keys'}){beside}"]


def _family(path: Path) -> str:
    return find_family(files.read_json(path / "model_index.json")).name
