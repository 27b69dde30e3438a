"""The recipe of tiny-sana: its tokenizer, the layout it writes, and the functions it trains with."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import files
from mlx_blockskip.models.sana import transformer as net
from mlx_blockskip.models.text.tokenize import gemma_ids

sys.path.append(str(Path(__file__).parents[2] / "examples" / "pretrain"))

recipe = pytest.importorskip("tiny_sana")

PROMPTS = ["a penguin on a cyan background", "small tractor, pink background", "a sks toy, 7 é on red", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights in the layout that the recipe writes."""
    path = tmp_path_factory.mktemp("tiny-sana")
    texts = [text for name in recipe.KNOWN for text in recipe.captions(name, "cyan", "small ")]
    recipe.write_tokenizer(path / "tokenizer", texts)
    recipe.save(path, {part: recipe.random(part, 0) for part in recipe.PARTS}, 0.5)
    return path


@pytest.mark.parametrize("name", ["AutoTokenizer", "GemmaTokenizer"])
def test_its_tokenizer_gives_the_same_ids_here_and_in_transformers(checkpoint, name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name).from_pretrained(str(checkpoint / "tokenizer"))
    found = theirs(PROMPTS, padding="max_length", max_length=recipe.LENGTH, truncation=True)
    ids, mask, cut = gemma_ids(checkpoint / "tokenizer", PROMPTS, recipe.LENGTH)
    np.testing.assert_array_equal(ids, np.array(found["input_ids"]))
    np.testing.assert_array_equal(mask, np.array(found["attention_mask"]))
    np.testing.assert_array_equal(mask, ids != 0)
    assert not any(cut)


def test_a_known_thing_is_one_token_after_the_article(checkpoint):
    _, mask, _ = gemma_ids(checkpoint / "tokenizer", ["a", "a penguin"], recipe.LENGTH)
    assert mask.sum(axis=1).tolist() == [2, 3]


def test_it_opens_in_diffusers(checkpoint):
    pytest.importorskip("torch")
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(str(checkpoint), local_files_only=True)
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.scheduler.config.use_flow_sigmas
    for part in recipe.PARTS:
        count = sum(parameter.numel() for parameter in getattr(pipeline, part).parameters())
        assert count == sum(np.prod(row.shape) for row in recipe.component(part).rows)


def test_what_is_saved_is_read_again_in_half_precision(checkpoint):
    for part, weights in recipe.load(checkpoint).items():
        for name, tensor in recipe.random(part, 0).items():
            assert mx.array_equal(weights[name], tensor.astype(mx.float16).astype(mx.float32)), (part, name)


def test_what_is_left_beside_it_is_read_again_and_described(checkpoint):
    state = recipe.begin({"a": mx.ones((40, 40)), "b.weight": mx.ones((3,))})
    for name in ("vae", "network"):
        recipe.Progress({"a": mx.ones((2,))}, state, {}, 90.0).save(recipe.beside(checkpoint, name))
    assert set(recipe.Progress.load(recipe.beside(checkpoint, "vae")).state) == set(state)
    recipe.describe(checkpoint, "all right")
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "all right" in text
    assert "3 minutes in all" in text


def test_what_it_trains_with_equals_the_networks_functions():
    x = mx.random.normal((8, 6, 6, 5), key=mx.random.key(0))
    kernel, bias = mx.random.normal((5, 3, 3, 1), key=mx.random.key(1)), mx.ones((5,))

    def both(depthwise, silu):
        def loss(x, kernel):
            return (silu(depthwise({"a.weight": kernel, "a.bias": bias}, "a", x)) ** 2).mean()

        value, grads = mx.value_and_grad(loss, argnums=(0, 1))(x, kernel)
        return [value, *grads]

    for own, other in zip(both(recipe.depthwise, recipe.silu), both(net.depthwise, net.silu), strict=True):
        np.testing.assert_allclose(np.array(own), np.array(other), atol=1e-5)


def test_its_measure_asks_for_every_thing_and_every_colour():
    asked = recipe.examination()
    assert len(asked) == 48
    assert {thing for _, thing, _ in asked} == set(recipe.KNOWN)
    assert all(sum(colour == name for _, _, colour in asked) == 4 for name in recipe.PALETTE)
    assert len(files.read_any_json(Path(recipe.HERE).parent / "quality" / "emoji.json")) == 50
