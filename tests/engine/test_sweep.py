"""The sweep on a small stack of its own: a residual MLP with two state fields, modulation and a trainable factor."""

import gc
import os
import threading
from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_blockskip.engine import memory, philox, sweep
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader, Prefetch
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.spill import hold_in
from mlx_blockskip.engine.stack import Block, BlockKind, Stack
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.layers import linear
from support.compare import relative_error, same_bits
from support.component import save_component


class Pair(NamedTuple):
    a: mx.array
    b: mx.array | None = None


def apply(w, trainable, state, context, modulation, mask):
    x = state.a + (state.b if state.b is not None else 0)
    hidden = mx.tanh(linear(w, "up", x, trainable) * modulation + context)
    a = state.a + linear(w, "down", hidden, trainable)
    return Pair(a, None if state.b is None else state.b * 0.9 + 0.1 * mx.tanh(a))


def modulate(w, context):
    return 1 + linear(w, "mod", context)


KIND = BlockKind("mlp", apply, modulate, ("mod",))


def make(path, depth, width=32, quantized=False):
    stack = Stack(tuple(Block(f"blocks.{i}.", KIND) for i in range(depth)))
    tensors = {}
    for i in range(depth):
        for j, name in enumerate(("up", "down", "mod")):
            w = mx.array(philox.normal(1, i, j, shape=(width, width))) / width**0.5
            key = f"blocks.{i}.{name}"
            if quantized and name != "mod":
                parts = mx.quantize(w, group_size=32, bits=4)
                tensors |= dict(zip((f"{key}.weight", f"{key}.scales", f"{key}.biases"), parts))
            else:
                tensors[f"{key}.weight"] = w
    return stack, Shards(save_component(path, {}, tensors, stack))


def factors(depth, width=32, rank=2):
    tree = {}
    for i in range(depth):
        tree[i] = {}
        for j, module in enumerate(("up", "down")):
            tree[i][f"{module}.lora_a"] = mx.array(philox.normal(2, i, j, 0, shape=(width, rank))) * 0.2
            tree[i][f"{module}.lora_b"] = mx.array(philox.normal(2, i, j, 1, shape=(rank, width))) * 0.2
    return tree


def samples(count=2, width=32, with_b=True):
    made = []
    for i in range(count):
        a, b, context = (mx.array(philox.normal(3, i, j, shape=(2, 5, width))) for j in range(3))
        made.append(Batch(Pair(a, b if with_b else None), context[:1, :1] * 0.1))
    return made


def loss(i, state):
    return mx.mean(mx.square(state.a)) * (i + 1)


def whole_graph(stack, reader, waiting, path, tree):
    """The same loss and gradients by one mx.value_and_grad over the resident stack."""
    weights = dict(reader.walk(range(stack.depth)))

    def total(trainable):
        value = mx.array(0.0)
        for i, s in enumerate(waiting):
            state = s.state
            for b in path:
                state = apply(weights[b], trainable[str(b)], state, s.context, modulate(weights[b], s.context), None)
            value = value + loss(i, state)
        return value

    return mx.value_and_grad(total)({str(b): tree[b] for b in path})


def run_backward(stack, reader, tree, path, **more):
    grads = {}
    losses = sweep.backward(
        stack, reader, samples(), path, trainable=tree, loss=loss, on_grad=grads.__setitem__, **more
    )
    return losses, grads


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_gradients_equal_those_of_the_whole_graph(tmp_path, quantized, start):
    stack, shards = make(tmp_path / "m", 5, quantized=quantized)
    tree, path = factors(5), list(range(start, 5))
    reader = BlockReader(shards, stack)
    losses, grads = run_backward(stack, reader, tree, path)
    value, reference = whole_graph(stack, reader, samples(), path, tree)
    assert relative_error(sum(losses), value) <= 1e-5
    assert sorted(grads) == path
    for block in path:
        for name, g in reference[str(block)].items():
            assert relative_error(grads[block][name], g) <= 1e-5, (block, name)


