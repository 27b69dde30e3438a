"""Token ids from a checkpoint's tokenizer directory, as transformers' tokenizers of CLIP, T5 and Gemma give them."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
GEMMA_START = "<bos>"
CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
PIECES = {"spiece.model": "T5Tokenizer", "tokenizer.model": "GemmaTokenizer"}
"""What sentencepiece's file is called by the classes that write it."""
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    """((B, length) int32, for each prompt whether it was cut): start, tokens, end, then padding."""
    return _ids(path, prompts, length)


def t5_ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    """((B, length) int32, for each prompt whether it was cut): tokens, end, then padding."""
    return _ids(path, prompts, length)


def gemma_ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """(ids (B, length) int32, mask (B, length) int32, for each prompt whether it was cut): start, tokens, padding.

    mask: 1 for the start and the tokens, 0 for padding, which is always on the right.
    """
    tokenizer, pad = _tokenizer(path)
    _starts(path, tokenizer)
    ids, cut, counts = _encoded(tokenizer, pad, prompts, length)
    return ids, (np.arange(length) < counts[:, None]).astype(np.int32), cut


def _ids(path: Path, prompts: Sequence[str], length: int) -> tuple[np.ndarray, list[bool]]:
    ids, cut, _ = _encoded(*_tokenizer(path), prompts, length)
    return ids, cut


def _encoded(
    tokenizer: Tokenizer, pad: int, prompts: Sequence[str], length: int
) -> tuple[np.ndarray, list[bool], np.ndarray]:
    """(ids (B, length), whether each prompt was cut, how many ids of each are not padding (B,))."""
    rows, cut, counts = [], [], []
    specials = tokenizer.num_special_tokens_to_add(is_pair=False)
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
        cut.append(len(tokens) > length - specials)
        tokenizer.enable_truncation(length)
        ids = tokenizer.encode(prompt).ids
        tokenizer.no_truncation()
        rows.append(ids + [pad] * (length - len(ids)))
        counts.append(len(ids))
    return np.array(rows, np.int32).reshape(len(prompts), length), cut, np.array(counts, np.int32)


def _starts(path: Path, tokenizer: Tokenizer) -> None:
    """Have every prompt start with Gemma's start token, also where tokenizer.json leaves that to transformers 4."""
    token = _text(_declared(path).get("bos_token")) or GEMMA_START
    start = tokenizer.token_to_id(token)
    if start is None:
        raise UserError(f"{path}: its start token {token!r} is not in its vocabulary; get the tokenizer again")
    if tokenizer.encode("").ids[:1] != [start]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, start)]
        )


@lru_cache(maxsize=4)
def _tokenizer(path: Path) -> tuple[Tokenizer, int]:
    """The tokenizer and the id of its padding token."""
    config = _declared(path)
    if (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    elif config.get("tokenizer_class", CLIP[0]) in CLIP and not any((path / file).is_file() for file in PIECES):
        tokenizer = _clip(path, config)
    else:
        tokenizer = _converted(path, config)
    token = _text(config.get("pad_token")) or ("<pad>" if tokenizer.token_to_id("<pad>") is not None else CLIP_END)
    pad = tokenizer.token_to_id(token)
    if pad is None:
        raise UserError(f"{path}: its padding token {token!r} is not in its vocabulary; get the tokenizer again")
    return tokenizer, pad


def _declared(path: Path) -> dict[str, Any]:
    """What a directory says of its tokenizer; a tokenizer may be written without either file, and then says nothing."""
    said = [path / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for file in said if file.is_file() for key, value in files.read_json(file).items()}


def _clip(path: Path, config: dict[str, Any]) -> Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt, as in FLUX.1's own checkpoints. Source: CLIPTokenizer."""
    start, end, unknown = (
        _text(config.get(f"{kind}_token")) or default
        for kind, default in (("bos", CLIP_START), ("eos", CLIP_END), ("unk", CLIP_END))
    )
    vocab, merges = path / "vocab.json", path / "merges.txt"
    for file in (vocab, merges):
        if not file.is_file():
            raise UserError(f"{file}: this part of the tokenizer is missing; get the tokenizer again")
    try:
        tokenizer = Tokenizer(
            models.BPE.from_file(str(vocab), str(merges), unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False)
        )
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: vocab.json and merges.txt do not make a tokenizer ({error}); get it again") from error
    start_id, end_id = tokenizer.token_to_id(start), tokenizer.token_to_id(end)
    if start_id is None or end_id is None:
        raise UserError(f"{vocab}: has no {start!r} or no {end!r}; get the tokenizer again")
    lower = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(lower)
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing((end, end_id), (start, start_id), False, False)
    declared = [config.get("bos_token"), config.get("eos_token"), *config.get("added_tokens_decoder", {}).values()]
    known = {token["content"]: token for token in declared if isinstance(token, dict)}
    tokenizer.add_special_tokens([_added(token, known.get(token, {})) for token in (start, end)])
    return tokenizer


def _added(content: str, declared: dict[str, Any]) -> AddedToken:
    """A special token. Where it is `normalized` it is looked for in the lower-cased prompt, else as it is written."""
    flags = {flag: bool(declared.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, special=True, **flags)


def _converted(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Another directory without tokenizer.json: transformers converts it, by the class that is declared, else by that
    whose file is there.
    """
    import transformers

    known = next((kind for file, kind in PIECES.items() if (path / file).is_file()), "AutoTokenizer")
    kind = "AutoTokenizer" if config.get("tokenizer_class") else known
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(str(path), local_files_only=True)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{path}: not a tokenizer that transformers can read ({error})") from error


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
