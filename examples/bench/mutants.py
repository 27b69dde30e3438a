"""Which single changes of the code no test notices: mutants, sampled evenly over files, each against its quick tests.

    python examples/bench/mutants.py RESULTS.json [FILE ...] [--count 120] [--seed 0] [--jobs 2] [--again]

Each mutant is one change in a copy of the package: a comparison, an operator or a constant that is another one, a call
left out. Its file's tests (QUICK) run on that copy until one fails; a survivor is either an equivalent change or a hole
in the tests. What stands in RESULTS is not run again while the file is the same; --again runs those that survived, for
tests that have changed. Prints a table and every survivor.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, CONVERTERS = "mlx_blockskip", "converters"
TRAINING = f"{PACKAGE}/tasks/train"
DEFAULT = (
    *(f"{PACKAGE}/models/flow.py", f"{PACKAGE}/lora.py", f"{PACKAGE}/blockskip/*.py", f"{PACKAGE}/engine/sweep.py"),
    *(f"{TRAINING}/*.py", f"{PACKAGE}/tasks/defaults.py"),
)
"""Files to change."""

FAMILY = "tests/contract/test_family.py"
TASKS = ("train", "prior", "optimizer", "samples", "setup", "loop")
RUNS, PRIOR, OPTIMIZER, SAMPLES, SETUP, LOOP = (f"tests/tasks/test_{name}.py" for name in TASKS)
STOPPED = f"{PRIOR}: stopped_among"
QUICK: dict[str, tuple[str, ...]] = {
    f"{PACKAGE}/models/flow.py": ("tests/test_flow.py", "tests/models/test_sana_sampling.py"),
    f"{PACKAGE}/models/flux2/*.py": ("tests/models/test_flux2.py",),
    f"{PACKAGE}/models/z_image/*.py": ("tests/models/test_z_image.py",),
    f"{PACKAGE}/models/text/lm.py": ("tests/models/test_lm.py",),
    f"{PACKAGE}/models/text/chat.py": ("tests/models/test_chat.py",),
    f"{PACKAGE}/models/vae/kl_flux2.py": ("tests/models/test_vae_kl_flux2.py", "tests/models/test_flux2.py"),
    f"{PACKAGE}/lora.py": ("tests/test_lora.py", FAMILY),
    f"{PACKAGE}/blockskip/plan.py": ("tests/blockskip/test_plan.py",),
    f"{PACKAGE}/blockskip/patches.py": ("tests/blockskip/test_patches.py",),
    f"{PACKAGE}/blockskip/masking.py": ("tests/blockskip/test_masking.py",),
    f"{PACKAGE}/blockskip/selection.py": ("tests/blockskip/test_selection.py",),
    f"{PACKAGE}/blockskip/records.py": ("tests/blockskip/test_records.py", f"{RUNS}: inner_runs"),
    f"{PACKAGE}/blockskip/*.py": ("tests/blockskip/test_residuals.py", "tests/blockskip/test_records.py", FAMILY),
    f"{PACKAGE}/engine/sweep.py": ("tests/engine/test_sweep.py", FAMILY),
    f"{PACKAGE}/engine/*.py": ("tests/engine/*.py",),
    f"{PACKAGE}/tasks/defaults.py": ("tests/tasks/test_defaults.py", SAMPLES, f"{PRIOR}: settings_make"),
    f"{TRAINING}/checkpoints.py": ("tests/tasks/test_checkpoints.py", STOPPED),
    f"{TRAINING}/job.py": ("tests/tasks/test_job.py", f"{RUNS}: says_what"),
    f"{TRAINING}/loop.py": (LOOP, f"{PRIOR}: weighted_mean stopped_among", f"{RUNS}: any_length not_finite"),
    f"{TRAINING}/moments.py": ("tests/tasks/test_moments.py", f"{OPTIMIZER}: moments_in_files", STOPPED),
    f"{TRAINING}/optimizer.py": (OPTIMIZER, f"{RUNS}: learning_rate bias_corrected"),
    f"{TRAINING}/precompute.py": ("tests/tasks/test_precompute.py", f"{RUNS}: encoded_once any_length fresh_residuals"),
    f"{TRAINING}/samples.py": (SAMPLES, f"{RUNS}: encoded_once", f"{PRIOR}: every_other orders_of weighted_mean"),
    f"{TRAINING}/setup.py": (SETUP, f"{RUNS}: enlarged", f"{PRIOR}: made_once on_resume one_class_prompt"),
    f"{TRAINING}/train.py": (SETUP, f"{RUNS}: says_what another_runs plan_is_said", STOPPED),
}
"""Tests by file, quickest first; the first pattern that fits holds. After a colon: words, one of which a test's name
has to contain.
"""

FALLBACK = (FAMILY, RUNS)
LARGE = ("tiny_", "killed_run", "ctrl_c_", "does_not_grow", "learning_to_reduce", "generate_takes", "generate_draws")
"""Words in the names of tests that take longest, and see little more: on other than the smallest family."""

SLACK, FACTOR = 30.0, 4.0
"""A mutant may take FACTOR times as long as its tests do without one, and SLACK seconds; then it is killed."""

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file: bytes start .. stop become `text`."""

    file: str
    kind: str
    start: int
    stop: int
    text: str

    def source(self, original: bytes) -> bytes:
        return original[: self.start] + self.text.encode() + original[self.stop :]

    def line(self, original: bytes) -> int:
        return original.count(b"\n", 0, self.start) + 1

    def difference(self, original: bytes) -> str:
        """The statement's own line before and after, or of a change over several lines what is changed."""
        first = original.rfind(b"\n", 0, self.start) + 1
        last = original.find(b"\n", self.stop)
        before = original[first:last]
        after = original[first : self.start] + self.text.encode() + original[self.stop : last]
        return " -> ".join(re.sub(r"\s+", " ", part.decode()).strip() for part in (before, after))


