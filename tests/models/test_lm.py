"""mlx-lm's decoders as a stack of ours: against transformers in every branch, against mlx-lm, and what they take."""

import resource
import subprocess
import sys
from functools import partial

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest

from mlx_blockskip.converters.encoders import gemma2_encoder, qwen3_decoder
from mlx_blockskip.engine import files, planner
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models import cpu
from mlx_blockskip.models.text import gemma2, lm
from mlx_blockskip.models.text.lm import Qwen3Config
from support import decoders
from support.compare import assert_parity, relative_error, same_bits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
LENGTHS = (17, 24, 1)
"""Tokens of the test's prompts; the rest of 24 is padding."""


def reference(cls="Qwen3ForCausalLM", **changes):
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.Qwen3Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    return model


converted = partial(decoders.converted, make=qwen3_decoder, config=Qwen3Config)
prompts = partial(decoders.prompts, lengths=LENGTHS, padded=24)


def theirs_for(model, ids, mask):
    """Every hidden state; the last one is normed."""
    with torch.no_grad():
        inputs, seen = (torch.from_numpy(x.astype(np.int64)) for x in (ids, mask))
        found = model(inputs, attention_mask=seen, output_hidden_states=True).hidden_states
    return [state.float().numpy() for state in found]


def ours_for(shards, ids, mask, layers, budget=None):
    return lm.hidden_states(shards, Qwen3Config.from_dict(shards.config), ids, mask, layers, budget)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "attention_bias": True},
        {"num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "tie_word_embeddings": True},
        {"cls": "Qwen3Model", "num_attention_heads": 6, "head_dim": 4},
    ],
    ids=str,
)
def test_equals_transformers_on_random_configs(tmp_path, changes):
    """At padding too, which the transformers of text-to-image models attend to."""
    model = reference(**changes)
    ids, mask = prompts()
    theirs = theirs_for(model, ids, mask)
    (ours,) = ours_for(converted(model, tmp_path), [ids], [mask], range(4))
    for found, wanted in zip(ours, theirs, strict=False):
        assert_parity("Qwen3, hidden states", found, wanted)


def test_layers_are_counted_from_both_ends_and_none_is_normed(tmp_path):
    model = reference()
    ids, mask = prompts()
    theirs, shards = theirs_for(model, ids, mask), converted(model, tmp_path)
    ((before, last, third),) = ours_for(shards, [ids], [mask], (-2, -1, 3))
    assert same_bits(before, third)
    assert_parity("Qwen3, hidden states", before, theirs[-2])
    assert relative_error(last, theirs[-1]) > 0.1, "theirs is normed"
    norm = shards.load(["model.norm.weight"])["model.norm.weight"]
    assert_parity("Qwen3, hidden states", mx.fast.rms_norm(last, norm, 1e-6), theirs[-1])
    for layers in ((5,), (-6,), ()):
        with pytest.raises(ValueError, match="not within 0 to 4"):
            ours_for(shards, [ids], [mask], layers)


def test_no_layer_beyond_the_last_that_is_asked_for_is_read(tmp_path, monkeypatch):
    shards, read = converted(reference(), tmp_path), []
    get = BlockReader._get
    monkeypatch.setattr(BlockReader, "_get", lambda self, index, *rest: read.append(index) or get(self, index, *rest))
    ids, mask = prompts()
    ours_for(shards, [ids], [mask], (2, 0))
    assert read == [0, 1]


def test_each_prompt_is_a_sample_of_its_own_length_and_a_budget_changes_nothing(tmp_path):
    shards = converted(reference(), tmp_path)
    ids, mask = prompts()
    rows = [(i[None, :n], m[None, :n]) for i, m, n in zip(ids, mask, LENGTHS)]
    alone = [ours_for(shards, [i], [m], (3,))[0][0] for i, m in rows]
    together = ours_for(shards, *zip(*rows), (3,), budget=1)
    (padded,) = ours_for(shards, [ids], [mask], (3,))
    for one, (other,), whole, length in zip(alone, together, padded[0], LENGTHS):
        assert same_bits(one, other)
        assert relative_error(one[0], whole[:length]) <= 1e-5


@pytest.mark.skipif(not cpu.in_use(), reason="of the CPU backend")
@pytest.mark.parametrize(("precision", "bound"), [({}, 0.05), ({"bits": 8, "group_size": 32}, 0.1)])
def test_on_the_cpu_states_are_float32_and_products_go_by_its_fast_path(tmp_path, monkeypatch, precision, bound):
    model = reference(hidden_size=64, intermediate_size=96, head_dim=16)
    shards = converted(model, tmp_path, "bfloat16", **precision)
    name, products = ("quantized_matmul" if precision else "matmul"), []
    fast = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda x, *rest: products.append(x.dtype) or fast(x, *rest))
    ids, mask = prompts()
    ((ours,),) = ours_for(shards, [ids], [mask], (3,))
    assert ours.dtype == mx.float32
    assert products == [mx.float32] * 3 * 7
    assert relative_error(ours, theirs_for(model, ids, mask)[3]) <= bound


