"""The command line: parse, call a task, draw its events. Commands and their options are made from the settings."""

import inspect
import json
import signal
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from mlx_blockskip import __version__
from mlx_blockskip.commands import COMMANDS, function_of
from mlx_blockskip.display import Json, Plain, Silent, drawn_by
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.ranges import Range, Sizes, range_in
from mlx_blockskip.options import merge, options_of
from mlx_blockskip.printable import one_line

REPORTS = ("verify", "doctor")
"""Commands whose --json is one document, that of their result; their status is 1 where the result is not healthy."""

app = typer.Typer(
    name="mlx-blockskip",
    help="Personalise large diffusion transformers on a Mac, in the memory of a small laptop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-blockskip {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Personalise large diffusion transformers on a Mac, in the memory of a small laptop."""


def _command(name: str, cls: type) -> Callable[..., None]:
    """A typer command whose options are the fields of `cls`; only options that were given override the config file."""
    hints = get_type_hints(cls)
    allowed = {key: range_in(hint) for key, hint in get_type_hints(cls, include_extras=True).items()}
    known = {f.name: f for f in options_of(cls)}

    def command(ctx: typer.Context, **options: Any) -> None:
        given = {
            key: value
            for key, value in options.items()
            if key in known and getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"
        }
        run(name, cls, given, options["config"], options["json_events"], options["debug"])

    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for field in known.values():
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        parameters.append(_parameter(field.name, hints[field.name], allowed[field.name], default, field.metadata))
    extra: tuple[tuple[str, Any, Any, tuple[str, ...], str], ...] = (
        ("config", str | None, None, ("-c", "--config"), "YAML file with these settings; the command line wins."),
        ("json_events", bool, False, ("--json",), _json_help(name)),
        ("debug", bool, False, ("--debug",), "Show the traceback of an error."),
    )
    for key, hint, default, flags, text in extra:
        option = typer.Option(*flags, help=text)
        parameters.append(_keyword(key, Annotated[hint, option], default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = cls.__doc__
    return command


def _json_help(name: str) -> str:
    return "Print one JSON document and nothing else." if name in REPORTS else "Print every event as a line of JSON."


def _parameter(name: str, hint: Any, allowed: Range | None, default: Any, metadata: Any) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    flags = [metadata["short"], flag] if metadata["short"] else [flag]
    extra: dict[str, Any] = {"help": metadata["help"], "rich_help_panel": metadata["group"]}
    if metadata["choices"]:
        extra["help"] += f" One of {', '.join(map(str, metadata['choices']))}."
    if isinstance(allowed, Range) and not isinstance(allowed, Sizes):
        extra["help"] += f" {str(allowed).capitalize()}."
    if default in (None, "", []):
        extra["show_default"] = False
    optional = get_origin(hint) in (types.UnionType, typing.Union)
    inner = next(a for a in get_args(hint) if a is not type(None)) if optional else hint
    given = typer.Argument(metavar=name.upper(), **extra) if metadata["positional"] else typer.Option(*flags, **extra)
    return _keyword(name, Annotated[inner | None if optional else inner, given], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run(name: str, cls: type, given: dict[str, Any], config: str | None, as_json: bool, debug: bool) -> None:
    """Run one task and draw it; errors of the user's become one sentence and exit code 1."""
    try:
        chosen: Any = merge(cls, config, given)
        task = function_of(name)
        report = name in REPORTS
        from mlx_blockskip.tasks.running import running  # brings MLX, which --help does without

        with drawn_by((Silent() if report else Json()) if as_json else _drawer()), running(name):
            result = task(chosen)
        if report and as_json:
            typer.echo(json.dumps(result.document(), indent=2, allow_nan=False))
        if report and not result.healthy:
            raise typer.Exit(1)
    except UserError as error:
        if debug:
            raise
        typer.echo(f"mlx-blockskip: {one_line(str(error))}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None


def _drawer() -> Any:
    if not sys.stdout.isatty():
        return Plain()
    from mlx_blockskip.display_rich import Bars

    return Bars()


for _name, _settings in COMMANDS.items():
    app.command(_name)(_command(_name, _settings))


def main() -> None:
    """The entry point `mlx-blockskip`."""
    app()
