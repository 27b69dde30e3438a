"""JSON that someone else may have written: its size and its parts are counted before it is parsed, so that no file
takes more memory or time than a checkpoint of any size needs.
"""

import json
from typing import Any

MAX_BYTES = 100 << 20
"""What the safetensors format allows a header; nothing that is read is larger."""

MAX_PARTS = 1_000_000
"""Members of objects and lists: a header of a hundred thousand tensors has as many."""

MAX_WIDE = 16 << 20
"""Bytes of a text that is not ASCII, whose letters take up to four bytes each in memory."""


def parse(data: bytes, most_parts: int = MAX_PARTS) -> Any:
    """The value. Raises ValueError for what is no JSON in UTF-8, or more of it than there is any use for."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"has {len(data) >> 20} MiB, and {MAX_BYTES >> 20} are the most that is read")
    if (parts := sum(map(data.count, (b",", b"[", b"{")))) > most_parts:
        raise ValueError(f"has {parts} parts, and {most_parts} are the most that is read")
    if len(data) > MAX_WIDE and not data.isascii():
        raise ValueError(
            f"has {len(data) >> 20} MiB that are not ASCII, and {MAX_WIDE >> 20} are the most that is read"
        )
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
