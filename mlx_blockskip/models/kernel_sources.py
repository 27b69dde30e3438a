"""Bodies of our Metal kernels, in Metal's language. What they are for, and how they are used, is in `kernels`."""

GELU_SLOPE, GELU_CUBE = 0.7978845608028654, 0.044715

SOURCES = {
    # x, dy, y: any shape
    "gelu": f"""
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float t = metal::precise::tanh({GELU_SLOPE}f * (v + {GELU_CUBE}f * v * v * v));
        y[i] = T(0.5f * v * (1.0f + t));
    """,
    "gelu_back": f"""
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float t = metal::precise::tanh({GELU_SLOPE}f * (v + {GELU_CUBE}f * v * v * v));
        float slope = {GELU_SLOPE}f * (1.0f + 3.0f * {GELU_CUBE}f * v * v);
        y[i] = T(float(dy[i]) * 0.5f * (1.0f + t + v * (1.0f - t * t) * slope));
    """,
    "silu": """
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        y[i] = T(v / (1.0f + metal::precise::exp(-v)));
    """,
    "silu_back": """
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float s = 1.0f / (1.0f + metal::precise::exp(-v));
        y[i] = T(float(dy[i]) * s * (1.0f + v * (1.0f - s)));
    """,
    # x: (B, L, D); shift, scale: (B or 1, 1, D)
    "modulate": """
        uint i = thread_position_in_grid.x;
        uint at = i % x_shape[2] + (scale_shape[0] == 1 ? 0 : i / x_shape[2] / x_shape[1] * x_shape[2]);
        y[i] = T(float(x[i]) * (1.0f + float(scale[at])) + float(shift[at]));
    """,
    # x, branch: (B, L, D); gate: (B or 1, 1, D)
    "gate_add": """
        uint i = thread_position_in_grid.x;
        uint at = i % x_shape[2] + (gate_shape[0] == 1 ? 0 : i / x_shape[2] / x_shape[1] * x_shape[2]);
        y[i] = T(float(x[i]) + float(gate[at]) * float(branch[i]));
    """,
    # x: (B, L, D), a cotangent; factor: (B or 1, 1, D)
    "scale_back": """
        uint i = thread_position_in_grid.x;
        uint at = i % x_shape[2] + (factor_shape[0] == 1 ? 0 : i / x_shape[2] / x_shape[1] * x_shape[2]);
        y[i] = T(float(x[i]) * (FROM_ONE ? 1.0f + float(factor[at]) : float(factor[at])));
    """,
    # x: (B, H, L, d), any strides; cosines, sines: (L, d / 2), float32; a thread turns a pair
    "rope": """
        uint pair = thread_position_in_grid.x;
        uint half_width = x_shape[3] / 2;
        uint column = pair % half_width;
        uint row = pair / half_width % x_shape[2];
        uint head = pair / half_width / x_shape[2] % x_shape[1];
        uint sample = pair / half_width / x_shape[2] / x_shape[1];
        size_t at = sample * x_strides[0] + head * x_strides[1] + row * x_strides[2] + 2 * column * x_strides[3];
        float even = float(x[at]);
        float odd = float(x[at + x_strides[3]]);
        float c = cosines[row * cosines_strides[0] + column * cosines_strides[1]];
        float s = sines[row * sines_strides[0] + column * sines_strides[1]];
        s = BACK ? -s : s;
        y[2 * pair] = T(even * c - odd * s);
        y[2 * pair + 1] = T(odd * c + even * s);
    """,
    # x: (B, rows, W, C); mean, inverse: (B, 1, groups, 1), float32; weight, bias: (C,)
    "group_norm": """
        uint i = thread_position_in_grid.x;
        uint channels = x_shape[3];
        uint channel = i % channels;
        uint sample = i / channels / x_shape[2] / x_shape[1];
        uint group = sample * mean_shape[2] + channel * mean_shape[2] / channels;
        float v = (float(x[i]) - mean[group]) * inverse[group];
        v = v * float(weight[channel]) + float(bias[channel]);
        y[i] = T(SILU ? v / (1.0f + metal::precise::exp(-v)) : v);
    """,
}
"""Bodies of kernels that write y from the inputs in INPUTS. T is the type of x and y."""

INPUTS = {
    "gelu": ("x",),
    "gelu_back": ("x", "dy"),
    "silu": ("x",),
    "silu_back": ("x", "dy"),
    "modulate": ("x", "shift", "scale"),
    "gate_add": ("x", "branch", "gate"),
    "scale_back": ("x", "factor"),
    "rope": ("x", "cosines", "sines"),
    "group_norm": ("x", "mean", "inverse", "weight", "bias"),
}

ANY_STRIDES = ("rope",)
"""Kernels whose inputs need not be contiguous."""
