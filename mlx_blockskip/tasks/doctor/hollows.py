"""A published model without its weights: zeros in its shapes that take no disk, in a temporary directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.converters import hollow
from mlx_blockskip.converters.run import components_of
from mlx_blockskip.converters.write import Precision, size_of
from mlx_blockskip.engine import files
from mlx_blockskip.engine.reader import Part
from mlx_blockskip.engine.stack import Context, Modulation
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models import presets
from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.registry import find_family, open_model
from mlx_blockskip.tasks.checkpoint.resolve import bundled
from mlx_blockskip.tasks.doctor.workshop import Workshop

DTYPE = "bfloat16"
RANK = 16


@dataclass(frozen=True)
class Hollow:
    """A preset: its transformer whole, its text encoders with one layer of each kind."""

    name: str
    family: Family
    model: DiffusionModel

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kinds of blocks there are, in the order of their first ones."""
        return tuple(dict.fromkeys(self.model.stack.kinds))

    def index(self, kind: str) -> int:
        """The first block of this kind."""
        return self.model.stack.kinds.index(kind)

    def factors(self, kind: str) -> dict[str, mx.array]:
        """Zeros in the shapes of a block's LoRA, on all linear layers."""
        return lora.blank(
            self.model.reader, self.index(kind), lora.targets(self.family.lora_targets, "all")[kind], RANK
        )

    def sample(self, width: int, height: int, length: int) -> Batch:
        """Zeros for an image of this size and a prompt of this length, with the modulation of every kind. Not
        evaluated: shapes are often enough.
        """
        model, prompt = self.model, self.model.blank_prompt(length)
        h, w, channels = model.latent_shape(width, height)
        context = model.context(mx.full((1,), 0.5), prompt, (h, w), 1.0)
        found = {self.index(kind): self._modulation(kind, context) for kind in self.kinds}
        batch = Batch(model.embed(mx.zeros((1, h, w, channels)), prompt), context, found.get)
        model.release()
        return batch

    def _modulation(self, kind: str, context: Context) -> Modulation:
        modulate = self.model.stack.block(self.index(kind)).kind.modulate
        return None if modulate is None else modulate(self.weights(kind, "modulation"), context)

    def weights(self, kind: str, part: Part = "body") -> Mapping[str, mx.array]:
        """A block's weights, none of them read yet."""
        reader, index = self.model.reader, self.index(kind)
        prefix = self.model.stack.block(index).prefix
        return {name[len(prefix) :]: a for name, a in reader.shards.lazily(reader.names(index, part)).items()}


def published(workshop: Workshop, name: str, bits: int = 0) -> Hollow:
    """A preset. bits: of its weights; 0 for bfloat16."""
    return workshop.once(("hollow", name, bits), lambda: _published(workshop.place(f"{name}-{bits or 16}"), name, bits))


def _published(target: Path, name: str, bits: int) -> Hollow:
    folder = presets.folders()[name]
    family, whole = find_family(files.read_json(folder / "model_index.json")), presets.configs(folder)
    configs = {**family.shallow(whole), "transformer": whole["transformer"]}
    hollow.write_hollow(
        target, family.name, configs, Precision(DTYPE, bits), bundled(family.bundled or ""),
        scheduler=configs["scheduler"],
    )  # fmt: skip
    return Hollow(name, family, open_model(target, 0))


def sizes() -> dict[str, int]:
    """Bytes of each preset's transformer in bfloat16, the smallest first."""
    found = {}
    for name, folder in presets.folders().items():
        family = find_family(files.read_json(folder / "model_index.json"))
        components = {part.folder: part for part in components_of(family.name, presets.configs(folder))}
        found[name] = size_of(components["transformer"], Precision(DTYPE))
    return dict(sorted(found.items(), key=lambda item: item[1]))
