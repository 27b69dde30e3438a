"""Model directories for tests: the bundled tiny-flux, small random FLUX.1 models, and the toy family."""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import run, write
from mlx_blockskip.engine import files, philox


def assets() -> Path:
    from importlib import resources

    return Path(str(resources.files("mlx_blockskip") / "assets"))


HEDGEHOG = assets() / "subjects" / "hedgehog"


def convert(source: Path, target: Path, family: str = "flux1", **precision) -> Path:
    """Convert a checkpoint of this family."""
    wanted = write.Precision(**{"dtype": "float32", **precision})
    with files.atomic_directory(target) as temporary:
        for _ in write.write_model(source, temporary, family, wanted, run.open_checkpoint(source, family), "test"):
            pass
    return target


def random_tree(model, blocks, rank=3, targets="all", seed=0, b_scale=0.05):
    """LoRA factors, both random and none zero."""
    from mlx_blockskip import lora
    from mlx_blockskip.models.registry import family_named, read_config

    family = family_named(read_config(model.path)["family"])
    tree = lora.init(model.reader, blocks, family.lora_targets[targets], rank, seed)
    for index, factors in tree.items():
        for number, name in enumerate(factors):
            if name.endswith("lora_b"):
                factors[name] = mx.array(philox.normal(seed, index, number, shape=factors[name].shape)) * b_scale
    return tree


def prepared(settings):
    """The set-up of a training run, made but not begun."""
    from mlx_blockskip.data import load_dataset
    from mlx_blockskip.engine import owned
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.defaults import train_config
    from mlx_blockskip.tasks.train import setup
    from mlx_blockskip.tasks.train.job import CACHE, CACHE_FILES

    model = open_model(Path(settings.model))
    dataset = load_dataset(Path(settings.data), settings.prompt)
    config, plan = train_config(settings, model), likely_plan(settings, model)
    directory = Path(settings.adapter_path)
    owned.begin(directory / CACHE, CACHE_FILES)
    return setup.prepare(config, directory, model, dataset, plan, ample=True)


def likely_plan(settings, model):
    """The plan, or one of the same ratio where it has to be probed for."""
    from mlx_blockskip.tasks.skipping import choice

    return choice.known_plan(settings, model) or choice.even_plan(settings, model)
