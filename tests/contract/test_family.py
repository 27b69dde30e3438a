"""What holds for every family: each registered family that has a small model, and a toy one."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import lora
from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.masking import image_to_text
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import kept, philox, sweep
from mlx_blockskip.engine.stack import arrays
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.registry import open_model
from support.compare import relative_error, same_bits
from support.models import random_tree


@pytest.fixture(scope="module", params=["tiny_flux", "tiny_klein", "tiny_sana", "tiny_z_image", "toy"])
def family_model(request):
    """Here also a stack with blocks that are swept but not counted."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_family(family_model):
    return lambda budget=None: open_model(family_model, budget)


def start(model, number=0, batch=2):
    """A sample at boundary 0, its head modulation and a target."""
    side = model.defaults.train_resolution
    shape = (batch, *model.latent_shape(side, side))
    latents, target = (mx.array(philox.normal(5, number, i, shape=shape)) for i in range(2))
    encoded = model.encode_prompts(["a small cat", "red"][:batch], model.defaults.max_sequence_length).prompts
    prompt = {key: mx.concatenate([p[key] for p in encoded]) for key in encoded[0]}
    context = model.context(mx.array(np.linspace(0.3, 0.8, batch, dtype=np.float32)), prompt, shape[1:3], 1.0)
    return Batch(model.embed(latents, prompt), context), model.final_modulation(context), target, prompt


def loss_of(model, sample, modulation, target):
    def loss(i, tokens):
        return mx.mean(mx.square(model.final_layer(tokens, sample.context, modulation) - target))

    return loss


def train_pass(model, path, tree, bridge=None, begin=None, backward=sweep.backward):
    sample, modulation, target, _ = start(model)
    if begin is not None:
        sample.state = begin
    grads = {}
    losses = backward(
        model.stack,
        model.reader,
        [sample],
        path,
        trainable=tree,
        loss=loss_of(model, sample, modulation, target),
        on_grad=grads.__setitem__,
        bridge=bridge,
    )
    return losses[0], grads, sample.state


def record_of(model, plan):
    """What a chunk holds for one micro-batch: tokens of the base model at the plan's boundaries."""
    kept = {}
    sample = start(model)[0]

    def tap(name):
        return lambda i, tokens: kept.__setitem__(name, tokens)

    taps = {}
    for boundary, names in residuals.boundaries(plan, "base").items():
        taps[boundary] = lambda i, tokens, names=names: [kept.__setitem__(n, tokens) for n in names]
    sweep.forward(model.stack, model.reader, [sample], taps=taps)
    return kept, sample.state


def bridge_over(kept):
    return lambda i, start, stop, own: residuals.cross(kept[f"run{start}.start"], kept[f"run{start}.stop"], own)


def test_streamed_equals_resident_bit_for_bit(open_family):
    results = []
    for budget in (None, 0, 3_000_000):
        model = open_family(budget)
        path = range(1, model.stack.depth)
        results.append(train_pass(model, path, random_tree(model, path)))
    for loss, grads, state in results[1:]:
        assert same_bits(loss, results[0][0])
        assert all(same_bits(a, b) for a, b in zip(arrays(state), arrays(results[0][2]), strict=True))
        assert all(same_bits(grads[b][n], results[0][1][b][n]) for b in grads for n in grads[b])


@pytest.mark.parametrize("runs", [((0, 1),), ((0, 1), (2, 3)), ((1, 3), (4, 5))])
def test_kept_activations_give_the_bits_of_recomputed_ones(open_family, runs):
    model = open_family()
    depth = model.stack.depth
    plan = SkipPlan(depth, tuple((a, depth if b == 5 else b) for a, b in runs))
    kept_tokens, _ = record_of(model, plan)
    tree = random_tree(model, plan.retained)
    given = {"bridge": bridge_over(kept_tokens), "begin": kept_tokens["entry"]}
    loss, grads, state = train_pass(model, plan.retained, tree, **given)
    own_loss, own, own_state = train_pass(model, plan.retained, tree, **given, backward=kept.backward)
    assert same_bits(loss, own_loss)
    assert all(same_bits(a, b) for a, b in zip(arrays(state), arrays(own_state), strict=True))
    assert list(own) == list(grads)
    assert all(same_bits(grads[b][n], own[b][n]) for b in grads for n in grads[b])


@pytest.mark.parametrize("runs", [((0, 2),), ((0, 1), (3, 5)), ((1, 3),), ((0, 1), (2, 3), (4, 5))])
def test_at_lora_zero_the_skipped_forward_equals_the_full_forward_bit_for_bit(open_family, runs):
    model = open_family()
    depth = model.stack.depth
    plan = SkipPlan(depth, tuple((a, depth if b == 5 else b) for a, b in runs))
    kept, full = record_of(model, plan)
    tree = random_tree(model, plan.retained, b_scale=0.0)
    sample, modulation, _, _ = start(model)
    sample.state = kept["entry"]
    sweep.forward(model.stack, model.reader, [sample], plan.retained, trainable=tree, bridge=bridge_over(kept))
    assert same_bits(sample.state.image, full.image)
    assert same_bits(
        model.final_layer(sample.state, sample.context, modulation), model.final_layer(full, sample.context, modulation)
    )


