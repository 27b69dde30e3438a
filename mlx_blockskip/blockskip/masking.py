"""Masking attention from image queries to text keys in chosen blocks (DiT-BlockSkip, section 3.3).

In joint attention -inf is added at (image query, text key); where text comes by cross-attention, that block's
cross-attention output is dropped. Text queries still see everything.
"""

from collections.abc import Iterable

from mlx_blockskip.models.attention import IMAGE_TO_TEXT


def image_to_text(blocks: Iterable[int]) -> dict[int, str]:
    """The `masks` of a sample for these blocks; none at all leaves every bit as it is."""
    return dict.fromkeys(blocks, IMAGE_TO_TEXT)


def first(n: int) -> dict[int, str]:
    """Masks of the first n blocks: what makes x_n."""
    return image_to_text(range(n))


def last(m: int, depth: int) -> dict[int, str]:
    """Masks of the last m of `depth` blocks: what makes x^m."""
    return image_to_text(range(depth - m, depth))
