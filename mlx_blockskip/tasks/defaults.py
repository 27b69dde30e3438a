"""What was left open is filled, and what is wrong is refused, once: settings become a config that has no open
fields.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mlx_blockskip.blockskip.patches import PatchSettings
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.defaults import ModelDefaults
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.ranges import SEEDS
from mlx_blockskip.options import parse_size
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.shared_options import DrawingOptions

ANY = "any"
"""The memory budget of a caller in Python who sets none."""


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn. n_images: per prompt. memory_budget: as the user wrote it."""

    width: int
    height: int
    steps: int
    cfg_scale: float
    guidance: float
    max_sequence_length: int
    negative_prompt: str = ""
    n_images: int = 1
    memory_budget: str = ANY

    @property
    def guided(self) -> bool:
        """Whether there is a second branch, for the negative prompt."""
        return self.cfg_scale > 1

    def recorded(self) -> dict[str, Any]:
        """What of it decides how an image looks, and is a default of the model."""
        return {name: getattr(self, name) for name in FROM_MODEL}


FROM_MODEL = ("steps", "cfg_scale", "guidance", "width", "height", "max_sequence_length")


@dataclass(frozen=True)
class TrainConfig:
    """All that a training run goes by, under the names of `TrainSettings`. size_multiple: the model's."""

    model: str
    data: str
    adapter_path: str
    resume: bool
    class_prompt: tuple[str, ...]
    class_images: int
    class_data: str
    prior_weight: float
    residuals: str
    refresh: int
    patch_mode: str
    resolution: int
    train_resolution: int
    size_multiple: int
    max_sequence_length: int
    guidance: float
    timestep_mean: float
    timestep_std: float
    rank: int
    scale: float
    lora_targets: str
    init_adapter: str
    learning_rate: float
    lr_schedule: str
    warmup: int
    weight_decay: float
    clip: float
    iters: int
    batch_size: int
    grad_accumulation: int
    seed: int
    cache_limit: str
    memory_budget: str
    steps_per_save: int
    steps_per_sample: int
    sample_prompt: tuple[str, ...]

    @property
    def patch(self) -> PatchSettings:
        """Raises UserError for sides that the model cannot take."""
        return PatchSettings(self.patch_mode, self.train_resolution, self.resolution, self.size_multiple)

    @property
    def cache_bytes(self) -> int:
        return parse_size(self.cache_limit, "--cache-limit") or 0

    @property
    def batches(self) -> int:
        """Micro-batches of the whole run."""
        return self.iters * self.grad_accumulation

    def recorded(self) -> dict[str, Any]:
        """As JSON values, under the names of `TrainSettings`; without what is empty."""
        return {
            name: value for name, value in asdict(self).items() if name != "size_multiple" and value not in ("", ())
        }


def train_config(settings: TrainSettings, model: DiffusionModel, captions: Sequence[str] = ()) -> TrainConfig:
    """What was left open is the model's, then its family's. captions: of the subject's images, the first of which
    sample images show where no prompt is given. Raises UserError for wrong values.
    """
    if settings.class_data and settings.class_images:
        raise UserError("--class-data and --class-images: give one of them")
    known = known_defaults(model.defaults) | {"guidance": model.defaults.train_guidance}
    given = {name: value for name, value in asdict(settings).items() if value not in (None, [])}
    given.setdefault("sample_prompt", tuple(captions[:1]))
    given.setdefault("memory_budget", ANY)
    given.setdefault("class_data", "")
    given.setdefault("init_adapter", "")
    values = {**known, **given, "size_multiple": model.size_multiple}
    values |= {name: tuple(values[name]) for name in ("class_prompt", "sample_prompt")}
    config = TrainConfig(**{one.name: values[one.name] for one in fields(TrainConfig)})
    config.patch  # noqa: B018  (raises)
    return _prior(settings, config)


def _prior(given: TrainSettings, filled: TrainConfig) -> TrainConfig:
    """No images to make where there is nothing to make them of. Raises UserError for options that then mean nothing."""
    if filled.class_prompt and not filled.class_data:
        return filled
    if given.class_images:
        raise UserError(f"--class-images {given.class_images}: say of what with --class-prompt, or give --class-data")
    if given.prior_weight is not None and given.class_images is None and not given.class_data:
        raise UserError(
            f"--prior-weight {given.prior_weight:g}: there are no class images to weigh; "
            "give --class-prompt or --class-data"
        )
    return replace(filled, class_images=0)


def draw_config(settings: DrawingOptions, model: DiffusionModel) -> DrawConfig:
    """What was left open is the model's own. settings: of any command that draws. Raises UserError for wrong values."""
    known = known_defaults(model.defaults)
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    values = {**known, **given}
    names = [one.name for one in fields(DrawConfig) if one.name in values and one.name != "n_images"]
    config = DrawConfig(**{name: values[name] for name in names})
    check_size(model, config.width, config.height)
    return config


def model_draws(model: DiffusionModel, width: int = 0, height: int = 0, memory_budget: str = ANY) -> DrawConfig:
    """How the model draws where nothing is asked for, in another size if one is given."""
    d = model.defaults
    return DrawConfig(
        width or d.width, height or d.height, d.steps, d.cfg_scale, d.guidance, d.max_sequence_length,
        memory_budget=memory_budget,
    )  # fmt: skip


def known_defaults(defaults: ModelDefaults) -> dict[str, Any]:
    """By the names of the settings."""
    return {one.name: getattr(defaults, one.name) for one in fields(defaults)}


def check_seeds(seed: int, count: int) -> None:
    """Raise UserError where so many images have no seeds of their own from this one on."""
    if seed + count > SEEDS:
        raise UserError(f"--seed {seed}: {count} images have seeds from it on, and {SEEDS - 1} is the last one")


def check_size(model: DiffusionModel, width: int, height: int) -> None:
    """Raise UserError, with the nearest size, where the model cannot take this one."""
    g = model.size_multiple
    if width < 1 or height < 1 or any(side % g for side in model.native_size(width, height)):
        near = " x ".join(str(max(g, round(side / g) * g)) for side in (width, height))
        raise UserError(f"{width} x {height}: the sides must be multiples of {g}; the nearest is {near}")
