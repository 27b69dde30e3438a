"""The small JSON files of published checkpoints: presets in the package, others in tests/data/hub."""

from pathlib import Path

from mlx_blockskip.converters.hollow import write_hollow
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files
from mlx_blockskip.models import presets
from mlx_blockskip.models.registry import find_family, open_model, own_defaults
from support.models import assets

HUB = Path(__file__).parents[1] / "data" / "hub"


def family_of(name: str):
    return find_family(files.read_json(presets.folders()[name] / "model_index.json"))


def hollow(name: str, target: Path):
    """A preset opened with its own widths, one block of each kind, in bfloat16; all weights are zeros."""
    family, configs = family_of(name), presets.configs(presets.folders()[name])
    small, beside = family.shallow(configs), assets() / family.bundled
    own = {"scheduler": configs["scheduler"], "defaults": own_defaults(presets.folders()[name], family)}
    write_hollow(target, family.name, small, Precision("bfloat16"), beside, **own)
    return open_model(target)
