"""Files that are nearly right: a value of another kind in JSON, some bytes that are others."""

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**9, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf"), -0.0),
    *("", "x", "../../x", "/etc/passwd", "a\0b", "\x1b[31mred", "[/b]", "\ud800", "F32", "9" * 400, "x" * 5000),
    *([], {}, [[]], [None], [1, "a"], {"a": {}}, {"": None}, [10**9] * 3, {"__metadata__": 1}),
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += _places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:20]):
            found += _places(item, (*path, number))
    return found


def of_value(value: Any, rng: random.Random) -> Any:
    """A copy in which one or two values are others, gone, or under another key."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(_places(value))
        new = copy.deepcopy(rng.choice(ODD))  # it may be put into itself else
        if not path:
            if rng.random() < 0.2:
                return new
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        if isinstance(holder, dict) and rng.random() < 0.25:
            old = holder.pop(path[-1])
            if rng.random() < 0.5:
                holder[rng.choice(("x", "", "a.b", path[-1] + "x"))] = old
        else:
            holder[path[-1]] = new
    return value


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Of a JSON file; one in five with other bytes instead, or nested beyond all measure."""
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    if rng.random() < 0.03:
        return b'{"a":' + b"[" * 100_000
    value = of_value(json.loads(data), rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits that flip, a part that is missing, doubled, or random."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(found) + 1)
        length = rng.choice((0, 1, 4, 64))
        how = rng.randrange(5)
        if how == 0 and found:
            found[min(start, len(found) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[start:]
        elif how == 2:
            del found[start : start + length]
        elif how == 3:
            found[start:start] = rng.randbytes(length)
        else:
            found[start:start] = found[start : start + length]
    return bytes(found)


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Of the header of a safetensors file, its length kept right; or of any bytes."""
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
