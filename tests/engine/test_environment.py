"""MLX's settings, each in a process of its own: they are read when MLX is first used."""

import json
import os
import subprocess
import sys

import pytest

from mlx_blockskip.engine.environment import WANTED

TELL = "import json, os; from mlx_blockskip.engine import environment; print(json.dumps(environment.state()))"


def state_after(before, **variables):
    """What `state()` says in a process that runs `before` and then imports the package."""
    clean = {name: value for name, value in os.environ.items() if name not in WANTED}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{TELL}"],
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("before", ["", "import mlx.core"], ids=["ours first", "mlx first"])
def test_what_the_user_has_not_set_is_set_in_time(before):
    assert state_after(before) == {name: [value, value, False] for name, value in WANTED.items()}


def test_it_reaches_the_variables_that_mlx_itself_reads():
    """`getenv` of the C library, which Python's own `os.environ` may differ from."""
    ask = "import ctypes, mlx_blockskip; get = ctypes.CDLL(None).getenv; get.restype = ctypes.c_char_p"
    check = "; ".join(f"assert get(b{name!r}) == b{value!r}" for name, value in WANTED.items())
    state_after(f"{ask}; {check}")


def test_only_what_mlx_reads_once_is_too_late_when_it_has_been_used():
    found = state_after("import mlx.core as mx; mx.eval(mx.ones(4) + 1)")
    assert found["MLX_ENABLE_TF32"] == ["0", "0", True]
    assert found["MLX_CONV_WINOGRAD_WORKING_SET"] == ["1", "1", False], "it is read at each convolution"


def test_what_the_user_has_set_stays():
    found = state_after("import mlx.core as mx; mx.eval(mx.ones(4) + 1)", MLX_ENABLE_TF32="1")
    assert found["MLX_ENABLE_TF32"] == ["1", "0", False]
    assert found["MLX_CONV_WINOGRAD_WORKING_SET"][0] == "1"
