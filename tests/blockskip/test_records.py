"""The training record: what is written, read back and counted is the same."""

import mlx.core as mx
import pytest

from mlx_blockskip.blockskip import records
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.family import Tokens
from support.compare import same_bits

PLAN = SkipPlan(6, ((0, 1), (2, 3), (5, 6)))


def tokens(number):
    return Tokens(*(mx.array(philox.normal(2, number, part, shape=(2, 3, 4))) for part in range(2)))


def parts(number, count=2):
    return tuple(mx.array(philox.normal(3, number, i, shape=(2, 5))) for i in range(count))


def record(number):
    """Every tensor of one record, under the functions that name them."""
    start = records.of_samples([1.0, number], [2, 0]) | records.of_start(
        *parts(number, 1), {"time.embedded": parts(number + 50, 1)[0]}, parts(number + 60)
    )
    found = dict(start)
    for boundary in range(7):
        found |= records.of_boundary(PLAN, "base", boundary, tokens(10 * number + boundary))
    for block in PLAN.retained:
        found |= records.of_modulation(block, parts(100 * number + block))
    layout = records.layout(PLAN, "base", tokens(0), start, lambda block: parts(block))
    return found, layout


def written(path):
    """A chunk of micro-batches 3 and 4, and of prompts 0 and 2."""
    both = {number: record(number) for number in (3, 4)}
    prompts = records.of_prompt(0, {"text": parts(7, 1)[0]}) | records.of_prompt(2, {"text": parts(8, 1)[0]})
    entries = records.entries_of(prompts)
    layouts = {number: layout for number, (_, layout) in both.items()}
    with records.writing(path, layouts, prompts, "made of this") as write:
        for number, (tensors, _) in reversed(both.items()):
            for name, value in tensors.items():
                write(number, {name: value})
    return layouts, entries


def test_a_record_gives_back_what_was_put_into_it(tmp_path):
    path = tmp_path / "chunk.safetensors"
    written(path)
    chunk = records.Chunk(path)
    for number in (3, 4):
        for name, boundary in (("entry", 1), ("run2.start", 2), ("run2.stop", 3), ("run5.start", 5), ("run5.stop", 6)):
            found, expected = chunk.tokens(number, name), tokens(10 * number + boundary)
            assert same_bits(found.image, expected.image)
            assert found.text is None if boundary >= 5 else same_bits(found.text, expected.text)
        assert same_bits(chunk.target(number), parts(number, 1)[0])
        assert chunk.weight(number).tolist() == [[[[1.0]]], [[[float(number)]]]]
        conditioning = chunk.conditioning(number)
        assert set(conditioning) == {"time.embedded", "text"}
        assert same_bits(conditioning["time.embedded"], parts(number + 50, 1)[0])
        joined = mx.concatenate([parts(8, 1)[0], parts(7, 1)[0]])
        assert same_bits(conditioning["text"], joined), "of each sample's own prompt, in order"
        for block in PLAN.retained:
            expected = parts(100 * number + block)
            assert all(same_bits(a, b) for a, b in zip(chunk.modulation(number)(block), expected, strict=True))
        assert chunk.modulation(number)(0) is None
        assert all(same_bits(a, b) for a, b in zip(chunk.final_modulation(number), parts(number + 60), strict=True))


def test_what_is_counted_is_what_is_written(tmp_path):
    path = tmp_path / "chunk.safetensors"
    layouts, prompts = written(path)
    stored = files.read_header(path).entries
    for number, layout in layouts.items():
        own = {name: entry for name, entry in stored.items() if name.startswith(f"{number}.")}
        assert set(own) == {entry.name for entry in layout.entries(number)}
        assert sum(entry.nbytes for entry in own.values()) == layout.nbytes
    assert abs(path.stat().st_size - records.chunk_bytes(layouts, prompts)) < 64  # the fingerprint's own length


def test_a_chunk_with_a_tensor_that_is_missing_or_not_announced_never_appears(tmp_path):
    path = tmp_path / "chunk.safetensors"
    tensors, layout = record(3)
    for wrong in ({"target": tensors["target"]}, {"another": tensors["target"]}):
        with (
            pytest.raises(ValueError, match="not written|not what was announced"),
            records.writing(path, {3: layout}, {}, "x") as write,
        ):
            write(3, wrong)
        assert not path.exists()


def test_only_a_whole_chunk_with_its_own_fingerprint_is_valid(tmp_path):
    path = tmp_path / "chunk.safetensors"
    assert not records.valid(path, "made of this")
    written(path)
    assert records.valid(path, "made of this")
    assert not records.valid(path, "made of that")
    assert records.fingerprint({"a": 1, "b": 2}) == records.fingerprint({"b": 2, "a": 1})
    assert records.fingerprint({"a": 1}) != records.fingerprint({"a": 2})
