"""What other tools do to weights: float8 with its scales is read, and every other quantization is refused by name."""

import json
import math
import re
from collections.abc import Mapping

from mlx_blockskip.converters import float8
from mlx_blockskip.converters.views import FLOATS, Stored, View, whole
from mlx_blockskip.engine.errors import UserError

SCALES = (".scale_weight", ".weight_scale", ".scale")
"""What stands for `.weight` in the name of the number, or the numbers by row, that a weight is multiplied by. Of a norm
`.scale` is the weight itself: there is none beside it.
"""
BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
"""What else lies beside a float8 weight: scales of what it is multiplied with, which stays whole here, and a note."""
MARKER = re.compile(r"(.*\.)?scaled_fp8")
"""A tensor without content, by which ComfyUI knows that a file's float8 has scales."""

OTHERS = (
    (r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)", "bitsandbytes (nf4 or fp4)"),
    (r".*\.SCB", "bitsandbytes (int8)"),
    (r".*\.(qweight|qzeros|wscales|wtscale)", "another tool (GPTQ, AWQ or SVDQuant)"),
)
OTHER_TYPES = {"U32": "MLX (by mflux, mlx-lm or another tool)"}
WAY_OUT = "get the checkpoint in bf16, fp16, fp32 or float8"


def views(stored: Mapping[str, Stored]) -> dict[str, View]:
    """The tensors by name, those of float8 with their scales, which have no names of their own any more.

    Raises UserError for weights that another tool quantized, and for a scale of another shape than one number or one a
    row.
    """
    _refuse(stored)
    found = {name: whole(tensor) for name, tensor in stored.items() if not MARKER.fullmatch(name)}
    for name in [name for name in found if name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        dtype = found[name].dtype
        for ending in SCALES if dtype in float8.VALUES else SCALES[:2] if dtype in FLOATS else ():
            if (scale := stored.get(module + ending)) is not None:
                del found[module + ending]
                found[name] = whole(stored[name], _checked(scale, stored[name]))
        for ending in BESIDE:
            found.pop(module + ending, None)
    return found


def _checked(scale: Stored, weight: Stored) -> Stored:
    rows, shape = weight.rows, scale.entry.shape
    if scale.entry.dtype not in FLOATS or (math.prod(shape) != 1 and (math.prod(shape) != rows or shape[0] != rows)):
        raise UserError(
            f"{scale.path}: {scale.entry.name} ({scale.entry.dtype} {list(shape)}) is not one scale for {rows} rows, "
            f"nor one for each; {WAY_OUT}"
        )
    return scale


def _refuse(stored: Mapping[str, Stored]) -> None:
    for told in (_by_name, _by_type):
        for name, tensor in stored.items():
            if (tool := told(name, tensor)) is not None:
                raise UserError(f"{tensor.path}: its weights are quantized by {tool}, see {name}; {WAY_OUT}")


def _by_name(name: str, tensor: Stored) -> str | None:
    """The tool whose way it is to call a tensor so."""
    if name.endswith(".comfy_quant"):
        return _by_comfy(tensor)
    return next((tool for pattern, tool in OTHERS if re.fullmatch(pattern, name)), None)


def _by_type(name: str, tensor: Stored) -> str | None:
    """The tool, as far as the dtype of a weight tells."""
    dtype = tensor.entry.dtype
    if not name.endswith(".weight") or len(tensor.entry.shape) < 2 or dtype in FLOATS:
        return None
    return OTHER_TYPES.get(dtype, f"another tool ({dtype})")


def _by_comfy(note: Stored) -> str | None:
    """The format that ComfyUI's note beside a weight names, where it is not float8."""
    try:
        content = json.loads(note.bytes(0, note.rows).tobytes())
        name = content["format"]
        return None if name.startswith("float8") and not content.get("convrot") else f"ComfyUI ({name})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "ComfyUI (in an unknown format)"
