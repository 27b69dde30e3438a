"""README and docs/: commands have the command line's own options, links lead somewhere, every option is explained."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

import mlx_blockskip
from mlx_blockskip.cli import app
from mlx_blockskip.commands import COMMANDS
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.options import from_mapping

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 150
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
COMMON = ("--config", "--json", "--debug", "--help")
CLICK = get_command(app).commands
FLAGS = {"--help", "--version"} | {flag for c in CLICK.values() for option in c.params for flag in option.opts}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in one of these languages."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `mlx-blockskip` line of the shell blocks, and of those inside a sentence."""
    lines = "".join(blocks(text, "bash", "shell", "")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(mlx-blockskip [^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        if line.strip().startswith("mlx-blockskip"):
            yield shlex.split(line, comments=True)[1:]


def problem_of_command(words: list[str]) -> str | None:
    """What the command line says of this command; None where it takes it. Nothing is run."""
    if not words or words[0] not in COMMANDS:
        return f"no such command: {' '.join(words[:1])}"
    name, *arguments = words
    try:
        context = CLICK[name].make_context(name, arguments)
        given = {
            key: value
            for key, value in context.params.items()
            if key in {field.name for field in fields(COMMANDS[name])}
            and getattr(context.get_parameter_source(key), "name", "") == "COMMANDLINE"
        }
        from_mapping(COMMANDS[name], given)
    except UserError as error:
        return str(error)
    except typer.Exit:
        return None
    except Exception as error:  # usage errors are of the click that typer brings
        return f"{type(error).__name__}: {getattr(error, 'message', '') or error}"
    return None


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problem_of_link(page: Path, link: str) -> str | None:
    """Why a relative link leads nowhere; None where it does not, or leaves the repository."""
    if re.match(r"[a-z]+:", link):
        return None
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: no such file"
    if anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
        return f"{link}: no such heading"
    return None


def problems_of_python(code: str) -> Iterator[str]:
    """Names that the package does not offer, and arguments that are no settings."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "mlx_blockskip":
            yield from (f"import {a.name}" for a in node.names if a.name not in mlx_blockskip.__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMMANDS:
            known = {field.name for field in fields(COMMANDS[node.func.id])} | {"on_event"}
            yield from (f"{node.func.id}({k.arg}=)" for k in node.keywords if k.arg not in known)


def unknown_flags(paragraph: str) -> set[str]:
    """Flags that neither a command has nor a script under examples/ that the paragraph names."""
    scripts = [ROOT / name for name in re.findall(r"examples/[\w/]+\.py", paragraph)]
    held = " ".join(path.read_text(encoding="utf-8") for path in scripts if path.is_file())
    return {flag for flag in FLAG.findall(paragraph) if flag not in FLAGS and f'"{flag}"' not in held}


def words_of(parameter) -> list[str]:
    """What stands for a parameter on the command line: its flags, or its name in capitals where it has none."""
    return [word if word.startswith("-") else word.upper() for word in parameter.opts]


def explained(text: str) -> dict[str, list[tuple[list[str], str]]]:
    """By command, the rows of docs/options.md: the flags of an option, and its default."""
    found: dict[str, list[tuple[list[str], str]]] = {}
    for section in text.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        rows = re.findall(r"^\| (`[-A-Z].+?`) \| (.+?) \|", body, re.M)
        if rows:
            found[name] = [(re.findall(r"`([-A-Z][^`]+)`", flags), default) for flags, default in rows]
    return found


def test_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= README_LINES


@every_page
def test_every_command_is_one_that_the_command_line_takes(page):
    problems = {" ".join(words): problem_of_command(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert not {command: problem for command, problem in problems.items() if problem}


def test_commands_are_found():
    """Of the four steps of the workflow, so that the test above does not pass by finding none."""
    found = {words[0] for words in commands(PAGES[0].read_text(encoding="utf-8"))}
    assert found >= {"convert", "train", "generate", "evaluate", "estimate"}


@every_page
def test_every_link_and_image_leads_somewhere(page):
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    assert not [problem for link in links if (problem := problem_of_link(page, link))]


@every_page
def test_every_example_that_is_named_exists(page):
    named = set(re.findall(r"(?<![\w/-])(?:\.\./)?((?:examples|tests)/[\w./-]*\w)", page.read_text(encoding="utf-8")))
    assert not [name for name in named if not (ROOT / name).exists()]


@every_page
def test_every_flag_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    assert not {flag for paragraph in text.split("\n\n") for flag in unknown_flags(paragraph)}


@every_page
def test_python_and_yaml_are_what_the_settings_take(page):
    text = page.read_text(encoding="utf-8")
    assert not [problem for code in blocks(text, "python") for problem in problems_of_python(code)]
    for body in blocks(text, "yaml"):
        command = re.match(r"# (\w+)\n", body)
        assert command is not None, "a YAML block says first which command it is for"
        from_mapping(COMMANDS[command[1]], yaml.safe_load(body))


def test_every_page_is_listed():
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_options_page_has_every_option_and_its_default(command):
    rows = explained((ROOT / "docs" / "options.md").read_text(encoding="utf-8"))[command]
    written = {flag: default for flags, default in rows for flag in flags}
    params = {flag: p for p in CLICK[command].params for flag in words_of(p) if flag not in COMMON}
    params.pop("-c", None)
    assert set(written) == set(params)
    for flag, default in written.items():
        own = params[flag].default
        if isinstance(own, bool):
            assert default == "off", flag
        elif own in (None, "", []):
            assert default in ("-", "model"), flag
        else:
            assert default == f"`{own}`", flag


class TestTheChecksCanFail:
    """Each check above finds what it is there for."""

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("mlx-blockskip train --data photos --modle x", "--modle"),
            ("mlx-blockskip train --data", "--data"),
            ("mlx-blockskip train --residuals stale", "stale"),
            ("mlx-blockskip train --iters many", "integer"),
            ("mlx-blockskip train photos", "photos"),
            ('mlx-blockskip train --data ""', "--data"),
            ("mlx-blockskip tarin --data photos", "tarin"),
            ("mlx-blockskip train --data photos \\\n  --modle x", "--modle"),
        ],
    )
    def test_a_wrong_command(self, line, problem):
        (words,) = commands(f"Run\n\n```bash\n{line}\n```\n")
        assert problem in (problem_of_command(words) or "")

    def test_a_right_command(self):
        (words,) = commands("Run `mlx-blockskip train -c dog.yaml --data photos --class-prompt a --class-prompt b`.")
        assert problem_of_command(words) is None

    @pytest.mark.parametrize("link", ["docs/none.md", "docs/memory.md#none", "#none", "docs/images/none.png"])
    def test_a_dead_link(self, link):
        assert problem_of_link(ROOT / "README.md", link)

    @pytest.mark.parametrize("link", ["docs/memory.md#will-it-fit", "#limits", "https://example.org/none", "docs"])
    def test_a_good_link(self, link):
        assert problem_of_link(ROOT / "README.md", link) is None

    def test_an_unknown_flag(self):
        assert unknown_flags("`--modle`, `--model` and `--tune`") == {"--modle", "--tune"}
        assert unknown_flags("`examples/ablation/run.py OUT` with `--tune`") == set()

    def test_a_wrong_argument(self):
        code = "from mlx_blockskip import train, trian\ntrain(data='a', modle='b', on_event=print)"
        assert list(problems_of_python(code)) == ["import trian", "train(modle=)"]


def test_what_is_predicted_for_metal_is_called_a_lower_bound():
    """It leaves out what a command buffer keeps until it has run."""
    places = [*PAGES, ROOT / "examples" / "bench" / "flux_scale.py"]
    lines = [line for page in places for line in page.read_text(encoding="utf-8").splitlines()]
    predicted = [line for line in lines if "predicted for Metal" in line]
    assert len(predicted) >= 6
    assert not [line for line in predicted if "at least" not in line and "lower bound" not in line]
