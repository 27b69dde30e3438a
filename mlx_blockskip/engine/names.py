"""Names by what they start with."""

import sys
from bisect import bisect_left
from collections.abc import Iterable

LAST = chr(sys.maxunicode)
"""No character comes after it."""


class Names:
    """Names in an order of their own, of which those that start alike are found without looking at the others: a chunk
    of records has tens of thousands.
    """

    def __init__(self, names: Iterable[str]):
        self._place = {name: place for place, name in enumerate(names)}
        self._sorted = sorted(self._place)

    def under(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, in their order."""
        start, stop = (bisect_left(self._sorted, end) for end in (prefix, prefix + LAST))
        return sorted(self._sorted[start:stop], key=self._place.__getitem__)
