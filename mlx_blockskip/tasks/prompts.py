"""What is said of prompts before they are drawn or learned."""

import re
from collections.abc import Sequence
from pathlib import Path

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, emit
from mlx_blockskip.models.family import Encoded
from mlx_blockskip.options import shown
from mlx_blockskip.tasks.defaults import DrawConfig

MOST_BYTES = 16 << 20
"""Of a file of prompts."""

LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>", re.I)
WEIGHTED = re.compile(r"\([^()]{1,200}:\s*\d*\.?\d+\s*\)")


def read_lines(file: str, option: str) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError, which names the option."""
    try:
        with Path(file).expanduser().open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{file}: is larger than {MOST_BYTES >> 20} MB; {option} takes a prompt a line")
        lines = content.decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {option} takes a text file with a prompt a line") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: not readable as text ({reason}); {option} takes a prompt a line") from None
    return [line.strip() for line in lines if line.strip()]


def warn_of_syntax(prompts: Sequence[str]) -> None:
    """Say once what of other tools' notation is taken as plain words here."""
    for pattern, what, way_out in (
        (LORA_TAG, "names an adapter inside a prompt", "give --adapter-path and --lora-scale"),
        (WEIGHTED, "weighs words of a prompt", "say it in words"),
    ):
        found = next((match[0] for prompt in prompts if (match := pattern.search(prompt))), None)
        if found is not None:
            emit(Warning(f"{found}: {what}, which is not read here but taken as plain words; {way_out}"))


def warn_of_length(texts: Sequence[str], encoded: Encoded, length: int, what: str = "prompt") -> None:
    """Say once which texts were cut, and of which an encoder of fewer tokens saw the beginning only."""
    cut = [text for text, one in zip(texts, encoded.truncated, strict=True) if one]
    _warn(cut, what, f"longer than {length} tokens and {'were' if len(cut) > 1 else 'was'} cut")
    part = [text for text, one in zip(texts, encoded.partial, strict=False) if one and text not in cut]
    room = next((one for one in encoded.partial if one), "")
    _warn(part, what, f"longer than {room}; this encoder sees the beginning only")


def _warn(texts: Sequence[str], what: str, how: str) -> None:
    if texts:
        several = f"{len(texts)} {what}s are" if len(texts) > 1 else f"the {what} is"
        emit(Warning(f"{several} {how}: {shown(texts[0])}"))


def check_negative(config: DrawConfig) -> None:
    """Say that what is not to be shown has no effect, where it has none."""
    if config.negative_prompt and not config.guided:
        emit(Warning("--negative-prompt: has no effect without guidance; give a --cfg-scale above 1"))
