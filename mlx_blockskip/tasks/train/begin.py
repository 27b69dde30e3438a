"""Where a run begins: with new factors, or with those of an adapter that is trained further."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.differences import LowRank
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Added
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import family_named, read_config
from mlx_blockskip.options import changed
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint.adapters import load_adapters
from mlx_blockskip.tasks.defaults import TrainConfig


@dataclass(frozen=True)
class Given:
    """An adapter to begin with. trained: of its factors those that the run trains, as it begins. kept: what it adds to
    other layers, which is read with their weights and written again at the end.
    """

    trained: lora.Tree = field(default_factory=dict)
    kept: Mapping[str, Added] = field(default_factory=dict)
    checksum: str = ""


def given_adapter(settings: TrainSettings, model: DiffusionModel) -> lora.Adapter | None:
    """The adapter of `--init-adapter`; None where none is given. Raises UserError for one that cannot be trained."""
    if not settings.init_adapter:
        return None
    adapter = load_adapters(model, [settings.init_adapter], [])
    for name, added in adapter.worn.items():
        if added.bias is not None or not isinstance(added.weight, LowRank):
            raise UserError(
                f"--init-adapter {settings.init_adapter}: {name} has more than low-rank factors, which cannot be "
                "trained; make a model of it with `mlx-blockskip fuse`, and train that"
            )
    return adapter


def with_rank(settings: TrainSettings, adapter: lora.Adapter | None) -> TrainSettings:
    """The settings with the rank of the adapter's factors, where none is given."""
    if adapter is None or settings.rank is not None or not (ranks := ranks_of(adapter.tree)):
        return settings
    return changed(settings, rank=max(ranks))


def ranks_of(tree: lora.Tree) -> set[int]:
    return {value.shape[1] for own in tree.values() for name, value in own.items() if name.endswith(".lora_a")}


def begin(config: TrainConfig, model: DiffusionModel, plan: SkipPlan, adapter: lora.Adapter | None) -> Given:
    """What of the adapter is trained and what is kept, for this plan; nothing where there is no adapter. Raises
    UserError for factors of a higher rank than is trained.
    """
    if adapter is None:
        return Given()
    tree = new_factors(config, model, plan)
    kept = dict(adapter.worn)
    for index, factors in adapter.tree.items():
        prefix = model.stack.block(index).prefix
        for module in [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]:
            a, b = factors[f"{module}.lora_a"], factors[f"{module}.lora_b"]
            if f"{module}.lora_a" not in tree.get(index, {}):
                kept[prefix + module] = Added(LowRank(a, b))
                continue
            if a.shape[1] > config.rank:
                raise UserError(
                    f"--rank {config.rank}: the factors of {prefix}{module} in --init-adapter have rank {a.shape[1]}; "
                    f"give --rank {max(ranks_of(adapter.tree))}"
                )
            _put(tree[index], module, a, b / config.scale)
        mx.eval(tree.get(index, {}))
    return Given(tree, kept, adapter.checksum())


def _put(own: dict[str, mx.array], module: str, a: mx.array, b: mx.array) -> None:
    """In place of the first of the new columns and rows. What is left of them adds nothing yet, since b is zero."""
    rank, names = a.shape[1], (f"{module}.lora_a", f"{module}.lora_b")
    own[names[0]] = mx.concatenate([a, own[names[0]][:, rank:]], axis=1)
    own[names[1]] = mx.concatenate([b, own[names[1]][rank:]], axis=0)


def new_factors(config: TrainConfig, model: DiffusionModel, plan: SkipPlan) -> lora.Tree:
    """Factors for the retained blocks, which add nothing yet."""
    modules = lora.targets(family_named(read_config(model.path)["family"]).lora_targets, config.lora_targets)
    return lora.init(model.reader, plan.retained, modules, config.rank, config.seed)


def whole(trained: lora.Tree, kept: Mapping[str, Added], model: DiffusionModel, scale: float) -> dict[str, mx.array]:
    """All factors of the adapter that a run ends with, by their full names, for one scale."""
    found = lora.flatten(trained, model.stack)
    for name, added in kept.items():
        if isinstance(added.weight, LowRank):
            found |= {f"{name}.lora_a": added.weight.a, f"{name}.lora_b": added.weight.b / scale}
    return found