@pytest.mark.parametrize("path", [range(6), [1, 2, 5]])
def test_inputs_of_blocks_may_wait_in_files_and_change_no_bit(tmp_path, path):
    stack, shards = make(tmp_path / "m", 6)
    tree, reader, files = factors(6), BlockReader(shards, stack), []

    def bridge(batch, start, stop, state):
        files.append(len(list((tmp_path / "inputs").glob("*"))))
        return state

    losses, grads = run_backward(stack, reader, tree, path, bridge=bridge)
    files.clear()
    hold = hold_in(tmp_path / "inputs")
    held_losses, held = run_backward(stack, reader, tree, path, bridge=bridge, hold=hold)
    assert all(same_bits(a, b) for a, b in zip(losses, held_losses, strict=True))
    assert all(same_bits(grads[block][name], held[block][name]) for block in path for name in grads[block])
    if path != range(6):
        assert files == [4, 5], "of two samples at two blocks, and of the first at the third"
    assert not list((tmp_path / "inputs").glob("*")), "what was read is gone"


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("budget", [0, 60_000])
def test_streamed_equals_resident_bit_for_bit(tmp_path, prefetch, budget):
    stack, shards = make(tmp_path / "m", 6)
    tree = factors(6)
    resident, streamed = BlockReader(shards, stack), BlockReader(shards, stack, budget, prefetch)
    for reader in (resident, streamed):  # the second pass of the resident reader reads nothing
        run_backward(stack, reader, tree, range(6))
    read = resident.bytes_read
    first, second = (run_backward(stack, reader, tree, range(6)) for reader in (resident, streamed))
    assert resident.bytes_read == read < streamed.bytes_read
    assert all(same_bits(a, b) for a, b in zip(first[0], second[0], strict=True))
    for block in range(6):
        assert all(same_bits(first[1][block][n], second[1][block][n]) for n in first[1][block])
    outputs = []
    for reader in (resident, streamed):
        waiting = samples()
        sweep.forward(stack, reader, waiting, trainable=tree)
        outputs.append(waiting)
    for a, b in zip(*outputs, strict=True):
        assert same_bits(a.state.a, b.state.a)
        assert same_bits(a.state.b, b.state.b)


def test_modulation_from_a_record_equals_computed_and_its_weights_are_not_read(tmp_path):
    stack, shards = make(tmp_path / "m", 4)
    reader = BlockReader(shards, stack, 0)
    computed, recorded = samples(), samples()
    sweep.forward(stack, reader, computed)
    per_sample = sweep.modulations(stack, reader, [s.context for s in recorded])
    for s, modulation in zip(recorded, per_sample, strict=True):
        s.modulation = modulation.__getitem__
    before = reader.bytes_read
    sweep.forward(stack, reader, recorded)
    assert reader.bytes_read - before == sum(reader.nbytes(i, "body") for i in range(4))
    assert all(same_bits(a.state.a, b.state.a) for a, b in zip(computed, recorded, strict=True))


def peak_of(run) -> int:
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def test_doubling_the_depth_adds_only_kept_inputs_and_trainable_state(tmp_path):
    width, peaks, kept, trained = 256, {}, {}, {}
    mx.set_cache_limit(0)
    for depth in (6, 12):
        stack, shards = make(tmp_path / f"m{depth}", depth, width)
        tree = factors(depth, width, rank=4)
        mx.eval(tree)
        reader = BlockReader(shards, stack, 0)
        waiting = samples(width=width)
        mx.eval([(s.state, s.context) for s in waiting])
        kept[depth] = depth * sum(s.state.a.nbytes + s.state.b.nbytes for s in waiting)
        trained[depth] = sum(v.nbytes for t in tree.values() for v in t.values())
        grads = {}

        def run(stack=stack, reader=reader, waiting=waiting, tree=tree, depth=depth, grads=grads):
            sweep.backward(stack, reader, waiting, range(depth), trainable=tree, loss=loss, on_grad=grads.__setitem__)

        peaks[depth] = peak_of(run)
    block = 3 * width * width * 4
    growth = peaks[12] - peaks[6]
    assert growth <= kept[12] - kept[6] + trained[12] - trained[6] + 65536
    assert peaks[6] < 6 * block, "the whole stack was in memory"


def test_a_block_is_let_go_of_before_the_next_is_read(tmp_path, monkeypatch):
    """In both directions: what is in memory when a block is read is less than a block more than at the start."""
    width, depth, held = 256, 4, []
    stack, shards = make(tmp_path / "m", depth, width)
    tree, reader = factors(depth, width), BlockReader(shards, stack, 0)
    take = Prefetch.take

    def watched(*more):
        count = take(*more)
        held.append(mx.get_active_memory())
        return count

    monkeypatch.setattr(Prefetch, "take", watched)
    gc.collect()
    sweep.forward(stack, reader, samples(width=width))
    reader.release()
    sweep.backward(
        stack, reader, samples(width=width), range(depth), trainable=tree, loss=loss, on_grad=lambda *_: None
    )
    assert len(held) == depth + 2 * depth - 1, "a block's tensors are read together"
    assert max(held) - min(held) < reader.nbytes(0)


