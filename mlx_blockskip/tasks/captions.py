"""What captions have in common."""

from collections.abc import Sequence


def common_words(captions: Sequence[str]) -> str:
    """The longest run of words that every caption has; the first of several."""
    split = [caption.split() for caption in captions]
    first = min(split, key=len, default=[])
    held = [f" {' '.join(words)} " for words in split]
    for length in range(len(first), 0, -1):
        for start in range(len(first) - length + 1):
            run = " ".join(first[start : start + length])
            if all(f" {run} " in words for words in held):
                return run
    return ""
