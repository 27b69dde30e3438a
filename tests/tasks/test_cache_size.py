"""Bytes of the residual cache that are predicted, against the chunk that training writes."""

import pytest
from conftest import on_every

from mlx_blockskip.blockskip import records
from mlx_blockskip.blockskip.residuals import MODES
from mlx_blockskip.tasks.memory.predict import Shape, Tracer
from mlx_blockskip.tasks.train.precompute import compute_chunk, prompt_records
from support.models import prepared

PLANS = [(1, 1), (0, 2), (2, 0), (0, 0)]


@on_every
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "m"), PLANS)
def test_a_chunk_takes_what_is_predicted_to_the_byte(quick, tmp_path, mode, n, m):
    job = prepared(quick(residuals=mode, skip_first=n, skip_last=m))
    side, batches = job.config.patch.output_side, range(2)
    shape = Shape(side, side, job.config.max_sequence_length, job.config.batch_size)
    predicted = Tracer(job.model, shape).layout(job.plan, mode)
    prompts = records.entries_of(prompt_records(job.samples, batches))
    path = tmp_path / "chunk.safetensors"
    compute_chunk(job, batches, path, records.fingerprint({}), {})
    assert records.chunk_bytes(dict.fromkeys(batches, predicted), prompts) == path.stat().st_size
