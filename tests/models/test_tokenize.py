"""Tokenizer directories of every layout: CLIP's from vocab.json and merges.txt, as FLUX.1's own checkpoints have it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.text import tokenize
from support.golden import GOLDEN, PROMPTS
from support.models import assets
from support.sana import gemma_tokenizer

ROOT = Path(__file__).parents[2]

TEXTS = [
    *(*PROMPTS, "", "UPPER case", "ünïcødé 🦔 日本", "word " * 200, "a  b\tc\n d", "don't I'M they'RE 123abc !!?..."),
    *(
        "e\u0301 ﬁ İ ß ẞ",
        "<|endoftext|> x <|startoftext|>",
        "<|StartOfText|> y",
        "\u00a0nbsp\u3000wide ",
        "\x00\x07",
        "“quoted”—dash a_b/c",
    ),
]
START, END = "<|startoftext|>", "<|endoftext|>"
PLAIN = {"bos_token": START, "eos_token": END}
DECODER = {
    "added_tokens_decoder": {
        "2220": {"content": START, "lstrip": False, "normalized": True, "special": True},
        "2221": {"content": END, "lstrip": False, "normalized": False, "special": True},
    }
}
TYPED = {
    key: {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True}
    for key, content in PLAIN.items()
}
"""How configs of different ages declare the special tokens."""


@pytest.fixture
def old_layout(tmp_path):
    """tiny-flux's CLIP tokenizer without its tokenizer.json."""
    model = json.loads((assets() / "tiny-flux" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    path = tmp_path / "tokenizer"
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    declare(path, PLAIN)
    return path


def declare(path, special):
    config = {"tokenizer_class": "CLIPTokenizer", "unk_token": END, "pad_token": END, "model_max_length": 77}
    (path / "tokenizer_config.json").write_text(json.dumps(config | special), encoding="utf-8")


@pytest.mark.parametrize("special", [PLAIN, DECODER | PLAIN, TYPED], ids=["plain", "decoder", "typed"])
def test_vocabulary_and_merges_give_the_ids_of_transformers(old_layout, special):
    pytest.importorskip("torch")
    from transformers import CLIPTokenizer

    declare(old_layout, special)
    reference = CLIPTokenizer.from_pretrained(str(old_layout))
    theirs = reference(TEXTS, padding="max_length", max_length=77, truncation=True)["input_ids"]
    ids, cut = tokenize.clip_ids(old_layout, TEXTS, 77)
    np.testing.assert_array_equal(ids, np.array(theirs))
    assert cut == [text.startswith("word word") for text in TEXTS]
    ids, _ = tokenize.clip_ids(old_layout, PROMPTS, 77)
    np.testing.assert_array_equal(ids, np.array(GOLDEN["clip_input_ids"]))


def test_vocabulary_and_merges_are_read_without_transformers(old_layout):
    code = (
        "import sys; from pathlib import Path; from mlx_blockskip.models.text import tokenize;"
        f"tokenize.clip_ids(Path({str(old_layout)!r}), ['a'], 77); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_or_broken_file_is_named(old_layout, tmp_path, file):
    copy = shutil.copytree(old_layout, tmp_path / "missing")
    (copy / file).unlink()
    with pytest.raises(UserError, match=file):
        tokenize.clip_ids(copy, ["a"], 77)
    broken = shutil.copytree(old_layout, tmp_path / "broken")
    (broken / file).write_text("{ no", encoding="utf-8")
    with pytest.raises(UserError, match=file):
        tokenize.clip_ids(broken, ["a"], 77)


@pytest.mark.parametrize("length", [3, 24, 512])
def test_t5_ids_are_cut_and_padded_as_by_transformers(length):
    pytest.importorskip("torch")
    from transformers import T5TokenizerFast

    path = assets() / "tiny-flux" / "tokenizer_2"
    reference = T5TokenizerFast.from_pretrained(str(path))
    theirs = reference(TEXTS, padding="max_length", max_length=length, truncation=True)["input_ids"]
    ids, cut = tokenize.t5_ids(path, TEXTS, length)
    np.testing.assert_array_equal(ids, np.array(theirs))
    whole = [len(reference(text)["input_ids"]) for text in TEXTS]
    assert cut == [count > length for count in whole]


@pytest.fixture(params=["starts by itself", "does not"])
def gemma(request, tmp_path):
    return gemma_tokenizer(tmp_path / "tokenizer", PROMPTS, starts=request.param == "starts by itself")


@pytest.mark.parametrize("length", [3, 24, 512])
def test_gemma_ids_start_are_cut_and_padded_on_the_right_as_by_transformers(gemma, length):
    pytest.importorskip("torch")
    from transformers import GemmaTokenizer

    reference = GemmaTokenizer.from_pretrained(str(gemma), padding_side="right")
    start = "" if reference("")["input_ids"] else "<bos>"
    started = [start + text for text in TEXTS]
    theirs = reference(started, padding="max_length", max_length=length, truncation=True)
    ids, mask, cut = tokenize.gemma_ids(gemma, TEXTS, length)
    assert (ids[:, 0] == 2).all()
    np.testing.assert_array_equal(ids, np.array(theirs["input_ids"]))
    np.testing.assert_array_equal(mask, np.array(theirs["attention_mask"]))
    assert cut == [len(reference(text)["input_ids"]) > length for text in started]


def test_gemma_ids_without_a_start_token_are_refused(gemma):
    config = json.loads((gemma / "tokenizer_config.json").read_text(encoding="utf-8"))
    (gemma / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}), encoding="utf-8")
    with pytest.raises(UserError, match="start token '<s>'"):
        tokenize.gemma_ids(gemma, ["a"], 8)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """T5's tokenizer as sentencepiece wrote it, and nothing beside it."""
    spm = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("t5")
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    words = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(path / "spiece"), vocab_size=300, minloglevel=2, **ids
    )
    (path / "spiece.vocab").unlink()
    return path


@pytest.mark.parametrize("declared", [{}, {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "extra_ids": 100}])
def test_sentencepieces_own_file_is_read_with_and_without_a_config(pieces, tmp_path, declared):
    import sentencepiece

    path = shutil.copytree(pieces, tmp_path / "tokenizer_2")
    if declared:
        (path / "tokenizer_config.json").write_text(json.dumps(declared), encoding="utf-8")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    texts = ["a photo of sks dog, on a beach", "", "Memory  budget 2GB"]
    theirs = np.zeros((3, 48), np.int32)
    for row, text in zip(theirs, texts, strict=True):
        found = [*reference.encode(text), reference.eos_id()]
        row[: len(found)] = found
    np.testing.assert_array_equal(tokenize.t5_ids(path, texts, 48)[0], theirs)


def test_vocabulary_and_merges_alone_are_clips(old_layout, tmp_path):
    declare(old_layout, PLAIN)
    expected, _ = tokenize.clip_ids(old_layout, PROMPTS, 77)
    bare = shutil.copytree(old_layout, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    ids, _ = tokenize.clip_ids(bare, PROMPTS, 77)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_tokenizer_json_alone_gives_the_same_ids(tmp_path, folder):
    whole = assets() / "tiny-flux" / folder
    (tmp_path / folder).mkdir()
    shutil.copy(whole / "tokenizer.json", tmp_path / folder)
    read = tokenize.clip_ids if folder == "tokenizer" else tokenize.t5_ids
    np.testing.assert_array_equal(read(tmp_path / folder, PROMPTS, 77)[0], read(whole, PROMPTS, 77)[0])
