"""What a model suggests where its user leaves a setting open: of its family, then of its own directory."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_origin, get_type_hints

from mlx_blockskip.engine.errors import UserError


@dataclass(frozen=True)
class ModelDefaults:
    """Settings under the names that the commands have for them; sides in pixels.

    guidance, train_guidance: of a distilled model, in generation and in training. plans: skip plans by ratio. own: what
    only this family reads.
    """

    resolution: int
    train_resolution: int
    width: int
    height: int
    max_sequence_length: int
    steps: int
    cfg_scale: float = 1.0
    guidance: float = 1.0
    train_guidance: float = 1.0
    skip_ratio: float = 0.5
    plans: Mapping[str, Any] = field(default_factory=dict)
    patch_mode: str = "dynamic"
    rank: int = 16
    learning_rate: float = 1e-4
    iters: int = 1000
    batch_size: int = 1
    class_prompt: tuple[str, ...] = ()
    class_images: int = 100
    prior_weight: float = 1.0
    own: Mapping[str, Any] = field(default_factory=dict)


def own_defaults(config: Mapping[str, Any], source: Any) -> Mapping[str, Any]:
    """What a model's config.json says of its defaults. Raises UserError where that is no object."""
    found = config.get("defaults") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: its defaults are {found!r}, and should be an object")
    return found


def model_defaults(values: Mapping[str, Any], source: Any) -> ModelDefaults:
    """The defaults that `values` holds. source: what errors call the place they are from.

    Raises UserError for a value of another type, and for one that has to be there and is not.
    """
    hints = get_type_hints(ModelDefaults)
    known = {f.name for f in fields(ModelDefaults)} - {"own"}
    found: dict[str, Any] = {}
    for name in known & values.keys():
        found[name] = _typed(name, values[name], hints[name], source)
    for one in fields(ModelDefaults):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in found:
            raise UserError(f"{source}: its defaults have no {one.name}; add one")
    return ModelDefaults(**found, own={name: value for name, value in values.items() if name not in known})


def _typed(name: str, value: Any, hint: Any, source: Any) -> Any:
    wanted = get_origin(hint) or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{source}: its default {name} is {value!r}, and should be a {wanted.__name__}")
    return value
