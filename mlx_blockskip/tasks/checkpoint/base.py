"""The base model of an adapter, as it is known elsewhere."""

from pathlib import Path

from mlx_blockskip.engine import files
from mlx_blockskip.tasks.checkpoint import card, hub_cache
from mlx_blockskip.tasks.checkpoint.address import repo_named
from mlx_blockskip.tasks.checkpoint.recognise import is_converted
from mlx_blockskip.tasks.checkpoint.resolve import MODEL, bundled, converted_before

README = "README.md"


def base_model(name: str) -> card.Base:
    """What an adapter calls its base model, as it is known elsewhere: without a path of this disk, and with its card's
    metadata where that is here.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        source = files.read_json(directory / "config.json").get("source") if is_converted(directory) else None
        found = card.base_of(str(source or directory), None if source else directory)
        return card.Base(found.name, found.repo, card.metadata_of(directory / README))
    if name in MODEL.bundled:
        return card.Base(name, None, card.metadata_of(bundled(name) / README))
    if (repo := repo_named(name)) is None:
        return card.Base(directory.name)
    places = [converted_before(repo, MODEL), *hub_cache.snapshots(repo)]
    told = [metadata for place in places if place and (metadata := card.metadata_of(place / README))]
    return card.Base(repo.name, repo, told[0] if told else {})
