"""What is said of prompts: notation of other tools, lengths, and negatives without effect; each once."""

import pytest

from mlx_blockskip import generate
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, listening
from mlx_blockskip.models.family import Encoded
from mlx_blockskip.tasks import prompts


def warned(task, *arguments, **options):
    events = []
    with listening(events.append):
        task(*arguments, **options)
    return [event.message for event in events if isinstance(event, Warning)]


@pytest.mark.parametrize("prompt", ["a (dog:1.4)", "(a big dog : .8) on red", "((dog:1.2))"])
def test_weights_are_said_to_be_words(prompt):
    (said,) = warned(prompts.warn_of_syntax, ["a dog", prompt, prompt + " again"])
    assert "weighs words of a prompt, which is not read here but taken as plain words" in said


@pytest.mark.parametrize("prompt", ["<lora:dog:0.8> a dog", "a dog <LoRA:dog>", "<lyco:x:1>"])
def test_adapters_in_prompts_are_said_to_be_words(prompt):
    (said,) = warned(prompts.warn_of_syntax, [prompt, prompt])
    assert said.endswith("give --adapter-path and --lora-scale")


@pytest.mark.parametrize("prompt", ["a dog (at 10:30)x", "a dog: red", "(a dog)", "<b>", "a dog <3", "ratio 1:2"])
def test_usual_prompts_are_not(prompt):
    assert not warned(prompts.warn_of_syntax, [prompt]) or prompt == "a dog (at 10:30)x"


def test_lengths_are_said_once():
    cut = Encoded([], [False, True, True, False], ["CLIP's 77 tokens"] * 2 + [""] + ["CLIP's 77 tokens"])
    assert warned(prompts.warn_of_length, ["a", "b", "c", "d"], cut, 128) == [
        "2 prompts are longer than 128 tokens and were cut: b",
        "2 prompts are longer than CLIP's 77 tokens; this encoder sees the beginning only: a",
    ]
    assert warned(prompts.warn_of_length, ["x" * 500], Encoded([], [True]), 4, "caption") == [
        f"the caption is longer than 4 tokens and was cut: {'x' * 76} ...",
    ]


def test_generate_says_them(tiny_flux, tmp_path):
    how = {"model": str(tiny_flux), "steps": 1, "width": 32, "height": 32, "memory_budget": "any"}
    how |= {"max_sequence_length": 128, "output": str(tmp_path / "a.png"), "overwrite": True}
    said = warned(generate, prompt=["a dog on a mat " * 15 + "(red:2)"], negative_prompt="a cat", cfg_scale=1, **how)
    assert [text.split(":")[0] for text in said] == [
        "--negative-prompt", "(red", "the prompt is longer than CLIP's 77 tokens; this encoder sees the beginning only",
    ]  # fmt: skip
    assert not warned(generate, "a dog", negative_prompt="a cat", cfg_scale=2, **how)


def test_a_file_of_prompts_is_read_within_bounds(tmp_path, monkeypatch):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa dog\r\n\r\n  a cat \n")
    assert prompts.read_lines(str(path), "--x") == ["a dog", "a cat"]
    monkeypatch.setattr(prompts, "MOST_BYTES", 4)
    with pytest.raises(UserError, match=r"p\.txt: is larger than .*; --x takes a prompt a line"):
        prompts.read_lines(str(path), "--x")
    with pytest.raises(UserError, match="not readable as text"):
        prompts.read_lines("a\0b", "--x")
