"""Prompts in a checkpoint's chat template, as diffusers' pipelines put them."""

import shutil

import numpy as np
import pytest

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.text import chat
from support.models import assets

TOKENIZER = assets() / "chat-tokenizer" / "tokenizer"
PROMPTS = ["a small cat", "", "two\n dogs' <|im_end|>"]


def text_of(row):
    return chat._tokenizer(TOKENIZER).decode(row)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_ids_are_those_of_diffusers(thinking):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    length = 36
    found = chat.asked(TOKENIZER, PROMPTS, length, thinking=thinking, padded=True)
    for prompt, ids, mask in zip(PROMPTS, found.ids, found.masks, strict=True):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        assert ("<think>" in text) is not thinking
        wanted = tokenizer(text, return_tensors="np", padding="max_length", truncation=True, max_length=length)
        np.testing.assert_array_equal(ids, wanted["input_ids"])
        np.testing.assert_array_equal(mask, wanted["attention_mask"])
    assert found.truncated == [False, False, not thinking]


def test_without_padding_each_prompt_has_its_own_length():
    found = chat.asked(TOKENIZER, PROMPTS, 48, thinking=True, padded=False)
    assert [ids.shape for ids in found.ids] == [mask.shape for mask in found.masks]
    assert len({ids.shape for ids in found.ids}) == 3
    assert all(mask.all() for mask in found.masks)
    assert text_of(found.ids[0][0]) == "<|im_start|>user\na small cat<|im_end|>\n<|im_start|>assistant\n"
    short = chat.asked(TOKENIZER, PROMPTS, 9, thinking=True, padded=False)
    assert short.truncated == [True] * 3
    assert all(np.array_equal(ids, whole[:, :9]) for ids, whole in zip(short.ids, found.ids, strict=True))


def test_what_is_no_tokenizer_or_has_no_template_is_said(tmp_path):
    def refused(name, why):
        with pytest.raises(UserError, match=why):
            chat.asked(tmp_path / name, ["a"], 9, thinking=True, padded=True)

    (tmp_path / "empty").mkdir()
    refused("empty", "empty: not a tokenizer that transformers can read")
    for name in ("plain", "broken", "unpadded"):
        shutil.copytree(TOKENIZER, tmp_path / name)
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    refused("plain", "plain: has no chat template")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{% for %}")
    refused("broken", "broken: its chat template cannot be used")
    config = files.read_json(TOKENIZER / "tokenizer_config.json")
    files.write_json(tmp_path / "unpadded" / "tokenizer_config.json", {**config, "pad_token": None})
    refused("unpadded", "unpadded: names no padding token")
