"""Token ids from a checkpoint's tokenizer directory, as transformers' CLIPTokenizer and T5TokenizerFast give them."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError


def clip_ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    """((B, length) int32, for each prompt whether it was cut): start, tokens, end, then padding."""
    return _ids(path, prompts, length)


def t5_ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    """((B, length) int32, for each prompt whether it was cut): tokens, end, then padding."""
    return _ids(path, prompts, length)


def _ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    tokenizer, pad = _tokenizer(path)
    rows, cut = [], []
    specials = tokenizer.num_special_tokens_to_add(is_pair=False)
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
        cut.append(len(tokens) > length - specials)
        tokenizer.enable_truncation(length)
        ids = tokenizer.encode(prompt).ids
        tokenizer.no_truncation()
        rows.append(ids + [pad] * (length - len(ids)))
    return np.array(rows, np.int32).reshape(len(prompts), length), cut


@lru_cache(maxsize=4)
def _tokenizer(path: Path) -> tuple[Tokenizer, int]:
    """The tokenizer and the id of its padding token."""
    config = files.read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    else:
        tokenizer = _slow(path)
    token = _text(config.get("pad_token")) or "<pad>"
    pad = tokenizer.token_to_id(token)
    if pad is None:
        raise UserError(f"{path}: its padding token {token!r} is not in its vocabulary; get the tokenizer again")
    return tokenizer, pad


def _slow(path: Path) -> Tokenizer:
    """A directory without tokenizer.json (vocab.json and merges.txt, or spiece.model): transformers converts it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{path}: not a tokenizer that transformers can read ({error})") from error


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
