"""Errors of the device are told from others by what MLX says. There is no such device here: they are made up."""

import mlx.core as mx
import pytest

from mlx_blockskip.engine import device
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from support.metal import FAILED


@pytest.mark.parametrize(
    "message",
    [
        FAILED,
        "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[malloc] Unable to allocate 99 bytes.",
    ],
)
def test_mlx_says_that_the_device_failed(message):
    assert device.is_device_error(RuntimeError(message))
    assert not device.is_device_error(ValueError(message))
    assert not device.is_device_error(RuntimeError(f"while at it: {message}"))


def test_a_sentence_has_mlx_own_words():
    said = device.described(RuntimeError(FAILED))
    assert said.startswith("the GPU could not go on: [METAL] Command buffer execution failed: Insufficient Memory")
    assert said.endswith("OutOfMemory)")


@pytest.mark.parametrize("failures", [0, 1, 5])
def test_what_was_under_way_may_fail_again_and_is_waited_for(monkeypatch, failures):
    left, calls = [RuntimeError(FAILED)] * failures, []

    def synchronize(stream):
        calls.append(stream)
        if left:
            raise left.pop()

    monkeypatch.setattr(mx, "synchronize", synchronize)
    device.drain()
    assert len(calls) == min(2 + failures, 4)


def test_an_error_of_another_kind_is_not_dropped(monkeypatch):
    def synchronize(stream):
        raise RuntimeError("something else")

    monkeypatch.setattr(mx, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="something else"):
        device.drain()


def test_a_weight_that_the_device_cannot_take_is_no_broken_file(toy, monkeypatch):
    shards = Shards(toy / "transformer")

    def failing(message):
        def evaluate(*arrays):
            raise RuntimeError(message)

        monkeypatch.setattr(mx, "eval", evaluate)

    failing(FAILED)
    with pytest.raises(RuntimeError, match="METAL"):
        shards.load(shards.names[:1])
    failing("[load] short read")
    with pytest.raises(UserError, match=r"short read\); convert the model again"):
        shards.load(shards.names[:1])
