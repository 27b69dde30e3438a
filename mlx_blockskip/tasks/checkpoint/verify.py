"""`verify`: what lies in a directory is held against what was written: a model, an adapter, or a residual cache."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip import __version__
from mlx_blockskip.blockskip import records
from mlx_blockskip.converters import run
from mlx_blockskip.converters.quantization import recorded
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.whole import Whole, misfits
from mlx_blockskip.engine import files, listing, manifest, owned, sealed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX, Shards
from mlx_blockskip.engine.verify import (
    Problem,
    checksum_problems,
    component_problems,
    json_of,
    unreadable,
    value_problems,
)
from mlx_blockskip.events import Note, Warning, emit
from mlx_blockskip.models.vision.encoder import open_encoder
from mlx_blockskip.settings import VerifySettings
from mlx_blockskip.tasks.checkpoint.adapter_names import CONFIG, TENSORS
from mlx_blockskip.tasks.phases import phase

FORMAT = 1
Found = tuple[list[Problem], list[str]]
"""What is wrong, and what a user should know of how it was looked at."""


@dataclass(frozen=True)
class Verification:
    """What came of it. kind: model, encoder, adapter or cache. notes: what could not be looked at."""

    path: Path
    kind: str
    files: int
    nbytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def document(self) -> dict[str, Any]:
        """The result as JSON values."""
        problems = [{**asdict(problem), "file": str(problem.file)} for problem in self.problems]
        found = {**asdict(self), "path": str(self.path), "problems": problems}
        return {"format": FORMAT, "version": __version__, "healthy": self.healthy, **found}


def verify(settings: VerifySettings) -> Verification:
    """Hold the directory `path` against what was written there; nothing is changed. Raises UserError for one that holds
    nothing of this tool's.
    """
    path = Path(settings.path).expanduser()
    if not settings.path or not path.is_dir():
        raise UserError(f"{settings.path or 'PATH'}: no such directory; give a model's, an adapter's or a cache's")
    kind, look = kind_of(path)
    held = [p for p in listing.visible(path, "**/*.safetensors") if p.is_file()]
    with phase("verify"):
        problems, notes = look(path)
    found = Verification(path, kind, len(held), sum(p.stat().st_size for p in held), tuple(problems), tuple(notes))
    for note in found.notes:
        emit(Note(note))
    for problem in found.problems:
        emit(Warning(str(problem)))
    state = "as it was written" if found.healthy else f"{len(found.problems)} problems"
    emit(Note(f"{path}: {kind}, {found.files} files of weights, {found.nbytes / 2**30:.2f} GiB: {state}"))
    return found


def kind_of(path: Path) -> tuple[str, Callable[[Path], Found]]:
    """What lies in a directory, and how to look at it. Raises UserError where it is nothing of this tool's."""
    if (path / CONFIG).is_file() or (path / TENSORS).is_file():
        return "adapter", adapter
    if (path / owned.MARKER).is_file() or listing.visible(path, "chunk-*.safetensors"):
        return "cache", cache
    if (path / "config.json").is_file():
        config, problems = json_of(path / "config.json")
        if "encoder" in config:
            return "encoder", encoder
        if problems or "format" in config:
            return "model", model
    way_out = (
        "is in Hugging Face layout, which records no checksums; `mlx-blockskip convert` looks at all of it"
        if (path / "model_index.json").is_file()
        else "holds no model, adapter or residual cache that mlx-blockskip wrote; give the directory of one"
    )
    raise UserError(f"{path}: {way_out}")


def model(path: Path) -> Found:
    """An MLX model directory: checksums, names and shapes of every component."""
    config, problems = json_of(path / "config.json")
    notes: list[str] = []
    named = config.get("components")
    own = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    folders = {*own, *(p.parent.name for p in listing.visible(path, f"*/{INDEX}"))}
    for name in sorted(folders):
        problems += component_problems(path / name)
        if not _has_checksums(path / name):
            notes.append(f"{path / name}: records no checksums, so only names and shapes were looked at")
    problems += _manifest_problems(path)
    if "family" not in config:
        return problems, notes
    try:
        run.load_table(config["family"])
    except UserError as error:
        return problems, [*notes, f"{path}: {error}, so shapes were not looked at"]
    try:
        components = run.read_components(path, config["family"])
    except UserError as error:
        return [*problems, unreadable(_named_in(error, path), error)], notes
    quantization = config.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        return [*problems, Problem(path / "config.json", None, "a quantization that is an object", "another")], notes
    for component in components:
        folder = path / component.folder
        try:
            problems += shape_problems(folder, component)
            problems += quantization_problems(path, quantization, component)
        except (AttributeError, KeyError, TypeError):
            problems.append(Problem(path / "config.json", None, "a quantization as convert writes it", "another"))
        except UserError as error:
            if not any(problem.file.is_relative_to(folder) for problem in problems):
                problems.append(unreadable(_named_in(error, path), error))
    return problems, notes


def _manifest_problems(path: Path) -> list[Problem]:
    """Of configs, indexes, tokenizers and the scheduler."""
    try:
        recorded = manifest.recorded(path)
    except UserError as error:
        return [unreadable(path / manifest.FILE, error)]
    return [p for name, expected in recorded.items() for p in checksum_problems(path / name, expected)]


def _has_checksums(folder: Path) -> bool:
    index, _ = json_of(folder / INDEX)
    metadata = index.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("sha256"))


