"""What layers do some tokens at a time."""

import mlx.core as mx
import pytest
from conftest import on_every

from mlx_blockskip.engine import philox
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models import layers
from mlx_blockskip.models.layers import by_rows, gelu_tanh, linear
from support.compare import relative_error, same_bits

W = {
    "up.weight": mx.array(philox.normal(0, 1, shape=(64, 8))),
    "down.weight": mx.array(philox.normal(0, 2, shape=(8, 64))),
}
X = mx.array(philox.normal(0, 3, shape=(2, 37, 8)))


def feed_forward(x, tree=None):
    return linear(W, "down", gelu_tanh(linear(W, "up", x, tree)))


@pytest.mark.parametrize("rows", [1, 5, 36, 37])
def test_values_and_gradients_do_not_depend_on_the_rows(rows, monkeypatch):
    tree = {"up.lora_a": mx.array(philox.normal(0, 4, shape=(8, 2))), "up.lora_b": mx.ones((2, 64))}
    upstream = mx.array(philox.normal(0, 5, shape=X.shape))

    def run(x, a, b):
        return [by_rows(lambda part: feed_forward(part, {"up.lora_a": a, "up.lora_b": b}), x)]

    found = []
    for count in (100, rows):
        monkeypatch.setattr(layers, "TOKEN_ROWS", count)
        values, pulled = mx.vjp(run, [X, *tree.values()], [upstream])
        found.append([*values, *pulled])
    for whole, parts in zip(*found, strict=True):
        assert relative_error(parts, whole) <= 1e-5


def test_several_inputs_are_cut_alike(monkeypatch):
    monkeypatch.setattr(layers, "TOKEN_ROWS", 10)
    assert same_bits(by_rows(lambda a, b: a - b[..., ::-1], X, 2 * X), X - 2 * X[..., ::-1])


def test_what_is_made_in_between_is_there_for_some_tokens_only(monkeypatch):
    x = mx.array(philox.normal(0, shape=(1, 8192, 8)))
    hidden = 8192 * 64 * 4
    peaks = {}
    mx.eval(x, W)
    for rows in (8192, 512):
        monkeypatch.setattr(layers, "TOKEN_ROWS", rows)
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        mx.eval(by_rows(feed_forward, x))
        peaks[rows] = mx.get_peak_memory() - start
    assert peaks[8192] >= 2 * hidden
    assert peaks[512] <= hidden


@on_every
def test_a_family_takes_many_tokens_by_rows(open_family, monkeypatch):
    """Its blocks say the same whether their tokens pass the feed-forward together or a few at a time."""
    model = open_family()
    prompt = model.encode_prompts(["a red apple"], 8).prompts[0]
    latents = mx.array(philox.normal(0, shape=(1, *model.latent_shape(64, 64))))
    found = []
    for rows in (10**6, 3):
        monkeypatch.setattr(layers, "TOKEN_ROWS", rows)
        context = model.context(mx.array([0.5]), prompt, latents.shape[1:3], 1.0)
        sample = Batch(model.embed(latents, prompt), context)
        forward(model.stack, model.reader, [sample])
        found.append(sample.state.image)
    assert relative_error(found[1], found[0]) <= 1e-5
