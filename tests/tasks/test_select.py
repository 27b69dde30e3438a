"""Choosing blocks from end to end, by each method, and training on what was chosen."""

import json
import sys

import numpy as np
import pytest
from conftest import on_toy
from PIL import Image as PillowImage

from mlx_blockskip import select, train
from mlx_blockskip.blockskip import selection
from mlx_blockskip.blockskip.plan import from_selection
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Table
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import SelectSettings
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from support.models import HEDGEHOG, random_tree


@pytest.fixture
def small(family_model, tmp_path):
    """Settings that take a second."""

    def settings(method, **options):
        fixed = {
            "model": str(family_model),
            "method": method,
            "output": str(tmp_path / "s.json"),
            "clip_model": "tiny-clip",
            "overwrite": True,
        }
        if method == "probe":
            fixed |= {"data": str(HEDGEHOG), "probe_images": 2, "noise_levels": 2, "resolution": 32}
        else:
            fixed |= {"prompt": ["a red cat"], "steps": 2, "width": 32, "height": 32, "distance": "clip"}
        return SelectSettings(**{**fixed, **options})

    return settings


def adapter(model_path, directory, seed, captions=("a sks toy",)):
    """A random adapter."""
    model = open_model(model_path)
    tree = random_tree(model, range(model.stack.depth), seed=seed)
    save_adapter(directory, tree, model, {"scale": 1.0, "captions": list(captions)})
    return str(directory)


@pytest.mark.parametrize("method", ["probe", "generate"])
def test_a_selection_holds_its_table_and_the_best_plan_for_every_budget(small, method):
    events = []
    result = select(small(method), on_event=events.append)
    written = files.read_json(result.path)
    depth, k = written["depth"], len(written["first"]) - 1
    assert k == int(0.5 * depth + 0.5)
    assert written["first"][0] == written["last"][0] == 0
    assert all(value > 0 for end in ("first", "last") for value in written[end][1:])
    for budget in range(1, k + 1):
        n, m = (written["plans"][str(budget)][name] for name in "nm")
        sums = [written["first"][i] + written["last"][budget - i] for i in range(budget + 1)]
        assert n + m == budget
        assert written["first"][n] + written["last"][m] == min(sums)
    assert any(isinstance(event, Table) for event in events)
    with PillowImage.open(result.path.with_suffix(".png")) as picture:
        assert picture.size[0] > 300


def test_without_matplotlib_the_selection_is_written_and_the_picture_is_said_to_be_missing(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    events = []
    result = select(small("probe"), on_event=events.append)
    assert files.read_json(result.path)["plans"]
    assert not result.path.with_suffix(".png").exists()
    assert any(isinstance(e, Note) and "pip install 'mlx-blockskip[plot]'" in e.message for e in events)


def test_the_probe_says_how_much_work_it_saves(small):
    events = []
    result = select(small("probe"), on_event=events.append)
    written = files.read_json(result.path)
    depth, k = written["depth"], result.distances.k
    assert written["evaluations"] == 4 * (depth + k + k * depth)
    assert written["evaluations_without_sharing"] == 4 * (depth + 2 * k * depth)
    assert any(isinstance(e, Note) and str(written["evaluations"]) in e.message for e in events)


def test_the_probe_does_not_depend_on_the_budget(small):
    tables = [select(small("probe", memory_budget=budget)).distances for budget in ("auto", "0")]
    assert tables[0] == tables[1]


@on_toy
def test_the_table_is_the_mean_over_adapters_prompts_and_seeds(small, family_model, tmp_path):
    paths = [adapter(family_model, tmp_path / f"a{i}", i) for i in range(2)]
    drawn = {"n_images": 2, "seed": 5, "steps": 1, "skip_ratio": 0.25}
    result = select(small("generate", adapter_path=paths, prompt=["a red cat", "a dog"], **drawn))
    written = files.read_json(result.path)
    assert len(written["measurements"]) == 8
    assert {(m["adapter"], m["prompt"], m["seed"]) for m in written["measurements"]} == {
        (a, p, s) for a in (0, 1) for p in ("a red cat", "a dog") for s in (5, 6)
    }
    assert np.allclose(written["first"], np.mean([m["first"] for m in written["measurements"]], axis=0))
    probed = {"skip_ratio": 0.25, "output": str(tmp_path / "p.json")}
    both = [select(small("probe", adapter_path=[path], **probed)).distances for path in paths]
    assert select(small("probe", adapter_path=paths, **probed)).distances == selection.mean(both)
    assert both[0] != both[1]


@on_toy
def test_prompts_are_the_adapters_own_captions(small, family_model, tmp_path):
    path = adapter(family_model, tmp_path / "a", 1, ["a sks cat", "a sks cat asleep"])
    result = select(small("generate", adapter_path=[path], prompt=[], skip_ratio=0.25))
    assert {m["prompt"] for m in files.read_json(result.path)["measurements"]} == {"a sks cat", "a sks cat asleep"}


@on_toy
def test_images_that_are_there_are_not_made_again(small, tmp_path):
    first = select(small("generate", skip_ratio=0.25)).distances
    images = tmp_path / "s_images" / "adapter0"
    paths = sorted(images.glob("*.png"))
    assert len(paths) == 1 + 2 * first.k
    times = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].unlink()
    assert select(small("generate", skip_ratio=0.25)).distances == first
    changed = [path for path in paths if path.stat().st_mtime_ns != times[path]]
    assert changed == [paths[1]]
    select(small("generate", skip_ratio=0.25, steps=1))
    assert all(path.stat().st_mtime_ns != times[path] for path in paths), "they were made from something else"


