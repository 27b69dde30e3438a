"""What a forecast goes by: how fast this machine multiplies, reads and waits."""

from collections.abc import Mapping
from dataclasses import dataclass

EVALUATIONS = 3
"""Of a block in a step: its output, its output again, the gradients."""


@dataclass(frozen=True)
class Rates:
    """there, back: floating point operations a second of products, by precision. reading: bytes a second. waiting:
    seconds of one evaluation of nothing.
    """

    there: Mapping[str, float]
    back: Mapping[str, float]
    reading: float
    waiting: float

    def products(self, flops: int, precision: str) -> float:
        """Seconds that linear layers take in a step, by their operations on the way there."""
        return 2 * flops / self.there[precision] + flops / self.back[precision]

    def waits(self, building: float) -> float:
        """Seconds of a block in a step in which nothing is computed. building: of its graphs, in Python."""
        return building + EVALUATIONS * self.waiting
