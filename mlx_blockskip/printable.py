"""Text of others on a terminal: names of files and tensors, prompts, what a server says. Nothing of it may steer the
terminal, so what is not a character to be seen is printed as its escape.
"""

import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of control characters, marks of direction, surrogates, characters of no meaning, separators."""

JOINER = "\u200d"
"""Holds emoji and some scripts together."""


def printable(text: str) -> str:
    """The text with line ends and tabs as they are, and escapes for what cannot be seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in "\n\t" else _escaped(one) for one in text)


def one_line(text: str) -> str:
    """The same in one line."""
    return "".join(_escaped(one) for one in text)


def _escaped(one: str) -> str:
    if one == JOINER or unicodedata.category(one) not in HIDDEN:
        return one
    return one.encode("unicode_escape").decode()
