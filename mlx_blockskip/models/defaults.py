"""What a model suggests where its user leaves a setting open: of its family, then of its own directory."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.ranges import range_in
from mlx_blockskip.models import ranges


@dataclass(frozen=True)
class ModelDefaults:
    """Settings under the names that the commands have for them; sides in pixels.

    guidance, train_guidance: of a distilled model, in generation and in training. plans: skip plans by ratio. own: what
    only this family reads.
    """

    resolution: ranges.Side
    train_resolution: ranges.Side
    width: ranges.Side
    height: ranges.Side
    max_sequence_length: ranges.TextTokens
    steps: ranges.DrawingSteps
    cfg_scale: ranges.CfgScale = 1.0
    guidance: ranges.Guidance = 1.0
    train_guidance: ranges.Guidance = 1.0
    skip_ratio: ranges.Share = 0.5
    plans: Mapping[str, Any] = field(default_factory=dict)
    patch_mode: str = "dynamic"
    rank: ranges.Rank = 16
    learning_rate: ranges.LearningRate = 1e-4
    iters: ranges.Steps = 1000
    batch_size: ranges.Batch = 1
    class_prompt: tuple[str, ...] = ()
    class_images: ranges.ImagesOrNone = 100
    prior_weight: ranges.PriorWeight = 1.0
    own: Mapping[str, Any] = field(default_factory=dict)


def model_defaults(*layers: Any, source: Any) -> ModelDefaults:
    """The defaults that these mappings hold, of which a later one wins. source: what errors call the place they are
    from.

    Raises UserError for a value of another type or out of its range, and for one that has to be there and is not.
    """
    if not all(isinstance(layer, Mapping) for layer in layers):
        raise UserError(f"{source}: its defaults are no object; correct the file, or get it again")
    values = {str(name): value for layer in layers for name, value in layer.items()}
    hints = get_type_hints(ModelDefaults, include_extras=True)
    known = {f.name for f in fields(ModelDefaults)} - {"own"}
    found: dict[str, Any] = {}
    for name in known & values.keys():
        found[name] = _typed(name, values[name], hints[name], source)
    for one in fields(ModelDefaults):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in found:
            raise UserError(f"{source}: its defaults have no {one.name}; add one")
    return ModelDefaults(**found, own={name: value for name, value in values.items() if name not in known})


def _typed(name: str, value: Any, hint: Any, source: Any) -> Any:
    allowed = range_in(hint)
    hint = get_args(hint)[0] if allowed else hint
    wanted = get_origin(hint) or hint
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if allowed and number and value not in allowed:
        raise UserError(f"{source}: its default {name} is {str(value)[:80]}, and must be {allowed}")
    if wanted is float and number:
        return float(value)
    if wanted is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{source}: its default {name} is {repr(value)[:80]}, and should be a {wanted.__name__}")
    return value