def test_without_a_trailing_run_the_skipped_gradient_is_the_full_models(open_family):
    model = open_family()
    plan = SkipPlan.ends(2, 0, model.stack.depth)
    tree = random_tree(model, plan.retained)
    kept, _ = record_of(model, plan)
    loss, grads, _ = train_pass(model, plan.retained, tree, begin=kept["entry"])
    full_loss, full, _ = train_pass(model, model.stack.path, tree)
    assert relative_error(loss, full_loss) <= 1e-5
    for block in plan.retained:
        assert all(relative_error(grads[block][n], g) <= 1e-5 for n, g in full[block].items())


def test_gradients_equal_autograd_through_an_inner_and_a_trailing_run(open_family):
    model = open_family()
    depth = model.stack.depth
    plan = SkipPlan(depth, ((0, 1), (2, 3), (depth - 1, depth)))
    tree = random_tree(model, plan.retained)
    kept, _ = record_of(model, plan)
    bridge = bridge_over(kept)
    _, grads, _ = train_pass(model, plan.retained, tree, bridge=bridge, begin=kept["entry"])
    weights = dict(model.reader.walk(range(depth)))
    sample, modulation, target, _ = start(model)
    loss = loss_of(model, sample, modulation, target)

    def total(trainable):
        tokens, before = kept["entry"], plan.n
        for b in plan.retained:
            if b > before:
                tokens = bridge(0, before, b, tokens)
            block = model.stack.blocks[b]
            modulation = sweep.modulation_of(block, weights[b], sample, b)
            tokens = block.kind.apply(weights[b], trainable[str(b)], tokens, sample.context, modulation, None)
            before = b + 1
        return loss(0, bridge(0, before, depth, tokens))

    reference = mx.grad(total)({str(b): tree[b] for b in plan.retained})
    for b in plan.retained:
        for name, g in reference[str(b)].items():
            assert relative_error(grads[b][name], g) <= 1e-5, (b, name)


def test_the_context_comes_back_from_its_record(open_family):
    model = open_family()
    sample, modulation, _, prompt = start(model)
    (by_block,) = sweep.modulations(model.stack, model.reader, [sample.context])
    record = {**model.prompt_conditioning(prompt), **model.conditioning(sample.context)}
    size = sample.context.size
    restored = Batch(sample.state, model.context_from(size, record), by_block.__getitem__)
    sweep.forward(model.stack, model.reader, [sample])
    sweep.forward(model.stack, model.reader, [restored])
    assert list(by_block) == [i for i in model.stack.path if model.stack.block(i).kind.modulate]
    assert all(same_bits(a, b) for a, b in zip(arrays(sample.state), arrays(restored.state), strict=True))
    assert same_bits(
        model.final_layer(restored.state, restored.context, modulation),
        model.final_layer(sample.state, sample.context, modulation),
    )


def test_masking_all_blocks_cuts_the_prompt_off(open_family):
    model = open_family()
    outputs = []
    for text in ("a cat", "blue"):
        _, _, _, prompt = start(model, batch=1)
        other = dict(model.encode_prompts([text], model.defaults.max_sequence_length).prompts[0])
        if "pooled" in other:
            other["pooled"] = prompt["pooled"]  # not attention: it reaches the image by modulation
        latents = mx.array(philox.normal(8, shape=(1, *model.latent_shape(64, 64))))
        context = model.context(mx.array([0.5]), other, latents.shape[1:3], 1.0)
        sample = Batch(model.embed(latents, other), context, masks=image_to_text(model.stack.path))
        sweep.forward(model.stack, model.reader, [sample])
        outputs.append(model.final_layer(sample.state, context, model.final_modulation(context)))
    assert same_bits(*outputs)


def test_two_adapters_add_up_and_scale_multiplies(open_family):
    model = open_family()
    blocks = range(model.stack.depth)
    trees = [random_tree(model, blocks, seed=s) for s in (1, 2)]
    combined = lora.combine(trees, [0.5, 2.0])
    for block in blocks:
        for name, a in combined[block].items():
            if name.endswith("lora_a"):
                module = name.removesuffix(".lora_a")
                product = a @ combined[block][f"{module}.lora_b"]
                parts = [t[block][name] @ t[block][f"{module}.lora_b"] for t in trees]
                assert relative_error(product, 0.5 * parts[0] + 2.0 * parts[1]) <= 1e-5
    scaled, plain = start(model)[0], start(model)[0]
    sweep.forward(lora.attach(model.stack, 3.0), model.reader, [scaled], trainable=trees[0])
    sweep.forward(model.stack, model.reader, [plain], trainable=lora.combine(trees[:1], [3.0]))
    assert same_bits(scaled.state.image, plain.state.image)


def test_tokens_split_into_image_and_text(open_family):
    sample = start(open_family())[0]
    assert isinstance(sample.state, Tokens)
    assert sample.state.image.ndim == 3
