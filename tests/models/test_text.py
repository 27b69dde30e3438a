"""CLIP and T5 against transformers on random configs; token ids against transformers' tokenizers."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.encoders import clip_text, t5_encoder
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.text import clip, t5, tokenize
from support.compare import assert_parity
from support.golden import GOLDEN, PROMPTS
from support.models import assets

CLIP = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "d_kv": 6, "num_heads": 4, "num_layers": 3}


def component(model, make, tmp_path, dtype="float32") -> Shards:
    model.save_pretrained(tmp_path / "hf")
    config = (clip.CLIPTextConfig if make is clip_text else t5.T5Config).read(tmp_path / "hf" / "config.json")
    made = make("hf", config)
    source = open_source(tmp_path / "hf")
    run.check_rows(made, source)
    (tmp_path / "mlx").mkdir()
    list(write.write_component(made, source, tmp_path / "mlx", write.Precision(dtype)))
    return Shards(tmp_path / "mlx")


@pytest.mark.parametrize(("eos", "act"), [(2, "quick_gelu"), (98, "gelu"), (5, "quick_gelu")])
def test_clip_equals_transformers(tmp_path, eos, act):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(**CLIP, eos_token_id=eos, bos_token_id=1, pad_token_id=0, hidden_act=act)
    reference = CLIPTextModel(config).eval()
    ids = np.random.default_rng(0).integers(6, 97, (2, 77)).astype(np.int32)
    end = eos if eos != 2 else 98
    ids[0, 9:] = end
    ids[1, 30] = end
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids.astype(np.int64)))
    ((hidden, pooled),) = clip.encode(component(reference, clip_text, tmp_path), [ids])
    assert_parity("CLIP text", hidden, theirs.last_hidden_state.numpy())
    assert_parity("CLIP text", pooled, theirs.pooler_output.numpy())


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
@pytest.mark.parametrize("length", [5, 150])
def test_t5_equals_transformers(tmp_path, projection, length):
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    reference = T5EncoderModel(T5Config(**T5, feed_forward_proj=projection)).eval()
    ids = np.random.default_rng(0).integers(0, 99, (2, length)).astype(np.int32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids.astype(np.int64))).last_hidden_state
    shards = component(reference, t5_encoder, tmp_path)
    (ours,) = t5.hidden(shards, [ids])
    assert_parity("T5 encoder", ours, theirs.numpy())
    apart = t5.hidden(shards, [ids[:1], ids[1:]], budget=0)
    assert_parity("T5 encoder", mx.concatenate(apart), theirs.numpy())


def test_t5_is_never_stored_in_float16(tmp_path):
    pytest.importorskip("torch")
    from transformers import T5Config, T5EncoderModel

    shards = component(T5EncoderModel(T5Config(**T5)), t5_encoder, tmp_path, "float16")
    assert shards.load(["shared.weight"])["shared.weight"].dtype == mx.bfloat16


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(UserError, match="swish"):
        clip.CLIPTextConfig(**CLIP, hidden_act="swish")
    with pytest.raises(UserError, match="gated-silu"):
        t5.T5Config(**T5, feed_forward_proj="gated-silu")
    with pytest.raises(UserError, match="dense_act_fn 'gelu'"):
        t5.T5Config(**T5, feed_forward_proj="gated-gelu", dense_act_fn="gelu")
    with pytest.raises(UserError, match="is_gated_act True"):
        t5.T5Config(**T5, is_gated_act=True)


TEXTS = [*PROMPTS, "", "UPPER case", "ünïcødé 🦔 日本", "word " * 200, "a  b\tc\n d"]


def test_token_ids_equal_transformers():
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    for folder, ours, length in (("tokenizer", tokenize.clip_ids, 77), ("tokenizer_2", tokenize.t5_ids, 24)):
        path = assets() / "tiny-flux" / folder
        reference = AutoTokenizer.from_pretrained(str(path))
        theirs = reference(TEXTS, padding="max_length", max_length=length, truncation=True)["input_ids"]
        ids, cut = ours(path, TEXTS, length)
        np.testing.assert_array_equal(ids, np.array(theirs))
        assert cut == [text.startswith("word word") for text in TEXTS] or folder == "tokenizer_2"
        assert cut[TEXTS.index("word " * 200)]
        assert not cut[0]


def test_token_ids_equal_the_stored_ones():
    ids, _ = tokenize.clip_ids(assets() / "tiny-flux" / "tokenizer", PROMPTS, 77)
    np.testing.assert_array_equal(ids, np.array(GOLDEN["clip_input_ids"]))
    ids, _ = tokenize.t5_ids(assets() / "tiny-flux" / "tokenizer_2", PROMPTS, 24)
    np.testing.assert_array_equal(ids, np.array(GOLDEN["t5_input_ids"]))
