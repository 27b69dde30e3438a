"""Published checkpoints that can be asked about before they are downloaded: their small JSON files, in the package.

A preset is a checkpoint in Hugging Face layout without weights and tokenizers; its folder is its name.
"""

import re
from importlib import resources
from pathlib import Path

from mlx_blockskip.engine import files, listing
from mlx_blockskip.models.family import Configs
from mlx_blockskip.models.schedulers import FILE

REPOS = {
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
    "flux1-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux2-klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "flux2-klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "sana-0.6b": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
    "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-sprint-1.6b": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    "sana1.5-1.6b": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "sana1.5-4.8b": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    "z-image": "Tongyi-MAI/Z-Image",
    "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
}
"""Where each preset's checkpoint lies on the Hub."""


def folders() -> dict[str, Path]:
    """The presets' directories, by name."""
    root = Path(str(resources.files("mlx_blockskip") / "assets" / "presets"))
    return {path.name: path for path in listing.visible(root) if path.is_dir()}


def folder(model: str) -> Path | None:
    """The directory of a preset, however its name is written: `flux1-dev`, `black-forest-labs/FLUX.1-dev`."""
    wanted = _plain(model.rsplit("/", 1)[-1])
    return next((path for name, path in folders().items() if _plain(name) == wanted), None)


def configs(path: Path) -> Configs:
    """The content of the config files of a checkpoint by folder, and that of its scheduler."""
    found = {file.parent.name: files.read_json(file) for file in listing.visible(path, "*/config.json")}
    return {**found, "scheduler": files.read_json(path / "scheduler" / FILE)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
