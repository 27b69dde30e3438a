"""Errors of the device: what MLX raises where Metal could not do its work: too little memory, or too long a wait.

Work runs behind Python's back, so such an error is raised at some later wait for the device, and is cleared by that;
work that was under way beside it may raise it once more.
"""

import mlx.core as mx

SIGNS = (
    *("[METAL] Command buffer execution failed:", "[metal::malloc] Attempting to allocate"),
    *("[metal::malloc] Resource limit (", "[malloc] Unable to allocate"),
)
"""How their messages begin. MLX has no class of its own for them."""

ATTEMPTS = 2


def is_device_error(error: BaseException) -> bool:
    """Whether this is an error of the device, not of a program or a file."""
    return isinstance(error, RuntimeError) and str(error).startswith(SIGNS)


def described(error: BaseException) -> str:
    """The beginning of a sentence about an error of the device: what happened, in MLX's own words."""
    return f"the GPU could not go on: {' '.join(str(error).split()).rstrip('.')}"


def drain() -> None:
    """Wait until nothing is under way. Errors of the device that this work still raises are dropped; others are not."""
    for device in (mx.default_device(), mx.cpu):
        for _ in range(ATTEMPTS):
            try:
                mx.synchronize(mx.default_stream(device))
                break
            except RuntimeError as error:
                if not is_device_error(error):
                    raise
