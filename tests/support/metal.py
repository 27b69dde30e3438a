"""Stand-ins for what only Metal has, so that how it is used is tested on any device."""

import ctypes
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.models import cpu, kernels, product

FAILED = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferErrorOutOfMemory)."
"""What MLX raises where a command buffer did not run."""

KEYS = 7
"""Keys that the stand-in takes at a time."""


def flash(q, k, v, scale, mask):
    """Attention as a fused kernel does it: a running maximum and sum over parts of the keys, in float32.

    It rounds otherwise than scores written out do, and like the kernel it has no gradient.
    """
    wide = mx.float32
    mask = None if mask is None else mx.broadcast_to(mask, (*q.shape[:3], k.shape[2])).astype(wide)
    top = mx.full((*q.shape[:3], 1), -1e30, wide)
    total, out = mx.zeros(top.shape, wide), mx.zeros((*q.shape[:3], v.shape[-1]), wide)
    for start in range(0, k.shape[2], KEYS):
        keys, values = (x[:, :, start : start + KEYS].astype(wide) for x in (k, v))
        scores = scale * (q.astype(wide) @ keys.swapaxes(-1, -2))
        scores = scores if mask is None else scores + mask[..., start : start + KEYS]
        now = mx.maximum(top, scores.max(axis=-1, keepdims=True))
        shares, shrink = mx.exp(scores - now), mx.exp(top - now)
        total, out, top = total * shrink + shares.sum(axis=-1, keepdims=True), out * shrink + shares @ values, now
    return mx.stop_gradient((out / total).astype(q.dtype))


def route_as_on_metal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Attention goes the way it goes on Metal; returns the shapes of queries that the stand-in takes."""
    if not cpu.in_use():
        return []  # here it is the kernel itself
    taken: list[tuple[int, ...]] = []

    def fused(q, k, v, scale, mask):
        taken.append(q.shape)
        return flash(q, k, v, scale, mask)

    monkeypatch.setattr(product, "is_fused", product.fits_fused)
    monkeypatch.setattr(product, "fused_attention", fused)
    return taken


PRELUDE = """
#include <cmath>
#include <cstdint>
#include <cstring>
typedef unsigned int uint;
namespace metal { namespace precise { using std::exp; using std::tanh; } }
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() {}
    explicit bfloat16_t(float v) { uint32_t u; memcpy(&u, &v, 4); bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
    explicit operator float() const { uint32_t u = uint32_t(bits) << 16; float v; memcpy(&v, &u, 4); return v; }
};
struct uint3 { uint x, y, z; };
"""
"""What the kernels use of Metal's language, in C++."""

TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16_t"}


class Compiled:
    """`mx.fast.metal_kernel`, which runs on the CPU: the kernel's body, compiled as C++, for one thread after another.

    Its outputs are computed at once, so what depends on them is not differentiated through, as with a kernel.
    """

    def __init__(self, directory: Path, *, name, input_names, output_names, source, ensure_row_contiguous=True):
        self.directory, self.inputs, self.outputs = directory, input_names, output_names
        self.source, self.contiguous = source, ensure_row_contiguous
        self.compiled: dict[tuple[str, ...], ctypes.CDLL] = {}

    def __call__(self, *, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert threadgroup[1:] == grid[1:] == (1, 1)
        given, arguments = [], []
        for x in inputs:
            values = np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
            if not self.contiguous and values.ndim == 4:  # as it would be were it never copied
                values = np.ascontiguousarray(values.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
            strides = [step // values.itemsize for step in values.strides]
            shape = (ctypes.c_int * 8)(*values.shape)
            given += [values, shape, step := (ctypes.c_int64 * 8)(*strides)]
            arguments += [values.ctypes.data_as(ctypes.c_void_p), shape, step]
        (shape,), (dtype,) = output_shapes, output_dtypes
        out = np.empty(shape, np.uint16 if dtype == mx.bfloat16 else np.float32)
        run = self._library(inputs, dict(template))
        run.all_threads(*arguments, out.ctypes.data_as(ctypes.c_void_p), grid[0])
        return [mx.array(out).view(dtype)]

    def _library(self, inputs, template) -> ctypes.CDLL:
        types = [TYPES[x.dtype] for x in inputs]
        constants = tuple(str(int(value)) for name, value in template.items() if name != "T")
        key = (*types, *constants)
        if key not in self.compiled:
            names = ", ".join(
                f"const {kind}* {name}, const int* {name}_shape, const int64_t* {name}_strides"
                for kind, name in zip(types, self.inputs, strict=True)
            )
            fixed = "".join(f"const bool {n} = {int(v)};" for n, v in template.items() if n != "T")
            body = (
                f"for (uint n = 0; n < threads; n++) {{ uint3 thread_position_in_grid = {{n, 0, 0}}; {self.source} }}"
            )
            text = (
                f"{PRELUDE} typedef {TYPES[template['T']]} T; {fixed}\n"
                f'extern "C" void all_threads({names}, T* {self.outputs[0]}, uint threads) {{ {body} }}\n'
            )
            self.compiled[key] = _compiled(text, self.directory)
        return self.compiled[key]


LIBRARIES: dict[str, ctypes.CDLL] = {}
"""By their text: each is compiled once a session."""


def _compiled(text: str, directory: Path) -> ctypes.CDLL:
    if text not in LIBRARIES:
        path = directory / f"{sha256(text.encode()).hexdigest()}.cpp"  # a library is loaded once by its path
        path.write_text(text)
        library = path.with_suffix(".so")
        command = ["g++", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-o", library, path]
        subprocess.run(command, check=True, capture_output=True, text=True)
        LIBRARIES[text] = ctypes.CDLL(str(library))
    return LIBRARIES[text]


def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Metal's kernels are used, by the same bodies compiled as C++; skips the test where there is no compiler."""
    if not cpu.in_use():
        return  # here they are themselves
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    made: dict[str, Compiled] = {}

    def kernel(name):
        if name not in made:
            made[name] = Compiled(
                directory,
                name=name,
                input_names=kernels.INPUTS[name],
                output_names=["y"],
                source=kernels.SOURCES[name],
                ensure_row_contiguous=name not in kernels.ANY_STRIDES,
            )
        return made[name]

    monkeypatch.setattr(kernels, "_kernel", kernel)
    monkeypatch.setattr(kernels, "in_use", lambda: True)
