"""Language models of transformers as text encoders: converted, and prompts for them."""

import numpy as np

from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine.shards import Shards


def converted(model, path, dtype="float32", *, make, config, **precision):
    """The shards of a model, by its component and its config's class."""
    model.save_pretrained(path / "hf")
    made, source = make("hf", config.read(path / "hf" / "config.json")), open_source(path / "hf")
    run.check_rows(made, source)
    (path / "mlx").mkdir()
    list(write.write_component(made, source, path / "mlx", write.Precision(dtype, **precision)))
    return Shards(path / "mlx")


def prompts(lengths, padded):
    """Tokens (prompts, padded) of these lengths, and which of them are no padding."""
    ids = np.random.default_rng(0).integers(3, 99, (len(lengths), padded)).astype(np.int32)
    mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int32)
    return np.where(mask, ids, 0), mask