def test_masked_images_are_those_of_a_masked_model(small, tmp_path):
    """An image with every block masked does not depend on the prompt where text comes by attention alone."""
    result = select(small("sliding", window=2))
    written = files.read_json(result.path)
    assert [(w["start"], w["stop"]) for w in written["windows"]] == list(selection.windows(written["depth"], 2))
    assert all(w["distance"] >= 0 for w in written["windows"])
    assert any(w["distance"] > 0 for w in written["windows"])
    assert "plans" not in written
    assert result.path.with_suffix(".png").is_file()
    with pytest.raises(UserError, match="plans|skip plan"):
        from_selection(written, 0.5, written["depth"], "s.json")


def test_training_takes_the_plan_of_a_ratio(small, quick):
    chosen = select(small("probe"))
    depth = files.read_json(chosen.path)["depth"]
    for ratio in (0.5, 0.25):
        result = train(quick(f"a{ratio}", plan=str(chosen.path), skip_ratio=ratio, iters=1))
        n, m = chosen.distances.best(int(ratio * depth + 0.5))
        runs = [run for run in ([0, n], [depth - m, depth]) if run[0] < run[1]]
        assert files.read_json(result.adapter_path / "adapter_config.json")["plan"]["runs"] == runs
    with pytest.raises(UserError, match=r"s\.json: has no plan for .* blocks \(ratio 0\.7\)"):
        train(quick("far", plan=str(chosen.path), skip_ratio=0.7, iters=1))


def test_without_a_plan_a_run_probes_first_and_says_so(quick):
    events = []
    result = train(quick(skip_ratio=0.2, iters=4), on_event=events.append)
    assert any(isinstance(e, Note) and "Probing which blocks" in e.message for e in events)
    found = files.read_json(result.adapter_path / "selection.json")
    plan = files.read_json(result.adapter_path / "adapter_config.json")["plan"]
    depth = found["depth"]
    k = int(0.2 * depth + 0.5)
    n, m = (found["plans"][str(k)][name] for name in "nm")
    assert n + m == k
    assert plan["runs"] == [run for run in ([0, n], [depth - m, depth]) if run[0] < run[1]]
    events.clear()
    train(quick(skip_ratio=0.2, iters=6, resume=True), on_event=events.append)
    assert not any(isinstance(e, Note) and "Probing" in e.message for e in events), "it is there already"


def test_a_recorded_plan_needs_no_probe(tiny_flux, tmp_path):
    events = []
    train(
        model=str(tiny_flux), data=str(HEDGEHOG), iters=1, adapter_path=str(tmp_path / "a"), train_resolution=32,
        resolution=32, class_images=0, on_event=events.append,
    )  # fmt: skip
    assert not (tmp_path / "a" / "selection.json").exists()
    assert any(isinstance(e, Note) and "the model's plan for 0.5" in e.message for e in events)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("probe", {"data": ""}, "--data: is empty"),
        ("generate", {"prompt": []}, "--prompt: say what to show"),
        ("probe", {"skip_ratio": 1.0}, "--skip-ratio 1"),
        ("probe", {"skip_ratio": 0.01}, "--skip-ratio 0.01: skips none"),
        ("probe", {"stride": 0}, "--stride 0"),
        ("probe", {"resolution": 33}, "33 x 33"),
        ("generate", {"n_images": 0}, "--n-images 0"),
        ("generate", {"seed": -1}, "--seed -1"),
        ("generate", {"adapter_path": ["nowhere"]}, "nowhere: no such adapter"),
        ("sliding", {"window": 99}, "--window 99"),
        ("probe", {"output": "plan.txt"}, "should|end in .json"),
        ("generate", {"width": 33}, "33 x 32"),
    ],
)
def test_bad_settings_are_one_clear_error(small, method, options, match):
    with pytest.raises(UserError, match=match):
        select(small(method, **options))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"plans": {"0.5": {"n": 1, "m": 0}}, "depth": 4}, "has no plan for 2 of 4 blocks"),
        ({"plans": [1], "depth": 4}, "not by number of blocks"),
        ({"plans": {"2": {"n": 1, "m": 1}}, "depth": 5}, "is for a model of 5 blocks"),
        ({"plans": {"2": {"n": 3, "m": 3}}, "depth": 4}, "skip plan"),
        ({"plans": {"2": 7}, "depth": 4}, "not a skip plan"),
    ],
)
def test_a_file_that_is_no_selection_is_named(tmp_path, value, match):
    with pytest.raises(UserError, match=f"^p.json: .*{match}"):
        from_selection(json.loads(json.dumps(value)), 0.5, 4, "p.json")
