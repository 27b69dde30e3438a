"""Weights of other tools: float8 is read with its scales, whatever else is quantized is named with the way out."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import float8
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.registry import open_model
from support.compare import same_bits
from support.models import assets
from support.stored import write

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOTE = {"format": "float8_e4m3fn"}


def note(content):
    return "U8", np.frombuffer(json.dumps(content).encode(), np.uint8)


def nothing():
    return "F8_E4M3", np.zeros(0, np.uint8)


def code(dtype="F8_E4M3"):
    return dtype, np.full((2, 3), 56, np.uint8)


def number(value):
    return "F32", np.array(value, np.float32)


@pytest.fixture
def opened(tmp_path):
    def open_(**tensors):
        write(tmp_path / "model.safetensors", **{name.replace("__", "."): value for name, value in tensors.items()})
        return open_source(tmp_path)

    return open_


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale", "scale"])
def test_float8_is_multiplied_by_its_scale_and_nothing_else_is_left(opened, ending):
    beside = {f"m__{ending}": number(0.5), "m__scale_input": number(9), "m__input_scale": number(9)}
    source = opened(m__weight=code(), **beside, m__comfy_quant=note(NOTE), scaled_fp8=nothing())
    assert set(source.tensors) == {"m.weight"}
    assert source.tensors["m.weight"].dtype == "F8_E4M3"
    assert same_bits(source.read("m.weight"), mx.full((2, 3), 0.5))


def test_what_is_called_scale_is_a_weight_where_no_float8_is_beside_it(opened):
    source = opened(
        norm__scale=number([1, 2]), lin__weight=("BF16", np.zeros((2, 3), np.uint16)), lin__scale=number([3])
    )
    assert set(source.tensors) == {"norm.scale", "lin.weight", "lin.scale"}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (
            {"m__weight": ("U8", np.zeros((6, 1), "u1")), "m__weight__absmax": number([1])},
            "by bitsandbytes .nf4 or fp4.",
        ),
        ({"m__weight__quant_state__bitsandbytes__nf4": note({})}, "by bitsandbytes .nf4 or fp4.*quant_state"),
        ({"m__weight": ("I8", np.zeros((2, 3), np.int8)), "m__SCB": number([1, 1])}, r"by bitsandbytes \(int8\)"),
        ({"m__weight": ("I8", np.zeros((2, 3), np.int8))}, r"another tool \(I8\)"),
        ({"m__qweight": ("I32", np.zeros((2, 3), np.int32))}, "GPTQ"),
        ({"m__weight": ("U32", np.zeros((2, 3), np.uint32)), "m__scales": number([[1], [1]])}, "by MLX"),
        ({"m__weight": ("F4", np.zeros((2, 2), np.uint8))}, r"another tool \(F4\)"),
        ({"m__weight": code(), "m__comfy_quant": note({"format": "nvfp4"})}, r"ComfyUI \(nvfp4\)"),
        ({"m__weight": code(), "m__comfy_quant": note(NOTE | {"convrot": True})}, "ComfyUI"),
        ({"m__weight": code(), "m__comfy_quant": note([1])}, "in an unknown format"),
        (
            {"m__weight": code(), "m__weight_scale": number(np.ones((1, 3)))},
            "not one scale for 2 rows, nor one for each",
        ),
        ({"m__weight": code(), "m__weight_scale": ("U8", np.ones((2, 1), np.uint8))}, r"U8 \[2, 1\]"),
    ],
)
def test_other_quantizations_are_named(opened, tensors, match):
    with pytest.raises(UserError, match=f"model.safetensors: .*{match}.*get the checkpoint in bf16"):
        opened(**tensors)


def test_a_checkpoint_in_float8_gives_the_numbers_that_its_codes_stand_for(tmp_path):
    """tiny-flux with every matrix of its transformer in float8, scaled. What is left out anyway may be of any type."""
    folder = shutil.copytree(assets() / "tiny-flux", tmp_path / "hf") / "transformer"
    tensors, expected = {}, {}
    for number_, (name, value) in enumerate(files.load_lazily(folder / WEIGHTS).items()):
        if value.ndim != 2:
            tensors[name] = ("F32", np.array(value.astype(mx.float32)))
            continue
        codes = np.array(mx.to_fp8(value.astype(mx.float32) * 8))
        tensors[name] = "F8_E4M3", codes
        tensors[name.replace(".weight", ".scale_weight")] = number(np.float32(1 / 8 + number_ / 1000))
        expected[name] = float8.VALUES["F8_E4M3"][codes] * np.float32(1 / 8 + number_ / 1000)
    write(folder / WEIGHTS, **tensors, scaled_fp8=nothing())
    clip = tmp_path / "hf" / "text_encoder" / "model.safetensors"
    held = {name: ("F16", np.array(value)) for name, value in files.load_lazily(clip).items()}
    held["text_model.embeddings.position_ids"] = "F64", np.arange(77.0)
    held["logit_scale"] = "I16", np.ones(2, np.int16)
    write(clip, **held)
    path = convert(hf_path=str(tmp_path / "hf"), mlx_path=str(tmp_path / "mlx"), dtype="float32")
    shards = Shards(path / "transformer")
    found = shards.load(expected)
    assert all(np.array_equal(np.array(found[name]), value) for name, value in expected.items())
    assert open_model(path).identity
