"""A checkpoint gives back all that changes in a run, and is refused where the run is another."""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import on_toy

from mlx_blockskip import train
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Warning
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.train import checkpoints
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.moments import Moments
from support.compare import assert_same_adapter, same_bits
from support.models import random_tree

SETTINGS = {"seed": 3, "rank": 2}


@pytest.fixture
def model(toy):
    return open_model(toy)


def drawn(tree, *place):
    """As many normal numbers as the tree has, of the same shapes."""
    return {
        name: mx.array(philox.normal(5, *place, i, shape=value.shape)) for i, (name, value) in enumerate(tree.items())
    }


def state_of(model, directory=None, **counts):
    """Factors and moments are normal numbers; block 2 has not been updated yet."""
    tree, at_chunk = (random_tree(model, (1, 2, 3), rank=2, seed=seed) for seed in (1, 2))
    moments = Moments(directory)
    for block in (1, 3):
        m, v = (drawn(tree[block], block, kind) for kind in range(2))
        moments.put(block, {name: {"m": m[name], "v": v[name]} for name in m})
    return State(tree, moments, **{"step": 7, "updates": 5, "skipped": 2, **counts}, at_chunk=at_chunk)


def assert_same_tree(found, expected):
    assert found.keys() == expected.keys()
    for block, own in expected.items():
        assert found[block].keys() == own.keys()
        assert all(same_bits(found[block][name], value) for name, value in own.items())


@pytest.mark.parametrize("in_files", [False, True])
def test_what_was_saved_is_loaded_bit_for_bit(model, tmp_path, in_files):
    state = state_of(model, tmp_path / "before" if in_files else None)
    path = checkpoints.save(tmp_path, state, model.stack, SETTINGS)
    assert path.name == "step-000007"
    found = checkpoints.load(path, model.stack, SETTINGS, Moments(tmp_path / "after" if in_files else None))
    assert (found.step, found.updates, found.skipped) == (7, 5, 2)
    assert_same_tree(found.tree, state.tree)
    assert_same_tree(found.at_chunk, state.at_chunk)
    assert found.moments.blocks == state.moments.blocks == [1, 3]
    for block in (1, 3):
        own, expected = found.moments.get(block), state.moments.get(block)
        assert_same_tree({name: own[name] for name in sorted(own)}, {name: expected[name] for name in sorted(expected)})


def test_the_last_two_are_kept_and_found_oldest_first(model, tmp_path):
    for step in (9, 11, 100):
        checkpoints.save(tmp_path, state_of(model, step=step), model.stack, SETTINGS)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["step-000011", "step-000100"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000011", "step-000100"]


def test_one_that_is_saved_again_takes_the_place_of_the_other(model, tmp_path):
    for skipped in (0, 1):
        path = checkpoints.save(tmp_path, state_of(model, skipped=skipped), model.stack, SETTINGS)
    assert checkpoints.load(path, model.stack, SETTINGS, Moments()).skipped == 1
    assert checkpoints.found(tmp_path) == [path]


def test_a_directory_that_is_not_whole_is_none(tmp_path):
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    assert checkpoints.found(tmp_path) == []
    assert checkpoints.found(tmp_path / "nowhere") == []


@pytest.mark.parametrize("other", [{"rank": 2}, {"seed": 3, "rank": 4}, {"seed": None, "rank": 2}])
def test_a_run_with_other_settings_is_refused_by_name(model, tmp_path, other):
    path = checkpoints.save(tmp_path, state_of(model), model.stack, SETTINGS)
    (name,) = (name for name in SETTINGS if other.get(name) != SETTINGS[name])
    with pytest.raises(UserError, match=f"was made with {name} = {SETTINGS[name]}, and this run has {other.get(name)}"):
        checkpoints.load(path, model.stack, other, Moments())


def test_moments_are_stored_in_float32_and_under_kind_and_block(model, tmp_path):
    path = checkpoints.save(tmp_path, state_of(model), model.stack, SETTINGS)
    entries = files.read_header(path / "moments.safetensors").entries
    names = state_of(model).tree[1]
    assert entries.keys() == {f"{kind}/{block}/{name}" for kind in "mv" for block in (1, 3) for name in names}
    assert {entry.dtype for entry in entries.values()} == {"F32"}


def test_an_adapter_that_is_set_aside_comes_back_with_its_bits(tmp_path):
    """Also where what was done meanwhile was stopped; and no file is left."""
    tree = {block: {"a.lora_a": mx.array(philox.normal(block, shape=(4, 2)))} for block in (0, 10, 3)}
    state = State(dict(tree))
    with pytest.raises(KeyboardInterrupt), checkpoints.set_aside(state, tmp_path / "adapter.safetensors"):
        assert not state.tree
        raise KeyboardInterrupt
    assert list(state.tree) == list(tree)
    assert all(same_bits(state.tree[block]["a.lora_a"], tree[block]["a.lora_a"]) for block in tree)
    assert not list(tmp_path.iterdir())


@on_toy
def test_a_damaged_checkpoint_is_set_apart_and_one_of_an_older_version_is_read(quick):
    """Nothing of either is lost; what an older version wrote has no checksums."""
    directory = train(quick("b", iters=2, steps_per_save=1)).adapter_path / "checkpoints"
    newest, before = directory / "step-000002", directory / "step-000001"
    state = files.read_json(before / "state.json")
    files.write_json(before / "state.json", {k: v for k, v in state.items() if k not in ("sha256", "checksum")})
    damaged = bytearray((newest / "adapters.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "adapters.safetensors").write_bytes(damaged)
    heard = []
    train(quick("b", iters=3, steps_per_save=1, resume=True), on_event=heard.append)
    said = [event.message for event in heard if isinstance(event, (Note, Warning))]
    assert any("checksum differs" in text and "now called step-000002.damaged" in text for text in said), said
    assert "Going on from step-000001" in said
    assert (directory / "step-000002.damaged" / "adapters.safetensors").read_bytes() == bytes(damaged)
    assert_same_adapter(Path(quick("b").adapter_path), train(quick("c", iters=3, steps_per_save=1)).adapter_path)
