"""Prompts as a language model is asked: put into its checkpoint's chat template, and then token ids."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_blockskip.engine.errors import UserError


class Asked(NamedTuple):
    """ids, masks: (1, L) int32 for each prompt, 1 for a token and 0 for padding, which is on the right. truncated: for
    each whether it was cut.
    """

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    truncated: list[bool]


def asked(path: Path, prompts: Sequence[str], length: int, *, thinking: bool, padded: bool) -> Asked:
    """Each prompt as the one turn of its user, and the beginning of an answer.

    thinking: whether the template leaves room for thoughts (`enable_thinking`). padded: to `length` tokens; else each
    has its own number, at most that. Raises UserError for a directory without a tokenizer or a template.
    """
    tokenizer = _tokenizer(path)
    found = Asked([], [], [])
    for prompt in prompts:
        every = tokenizer(_rendered(path, tokenizer, prompt, thinking)).input_ids
        kept = every[:length]
        blank = length - len(kept) if padded else 0
        found.ids.append(np.array([kept + [tokenizer.pad_token_id] * blank], np.int32))
        found.masks.append(np.array([[1] * len(kept) + [0] * blank], np.int32))
        found.truncated.append(len(every) > length)
    return found


def _rendered(path: Path, tokenizer: Any, prompt: str, thinking: bool) -> str:
    turn = {"role": "user", "content": prompt}
    try:
        return str(
            tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        )
    except Exception as error:  # jinja2 raises many kinds here, and so does transformers
        raise UserError(f"{path}: its chat template cannot be used ({error}); get the tokenizer again") from error


@lru_cache(maxsize=4)
def _tokenizer(path: Path) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{path}: not a tokenizer that transformers can read ({error})") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: has no chat template (chat_template.jinja); get the tokenizer again")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: names no padding token; get the tokenizer again")
    return tokenizer
