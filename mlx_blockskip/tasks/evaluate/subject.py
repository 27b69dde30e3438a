"""What an evaluation shows and asks: how prompts call the subject, and lists of prompts with `{}` where it goes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.settings import EvaluateSettings
from mlx_blockskip.tasks.captions import common_words
from mlx_blockskip.tasks.checkpoint import encoders
from mlx_blockskip.tasks.prompts import read_lines

PLACE = "{}"
SUBJECT_KINDS = {"object": "objects", "living": "living", "plain": "plain"}
LEAD_IN = re.compile(r"^((an?|the)\s+)?([a-z-]+\s+)?(photo|photograph|picture|image|painting|drawing)\s+of\s+", re.I)
ARTICLE = re.compile(r"^(an?|the|one)\s+", re.I)
AFTER = re.compile(r"[,.;:]|\s(on|in|at|with|under|beside|by|near|before|behind|against|over|of|and|is|are)\b", re.I)
"""Where a caption stops naming the subject and goes on to where it is."""


@dataclass(frozen=True)
class Subject:
    """phrase: what stands for `{}` when images are made. noun: what stands there when they are compared with texts."""

    phrase: str
    noun: str


@dataclass(frozen=True)
class Prompts:
    """Prompts with `{}` for the subject, and prompts without it."""

    subject: list[str]
    others: list[str]


def subject_of(captions: Sequence[str], phrase: str | None = None, noun: str | None = None) -> Subject:
    """How the captions call the subject, where `phrase` does not say: "a photo of sks dog" calls it "sks dog".

    The noun is the phrase without its first word, the identifier: an encoder of texts does not know that one.
    Raises UserError where captions have no words in common.
    """
    if phrase is None:
        words = ARTICLE.sub("", LEAD_IN.sub("", common_words(captions)))
        phrase = AFTER.split(f" {words}", maxsplit=1)[0].strip()
        if not phrase:
            raise UserError(
                "--subject: the captions have no words in common that name the subject; "
                "name it, e.g. --subject 'sks dog'"
            )
    elif not phrase.strip():
        raise UserError("--subject: is empty; say how prompts call the subject, e.g. 'sks dog'")
    return Subject(phrase, noun or " ".join(phrase.split()[1:]) or phrase)


def shipped(name: str) -> list[str]:
    """A list of prompts in the package, by its name."""
    path = resources.files("mlx_blockskip") / "assets" / "prompts" / f"{name}.txt"
    return path.read_text(encoding="utf-8").splitlines()


def read_list(file: str, *, names_subject: bool, option: str) -> list[str]:
    """A prompt a line; empty lines are passed over. Raises UserError where a line names the subject, or does not."""
    prompts = list(dict.fromkeys(read_lines(file, option)))
    if not prompts:
        raise UserError(f"{file}: holds no prompts; {option} takes a prompt a line")
    for prompt in prompts:
        if (PLACE in prompt) != names_subject:
            way_out = f"write {PLACE} where the subject goes" if names_subject else f"{option} are without {PLACE}"
            raise UserError(f"{file}: {prompt!r}: {way_out}")
    return prompts


def given_prompts(settings: EvaluateSettings) -> Prompts:
    """The prompts in the user's own files; none where there is no file."""
    own, others = settings.prompts, settings.drift_prompts
    return Prompts(
        read_list(own, names_subject=True, option="--prompts") if own else [],
        read_list(others, names_subject=False, option="--drift-prompts") if others else [],
    )


def complete_prompts(
    settings: EvaluateSettings, given: Prompts, model: DiffusionModel
) -> tuple[EvaluateSettings, Prompts]:
    """The lists that ship, where the user gave none; a small model has its own."""
    kind = settings.subject_kind or encoders.default(("plain", "object"), model.path)
    others = given.others or shipped("others-plain" if kind == "plain" else "others")
    if given.subject:
        return settings, Prompts(given.subject, others)
    return replace(settings, subject_kind=kind), Prompts(shipped(SUBJECT_KINDS[kind]), others)