def _named_in(error: UserError, path: Path) -> Path:
    """The file that an error begins with, else the directory."""
    named = Path(str(error).split(": ", 1)[0])
    return named if named.is_relative_to(path) else path


def shape_problems(folder: Path, component: Component) -> list[Problem]:
    """Tensors that are not as the component's config says, and quantized layers whose parts do not go together.

    Raises UserError where a file cannot be read.
    """
    whole = Whole(Shards(folder))
    found = [
        Problem(folder / whole.shards.weight_map.get(m.name, INDEX), m.name, _said(m.expected), _said(m.actual))
        for m in misfits(component, whole)
    ]
    for row in component.rows:
        if row.name in whole.shards.weight_map and whole.quantized(row.name):
            found += _packing_problems(folder, row.name, whole)
    return found


def _packing_problems(folder: Path, name: str, whole: Whole) -> list[Problem]:
    module = name.removesuffix(".weight")
    scales, biases = (whole.shards.shape(f"{module}.{kind}") for kind in ("scales", "biases"))
    stored = whole.quantized(name)
    assert stored is not None
    packed = (scales[0], whole.shape(name)[1] * stored[1] // 32)
    wrong = [(f"{module}.biases", scales, biases), (name, packed, whole.shards.shape(name))]
    return [
        Problem(folder / whole.shards.weight_map[tensor], tensor, _said(expected), _said(actual))
        for tensor, expected, actual in wrong
        if expected != actual
    ]


def quantization_problems(path: Path, record: dict[str, Any] | None, component: Component) -> list[Problem]:
    """Layers that are quantized otherwise than the model's config.json says."""
    whole, found = Whole(Shards(path / component.folder)), []
    for row in component.rows:
        if row.name in whole.shards.weight_map:
            said, stored = recorded(record, component.folder, row), whole.quantized(row.name)
            if said != stored:
                name = f"{component.folder}.{row.name}"
                found.append(Problem(path / "config.json", name, _as_quantized(stored), _as_quantized(said)))
    return found


def _as_quantized(stored: tuple[int, int] | None) -> str:
    return "a whole layer" if stored is None else f"{stored[1]} bits in groups of {stored[0]}"


def _said(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"a shape of {list(shape)}"


def encoder(path: Path) -> Found:
    """An MLX directory of an image encoder: checksums and names; it is opened, which looks at its configs."""
    problems = [p for index in listing.visible(path, f"*/{INDEX}") for p in component_problems(index.parent)]
    try:
        open_encoder(path)
    except UserError as error:
        problems.append(unreadable(_named_in(error, path), error))
    return problems, []


def adapter(path: Path) -> Found:
    """An adapter directory: its factors' checksum, shapes and values, its checkpoints, and its cache where one is."""
    config, problems = json_of(path / CONFIG)
    expected, notes = config.get("sha256", {}).get(TENSORS), []
    if expected is None:
        notes.append(f"{path / CONFIG}: records no checksum, so only shapes and finite values were looked at")
    problems += checksum_problems(path / TENSORS, expected)
    if (path / TENSORS).is_file():
        problems += value_problems(path / TENSORS, "finite factors") or factor_problems(path / TENSORS, config)
    for file in listing.visible(path, "checkpoints/*/*.safetensors"):
        problems += value_problems(file)
    for state in listing.visible(path, "checkpoints/*/state.json"):
        problems += _checkpoint_problems(state)
    if (path / "cache" / owned.MARKER).is_file():
        problems += cache(path / "cache")[0]
    return problems, notes


def _checkpoint_problems(path: Path) -> list[Problem]:
    """Of the state.json of a checkpoint, and of the files that it has checksums of."""
    value, problems = json_of(path)
    try:
        sums = sealed.opened(path, value, "go on from the one before", required=not problems).get("sha256", {})
    except UserError as error:
        return [unreadable(path, error)]
    return problems + [p for name, expected in sums.items() for p in checksum_problems(path.with_name(name), expected)]


def factor_problems(path: Path, config: dict[str, Any]) -> list[Problem]:
    """Factors without their other half, or of ranks that do not go together. config: adapter_config.json."""
    entries, found = files.read_header(path).entries, []
    for name, entry in entries.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b") or len(entry.shape) != 2:
            found.append(Problem(path, name, "a factor lora_a (in, r) or lora_b (r, out)", f"{list(entry.shape)}"))
            continue
        other = entries.get(f"{module}.{'lora_b' if kind == 'lora_a' else 'lora_a'}")
        rank = entry.shape[1 if kind == "lora_a" else 0]
        if other is None:
            found.append(Problem(path, name, "its other factor", "none"))
        elif rank != config.get("rank", rank):
            found.append(Problem(path, name, f"rank {config['rank']}", f"{list(entry.shape)}"))
        elif kind == "lora_a" and len(other.shape) == 2 and other.shape[0] != rank:
            found.append(Problem(path, other.name, f"rank {rank}, as its other factor", f"{list(other.shape)}"))
    return found


def cache(path: Path) -> Found:
    """A residual cache: every chunk's records are complete and alike, and every value is finite."""
    problems: list[Problem] = []
    for file in listing.visible(path, "**/*.safetensors"):
        problems += value_problems(file) or (records.problems(file) if file.name.startswith("chunk-") else [])
    return problems, [f"{path}: scratch files beside the chunks have no checksums; their values were looked at"]
