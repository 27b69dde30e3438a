"""What opened model directories of all families share: the transformer's stack, the VAE, and what stays of them."""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Stack, Weights
from mlx_blockskip.models import flow, schedulers
from mlx_blockskip.models.config import Config
from mlx_blockskip.models.defaults import model_defaults, own_defaults
from mlx_blockskip.models.layers import UsedOnce

SCARCE = 2 << 30
"""Below such a memory budget what is not at work is let go of, and read again, rather than kept."""

Defaults = Callable[[Any], dict[str, Any]]
"""`(the transformer's Config) -> settings`, as in `Family`."""


class Opened:
    """A directory with a `transformer`, a `vae` and a `scheduler`. Every component's config is read when it is opened.

    configs: the components, by folder, that make its identity. defaults: the family's; what the directory's config.json
    records goes over them. make_stack: the transformer's config -> its blocks. factor: the VAE's config -> pixels a
    side of one latent. Raises UserError for an option of a network or of the scheduler that is not implemented.
    """

    def __init__(
        self,
        path: Path,
        budget: int | None,
        defaults: Defaults,
        configs: Mapping[str, type[Config]],
        make_stack: Callable[[Any], Stack],
        factor: Callable[[Any], int],
    ):
        self.path = path
        self.budget = budget
        self.configs: Mapping[str, Any] = {
            folder: config.read(path / folder / "config.json") for folder, config in configs.items()
        }
        self.shards = Shards(path / "transformer")
        own = own_defaults(files.read_json(path / "config.json"), path / "config.json")
        self.defaults = model_defaults({**defaults(self.configs["transformer"]), **own}, path / "config.json")
        self.stack = make_stack(self.configs["transformer"])
        self.reader = BlockReader(self.shards, self.stack, budget)
        file = path / "scheduler" / schedulers.FILE
        self.scheduler = schedulers.parse(files.read_json(file), file)
        self.vae = Shards(path / "vae")
        self.vae_factor = factor(self.configs["vae"])
        self.identity = sha256("".join(Shards(path / name).identity for name in configs).encode()).hexdigest()
        self._rest: dict[str, Weights] = {}

    @property
    def dtype(self) -> mx.Dtype:
        return self.weights("proj_out")["proj_out.weight"].dtype

    def weights(self, *modules: str) -> Weights:
        """The weights outside the blocks, by module; they stay until `release`."""
        merged: dict[str, mx.array] = {}
        for module in modules:
            if module not in self._rest:
                self._rest[module] = self.shards.load(self.shards.under(module + ".") or [module])
            merged |= self._rest[module]
        return merged

    @property
    def scarce(self) -> bool:
        return self.budget is not None and self.budget < SCARCE

    def make_room(self) -> None:
        if self.scarce:
            self._rest.clear()

    def release(self) -> None:
        """Let go of the weights outside the blocks and of the blocks that were kept."""
        self._rest.clear()
        self.reader.release()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return height // self.vae_factor, width // self.vae_factor, self.configs["vae"].latent_channels

    def guide(self, conditional: mx.array, unconditional: mx.array, scale: float) -> mx.array:
        return flow.guided(conditional, unconditional, scale)

    def vae_weights(self, prefixes: Iterable[str]) -> tuple[UsedOnce, mx.Dtype]:
        """What is under these prefixes, each layer read when it is reached, and the type of the first convolution."""
        weights = UsedOnce(self.vae.lazily(name for prefix in prefixes for name in self.vae.under(prefix)))
        return weights, next(array.dtype for name, array in weights.items() if ".conv_in." in name)
