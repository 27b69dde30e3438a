"""What makes opening a model quick: nothing of its weights is read before it is needed."""

import pytest
from conftest import on_every

from mlx_blockskip import load
from mlx_blockskip.engine import files


@on_every
@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_no_checksum_is_made_and_no_weight_is_read_to_open_a_model(family_model, monkeypatch, budget):
    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or sha256(path))
    monkeypatch.setattr(files, "load_lazily", lambda path: read.append(path))
    model = load(str(family_model), memory_budget=budget)
    assert model.identity
    assert not [path for path in read if path.suffix == ".safetensors"]
