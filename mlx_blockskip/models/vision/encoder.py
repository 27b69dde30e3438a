"""An image encoder opened from its MLX directory: images, and for CLIP texts, as vectors of unit length.

The directory: config.json (`encoder` says the kind), preprocessor_config.json, `vision/` and, for CLIP, `text/` as
components, and `tokenizer/`. Weights are stored in any precision and computed with in float32: it measures.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Protocol

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_blockskip.engine import files, manifest
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.layers import linear
from mlx_blockskip.models.text import clip as text
from mlx_blockskip.models.text import tokenize
from mlx_blockskip.models.vision import clip, preprocess, vit
from mlx_blockskip.models.vision.clip import CLIPVisionConfig
from mlx_blockskip.models.vision.vit import Dinov2Config, ViTConfig

TOGETHER = 32
"""Images that wait in one sweep over the layers. Each is a batch of its own, so it does not depend on the others."""


class Encoder(Protocol):
    """Vectors of unit length, (N, D) float32. identity: a fingerprint of weights and preprocessing.

    Texts are embedded only where `has_text`; elsewhere `embed_texts` raises UserError.
    """

    path: Path
    identity: str
    has_text: bool

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A kind of encoder. tower: a module with `stack`, `tokens` and `class_token`. config: that of the tower.
    projected: whether vectors are in CLIP's space.
    """

    tower: ModuleType
    config: type[ViTConfig | Dinov2Config | CLIPVisionConfig]
    projected: bool


KINDS = {
    "vit": Kind(vit, ViTConfig, False),
    "dinov2": Kind(vit, Dinov2Config, False),
    "clip": Kind(clip, CLIPVisionConfig, True),
}


def open_encoder(path: Path, budget: int | None = None) -> Encoder:
    """Open an MLX encoder directory; weights are read when they are needed. Raises UserError where it is none.

    budget: bytes of MLX memory that the layers are read within; None keeps them until `release`.
    """
    config = files.read_json(path / "config.json") if (path / "config.json").is_file() else None
    kind = KINDS.get(str(config.get("encoder"))) if isinstance(config, dict) else None
    if kind is None:
        raise UserError(
            f"{path}: is not an MLX encoder directory; give a checkpoint of DINO, DINOv2 or CLIP, "
            "or what `mlx-blockskip convert` made of one"
        )
    assert isinstance(config, dict)
    if config.get("format") != 1:
        raise UserError(
            f"{path}: has format {config.get('format')}, and this version reads format 1; update or reconvert"
        )
    manifest.check(path)
    return Opened(path, kind, budget)


class Opened:
    """See `Encoder`."""

    def __init__(self, path: Path, kind: Kind, budget: int | None):
        self.path = path
        self.kind = kind
        self.budget = budget
        self.has_text = kind.projected
        self.how = preprocess.read(path / preprocess.FILE)
        self.shards = Shards(path / "vision")
        self.config = kind.config.from_dict(self.shards.config, path / "vision" / "config.json")
        self.text = Shards(path / "text") if kind.projected else None
        if self.text is not None:
            self.text_config = text.CLIPTextConfig.from_dict(self.text.config, path / "text" / "config.json")
        self.stack = kind.tower.stack(self.config)
        self.reader = BlockReader(self.shards, self.stack, budget)
        parts = [shards.identity for shards in (self.shards, self.text) if shards is not None]
        told = json.dumps(files.read_json(path / preprocess.FILE), sort_keys=True)
        self.identity = sha256("".join([*parts, told]).encode()).hexdigest()
        self._rest: dict[str, mx.array] | None = None

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) float32, of unit length."""
        found = []
        for start in range(0, len(images), TOGETHER):
            found += self._sweep([preprocess.pixels(image, self.how) for image in images[start : start + TOGETHER]])
        return _unit(found, self._width(self.shards, "visual_projection"))

    def _sweep(self, inputs: Iterable[np.ndarray]) -> list[mx.array]:
        tower, config, rest = self.kind.tower, self.config, self._outside()
        samples = [Batch(tower.tokens(rest, config, mx.array(pixels)[None])) for pixels in inputs]
        forward(self.stack, self.reader, samples)
        found = [tower.class_token(rest, config, sample.state) for sample in samples]
        if self.kind.projected:
            found = [linear(rest, "visual_projection", x) for x in found]
        mx.eval(found)
        return found

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, of unit length; what is longer than the text tower reads is cut off."""
        if self.text is None:
            raise UserError(f"{self.path}: embeds images only; give a CLIP encoder to compare with texts")
        if not texts:
            return _unit([], self._width(self.text, "text_projection"))
        length = self.text_config.max_position_embeddings
        ids, _ = tokenize.clip_ids(self.path / "tokenizer", texts, length)
        pooled = text.pooled(self.text, [row[None] for row in ids], self.budget, dtype=mx.float32)
        w = self.text.load(["text_projection.weight"])
        return _unit([linear(w, "text_projection", x) for x in pooled], self._width(self.text, "text_projection"))

    def release(self) -> None:
        """Let go of the weights; the next images read them again."""
        self.reader.release()
        self._rest = None

    def _outside(self) -> dict[str, mx.array]:
        """The weights outside the layers."""
        if self._rest is None:
            prefixes = tuple(block.prefix for block in self.stack.blocks)
            self._rest = self.shards.load([name for name in self.shards.names if not name.startswith(prefixes)])
        return self._rest

    def _width(self, shards: Shards, projection: str) -> int:
        return shards.shape(f"{projection}.weight")[0] if self.kind.projected else self.config.hidden_size


def _unit(vectors: Sequence[mx.array], width: int) -> np.ndarray:
    """(N, width) float32 from N arrays of (1, width)."""
    stacked = np.concatenate([np.zeros((0, width), np.float32), *(np.array(x.astype(mx.float32)) for x in vectors)])
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