def test_quantized_layers_are_as_mlx_lm_has_them(tmp_path):
    """The same names, the same packed weights, the same states."""
    import mlx.nn as nn
    from mlx_lm.models import qwen3

    reference_model = reference(hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True)
    shards = converted(reference_model, tmp_path, bits=4, group_size=32)
    theirs = qwen3.Model(qwen3.ModelArgs.from_dict(shards.config))
    nn.quantize(theirs, 32, 4, class_predicate=lambda name, part: isinstance(part, nn.Linear))
    theirs.load_weights(list(shards.load(shards.names).items()))
    ids, mask = prompts()
    ((last,),) = ours_for(shards, [ids[1:2]], [mask[1:2]], (-1,))
    mx.disable_compile()
    wanted = theirs.model(mx.array(ids[1:2]))
    mx.enable_compile()
    assert relative_error(theirs.model.norm(last), wanted) <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_mlx_lm_s_own_is_read_as_it_is(tmp_path, bits):
    """As those of mlx-community: quantized, its embeddings too, with an index without checksums."""
    import mlx.nn as nn
    from mlx_lm.models import qwen3
    from mlx_lm.utils import save_model

    config = {**SMALL, "model_type": "qwen3", "rms_norm_eps": 1e-6, "max_position_embeddings": 99, "rope_theta": 1e4}
    config |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True}
    mx.random.seed(0)
    theirs = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    nn.quantize(theirs, 32, bits)
    save_model(tmp_path, theirs)
    files.write_json(tmp_path / "config.json", config)
    ids, mask = prompts(lengths=(24,))
    ((last,),) = ours_for(Shards(tmp_path), [ids], [mask], (-1,))
    mx.disable_compile()
    wanted = theirs.model(mx.array(ids))
    mx.enable_compile()
    assert relative_error(theirs.model.norm(last), wanted) <= 1e-5


@pytest.mark.skipif(not cpu.in_use(), reason="of the CPU backend")
@pytest.mark.parametrize("by_user", [False, True])
def test_on_the_cpu_nothing_is_compiled_and_what_the_user_set_stays(tmp_path, monkeypatch, by_user):
    shards, asked = converted(reference(), tmp_path), []
    ids, mask = prompts()
    for name in ("disable", "enable"):
        monkeypatch.setattr(mx, f"{name}_compile", lambda name=name: asked.append(name))
    if by_user:
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    ours_for(shards, [ids], [mask], (2,))
    assert asked == ([] if by_user else ["disable", "enable"] * 2)


def test_mlx_lm_is_imported_by_nothing_but_a_prompt():
    alone = (
        "import sys, mlx_blockskip.models.flux2.model as m; print(m.lm, {'mlx_lm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_gemma_goes_by_the_same_path(tmp_path):
    torch.manual_seed(0)
    small = {**SMALL, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 0.7}
    model = transformers.Gemma2Model(transformers.Gemma2Config(**small)).eval()
    shards = converted(model, tmp_path, make=gemma2_encoder, config=gemma2.Gemma2Config)
    config = gemma2.Gemma2Config.from_dict(shards.config)
    ids, mask = prompts(lengths=(17,))
    (wanted,) = gemma2.hidden_states(shards, [ids], [mask], (3,))
    whole = lm.stack(config, prefix="")
    batch = Batch(lm.Hidden(gemma2.embedded(shards, ids, config.hidden_size)), mx.array(lm.causal(mask)))
    forward(whole, BlockReader(shards, whole), [batch], range(3))
    assert relative_error(batch.state.hidden[:, :17], wanted[3][:, :17]) <= 1e-5


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    shards = converted(reference(hidden_size=256, intermediate_size=1024, num_hidden_layers=6), tmp_path)
    ids, mask = prompts(lengths=(8,), padded=8)
    whole = lm.stack(Qwen3Config.from_dict(shards.config))
    layer = BlockReader(shards, whole).nbytes(0)
    peak, _, _ = planner.traced(lambda: mx.eval(ours_for(shards, [ids], [mask], (6,), budget=0)))
    assert layer <= peak <= 1.3 * layer


def test_importing_mlx_lm_leaves_the_limit_of_open_files(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (99, 100))\nTransformerBlock = 1\n"
    )
    monkeypatch.setattr(mlx_lm.models, "__path__", [*mlx_lm.models.__path__, str(tmp_path)])
    limits, setrlimit = resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit
    assert lm.imported("greedy").TransformerBlock == 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert resource.setrlimit is setrlimit


def test_the_rows_fit_the_published_sizes():
    config = transformers.Qwen3Config(
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8}
    )
    with torch.device("meta"):
        left = {name: tuple(p.shape) for name, p in transformers.Qwen3ForCausalLM(config).state_dict().items()}
    component = qwen3_decoder("text_encoder", Qwen3Config.from_dict(config.to_dict()))
    for row in component.rows:
        assert row.fits(left.pop(row.name)), row
    assert set(left) == {"lm_head.weight"}
    assert all(component.ignored(name) for name in left)
    assert len({component.block(row.name) for row in component.rows} - {None}) == 36
