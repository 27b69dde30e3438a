"""The numbers that float8 codes stand for, exactly: of the 256 codes each."""

import numpy as np


def values(exponent_bits: int, mantissa_bits: int, infinite: bool) -> np.ndarray:
    """(256,) float32 by code. infinite: the largest exponent is for infinities and NaN, as IEEE has it; else only the
    codes of all ones are NaN.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (1 << mantissa_bits) - 1
    bias, top = (1 << exponent_bits - 1) - 1, (1 << exponent_bits) - 1
    normal = np.ldexp(1 + mantissa / (1 << mantissa_bits), exponent - bias)
    found = np.where(exponent == 0, np.ldexp(mantissa / (1 << mantissa_bits), 1 - bias), normal)
    if infinite:
        found = np.where(exponent == top, np.where(mantissa == 0, np.inf, np.nan), found)
    else:
        found = np.where((codes & 127) == 127, np.nan, found)
    return np.where(codes & 128, -found, found).astype(np.float32)


VALUES = {"F8_E4M3": values(4, 3, infinite=False), "F8_E5M2": values(5, 2, infinite=True)}
"""By safetensors' names of the dtypes."""
