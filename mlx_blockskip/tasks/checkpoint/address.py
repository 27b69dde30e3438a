"""What a user may call a repo of the Hub: its id, with a revision or without, its address, or a preset's name."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHERS = ("datasets", "spaces", "collections", "papers", "docs", "blog", "models")
"""What the Hub's addresses begin with that lead to no model."""

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repo:
    """A model's repo. name: owner/name. revision: branch, tag or commit; None for the main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def branch(self) -> str:
        return self.revision or "main"

    @property
    def commit(self) -> str | None:
        """The revision where it is a whole commit, which needs no looking up."""
        return self.revision if COMMIT.fullmatch(self.revision or "") else None


def repo_named(text: str) -> Repo | None:
    """The repo that `text` stands for: `owner/name`, `owner/name@revision`, a pasted address of its page, or a preset's
    name such as flux1-dev; None where it is none of these.

    Raises UserError for an address of the Hub that is not a model's.
    """
    if re.match(r"(https?://|hf://|(www\.)?(huggingface|hf)\.co/)", text):
        return _of_address(text)
    if match := re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?", text):
        return Repo(match[1], match[2])
    name, _, revision = text.partition("@")
    if "/" not in name and (found := presets.folder(name)) is not None:
        return Repo(presets.REPOS[found.name], revision or None)
    return None


def _of_address(text: str) -> Repo:
    if text.startswith("hf://"):
        text = f"https://{HOSTS[0]}/{text.removeprefix('hf://')}"
    parts = urlsplit(text if "://" in text else f"https://{text}")
    segments = [unquote(part) for part in parts.path.split("/") if part]
    if parts.hostname not in HOSTS or len(segments) < 2 or segments[0] in OTHERS:
        raise UserError(
            f"{text}: is not the address of a model's page; give one such as https://huggingface.co/owner/name, "
            "or owner/name alone"
        )
    owner, _, pinned = "/".join(segments[:2]).partition("@")
    if len(segments) > 3 and segments[2] in ("tree", "blob", "resolve", "commit"):
        pinned = "/".join(segments[3:6] if segments[3:5] == ["refs", "pr"] else segments[3:4])
    return Repo(owner, pinned or None)
