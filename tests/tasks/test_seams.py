"""What families may bring besides: blocks that are swept but not counted, and prompts of different lengths."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUICK
from PIL import Image

from mlx_blockskip import generate, lora, select, train
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter
from mlx_blockskip.tasks.train import loop, precompute
from mlx_blockskip.tasks.train import train as task
from support.compare import assert_same_adapter, factors, same_bits
from support.models import HEDGEHOG, prepared, random_tree


def settings(model, path, **options):
    fixed = {**QUICK, "model": str(model), "train_resolution": 32, "resolution": 48, "batch_size": 1, "iters": 4}
    return TrainSettings(**{**fixed, "adapter_path": str(path), "patch_mode": "resize", **options})


def directly(samples, model, path):
    """The loss of micro-batch 0, by the whole model."""
    precompute.encode_images(samples, range(1), path)
    noisy, target, s = precompute.Noised(path).read(0)
    tokens, context = samples.embed(0, noisy, s)
    (one,) = waiting = [Batch(tokens, context)]
    forward(model.stack, model.reader, waiting)
    velocity = model.final_layer(one.state, context, model.final_modulation(context))
    return float(mx.mean(mx.square(velocity - target)))


@pytest.mark.parametrize("name", ["toy_with_prelude", "toy_of_many_lengths", "tiny_z_image"])
@pytest.mark.parametrize("ends", [(0, 0), (2, 0), (0, 2), (1, 1)])
def test_the_first_step_has_the_loss_of_the_whole_model(request, tmp_path, name, ends):
    """At LoRA zero, whatever is skipped: the prelude is swept while the entry is computed, and never again."""
    job = prepared(settings(request.getfixturevalue(name), tmp_path / "a", skip_first=ends[0], skip_last=ends[1]))
    state = task.first_state(job)
    _, chunk = loop.next_chunk(job, state)
    visited = []
    walk = job.model.reader.walk
    job.model.reader.walk = lambda blocks, part="all": (visited.extend(blocks), walk(blocks, part))[1]
    loss = loop.train_step(job, chunk, state)
    assert min(visited) >= ends[0]
    del job.model.reader.walk
    assert loss == pytest.approx(directly(job.samples, job.model, tmp_path / "latents.safetensors"), rel=1e-5)


def test_the_prelude_is_neither_counted_nor_trained(toy_with_prelude, tmp_path):
    directory = train(settings(toy_with_prelude, tmp_path / "a", skip_ratio=0.4, plan="even")).adapter_path
    plan = json.loads((directory / "adapter_config.json").read_text())["plan"]
    assert (plan["depth"], plan["runs"]) == (5, [[0, 1], [4, 5]])
    assert {name.split(".lora")[0].split(".attn")[0].split(".ff")[0] for name in factors(directory)} == {
        "blocks.1", "blocks.2", "blocks.3",
    }  # fmt: skip
    none = train(settings(toy_with_prelude, tmp_path / "b", skip_first=1, skip_last=1, residuals="none")).adapter_path
    assert factors(none).keys() == factors(directory).keys()


def test_a_prelude_changes_the_image_and_takes_an_adapter(toy, toy_with_prelude, tmp_path):
    model = open_model(toy_with_prelude)
    main = random_tree(model, range(model.stack.depth), b_scale=0.3)
    tree = {-2: main[3], -1: main[4], **main}
    files.save_tensors(tmp_path / "a" / "adapters.safetensors", lora.flatten(tree, model.stack))
    files.write_json(tmp_path / "a" / "adapter_config.json", {"format": 1, "family": "toy", "scale": 1.0})
    loaded, _ = load_adapter(model, tmp_path / "a")
    assert list(loaded.tree) == list(model.stack.path) == [-2, -1, 0, 1, 2, 3, 4]
    assert all(same_bits(loaded.tree[b][n], tree[b][n]) for b in tree for n in tree[b])
    images = []
    cases = [(toy, []), (toy_with_prelude, []), (toy_with_prelude, [str(tmp_path / "a")])]
    for number, (path, adapter) in enumerate(cases):
        output = str(tmp_path / f"{number}.png")
        (made,) = generate(model=str(path), prompt=["a cat"], adapter_path=adapter, output=output)
        images.append(np.asarray(Image.open(made), int))
    assert all(np.abs(a - b).max() > 1 for a, b in zip(images, [*images[1:], images[0]], strict=True))


def test_selection_passes_over_the_prelude(toy_with_prelude, tmp_path):
    found = select(
        model=str(toy_with_prelude), data=str(HEDGEHOG), resolution=48, output=str(tmp_path / "selection.json")
    )
    assert (len(found.distances.first), len(found.distances.last)) == (4, 4)


SHORT = ("cat", "a cat", "a red cat", "a cat")
LONG = ("a red cat that sleeps in the sun", "a cat", *SHORT[:2])
"""Of two lengths in multiples of 32."""


@pytest.mark.parametrize(
    ("name", "captions", "lengths"), [("toy_of_many_lengths", SHORT, 3), ("tiny_z_image", LONG, 2)]
)
def test_prompts_of_different_lengths_train_and_go_on_to_the_same_bits(request, tmp_path, name, captions, lengths):
    """One record layout for each length; a run that is stopped inside a chunk ends with the same adapter."""
    model = request.getfixturevalue(name)
    photos = str(captioned(tmp_path, captions))
    own = {"data": photos, "grad_accumulation": 2, "iters": 6, "steps_per_save": 2, "skip_first": 1}
    job = prepared(settings(model, tmp_path / "job", **own))
    assert len(job.layouts) == lengths
    whole = train(settings(model, tmp_path / "whole", **own)).adapter_path

    def stop(event):
        if getattr(event, "phase", "") == "train" and getattr(event, "done", 0) == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(settings(model, tmp_path / "stopped", **own), on_event=stop)
    assert_same_adapter(whole, train(settings(model, tmp_path / "stopped", **own, resume=True)).adapter_path)


def captioned(tmp_path, captions=SHORT):
    """Photos whose captions differ in length."""
    directory = tmp_path / "photos"
    directory.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (48, 48), (60 * number, 90, 30)).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(caption)
    return directory


def test_prompts_of_different_lengths_do_not_go_into_one_micro_batch(toy_of_many_lengths, tmp_path):
    own = {"data": str(captioned(tmp_path)), "batch_size": 3, "grad_accumulation": 2}
    with pytest.raises(UserError, match="--batch-size 3: .* give --batch-size 1 --grad-accumulation 6"):
        train(settings(toy_of_many_lengths, tmp_path / "a", **own))


@pytest.mark.parametrize(("name", "prompts"), [("toy_of_many_lengths", SHORT[1:3]), ("tiny_z_image", LONG[:2])])
def test_prompts_of_different_lengths_are_drawn_together_as_they_are_alone(request, tmp_path, name, prompts):
    prompts, model = list(prompts), str(request.getfixturevalue(name))
    together = generate(model=model, prompt=prompts, output=str(tmp_path / "both.png"))
    for number, prompt in enumerate(prompts):
        (alone,) = generate(model=model, prompt=[prompt], seed=number, output=str(tmp_path / f"{number}.png"))
        assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(together[number])))
