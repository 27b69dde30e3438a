"""A run that begins with an adapter: whole at the start, what is not trained stays, and resuming changes nothing."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import on_toy
from PIL import Image

from mlx_blockskip import generate, train
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Step
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter, save_adapter, write_adapter
from support.compare import factors, same_bits
from support.models import random_tree

PLAN = {"skip_first": 1, "skip_last": 1}


@pytest.fixture
def first(family_model, tmp_path):
    """An adapter on all blocks, of rank 2 and scale 0.5."""
    model = open_model(family_model)
    path = tmp_path / "first"
    path.mkdir()
    tree = random_tree(model, model.stack.path, rank=2, b_scale=0.3)
    save_adapter(path, tree, model, {"scale": 0.5, "base_model_identity": model.identity})
    return path


def losses(settings):
    found = []
    train(settings, on_event=lambda e: found.append(e.loss) if isinstance(e, Step) and e.phase == "train" else None)
    return found


def differences(model, path):
    """What an adapter adds to each layer, by its name."""
    adapter, scale = load_adapter(open_model(model), path)
    layers = adapter.layers(open_model(model).stack)
    return {name: np.array(added.weight.b.T @ added.weight.a.T) * scale for name, added in layers.items()}


@on_toy
@pytest.mark.parametrize(("rank", "scale"), [(None, 1.0), (3, 2.0)])
def test_it_is_whole_where_nothing_was_learned(quick, family_model, first, rank, scale):
    """Also where only some of its blocks are trained, with a higher rank and another scale."""
    made = quick(iters=1, learning_rate=1e-12, rank=rank, scale=scale, init_adapter=str(first), **PLAN)
    result = train(made)
    before, after = differences(family_model, first), differences(family_model, result.adapter_path)
    assert before.keys() == after.keys()
    for name, delta in before.items():
        np.testing.assert_allclose(after[name], delta, atol=1e-6)
    config = json.loads((result.adapter_path / "adapter_config.json").read_text())
    assert (config["rank"], config["scale"]) == (rank or 2, scale)


@on_toy
def test_what_is_learned_is_in_the_trained_blocks_alone(quick, family_model, first):
    depth = open_model(family_model).stack.depth
    result = train(quick(iters=4, rank=None, init_adapter=str(first), **PLAN))
    before, after = differences(family_model, first), differences(family_model, result.adapter_path)
    changed = {name for name, delta in before.items() if np.abs(after[name] - delta).max() > 1e-6}
    assert {int(name.split(".")[1]) for name in changed} == set(range(1, depth - 1))
    assert len(changed) == sum(int(name.split(".")[1]) in range(1, depth - 1) for name in before)


@on_toy
@pytest.mark.parametrize("residuals", ["base", "fresh"])
def test_the_features_are_those_of_the_model_with_the_adapter(quick, first, residuals):
    """At the first step skipping is exact: the loss is that of a run that skips nothing."""
    options = {"iters": 1, "rank": None, "init_adapter": str(first), "residuals": residuals}
    (skipping,), (plain,) = losses(quick("a", **options, **PLAN)), losses(quick("b", **options, skip_ratio=0.0))
    (without,) = losses(quick("c", iters=1, **PLAN))
    assert skipping == pytest.approx(plain, rel=1e-5)
    assert abs(skipping - without) > 1e-3 * without


@on_toy
def test_a_resumed_run_ends_with_the_same_bits(quick, first, tmp_path):
    options = {"rank": None, "init_adapter": str(first), "steps_per_save": 2, **PLAN}
    whole = train(quick("whole", iters=4, **options))
    train(quick("parts", iters=2, **options))
    parts = train(quick("parts", iters=4, resume=True, **options))
    mine, theirs = factors(whole.adapter_path), factors(parts.adapter_path)
    assert mine.keys() == theirs.keys()
    assert all(same_bits(mine[name], theirs[name]) for name in mine)
    other = shutil.copytree(first, tmp_path / "other")
    tensors = {name: value * 1.01 for name, value in factors(first).items()}
    write_adapter(other, tensors, {"scale": 0.5})
    with pytest.raises(UserError, match="init_adapter"):
        train(quick("parts", iters=6, resume=True, **{**options, "init_adapter": str(other)}))


def test_layers_outside_of_the_blocks_stay_and_are_seen(quick, family_model, tmp_path):
    model = open_model(family_model)
    name = {"flux": "x_embedder", "sana": "proj_out"}.get(family_model.name.split("-")[-1])
    if name is None:  # the toy's file is in its own names, since it comes without a converter
        name = next(n for n in model.reader.shards.names if not n.startswith("blocks")).removesuffix(".weight")
    out, *rest = model.reader.shards.shape(f"{name}.weight")
    a, b = (mx.array(philox.normal(i, shape=shape)) * 0.3 for i, shape in enumerate(((2, *rest), (out, 2))))
    lora = tmp_path / "outer.safetensors"
    files.save_tensors(lora, {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b})
    (with_it,) = losses(quick("a", iters=1, init_adapter=str(lora), **PLAN))
    (without,) = losses(quick("b", iters=1, **PLAN))
    assert abs(with_it - without) > 1e-4 * without
    found = differences(family_model, tmp_path / "a")
    np.testing.assert_allclose(found[name], np.array(b @ a), atol=1e-5)
    drawn = {"model": str(family_model), "prompt": ["a dog"], "width": 64, "height": 64, "steps": 1}
    images = [
        np.asarray(Image.open(generate(adapter_path=[str(path)], output=str(tmp_path / f"{i}.png"), **drawn)[0]), int)
        for i, path in enumerate((tmp_path / "a", tmp_path / "b"))
    ]
    assert np.abs(images[0] - images[1]).max() > 2


@on_toy
def test_what_cannot_be_trained_is_refused(quick, family_model, first, tmp_path):
    with pytest.raises(UserError, match=r"--rank 1: the factors of .* in --init-adapter have rank 2; give --rank 2"):
        train(quick(iters=1, rank=1, init_adapter=str(first), **PLAN))
    with pytest.raises(UserError, match="no such adapter"):
        train(quick(iters=1, init_adapter=str(tmp_path / "none"), **PLAN))


def test_more_than_factors_is_refused(tiny_flux, tmp_path):
    from conftest import QUICK

    path = tmp_path / "lokr.safetensors"
    files.save_tensors(path, {"x_embedder.diff_b": mx.ones(128)})
    with pytest.raises(UserError, match=r"x_embedder has more than low-rank factors.* `mlx-blockskip fuse`"):
        train(model=str(tiny_flux), adapter_path=str(tmp_path / "a"), init_adapter=str(path), **QUICK)
