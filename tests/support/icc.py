"""Colour profiles made by hand (ICC.1:2001-04), small enough to know what they do."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = np.array([[0.5151, 0.2412, -0.0011], [0.2920, 0.6922, 0.0419], [0.1572, 0.0666, 0.7844]])
"""Rows: the XYZ of red, green and blue, adapted to D50."""


def display_p3(gamma: float = 2.2) -> bytes:
    """The primaries of Display P3 with a plain power as curve."""
    colours = {name: _xyz(row) for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), DISPLAY_P3, strict=True)}
    curves = {name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", colours | curves)


def gray(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def only_black_prints() -> bytes:
    """A CMYK profile in which cyan, magenta and yellow leave the paper white."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([255 * (1 - k), 128, 128]) for _ in range(8) for k in (0, 1))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + grid + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"made by hand\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": description, b"wtpt": _xyz(D50), **tags}
    table, data = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    size = 128 + len(table) + len(data)
    white = struct.pack(">3i", *(round(v * 65536) for v in D50))
    head = struct.pack(">III", size, 0, 0x02400000) + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    return head + white + bytes(48) + table + data
