"""What waits while records are made, and where: it changes no result. Micro-batches that wait together in one sweep
over the whole stack are each applied by itself.
"""

from mlx_blockskip.engine.stack import Context, arrays
from mlx_blockskip.models.family import DiffusionModel, Prompt, Tokens

WAITING_BYTES = 96 << 20
"""Of what waits in one sweep."""


def together(nbytes: int) -> int:
    """Micro-batches of so many bytes that wait in one sweep."""
    return max(1, WAITING_BYTES // nbytes)


def waiting_bytes(model: DiffusionModel, tokens: Tokens, prompt: Prompt, context: Context) -> int:
    """Of a micro-batch that waits: its tokens, and what of its context is its own."""
    own = (*arrays(tokens), *model.prompt_conditioning(prompt).values(), *model.conditioning(context).values())
    return sum(array.nbytes for array in own)


def adapter_waits(model: DiffusionModel, residuals: str) -> bool:
    """Whether the adapter is on disk while records are made: memory is scarce, and the base model's features need none
    of it.
    """
    return model.scarce and residuals != "fresh"
