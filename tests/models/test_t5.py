"""What the T5 encoder does where it is easy to be nearly right: buckets far away, weights in float16."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.text import t5
from support.compare import relative_error
from support.component import save_component

SMALL = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "d_kv": 6, "num_heads": 4, "num_layers": 3}


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64), (32, 256)])
@pytest.mark.parametrize("length", [1, 2, 77, 512])
def test_buckets_are_those_of_transformers(buckets, distance, length):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(length)
    theirs = T5Attention._relative_position_bucket(position[None] - position[:, None], True, buckets, distance)
    np.testing.assert_array_equal(t5.relative_buckets(length, buckets, distance), theirs.numpy())


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])
def test_float16_weights_are_computed_with_in_float32(tmp_path, projection, stored):
    """Products of float16 weights would overflow in float16; scaled up by 2000, they do."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    reference = T5EncoderModel(T5Config(**SMALL, feed_forward_proj=projection)).eval()
    config = reference.config.to_dict()
    kept = {}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("wo.weight", "SelfAttention.o.weight")):
                parameter.mul_(2000)
            parameter.copy_(parameter.to(torch.float16 if stored == mx.float16 else torch.bfloat16))
            kept[name] = mx.array(parameter.numpy()).astype(stored)
        ids = np.random.default_rng(0).integers(0, 99, (2, 33)).astype(np.int32)
        theirs = reference(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()
    shards = Shards(save_component(tmp_path / "t5", config, kept, t5.stack(t5.T5Config.from_dict(config))))
    (ours,) = t5.hidden(shards, [ids])
    assert ours.dtype == (mx.float32 if stored == mx.float16 else mx.bfloat16)
    assert relative_error(ours.astype(mx.float32), theirs) <= (1e-4 if stored == mx.float16 else 0.1)
