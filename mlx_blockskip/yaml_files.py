"""A YAML file of settings, which somebody else may have written: read within bounds of memory and time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mlx_blockskip.engine.errors import UserError

MOST_BYTES = 64 << 10
"""Far more than all settings take, and a second or two of PyYAML's work at worst."""

MOST_DEPTH = 16


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which grow without bounds; dates are text, as they were written; a key stands once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", event.start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, "is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str) -> dict[str, Any]:
    """The keys of a YAML file in snake_case. Raises UserError where it cannot be read."""
    with _named(path):
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path}: is larger than {MOST_BYTES >> 10} KB, which no file of settings is")
        value = yaml.load(content.decode("utf-8-sig"), _Loader)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold `setting: value` lines")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Inside, whatever reading raises becomes a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise UserError(f"{path}: not readable as YAML ({reason[:300]})") from None
