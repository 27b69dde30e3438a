"""Gemma-2 against transformers: every branch of its config, padding, names, dtypes, budgets, and what is refused."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters.encoders import gemma2_encoder
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.models.text import gemma2
from support import decoders
from support.compare import assert_parity, relative_error, same_bits
from support.component import save_component

SMALL = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 10, "sliding_window": 40},
}
LENGTHS = (17, 40, 1)
"""Tokens of the test's prompts; the rest of 40 is padding."""


def reference(head=False, **changes):
    torch = pytest.importorskip("torch")
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

    torch.manual_seed(0)
    model = (Gemma2ForCausalLM if head else Gemma2Model)(
        Gemma2Config(**{**SMALL, **changes}, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.15))
    return model


converted = partial(decoders.converted, make=gemma2_encoder, config=gemma2.Gemma2Config)
prompts = partial(decoders.prompts, lengths=LENGTHS, padded=40)


def theirs_for(model, ids, mask):
    import torch

    with torch.no_grad():
        inputs, seen = (torch.from_numpy(x.astype(np.int64)) for x in (ids, mask))
        return getattr(model, "model", model)(inputs, attention_mask=seen).last_hidden_state.float().numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"attn_logit_softcapping": 0.7},
        {"attn_logit_softcapping": None},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_equals_transformers_on_random_configs(tmp_path, changes):
    model = reference(**changes)
    ids, mask = prompts()
    theirs = theirs_for(model, ids, mask)
    ((ours, kept),) = gemma2.encode(converted(model, tmp_path), [ids], [mask])
    np.testing.assert_array_equal(np.array(kept), mask)
    for i, length in enumerate(LENGTHS):
        assert_parity("Gemma-2", ours[i, :length], theirs[i, :length])


@pytest.mark.parametrize("head", [False, True])
def test_a_language_model_gives_the_same_as_its_encoder(tmp_path, head):
    model = reference(head=head)
    names = {name for name, _ in model.named_parameters()}
    assert ("model.norm.weight" in names) is head
    ids, mask = prompts()
    ((ours, _),) = gemma2.encode(converted(model, tmp_path), [ids], [mask])
    assert relative_error(ours[1], theirs_for(model, ids, mask)[1]) <= 1e-4


@pytest.mark.parametrize("layers", [(1,), (0, 2), (2, 1)])
def test_hidden_states_equal_those_of_transformers_and_no_further_layer_is_read(tmp_path, monkeypatch, layers):
    model = reference()
    import torch

    ids, mask = prompts()
    with torch.no_grad():
        inputs, seen = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
        theirs = model(inputs, attention_mask=seen, output_hidden_states=True).hidden_states
    assert max(layers) < len(theirs) - 1, "the last one is normed there"
    read = []
    get = BlockReader._get
    monkeypatch.setattr(BlockReader, "_get", lambda self, index, *rest: read.append(index) or get(self, index, *rest))
    shards = converted(model, tmp_path)
    (ours,) = gemma2.hidden_states(shards, [ids], [mask], layers)
    assert set(ours) == set(layers)
    assert read == list(range(max(layers)))
    for layer, hidden in ours.items():
        for i, length in enumerate(LENGTHS):
            assert_parity("Gemma-2, hidden states", hidden[i, :length], theirs[layer][i, :length].numpy())
    with pytest.raises(ValueError, match="not within 0 to"):
        gemma2.hidden_states(Shards(shards.path), [ids], [mask], (1, 99))


def test_rope_theta_is_read_in_the_old_place_too():
    places = ({"rope_theta": 9.0}, {"rope_parameters": {"rope_theta": 9.0}}, {})
    old, new, default = (gemma2.Gemma2Config.from_dict({"head_dim": 8, **place}) for place in places)
    np.testing.assert_array_equal(gemma2.rope_tables(old, 5), gemma2.rope_tables(new, 5))
    assert not np.array_equal(gemma2.rope_tables(old, 5), gemma2.rope_tables(default, 5))


