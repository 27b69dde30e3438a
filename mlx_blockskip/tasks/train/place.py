"""The directory of a run: whether another run's work lies in it, and what is taken away where that may be replaced."""

from pathlib import Path

from mlx_blockskip.engine import listing, owned
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.tasks.checkpoint.adapter_names import TENSORS
from mlx_blockskip.tasks.sampling.previews import SAMPLE_FILES, SAMPLES
from mlx_blockskip.tasks.train import checkpoints


def claim(directory: Path, resume: bool, overwrite: bool) -> None:
    """Have the directory for a run. Raises UserError where another one's adapter or checkpoints are in it and the run
    neither goes on nor may replace them; those that it replaces go, but the adapter stays until there is a new one.
    """
    held = checkpoints.found(directory)
    what = "an adapter" if (directory / TENSORS).exists() else f"{held[-1].name} of another run" if held else None
    if what and not (resume or overwrite):
        raise UserError(
            f"{directory}: already holds {what}; go on with --resume, begin again with --overwrite, or choose another "
            "--adapter-path"
        )
    samples = listing.visible(directory / SAMPLES, SAMPLE_FILES)
    if samples and not (resume or overwrite):
        raise UserError(f"{samples[0]}: is of another run; move it, or begin again with --overwrite")
    if overwrite and not resume:
        for path in held:
            checkpoints.remove(path)
        for path in samples:
            path.unlink()
        owned.remove_empty(directory / SAMPLES)
