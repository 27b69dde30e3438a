"""How many micro-batches wait together in one sweep over the whole stack. It changes no result: each is applied by
itself.
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