class Finder:
    """All mutants of one file."""

    def __init__(self, file: str, source: bytes):
        self.file, self.bytes = file, source
        self.lines = [0]
        for line in source.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)
        self.found: list[Mutant] = []

    def all(self) -> list[Mutant]:
        """All that compile."""
        self.visit(ast.parse(self.bytes))
        return [mutant for mutant in dict.fromkeys(self.found) if self._compiles(mutant)]

    def _compiles(self, mutant: Mutant) -> bool:
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(mutant.source(self.bytes), self.file, "exec", dont_inherit=True)
        except SyntaxError:
            return False
        return True

    def start(self, node: Any) -> int:
        return self.lines[node.lineno - 1] + int(node.col_offset)

    def stop(self, node: Any) -> int:
        return self.lines[node.end_lineno - 1] + int(node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        return self.bytes[self.start(node) : self.stop(node)].decode()

    def add(self, kind: str, start: int, stop: int, text: str) -> None:
        self.found.append(Mutant(self.file, kind, start, stop, text))

    def replace(self, kind: str, node: ast.AST, text: str) -> None:
        self.add(kind, self.start(node), self.stop(node), text)

    def between(self, kind: str, left: ast.AST, right: ast.AST, pattern: str, text: str) -> None:
        """Change the operator between two operands."""
        begin = self.stop(left)
        met = re.search(pattern, self.bytes[begin : self.start(right)].decode())
        if met:
            self.add(kind, begin + met.start(), begin + met.end(), text)

    def visit(self, node: ast.AST) -> None:
        if self.skipped(node):
            return
        getattr(self, f"at_{type(node).__name__}", lambda node: None)(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "ctx"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def skipped(self, node: ast.AST) -> bool:
        """What no test should see: errors' sentences, checks for mypy, imports for annotations, what a script does."""
        if isinstance(node, ast.If):
            return any(isinstance(n, ast.Name) and n.id in ("TYPE_CHECKING", "__name__") for n in ast.walk(node.test))
        return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)

    def at_Compare(self, node: ast.Compare) -> None:  # noqa: N802
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:]):
            pattern, other = COMPARISONS[type(op)]
            self.between("comparison", left, right, pattern, other)

    def at_BinOp(self, node: ast.BinOp) -> None:  # noqa: N802
        if type(node.op) in OPERATORS:
            own, other = OPERATORS[type(node.op)]
            self.between("operator", node.left, node.right, re.escape(own), other)

    def at_AugAssign(self, node: ast.AugAssign) -> None:  # noqa: N802
        if type(node.op) in OPERATORS:
            own, other = OPERATORS[type(node.op)]
            self.between("operator", node.target, node.value, re.escape(own), other)

    def at_BoolOp(self, node: ast.BoolOp) -> None:  # noqa: N802
        own, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            self.between("and/or", left, right, rf"\b{own}\b", other)

    def at_UnaryOp(self, node: ast.UnaryOp) -> None:  # noqa: N802
        if isinstance(node.op, ast.Not):
            self.replace("not", node, f"({self.text(node.operand)})")
        elif isinstance(node.op, ast.USub):
            self.replace("sign", node, self.text(node.operand))

    def at_Constant(self, node: ast.Constant) -> None:  # noqa: N802
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", node, repr(not value))
        elif isinstance(value, int):
            for other in (value + 1, value - 1):
                self.replace("constant", node, str(other))
        elif isinstance(value, float):
            self.replace("constant", node, repr(value + 1))
            self.replace("constant", node, repr(value / 2 if value else value - 1))

    def at_IfExp(self, node: ast.IfExp) -> None:  # noqa: N802
        self.replace("branch", node, f"({self.text(node.body)})")
        self.replace("branch", node, f"({self.text(node.orelse)})")

    def at_Return(self, node: ast.Return) -> None:  # noqa: N802
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("return", node, "return None")

    def at_Expr(self, node: ast.Expr) -> None:  # noqa: N802
        if isinstance(node.value, ast.Call):
            self.replace("statement", node, "pass")

    def at_arguments(self, node: ast.arguments) -> None:
        for default in [*node.defaults, *(d for d in node.kw_defaults if d is not None)]:
            if isinstance(default, ast.Constant) and (isinstance(default.value, str) or default.value is None):
                self.replace("default", default, "'another'" if default.value is not None else "0")

    def at_Call(self, node: ast.Call) -> None:  # noqa: N802
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            self.replace("function", node.func, NAMES[node.func.id])
        for keyword in node.keywords:
            if keyword.arg is None:
                continue
            start, stop = self.start(keyword), self.stop(keyword)
            after = re.match(rb"\s*,\s*", self.bytes[stop:])
            before = re.search(rb",\s*$", self.bytes[:start])
            if after:
                self.add("keyword", start, stop + after.end(), "")
            elif before:
                self.add("keyword", before.start(), stop, "")
            else:
                self.add("keyword", start, stop, "")

    def at_Subscript(self, node: ast.Subscript) -> None:  # noqa: N802
        index = node.slice
        places = [index.lower, index.upper] if isinstance(index, ast.Slice) else [index]
        for place in places:
            if isinstance(node.ctx, ast.Load) and isinstance(place, ast.Name | ast.Attribute):
                self.replace("index", place, f"{self.text(place)} + 1")