class Watch:
    """Tells when the thread that reads ahead has come as far as it can."""

    def __init__(self, monkeypatch):
        self.changed = threading.Condition()
        self.asked = self.finished = 0
        self.waits = False
        take, get = Prefetch.take, BlockReader._get

        def watched_take(flight, sizes):
            self._say(waits=not flight._fits(sizes[0]))
            count = take(flight, sizes)
            self._say(waits=False)
            return count

        def watched_get(*more):
            try:
                return get(*more)
            finally:
                self._say(finished=self.finished + 1)

        monkeypatch.setattr(Prefetch, "take", watched_take)
        monkeypatch.setattr(BlockReader, "_get", watched_get)

    def _say(self, **changes):
        with self.changed:
            vars(self).update(changes)
            self.changed.notify()

    def walk(self, reader, blocks, part):
        """The reader's walk, each block handed out when nothing more can be read ahead of it."""
        self.asked, self.finished = 1, 0
        for block, weights in reader.walk(blocks, part):
            self.asked = min(self.asked + 1, len(blocks))
            with self.changed:
                left = self.asked - 1
                assert self.changed.wait_for(
                    lambda left=left: self.finished > left or (self.finished == left and self.waits), timeout=60
                )
            yield block, weights
            del weights


def test_a_walk_stays_within_its_budget(tmp_path, monkeypatch):
    """The first walk measures what the work takes; then the next block is read ahead, as far as it fits, and kept."""
    width, work, watch = 256, 600_000, Watch(monkeypatch)
    stack, shards = make(tmp_path / "m", 6, width)
    block, tensor = BlockReader(shards, stack).nbytes(0, "body"), width * width * 4
    mx.set_cache_limit(0)
    peaks, read = {}, {}
    for weights in (block, block + tensor, 2 * block, 4 * block + work):
        gc.collect()
        base = mx.get_active_memory()
        reader = BlockReader(shards, stack, base + work + weights + 4096)

        def walk(reader=reader):
            for _, weights in watch.walk(reader, range(6), "body"):
                mx.eval(mx.zeros((work // 4,)) + 1)
                del weights

        walk()
        assert reader.overhead["body"] - base == pytest.approx(work, rel=0.05)
        memory.reset()
        before = reader.bytes_read
        walk()
        peaks[weights], read[weights] = memory.peak(), reader.bytes_read - before
        assert peaks[weights] <= reader.budget
        spare = work if weights > 2 * block else 0
        assert peaks[weights] >= base + work + weights - spare - 8192, "memory is there and was not used"
        reader.release()
    assert read[block] == read[2 * block] == 6 * reader.nbytes(0, "body")
    walk()
    walk()
    before = reader.bytes_read
    walk()
    assert reader.bytes_read - before == 4 * reader.nbytes(0, "body"), "two blocks of four stay, two are in flight"


def test_a_walk_that_is_left_does_not_hang(tmp_path):
    stack, shards = make(tmp_path / "m", 6)
    reader = BlockReader(shards, stack, 0)
    for _, weights in reader.walk(range(6)):
        del weights
        break
    assert [index for index, _ in reader.walk(range(6))] == list(range(6))


def test_a_block_that_is_not_visited_is_never_read(tmp_path):
    stack, shards = make(tmp_path / "m", 5)
    (shards.path / shards.weight_map["blocks.3.up.weight"]).write_bytes(b"broken")
    (shards.path / shards.weight_map["blocks.0.up.weight"]).unlink()
    sweep.forward(stack, BlockReader(shards, stack, 0), samples(), range(1, 3))


def test_files_and_memory_are_back_at_their_start_after_a_sweep(tmp_path):
    stack, shards = make(tmp_path / "m", 5)
    tree = factors(5)
    mx.eval(tree)

    def once():
        reader = BlockReader(shards, stack, 0)
        run_backward(stack, reader, tree, range(5))

    once()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else len(os.listdir("/dev/fd"))
    active = mx.get_active_memory()
    once()
    gc.collect()
    assert mx.get_active_memory() == active
    now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else len(os.listdir("/dev/fd"))
    assert now == descriptors


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_damaged_shard_is_one_clear_error(tmp_path, damage, prefetch):
    stack, shards = make(tmp_path / "m", 5)
    path = shards.path / shards.weight_map["blocks.3.up.weight"]
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(UserError, match=path.name):
        sweep.forward(stack, BlockReader(Shards(shards.path), stack, 0, prefetch), samples())


def test_a_reader_that_fails_does_not_hang(tmp_path, monkeypatch):
    stack, shards = make(tmp_path / "m", 5)
    load = shards.load

    def failing(names, *more):
        names = list(names)
        if any("blocks.2" in n for n in names):
            raise OSError("the disk went away")
        return load(names, *more)

    monkeypatch.setattr(shards, "load", failing)
    with pytest.raises(OSError, match="went away"):
        sweep.forward(stack, BlockReader(shards, stack, 0), samples())


def test_a_path_with_gaps_needs_a_bridge_and_the_gradient_passes_it(tmp_path):
    stack, shards = make(tmp_path / "m", 5)
    reader, tree, path = BlockReader(shards, stack), factors(5), [1, 3]
    with pytest.raises(ValueError, match="no bridge"):
        run_backward(stack, reader, tree, path)
    crossed = []

    def bridge(i, start, stop, state):
        crossed.append((i, start, stop))
        return Pair(state.a + 0.25, state.b)

    _, grads = run_backward(stack, reader, tree, path, bridge=bridge)
    assert set(crossed) == {(i, *run) for i in range(2) for run in ((2, 3), (4, 5))}
    weights = dict(reader.walk(range(5)))

    def total(trainable):
        value = mx.array(0.0)
        for i, s in enumerate(samples()):
            state = s.state
            for b in path:
                state = apply(weights[b], trainable[str(b)], state, s.context, modulate(weights[b], s.context), None)
                state = Pair(state.a + 0.25, state.b)
            value = value + loss(i, state)
        return value

    reference = mx.grad(total)({str(b): tree[b] for b in path})
    for b in path:
        assert all(relative_error(grads[b][n], g) <= 1e-5 for n, g in reference[str(b)].items())


def test_taps_see_the_state_at_their_boundary(tmp_path):
    stack, shards = make(tmp_path / "m", 3)
    reader, seen = BlockReader(shards, stack), {}
    waiting = samples(1)
    taps = {b: lambda i, state, b=b: seen.__setitem__(b, state.a) for b in range(4)}
    sweep.forward(stack, reader, waiting, taps=taps)
    assert same_bits(seen[0], samples(1)[0].state.a)
    assert same_bits(seen[3], waiting[0].state.a)
    partial = samples(1)
    sweep.forward(stack, reader, partial, range(2))
    assert same_bits(seen[2], partial[0].state.a)


def test_a_tap_at_the_end_sees_what_the_bridge_makes_of_the_last_run(tmp_path):
    stack, shards = make(tmp_path / "m", 5)
    seen, waiting = [], samples(2)

    def bridge(i, start, stop, state):
        assert (start, stop) == (2, 5)
        return Pair(state.a + i + 1, state.b)

    taps = {5: lambda i, state: seen.append((i, state.a))}
    sweep.forward(stack, BlockReader(shards, stack), waiting, range(2), taps=taps, bridge=bridge)
    plain = samples(2)
    sweep.forward(stack, BlockReader(shards, stack), plain, range(2))
    assert [i for i, _ in seen] == [0, 1]
    for (i, crossed), before, after in zip(seen, plain, waiting, strict=True):
        assert same_bits(crossed, before.state.a + i + 1)
        assert same_bits(crossed, after.state.a)


def test_nothing_is_pulled_back_to_what_stands_before_the_first_block(tmp_path, monkeypatch):
    """What comes before does not train, so the first block's own gradient is of its factors alone."""
    stack, shards = make(tmp_path / "m", 5)
    pull_back, wanted = sweep._pull_back, {}

    def watched(block, weights, tree, sample, index, cotangent, wants_state):
        found = pull_back(block, weights, tree, sample, index, cotangent, wants_state)
        wanted[index] = len(found[0])
        return found

    monkeypatch.setattr(sweep, "_pull_back", watched)
    run_backward(stack, BlockReader(shards, stack), factors(5), range(1, 5))
    assert wanted == {4: 2, 3: 2, 2: 2, 1: 0}
