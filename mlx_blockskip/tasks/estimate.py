"""`estimate`: what converting, training and drawing would take, before anything is downloaded or converted.

A hollow model (zeros that take no disk) stands in for the real one: one block of each kind is traced on this machine at
the shapes of the run, in bfloat16. What a block takes beside its weights is the same where they are quantized. One
trace gives both bytes and seconds.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_blockskip import lora
from mlx_blockskip.blockskip import plan as plans
from mlx_blockskip.blockskip.patches import PatchSettings
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.converters import hollow, run
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.converters.write import Precision, size_of
from mlx_blockskip.engine import disk, leftovers, limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Table, emit
from mlx_blockskip.models import presets
from mlx_blockskip.models.defaults import model_defaults
from mlx_blockskip.models.family import Configs, DiffusionModel, Family
from mlx_blockskip.models.registry import family_named, open_model, own_defaults, read_config
from mlx_blockskip.options import parse_size
from mlx_blockskip.settings import EstimateSettings
from mlx_blockskip.tasks.checkpoint.recognise import family_of, is_converted
from mlx_blockskip.tasks.checkpoint.resolve import BUNDLED, bundled
from mlx_blockskip.tasks.defaults import known_defaults
from mlx_blockskip.tasks.memory import predict
from mlx_blockskip.tasks.memory.limit import AUTO, budget_of, fits
from mlx_blockskip.tasks.memory.predict import Phase, Shape, Tracer
from mlx_blockskip.tasks.phases import phase

PRECISIONS = {"bf16": 0, "8 bit": 8, "4 bit": 4}
RATIOS = (0.0, 0.3, 0.4, 0.5)
SHORT = 16
"""Text tokens of a prompt that is encoded only to see what other weights take."""


@dataclass(frozen=True)
class Subject:
    """What is asked about. beside: a directory with its tokenizers and scheduler."""

    name: str
    family: Family
    configs: Configs
    beside: Path
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """One precision and one skip ratio: the phases, and what the run comes to.

    model_bytes: on disk. cache_bytes: the residual cache. seconds: of a training step. read: bytes of it. hours: a run.
    """

    precision: str
    ratio: float
    plan: SkipPlan
    phases: tuple[Phase, ...]
    model_bytes: int
    cache_bytes: int
    read: int
    seconds: float
    hours: float

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)


@dataclass(frozen=True)
class Traces:
    """What was traced, all of it in bfloat16 but for the prompts, by precision. speed: bytes a second from the disk."""

    train: Tracer
    generate: Tracer
    encoding: Phase
    decoding: Phase
    prompts: dict[str, Phase]
    speed: float


def estimate(settings: EstimateSettings) -> list[Estimate]:
    """Emits two tables, of memory and of time, and the flags to use; returns their rows."""
    memory = budget_of(settings.memory)
    if not memory:
        raise UserError(f"--memory {settings.memory}: give a size such as 8GB, or auto")
    subject = find(settings.model)
    settings = complete(settings, subject)
    limits.bound(memory)
    with leftovers.scratch_directory() as directory:
        models = {name: _hollow(subject, bits, directory / f"{bits}") for name, bits in PRECISIONS.items()}
        traces = _trace(settings, subject, models["bf16"], directory)
        rows = [
            _row(settings, subject, name, ratio, model, traces, memory)
            for name, model in models.items()
            for ratio in RATIOS
        ]
    _tables(subject, settings, rows, memory, traces.speed)
    return rows


def _trace(settings: EstimateSettings, subject: Subject, model: DiffusionModel, directory: Path) -> Traces:
    """Trace everything once. settings: complete."""
    length, patch = settings.max_sequence_length or 0, _patches(settings, model).output_side
    width, height = model.native_size(settings.width or 0, settings.height or 0)
    modules = lora.targets(subject.family.lora_targets, "all")
    with phase("trace blocks", 5, "part") as track:
        speed = disk.read_speed(directory)
        track.step(1)
        train = Tracer(model, Shape(patch, patch, length, settings.batch_size or 1), settings.rank or 0, modules)
        train.train(range(train.stack.depth))
        track.step(2)
        generate = train.at(Shape(width, height, length))
        generate.generate(1)
        track.step(3)
        encoding = predict.images(model, patch, patch, decoding=False)
        decoding = predict.images(model, width, height, decoding=True)
        track.step(4)
        traces = Traces(train, generate, encoding, decoding, _prompts(subject, length, directory), speed)
        track.step(5)
    return traces


def _prompts(subject: Subject, length: int, directory: Path) -> dict[str, Phase]:
    """Encoding a prompt, by precision: traced in bfloat16, and what other weights take or spare on a SHORT one."""
    small = {name: _hollow(subject, bits, directory / f"{bits}-shallow", True) for name, bits in PRECISIONS.items()}
    short = {name: predict.prompts(model, min(SHORT, length)).peak for name, model in small.items()}
    whole = predict.prompts(small["bf16"], length)
    return {name: replace(whole, peak=whole.peak + peak - short["bf16"]) for name, peak in short.items()}


def find(model: str) -> Subject:
    """The configs of a directory (of either layout), a bundled model or a preset. Raises UserError for another."""
    path = bundled(model) if model in BUNDLED else Path(model).expanduser()
    if path.is_dir():
        converted = is_converted(path)
        family = family_named(read_config(path)["family"]) if converted else family_of(path)
        given = read_config(path).get("defaults", {}) if converted else own_defaults(path, family)
        return _subject(model, family, path, path, given)
    preset = presets.folder(model)
    if preset is None:
        known = sorted([*BUNDLED, *presets.folders()])
        raise UserError(f"--model {model}: no such directory, and not one of {', '.join(known)}")
    family = family_of(preset)
    return _subject(preset.name, family, preset, bundled(family.bundled or ""), own_defaults(preset, family))


def _subject(name: str, family: Family, path: Path, beside: Path, given: dict[str, Any]) -> Subject:
    run.read_components(path, family.name)  # refuses what is not implemented, naming the file
    configs = presets.configs(path)
    transformer = load_table(family.name).CONFIGS["transformer"].from_dict(configs["transformer"])
    return Subject(name, family, configs, beside, family.defaults(transformer) | given)


def complete(settings: EstimateSettings, subject: Subject) -> EstimateSettings:
    """Fill what was left open as training and generation would."""
    known = known_defaults(model_defaults(subject.defaults, source=subject.name))
    names = ("resolution", "train_resolution", "max_sequence_length", "batch_size", "rank", "iters", "width", "height")
    return replace(settings, **{n: known[n] for n in (*names, "steps") if getattr(settings, n) is None})


def _patches(settings: EstimateSettings, model: DiffusionModel) -> PatchSettings:
    return PatchSettings(
        model.defaults.patch_mode, settings.train_resolution or 0, settings.resolution or 0, model.size_multiple
    )


def _hollow(subject: Subject, bits: int, target: Path, shallow: bool = False) -> DiffusionModel:
    configs = subject.family.shallow(subject.configs) if shallow else subject.configs
    hollow.write_hollow(
        target, subject.family.name, configs, Precision("bfloat16", bits), subject.beside,
        scheduler=configs["scheduler"], defaults=subject.defaults,
    )  # fmt: skip
    return open_model(target, 0)


def _row(
    settings: EstimateSettings,
    subject: Subject,
    precision: str,
    ratio: float,
    model: DiffusionModel,
    traces: Traces,
    memory: int,
) -> Estimate:
    plan = plans.choose(model.stack.depth, ratio=ratio, recorded=subject.defaults.get("plans"))
    tracer, iters = traces.train.on(model), settings.iters or 1
    waiting = tracer.together(iters)
    precompute, train = tracer.precompute(plan, "base", waiting), tracer.train(plan.retained)
    encoding = tracer.beside_adapter(traces.encoding, plan, "base")
    drawing = traces.generate.on(model).generate(settings.steps or 1)
    resident = fits(train.ample, memory)
    read = 0 if resident else max(0, train.read - 2 * max(0, memory - train.peak))
    seconds = max(train.seconds * (2 / 3 if resident else 1), read / traces.speed)
    ahead = max(precompute.seconds / waiting * iters, -(-iters // waiting) * precompute.read / traces.speed)
    if _patches(settings, model).mode not in ("resize", "none"):  # there each image is encoded once
        ahead += encoding.seconds * iters * (settings.batch_size or 1)
    components = run.components_of(subject.family.name, subject.configs)
    record = tracer.layout(plan, "base").nbytes
    limit = parse_size(settings.cache_limit, "--cache-limit") or 0
    return Estimate(
        precision, ratio, plan, (traces.prompts[precision], encoding, precompute, train, drawing, traces.decoding),
        sum(size_of(component, Precision("bfloat16", PRECISIONS[precision])) for component in components),
        min(iters, limit // record) * record, read, seconds, (iters * seconds + ahead) / 3600,
    )  # fmt: skip


def recommended(rows: list[Estimate], memory: int) -> Estimate | None:
    """The finest precision that fits, and with it the smallest skip ratio; None where nothing fits."""
    return next((row for row in rows if fits(row.peak, memory)), None)


def _tables(subject: Subject, settings: EstimateSettings, rows: list[Estimate], memory: int, speed: float) -> None:
    names = [phase.name for phase in rows[0].phases]
    unit, size = ("GiB", 2**30) if max(row.peak for row in rows) >= 2**29 else ("MiB", 2**20)
    gib = 2**30
    emit(Table(
        f"{subject.name}: least peak of MLX memory, {unit}",
        ("weights", "skipped", "plan (n, m)", *names, f"fits {memory / gib:.1f} GiB"),
        tuple(
            (row.precision, f"{row.ratio:.0%}", f"({row.plan.n}, {row.plan.m})",
             *(f"{phase.peak / size:.2f}" for phase in row.phases), "yes" if fits(row.peak, memory) else "no")
            for row in rows
        ),
    ))  # fmt: skip
    emit(Table(
        f"{subject.name}: disk and time with {memory / gib:.1f} GiB, {settings.iters} steps",
        ("weights", "skipped", f"model, {unit}", f"cache, {unit}", f"read a step, {unit}", "s a step", "hours a run"),
        tuple(
            (row.precision, f"{row.ratio:.0%}", f"{row.model_bytes / size:.2f}", f"{row.cache_bytes / size:.2f}",
             f"{row.read / size:.2f}", f"{row.seconds:.3g}", f"{row.hours:.2g}")
            for row in rows
        ),
    ))  # fmt: skip
    emit(
        Note(f"measured here: one block of each kind, and {speed / 1e9:.1f} GB/s from the disk; all else is predicted")
    )
    best = recommended(rows, memory)
    if best is None:
        least = min(rows, key=lambda row: row.peak)
        need = f"{least.peak / gib:.2f} GiB with {least.precision} and {least.ratio:.0%} skipped"
        emit(Note(f"nothing fits {memory / gib:.2f} GiB; the least is {need}"))
        return
    bits = PRECISIONS[best.precision]
    quantize = f" -q --q-bits {bits}" if bits else " --dtype bfloat16"
    budget = "" if settings.memory == AUTO else f" --memory-budget {settings.memory}"
    emit(Note(f"recommended: mlx-blockskip convert --hf-path CHECKPOINT --mlx-path MODEL{quantize}"))
    emit(Note(f"then: mlx-blockskip train --model MODEL --data PHOTOS --skip-ratio {best.ratio:g}{budget}"))
