"""Eq. 3, and what a record keeps of the tokens."""

import mlx.core as mx
import numpy as np
from support.compare import relative_error, same_bits

from mlx_blockskip.blockskip import residuals
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.family import Tokens


def tokens(number):
    return Tokens(*(mx.array(philox.normal(2, number, part, shape=(2, 3, 4))) for part in range(2)))


def test_equation_three_is_exact_while_nothing_has_changed():
    first, last = (
        Tokens(mx.array(philox.normal(0, i, shape=(2, 3))), mx.array(philox.normal(1, i, shape=(2, 3)))) for i in (0, 1)
    )
    crossed = residuals.cross(first, last, first)
    assert same_bits(crossed.image, last.image)
    assert same_bits(crossed.text, last.text)
    moved = residuals.cross(first, last, Tokens(first.image + 1, first.text))
    assert np.allclose(np.array(moved.image), np.array(last.image + 1), atol=1e-6)
    text_dropped = residuals.cross(Tokens(first.image), Tokens(last.image), first)
    assert same_bits(text_dropped.text, first.text)


def test_equation_three_adds_what_training_changed_to_image_and_text_alike():
    at_start, at_stop, own = (tokens(i) for i in range(3))
    crossed = residuals.cross(at_start, at_stop, own)
    for name in ("image", "text"):
        start, stop, now = (np.array(getattr(t, name), np.float64) for t in (at_start, at_stop, own))
        assert relative_error(getattr(crossed, name), now + (stop - start)) <= 1e-6


def test_a_record_gives_back_what_was_put_into_it(tmp_path):
    """Two records and two prompts: tokens with and without text, what the context holds, and both modulations."""
    kept = {(number, name): tokens(10 * number + len(name)) for number in range(2) for name in ("entry", "run4.start")}
    written = {}
    for (number, name), value in kept.items():
        found = residuals.named(name, value, text=name == "entry")
        assert set(found) == {f"{name}.image"} | ({f"{name}.text"} if name == "entry" else set())
        written |= {f"{number}.{key}": array for key, array in found.items()}
    parts = [mx.array(philox.normal(3, i, shape=(2, 5))) for i in range(9)]
    written |= {"0.target": parts[0], "1.target": parts[1], "1.context.embedded.time": parts[2]}
    written |= {"prompt.0.text": parts[3], "prompt.2.text": parts[4], "prompt.1.text": parts[0]}
    written |= {"1.modulation.3.0": parts[5], "1.modulation.3.1": parts[6], "1.head.0": parts[7], "1.head.1": parts[8]}
    files.save_tensors(tmp_path / "chunk.safetensors", written)
    chunk = residuals.Chunk(tmp_path / "chunk.safetensors")
    for (number, name), value in kept.items():
        found = chunk.tokens(number, name)
        assert same_bits(found.image, value.image)
        assert found.text is None if name != "entry" else same_bits(found.text, value.text)
    assert same_bits(chunk.target(1), parts[1])
    context = chunk.context(1, [2, 0])
    assert set(context) == {"embedded.time", "text"}
    assert same_bits(context["embedded.time"], parts[2])
    assert same_bits(context["text"], mx.concatenate([parts[4], parts[3]])), "of each sample's own prompt, in order"
    assert all(same_bits(a, b) for a, b in zip(chunk.modulation(1)(3), parts[5:7], strict=True))
    assert chunk.modulation(1)(4) is None
    assert all(same_bits(a, b) for a, b in zip(chunk.head_modulation(1), parts[7:], strict=True))
    assert chunk.head_modulation(0) is None


def test_a_layout_knows_names_and_bytes_of_what_is_written(tmp_path):
    layout = residuals.Layout({"target": ((2, 3), "F32"), "entry.image": ((2, 5, 4), "BF16")})
    assert [entry.name for entry in layout.entries(7)] == ["7.target", "7.entry.image"]
    assert layout.nbytes == 4 * 2 * 3 + 2 * 2 * 5 * 4
    written = {"7.target": mx.ones((2, 3)), "7.entry.image": mx.ones((2, 5, 4), mx.bfloat16)}
    files.save_tensors(tmp_path / "chunk.safetensors", written)
    entries = files.read_header(tmp_path / "chunk.safetensors").entries
    assert {entry.name: (entry.shape, entry.dtype) for entry in layout.entries(7)} == {
        name: (tuple(entry.shape), entry.dtype) for name, entry in entries.items()
    }
    assert layout.nbytes == sum(entry.nbytes for entry in entries.values())


def test_a_bridge_crosses_with_the_record_of_the_sample_s_own_micro_batch(tmp_path):
    ends = {(number, end): tokens(10 * number + i) for number in (5, 6) for i, end in enumerate(("start", "stop"))}
    written = {
        f"{number}.{key}": array
        for (number, end), value in ends.items()
        for key, array in residuals.named(f"run4.{end}", value, text=True).items()
    }
    files.save_tensors(tmp_path / "chunk.safetensors", written)
    chunk, own = residuals.Chunk(tmp_path / "chunk.safetensors"), tokens(99)
    over = residuals.bridge(chunk, [6, 5], "base")
    for sample, number in enumerate((6, 5)):
        crossed = over(sample, 4, 7, own)
        expected = residuals.cross(ends[number, "start"], ends[number, "stop"], own)
        assert same_bits(crossed.image, expected.image)
        assert same_bits(crossed.text, expected.text)
    passed = residuals.bridge(chunk, [6, 5], "none")(0, 4, 7, own)
    assert same_bits(passed.image, own.image)
    assert same_bits(passed.text, own.text)


def test_tokens_that_have_no_text_are_kept_without():
    assert set(residuals.named("entry", Tokens(mx.ones((1, 2))), text=True)) == {"entry.image"}


def test_a_fingerprint_depends_on_every_value_and_on_no_order(tmp_path):
    one, other = residuals.fingerprint({"seed": 1, "model": "a"}), residuals.fingerprint({"model": "a", "seed": 1})
    assert one == other != residuals.fingerprint({"seed": 2, "model": "a"})
    path = tmp_path / "chunk.safetensors"
    assert not residuals.valid(path, one), "it is not there"
    entry = files.TensorEntry("0.target", (1,), "F32")
    with files.SafetensorsWriter(path, [entry], {residuals.FINGERPRINT: one}) as writer:
        writer.write("0.target", mx.zeros((1,)))
    assert residuals.valid(path, one)
    assert not residuals.valid(path, residuals.fingerprint({}))


def test_the_trailing_run_keeps_image_tokens_only():
    plan = SkipPlan(12, ((0, 2), (4, 6), (10, 12)))
    assert residuals.boundaries(plan, "base") == {
        2: ["entry"], 4: ["run4.start"], 6: ["run4.stop"], 10: ["run10.start"], 12: ["run10.stop"],
    }  # fmt: skip
    assert residuals.boundaries(plan, "none") == {0: ["entry"]}
    assert [residuals.keeps_text(plan, b) for b in (2, 4, 6, 10, 12)] == [True, True, True, False, False]
