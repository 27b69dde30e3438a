"""Residual features (DiT-BlockSkip, Eq. 3): f'_(i+l) = f'_i + D with D = f_(i+l) - f_i of the base model.

For each micro-batch the base model's tokens are kept once (`records`): the *entry*, before the first retained block,
and f_i and f_(i+l) of every later skipped run. The sum is computed as f_(i+l) + (f'_i - f_i): the same equation,
bit-exact while f' = f. For the leading run the entry is exact, because nothing before it trains; for later runs the
gradient passes as the identity.
"""

from collections.abc import Callable, Sequence

from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine.sweep import Bridge
from mlx_blockskip.models.family import Tokens

MODES = ("base", "fresh", "none")

Recorded = Callable[[int, str], Tokens]
"""`(micro-batch, name) -> tokens`: what a record holds under a name of `boundaries`."""


def cross(at_start: Tokens, at_stop: Tokens, own: Tokens) -> Tokens:
    """Eq. 3: f_(i+l) + (f'_i - f_i), for image and text tokens apart. Text of the record is None where nothing reads
    it after the run; then the own text passes as it is.
    """
    text = own.text
    if text is not None and at_start.text is not None and at_stop.text is not None:
        text = at_stop.text + (text - at_start.text)
    return Tokens(at_stop.image + (own.image - at_start.image), text)


def keeps_text(plan: SkipPlan, boundary: int) -> bool:
    """Nothing reads the text after the trailing run; elsewhere it goes on."""
    return not (plan.m and boundary >= plan.depth - plan.m)


def boundaries(plan: SkipPlan, mode: str) -> dict[int, list[str]]:
    """Where the precompute sweep keeps tokens, and under which names: the entry, and both ends of later runs."""
    found: dict[int, list[str]] = {plan.n if mode != "none" else 0: ["entry"]}
    if mode != "none":
        for start, stop in plan.later:
            found.setdefault(start, []).append(f"run{start}.start")
            found.setdefault(stop, []).append(f"run{start}.stop")
    return found


def bridge(recorded: Recorded, numbers: Sequence[int], mode: str) -> Bridge:
    """What carries a micro-batch across a skipped run while training; without residuals the tokens pass as they are.

    numbers: of the micro-batches that wait in the sweep.
    """

    def over(sample: int, start: int, stop: int, own: Tokens) -> Tokens:
        if mode == "none":
            return own
        number = numbers[sample]
        return cross(recorded(number, f"run{start}.start"), recorded(number, f"run{start}.stop"), own)

    return over
