"""Factors of LoRA as trees: how they begin, are scaled, added up, written, read and checked; on the toy family."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from engine.test_sweep import make

from mlx_blockskip import lora
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.models.registry import open_model
from support.compare import relative_error, same_bits
from support.models import random_tree
from support.toy import FAMILY, MODULES, WIDTH

FILE = Path("own/adapters.safetensors")
ALL = FAMILY.lora_targets["all"]


@pytest.fixture
def model(toy):
    return open_model(toy)


def begun(model, blocks=(1, 3), rank=4, seed=0):
    return lora.init(model.reader, blocks, ALL, rank, seed)


def same_trees(a, b):
    return list(a) == list(b) and all(
        list(a[i]) == list(b[i]) and all(same_bits(a[i][name], b[i][name]) for name in a[i]) for i in a
    )


def test_new_factors_change_nothing_and_are_of_the_layers_shapes(model):
    tree = begun(model)
    assert list(tree) == [1, 3]
    shapes = dict.fromkeys(MODULES, (WIDTH, WIDTH)) | {"ff.0": (64, WIDTH), "ff.2": (WIDTH, 64)}
    for own in tree.values():
        assert list(own) == [f"{module}.lora_{end}" for module in MODULES for end in "ab"]
        for module, (out, width) in shapes.items():
            a, b = own[f"{module}.lora_a"], own[f"{module}.lora_b"]
            assert (a.shape, b.shape) == ((width, 4), (4, out))
            assert a.dtype == b.dtype == mx.float32
            assert not np.array(b).any()
            bound = 1 / width**0.5
            assert 0.8 * bound < np.abs(np.array(a)).max() <= bound
            assert abs(np.array(a).mean()) < 4 * bound / (3 * a.size) ** 0.5
            assert (np.array(a) < 0).any()


def test_new_factors_are_a_function_of_seed_and_place(model):
    tree = begun(model)
    assert same_trees(begun(model), tree)
    assert same_trees({3: begun(model, (3,))[3]}, {3: tree[3]}), "other blocks do not matter"
    every = [own[f"{module}.lora_a"] for own in tree.values() for module in MODULES[:8]]
    every += [begun(model, seed=1)[1][f"{MODULES[0]}.lora_a"]]
    for i, a in enumerate(every):
        assert all(relative_error(a, b) > 0.1 for b in every[:i]), "no two are alike"


@pytest.mark.parametrize("quantized", [False, True])
def test_the_shape_of_a_layer_is_read_from_its_header(tmp_path, quantized):
    stack, shards = make(tmp_path / "m", 2, width=64, quantized=quantized)
    assert lora.linear_shape(BlockReader(shards, stack), 1, "up") == (64, 64)


def test_targets_by_name():
    assert lora.targets(FAMILY.lora_targets, "attention") == {"cross": MODULES[:8]}
    with pytest.raises(UserError, match="--lora-targets none: is not known; use all or attention"):
        lora.targets(FAMILY.lora_targets, "none")


def test_the_scale_is_on_the_second_factor_alone():
    tree = {"m.lora_a": mx.array([[2.0]]), "m.lora_b": mx.array([[3.0]])}
    assert {name: float(value.item()) for name, value in lora.scaled(tree, 0.5).items()} == {
        "m.lora_a": 2.0, "m.lora_b": 1.5,
    }  # fmt: skip


def test_a_scale_of_one_leaves_the_stack_and_another_changes_every_kind_once(model):
    assert lora.attach(model.stack, 1.0) is model.stack
    attached = lora.attach(model.stack, 2.0)
    assert [block.prefix for block in attached.blocks] == [block.prefix for block in model.stack.blocks]
    assert len({id(block.kind) for block in attached.blocks}) == 1
    assert attached.blocks[0].kind.modulate is model.stack.blocks[0].kind.modulate
    assert attached.blocks[0].kind.apply is not model.stack.blocks[0].kind.apply


def test_adapters_of_different_ranks_and_blocks_add_up(model):
    first, second = random_tree(model, (0, 1), rank=3), random_tree(model, (1, 2), rank=2, seed=5)
    found = lora.combine([first, second], [0.5, -2.0])
    assert sorted(found) == [0, 1, 2]
    for block, own in found.items():
        for module in MODULES:
            a, b = f"{module}.lora_a", f"{module}.lora_b"
            parts = [s * (t[block][a] @ t[block][b]) for t, s in ((first, 0.5), (second, -2.0)) if block in t]
            assert own[a].shape[1] == own[b].shape[0] == {0: 3, 1: 5, 2: 2}[block]
            assert relative_error(own[a] @ own[b], sum(parts)) <= 1e-5


def test_every_adapter_needs_a_scale(model):
    with pytest.raises(ValueError, match="shorter"):
        lora.combine([random_tree(model, (0,))] * 2, [1.0])


def test_a_tree_in_a_file_s_names_and_back_is_the_same_tree_in_order(model):
    tree = random_tree(model, (4, 0))
    names = lora.flatten(tree, model.stack)
    assert "blocks.4.attn2.to_out.0.lora_b" in names
    assert len(names) == 2 * 2 * len(MODULES)
    back = lora.unflatten({name: value.astype(mx.bfloat16) for name, value in names.items()}, model.stack, FILE)
    assert list(back) == [0, 4]
    assert {value.dtype for own in back.values() for value in own.values()} == {mx.float32}
    assert same_trees(lora.unflatten(names, model.stack, FILE), {0: tree[0], 4: tree[4]})


def test_a_name_of_no_block_is_refused_with_its_file(model):
    with pytest.raises(UserError, match=r"^own/adapters\.safetensors: blocks\.9\.x\.lora_a belongs to no block"):
        lora.unflatten({"blocks.9.x.lora_a": mx.zeros((1, 1))}, model.stack, FILE)


def test_factors_that_fit_are_let_through(model):
    lora.check(lora.flatten(random_tree(model, range(5)), model.stack), model.reader, FILE)


@pytest.mark.parametrize(
    "change",
    [
        {"ff.0.lora_a": mx.zeros((WIDTH + 1, 3))},
        {"ff.0.lora_b": mx.zeros((3, 65))},
        {"ff.0.lora_a": mx.zeros((WIDTH, 2))},
        {"ff.0.lora_b": None},
    ],
)
def test_factors_that_do_not_fit_are_refused_by_their_layer(model, change):
    tree = random_tree(model, (2,))
    tree[2] = {name: value for name, value in {**tree[2], **change}.items() if value is not None}
    with pytest.raises(UserError, match=r"^own/.*: the factors of blocks\.2\.ff\.0 do not fit a layer of 32 -> 64"):
        lora.check(lora.flatten(tree, model.stack), model.reader, FILE)


def test_factors_of_a_layer_that_is_not_there_are_refused_by_its_name(model):
    tree = {2: {"ff.1.lora_a": mx.zeros((WIDTH, 3)), "ff.1.lora_b": mx.zeros((3, WIDTH))}}
    with pytest.raises(UserError, match=r"^own/.*: this model has no layer blocks\.2\.ff\.1"):
        lora.check(lora.flatten(tree, model.stack), model.reader, FILE)


def test_the_checksum_sees_every_number_name_and_block_and_no_order_of_blocks(model):
    tree = random_tree(model, (0, 1))
    plain = lora.checksum(tree)
    assert lora.checksum({1: tree[1], 0: tree[0]}) == plain
    name = f"{MODULES[-1]}.lora_b"
    others = [
        {0: tree[0]},
        {0: tree[0], 2: tree[1]},
        {0: tree[0], 1: {**tree[1], name: tree[1][name] + 1e-3}},
        {0: tree[0], 1: {**tree[1], name: tree[1][name].T}},
        {0: tree[0], 1: {f"x{key}": value for key, value in tree[1].items()}},
    ]
    assert len({plain, *(lora.checksum(other) for other in others)}) == 1 + len(others)