@cache
def mutants_of(file: str) -> tuple[Mutant, ...]:
    return tuple(Finder(file, (ROOT / file).read_bytes()).all())


def sample(files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as many of each file, in the order of the files; a file that has few gives all it has."""
    every = {file: list(mutants_of(file)) for file in files}
    for file, own in every.items():
        random.Random(f"{seed} {file}").shuffle(own)
    taken = dict.fromkeys(files, 0)
    left = min(count, sum(map(len, every.values())))
    while left:
        for file in files:
            if left and taken[file] < len(every[file]):
                taken[file] += 1
                left -= 1
    return [mutant for file in files for mutant in sorted(every[file][: taken[file]], key=lambda m: (m.start, m.text))]


def tests_of(file: str) -> tuple[str, ...]:
    """A file's tests, each `path` or `path: words`."""
    wanted = next((tests for pattern, tests in QUICK.items() if fnmatch(file, pattern)), FALLBACK)
    return tuple(one for test in wanted for one in _expanded(*test.partition(":")))


def _expanded(pattern: str, *words: str) -> list[str]:
    return ["".join((str(path.relative_to(ROOT)), *words)) for path in sorted(ROOT.glob(pattern))]


def selection(tests: Sequence[str]) -> tuple[list[str], str]:
    """Files, and pytest's expression for those of their tests that are wanted."""
    parts = [(path, words.split()) for path, _, words in (test.partition(":") for test in tests)]
    wanted = " or ".join(word for path, words in parts for word in words or [Path(path).stem])
    return [path for path, _ in parts], f"({wanted})" + "".join(f" and not {word}" for word in LARGE)


class Workshop:
    """A copy of the package and its tests that one process at a time changes; work on the repository may go on."""

    def __init__(self, directory: Path):
        self.path = directory
        without = shutil.ignore_patterns("__pycache__", CONVERTERS)
        for name in (PACKAGE, "convert", "tests", "examples"):
            shutil.copytree(ROOT / name, directory / name, ignore=without)
        shutil.copytree(directory / "convert", directory / PACKAGE / CONVERTERS)
        shutil.copy(ROOT / "pyproject.toml", directory)
        self.environment = {
            **os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip
        where = subprocess.run(
            [sys.executable, "-P", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"],
            env=self.environment, cwd=directory, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        if str(directory) not in where:
            raise SystemExit(f"the tests would run on {where.strip()} and not on the copy")

    def test(self, tests: Sequence[str], seconds: float | None) -> int | None:
        """pytest's exit status; None where it took longer than it may."""
        command = [sys.executable, "-P", "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", ".."]
        files, expression = selection(tests)
        command += ["-x", "-q", "-k", expression, "-p", "no:cacheprovider", "--basetemp", "../tmp"]
        process = subprocess.Popen(
            [*command, *(f"../{file}" for file in files)], env=self.environment, cwd=self.path / "tests",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def survives(self, mutant: Mutant, tests: Sequence[str], seconds: float) -> bool:
        target = self.path / mutant.file
        original = target.read_bytes()
        target.write_bytes(mutant.source(original))
        try:
            return self.test(tests, seconds) == 0
        finally:
            target.write_bytes(original)


class Results:
    """By mutant and the state of its file, in a JSON file: whether it survived."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self.lock = Lock()

    @staticmethod
    def key(mutant: Mutant) -> str:
        state = hashlib.sha256((ROOT / mutant.file).read_bytes()).hexdigest()[:12]
        return f"{mutant.file} {state} {mutant.start}-{mutant.stop} {mutant.text}"

    def put(self, mutant: Mutant, survived: bool) -> None:
        original = (ROOT / mutant.file).read_bytes()
        said = {"line": mutant.line(original), "change": mutant.difference(original), "kind": mutant.kind}
        with self.lock:
            self.found[self.key(mutant)] = {**said, "survived": survived}
            temporary = self.path.with_suffix(".part")
            temporary.write_text(json.dumps(self.found, indent=0, ensure_ascii=False) + "\n")
            temporary.replace(self.path)


def run(mutants: Sequence[Mutant], results: Results, jobs: int, again: bool) -> None:
    """Test what is not known yet, `jobs` mutants at a time. Stops where the tests fail without a mutant."""
    known = {key for key, value in results.found.items() if not (again and value["survived"])}
    waiting = [mutant for mutant in mutants if results.key(mutant) not in known]
    print(f"{len(mutants) - len(waiting)} of {len(mutants)} mutants are known already", file=sys.stderr)
    if not waiting:
        return
    done, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        shops: Queue[Workshop] = Queue()
        for number in range(jobs):
            shops.put(Workshop(Path(directory) / str(number)))
        limits = {tests: _baseline(shops, tests) for tests in dict.fromkeys(tests_of(m.file) for m in waiting)}

        def one(mutant: Mutant) -> None:
            nonlocal done
            shop = shops.get()
            try:
                tests = tests_of(mutant.file)
                survived = shop.survives(mutant, tests, limits[tests])
            finally:
                shops.put(shop)
            results.put(mutant, survived)
            done += 1
            left = (time.perf_counter() - began) / done * (len(waiting) - done) / 60
            text = "survived" if survived else "killed"
            print(f"{done} of {len(waiting)}: {mutant.file} {text}, about {left:.0f} min to go", file=sys.stderr)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, waiting))


def _baseline(shops: "Queue[Workshop]", tests: Sequence[str]) -> float:
    """The seconds that a mutant may take."""
    shop, began = shops.get(), time.perf_counter()
    status = shop.test(tests, None)
    shops.put(shop)
    if status != 0:
        raise SystemExit(f"without a mutant pytest ends with {status} on {' '.join(tests)}")
    return FACTOR * (time.perf_counter() - began) + SLACK


def report(mutants: Sequence[Mutant], results: Results) -> Iterator[str]:
    """Markdown: counts by file, and every survivor."""
    found = [(mutant, results.found[results.key(mutant)]) for mutant in mutants if results.key(mutant) in results.found]
    yield "| file | tried | killed | survived |"
    yield "|---|---|---|---|"
    for file in dict.fromkeys(mutant.file for mutant, _ in found):
        yield _row(file, [result["survived"] for mutant, result in found if mutant.file == file])
    yield _row("all", [result["survived"] for _, result in found])
    for mutant, result in found:
        if result["survived"]:
            yield f"\n{mutant.file}:{result['line']} ({result['kind']})\n    {result['change']}"


def _row(name: str, survived: Sequence[bool]) -> str:
    return f"| {name} | {len(survived)} | {len(survived) - sum(survived)} | {sum(survived)} |"


def chosen(patterns: Sequence[str]) -> list[str]:
    """Files by patterns, relative to the repository; empty ones have nothing to change."""
    found = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.stat().st_size)
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for path in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file, read and written")
    parser.add_argument("files", nargs="*", help="patterns of source files, from the repository's folder")
    parser.add_argument("--count", type=int, default=120, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="test the survivors once more")
    given = parser.parse_args()
    files = chosen(given.files or DEFAULT)
    if not files:
        parser.error("no such files")
    mutants = sample(files, given.count, given.seed)
    results = Results(given.results)
    run(mutants, results, given.jobs, given.again)
    print("\n".join(report(mutants, results)))


if __name__ == "__main__":
    main()
