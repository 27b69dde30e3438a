"""The optimizer's step, a block at a time, against mlx.optimizers.AdamW on the whole tree at once."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_blockskip.engine import limits, philox
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.moments import Moments
from mlx_blockskip.tasks.train.optimizer import global_norm, update
from support.compare import relative_error, same_bits

STEPS, WARMUP, RATE, DECAY = 10, 3, 2e-2, 0.1
SHAPES = {"attn.to_q.lora_a": (6, 2), "attn.to_q.lora_b": (2, 5), "ff.lora_a": (4, 2), "ff.lora_b": (2, 6)}
BLOCKS = (1, 2, 5)


def tree(*place):
    """Normal numbers for each factor of each block."""

    def drawn(block):
        shapes = enumerate(SHAPES.items())
        return {name: mx.array(philox.normal(7, *place, block, i, shape=shape)) for i, (name, shape) in shapes}

    return {block: drawn(block) for block in BLOCKS}


def gradients(step):
    """Of another length in each step, between 0.5 and 16 or so."""
    size = (0.3, 0.02, 1.0, 0.1)[step % 4]
    return {block: {name: g * size for name, g in own.items()} for block, own in tree(1, step).items()}


def settings(**changes):
    fixed = {"iters": STEPS, "learning_rate": RATE, "warmup": WARMUP, "weight_decay": DECAY, "clip": 0.0}
    return TrainSettings(**{**fixed, **changes})


def ours(directory, wanted, skipped=()):
    """The state after each step. skipped: steps in which no update is made."""
    state, found = State(tree(0), Moments(directory)), []
    for step in range(STEPS):
        state.step = step
        if step not in skipped:
            grads = gradients(step)
            update(state, grads, wanted, global_norm(grads))
            assert not grads, "gradients are let go of as they are used"
        found.append(state.tree)
    assert state.updates == STEPS - len(skipped)
    return found


def of_mlx(wanted, schedule, skipped=()):
    """The same by one AdamW over the whole tree, and MLX's own clipping and schedules."""
    parameters, found = {str(block): own for block, own in tree(0).items()}, []
    adam = optim.AdamW(learning_rate=0.0, weight_decay=wanted.weight_decay, bias_correction=True)
    for step in range(STEPS):
        if step not in skipped:
            grads = {str(block): own for block, own in gradients(step).items()}
            if wanted.clip:
                grads, _ = optim.clip_grad_norm(grads, wanted.clip)
            adam.learning_rate = schedule(mx.array(step))
            parameters = adam.apply_gradients(grads, parameters)
        found.append({int(block): own for block, own in parameters.items()})
    return found


def falling(name):
    """MLX's schedule of this name, after its linear warm-up."""
    after = {
        "constant": lambda step: mx.array(RATE),
        "linear": optim.linear_schedule(RATE, 0.0, STEPS - WARMUP),
        "cosine": optim.cosine_decay(RATE, STEPS - WARMUP),
    }
    return optim.join_schedules([optim.linear_schedule(RATE / WARMUP, RATE, WARMUP - 1), after[name]], [WARMUP])


def assert_same_steps(found, reference):
    """A weight decay of 0 would be off by 2e-3, an uncorrected bias by more."""
    for step, (own, theirs) in enumerate(zip(found, reference, strict=True)):
        for block in BLOCKS:
            for name in SHAPES:
                assert relative_error(own[block][name], theirs[block][name]) <= 1e-5, (step, block, name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("in_files", [False, True])
def test_ten_steps_a_block_at_a_time_are_those_of_adamw_on_the_whole_tree(tmp_path, schedule, clip, in_files):
    wanted = settings(lr_schedule=schedule, clip=clip)
    found = ours(tmp_path / "moments" if in_files else None, wanted)
    assert_same_steps(found, of_mlx(wanted, falling(schedule)))


def test_a_step_without_an_update_counts_for_the_rate_and_not_for_the_bias_correction():
    wanted = settings(lr_schedule="cosine")
    found = ours(None, wanted, skipped=(0, 4))
    assert_same_steps(found, of_mlx(wanted, falling("cosine"), skipped=(0, 4)))
    assert all(same_bits(found[4][block][name], found[3][block][name]) for block in BLOCKS for name in SHAPES)


def test_moments_in_files_give_the_same_bits_as_in_memory(tmp_path):
    wanted = settings(clip=1.0)
    for own, other in zip(ours(None, wanted), ours(tmp_path / "moments", wanted), strict=True):
        assert all(same_bits(own[block][name], other[block][name]) for block in BLOCKS for name in SHAPES)


def test_the_largest_norm_bounds_some_of_these_steps_and_not_others():
    norms = [global_norm(gradients(step)) for step in range(STEPS)]
    assert min(norms) < 1.0 < max(norms)
    flat = mx.concatenate([g.reshape(-1) for own in gradients(2).values() for g in own.values()])
    assert norms[2] == pytest.approx(float(mx.linalg.norm(flat)), rel=1e-6)


def test_a_step_is_computed_when_it_is_over():
    """While a Ctrl-C waits; nothing of it is left for later, so no gradient stays in memory."""
    state, grads = State(tree(0), Moments()), gradients(0)
    update(state, grads, settings(), global_norm(grads))
    before = mx.get_active_memory()
    mx.eval(state.tree, [state.moments.get(block) for block in BLOCKS])
    assert mx.get_active_memory() == before


def test_the_norm_has_the_bits_of_one_sum_after_the_other_and_holds_the_squares_of_one_block():
    grads = {block: {"a": mx.array(philox.normal(9, block, shape=(256, 256)))} for block in range(30)}
    mx.eval(grads)
    expected = sum(float(mx.sum(mx.square(own["a"]))) for own in grads.values()) ** 0.5
    mx.set_cache_limit(0)
    with limits.tight():
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        assert global_norm(grads) == expected
        assert mx.get_peak_memory() - before < 3 * grads[0]["a"].nbytes