def test_each_prompt_is_a_sample_and_nothing_sees_padding(tmp_path):
    shards = converted(reference(), tmp_path)
    ids, mask = prompts()
    alone = [gemma2.encode(shards, [i[None]], [m[None]])[0][0] for i, m in zip(ids, mask)]
    together = gemma2.encode(shards, [i[None] for i in ids], [m[None] for m in mask])
    assert all(same_bits(one, other) for one, (other, _) in zip(alone, together))
    changed = np.where(mask, ids, 77)
    for length, one, (other, _) in zip(
        LENGTHS, alone, gemma2.encode(shards, [i[None] for i in changed], [m[None] for m in mask])
    ):
        assert same_bits(one[:, :length], other[:, :length])


def test_a_budget_changes_nothing(tmp_path):
    shards = converted(reference(), tmp_path)
    ids, mask = prompts()
    ((free, _),) = gemma2.encode(shards, [ids], [mask])
    ((bound, _),) = gemma2.encode(shards, [ids], [mask], budget=1)
    assert same_bits(free, bound)


def test_bfloat16_stays_bfloat16_and_is_near(tmp_path):
    model = reference()
    ids, mask = prompts()
    ((ours, _),) = gemma2.encode(converted(model, tmp_path, "bfloat16"), [ids], [mask])
    assert ours.dtype == mx.bfloat16
    assert relative_error(ours.astype(mx.float32)[1], theirs_for(model, ids, mask)[1]) <= 0.1


def test_float16_weights_are_computed_with_in_float32(tmp_path):
    """Products of float16 weights would overflow in float16; scaled up by 3000, they do."""
    torch = pytest.importorskip("torch")
    model = reference()
    kept = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3000 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            parameter.copy_(parameter.to(torch.float16))
            kept[name] = mx.array(parameter.numpy()).astype(mx.float16)
    config = model.config.to_dict()
    stack = gemma2.stack(gemma2.Gemma2Config.from_dict(config))
    shards = Shards(save_component(tmp_path / "gemma2", config, kept, stack))
    ids, mask = prompts()
    ((ours, _),) = gemma2.encode(shards, [ids], [mask])
    assert ours.dtype == mx.float32
    assert relative_error(ours[1], theirs_for(model, ids, mask)[1]) <= 1e-4


def test_quantized_layers_are_near(tmp_path):
    model = reference(hidden_size=64, intermediate_size=128, head_dim=32)
    ids, mask = prompts()
    shards = converted(model, tmp_path, bits=8, group_size=32)
    assert len(shards.group_sizes) == 3 * 7
    ((ours, _),) = gemma2.encode(shards, [ids], [mask])
    assert relative_error(ours[1], theirs_for(model, ids, mask)[1]) <= 0.1


def test_the_rows_fit_the_published_size():
    torch = pytest.importorskip("torch")
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config()
    with torch.device("meta"):
        left = {name: tuple(p.shape) for name, p in Gemma2ForCausalLM(config).state_dict().items()}
    component = gemma2_encoder("text_encoder", gemma2.Gemma2Config.from_dict(config.to_dict()))
    for row in component.rows:
        assert row.fits(left.pop(row.aliases[0])), row
    assert set(left) == {"lm_head.weight"}
    assert all(component.ignored(name) for name in left)
    assert len({component.block(row.name) for row in component.rows} - {None}) == 26


def test_more_tokens_than_the_sliding_window_are_refused(tmp_path):
    ids, mask = prompts(padded=41)
    with pytest.raises(UserError, match="41 tokens are more than its sliding window of 40"):
        gemma2.encode(converted(reference(), tmp_path), [ids], [mask])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_options_that_are_not_implemented_are_refused_by_name(change, name):
    with pytest.raises(UserError, match=f"{name}=.* is not implemented"):
        gemma2.Gemma2Config.from_dict({**SMALL, **change})
