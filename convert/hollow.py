"""A model directory without content: every name, shape and type of a real one, and zeros that take no disk.

What memory and time a job needs does not depend on the values of weights, so a hollow model can be measured before
anything is downloaded. Its files are sparse: a header, and a hole of the right size.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.converters.quantization import of_model, with_record
from mlx_blockskip.converters.run import components_of, load_table
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.write import Precision, index_of, plan_shards, shard_entries
from mlx_blockskip.engine import files
from mlx_blockskip.engine.shards import INDEX
from mlx_blockskip.models.family import Configs


def write_hollow(
    target: Path,
    family: str,
    configs: Configs,
    precision: Precision,
    beside: Path,
    *,
    scheduler: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write an MLX model directory of zeros. Raises UserError where `target` exists.

    beside: a model directory, of either layout, whose tokenizers (and scheduler, where none is given) are copied.
    """
    components = components_of(family, configs)
    with files.atomic_directory(target, durable=False) as temporary:
        for component in components:
            own = with_record(configs[component.folder], component, precision)
            files.write_json(temporary / component.folder / "config.json", own)
            _write_component(component, temporary / component.folder, precision)
        for name in load_table(family).COPIED:
            shutil.copytree(beside / name, temporary / name)
        if scheduler is not None:
            files.write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        config = {
            "format": 1,
            "family": family,
            "components": [component.folder for component in components],
            "dtype": precision.dtype,
            "quantization": of_model(precision, components),
            "defaults": dict(defaults or {}),
            "source": "zeros",
        }
        files.write_json(temporary / "config.json", config)


def _write_component(component: Component, folder: Path, precision: Precision) -> None:
    shards = plan_shards(component, precision)
    for shard in shards:
        header, size = files.encode_header(shard_entries(component, shard, precision), {"format": "mlx"})
        with (folder / shard.file).open("wb") as file:
            file.write(header)
        os.truncate(folder / shard.file, size)
    files.write_json(folder / INDEX, index_of(component, shards, precision, checksums={}))
