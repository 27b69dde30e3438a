"""Which layers of a model a LoRA may be for, under every name that tools have for them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_blockskip.converters import lora_keys
from mlx_blockskip.converters.layouts import Rule, pattern_of
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.engine.shards import Shards


@dataclass(frozen=True)
class Target:
    """What a layer of theirs is here: `modules` below one another, each with as many rows as it has. swapped: the
    second half of the rows comes first here.
    """

    modules: tuple[str, ...]
    swapped: bool = False


class Layers:
    """The layers of a transformer. shapes: of their weights as ours have them, by module: (out, in) of a linear layer,
    (out, height, width, in) of a convolution. others: modules with a weight that no LoRA can be added to.
    """

    def __init__(self, shards: Shards, rules: Sequence[Rule] = ()):
        whole = Whole(shards)
        weights = {n.removesuffix(".weight"): whole.shape(n) for n in shards.names if n.endswith(".weight")}
        self.shapes = {module: shape for module, shape in weights.items() if _takes_lora(shape)}
        self.others = weights.keys() - self.shapes.keys()
        self._targets = {module: Target((module,)) for module in self.shapes}
        self._targets |= dict(self._by_rules(rules))
        self._flat = {name.replace(".", "_"): target for name, target in self._targets.items()}

    def find(self, layer: str) -> Target | None:
        """What a layer of theirs is, by its name in a file; None where the model has none."""
        name = lora_keys.flat(layer)
        if name is not None:
            return self._flat.get(name)
        return self._targets.get(layer) or self._targets.get(lora_keys.stripped(layer))

    def refused(self, layer: str) -> bool:
        """Whether the model has it, and a LoRA on it cannot be applied."""
        name = lora_keys.flat(layer)
        if name is not None:
            return name in {other.replace(".", "_") for other in self.others}
        return lora_keys.stripped(layer) in self.others

    def widths(self, target: Target) -> tuple[int, list[int]]:
        """in, and how many rows each of the target's modules has."""
        shapes = [self.shapes[module] for module in target.modules]
        return math.prod(shapes[0][1:]), [shape[0] for shape in shapes]

    def _by_rules(self, rules: Sequence[Rule]) -> Iterator[tuple[str, Target]]:
        for known in rules:
            first = pattern_of(known.ours[0])
            for module in self.shapes:
                if match := first.fullmatch(module):
                    ours = tuple(name.format(*match.groups()) for name in known.ours)
                    if all(name in self.shapes for name in ours):
                        yield known.theirs.format(*match.groups()), Target(ours, known.swapped)


def _takes_lora(shape: tuple[int, ...]) -> bool:
    """Linear layers, and convolutions over all channels: those of each channel by itself have one input channel."""
    return len(shape) == 2 or (len(shape) == 4 and shape[-1] > 1)
