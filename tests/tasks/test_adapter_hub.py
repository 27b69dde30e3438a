"""Adapters that are named by a repo: which files are fetched, and what is said where that cannot be told."""

import json

import mlx.core as mx
import pytest

from mlx_blockskip import evaluate, fuse, generate
from mlx_blockskip.engine import files, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Warning, listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.adapter_hub import chosen, named
from mlx_blockskip.tasks.checkpoint.adapters import here, load_adapter, load_adapters
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.evaluate.evaluate import evaluation_directory

REPO = "someone/dog"
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def lora(tmp_path):
    """The bytes of a LoRA file."""
    tensors = {
        f"transformer.{QUERY}.lora_{letter}.weight": mx.array(philox.normal(i, shape=shape))
        for i, (letter, shape) in enumerate((("A", (2, 128)), ("B", (128, 2))))
    }
    files.save_tensors(tmp_path / "lora.safetensors", tensors)
    return (tmp_path / "lora.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "repo", "file"),
    [
        ("a/b", Repo("a/b"), None),
        ("a/b@v1", Repo("a/b", "v1"), None),
        ("a/b/dog.safetensors", Repo("a/b"), "dog.safetensors"),
        ("a/b@v1/sub/dog.sft", Repo("a/b", "v1"), "sub/dog.sft"),
        ("https://huggingface.co/a/b", Repo("a/b"), None),
        ("https://huggingface.co/a/b/blob/main/sub/dog.safetensors", Repo("a/b", "main"), "sub/dog.safetensors"),
        ("https://huggingface.co/a/b/resolve/v1/dog.safetensors?download=true", Repo("a/b", "v1"), "dog.safetensors"),
        ("adapters", None, None),
        ("./a/b/dog.safetensors", None, None),
        ("/a/b/dog.safetensors", None, None),
    ],
)
def test_what_an_adapter_of_the_hub_may_be_called(text, repo, file):
    assert named(text) == (repo, file)


CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    ("names", "file", "found"),
    [
        (["README.md", "a.safetensors"], None, ["a.safetensors"]),
        (["a.safetensors", "pytorch_lora_weights.safetensors"], None, ["pytorch_lora_weights.safetensors"]),
        ([CONFIG, "adapter_model.safetensors", "other.safetensors"], None, [CONFIG, "adapter_model.safetensors"]),
        ([CONFIG, "adapters.safetensors", "dog.safetensors"], None, [CONFIG, "adapters.safetensors"]),
        (["a.safetensors", "b.safetensors"], "b.safetensors", ["b.safetensors"]),
        (
            [f"x/{CONFIG}", "x/adapters.safetensors"],
            "x/adapters.safetensors",
            [f"x/{CONFIG}", "x/adapters.safetensors"],
        ),
        ([CONFIG, "b.safetensors"], "b.safetensors", ["b.safetensors"]),
        (
            ["b.safetensors", "a.safetensors"],
            None,
            r"several LoRA files \(a.safetensors, b.safetensors\); add the name",
        ),
        (["a.safetensors"], "c.safetensors", "has no file c.safetensors"),
        (["model_index.json", "a.safetensors"], None, "is a whole model and no adapter"),
        (["lora.bin"], None, "has only pickled files and no safetensors file"),
        (["README.md"], None, "has no safetensors file; choose another repo"),
    ],
)
def test_which_files_of_a_repo_are_its_adapter(names, file, found):
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            chosen(Repo(REPO), names, file)
        assert chosen(Repo(REPO), names, file, complain=False) is None
    else:
        assert chosen(Repo(REPO), names, file) == found


def test_it_is_fetched_once_alone_and_found_offline(hub_server, tiny_flux, lora, monkeypatch):
    others = {"big.bin": b"\0" * 1000, "README.md": b"# dog", "sub/second.safetensors": lora}
    hub_server.add(REPO, {**others, "dog.safetensors": lora})
    model = open_model(tiny_flux)
    with pytest.raises(UserError, match=r"several LoRA files \(dog.safetensors, sub/second.safetensors\)"):
        here(REPO)
    adapter = load_adapters(model, [f"{REPO}/dog.safetensors"], [])
    assert set(adapter.layers(model.stack)) == {QUERY}
    assert hub_server.fetched() == {"dog.safetensors"}
    hub_server.forget()
    assert here(f"{REPO}/dog.safetensors").read_bytes() == lora
    assert not hub_server.fetched()
    hub_server.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert here(f"{REPO}/dog.safetensors").read_bytes() == lora
    with pytest.raises(UserError, match="someone/dog/other.safetensors: no such adapter here, and on the Hub"):
        here(f"{REPO}/other.safetensors")


def test_a_directory_of_the_hub_comes_with_its_config(hub_server, tiny_flux, lora):
    hub_server.add(
        REPO, {"adapter_model.safetensors": lora, CONFIG: json.dumps({"peft_type": "LORA", "r": 2}).encode()}
    )
    path = here(REPO)
    assert path.is_dir()
    model = open_model(tiny_flux)
    assert set(load_adapter(model, path)[0].layers(model.stack)) == {QUERY}


def test_commands_take_it_by_its_name(hub_server, tiny_flux, lora, tmp_path):
    hub_server.add(REPO, {"dog.safetensors": lora})
    drawn = {"model": str(tiny_flux), "prompt": ["a dog"], "width": 64, "height": 64, "steps": 1}
    (made,) = generate(adapter_path=[REPO], output=str(tmp_path / "a.png"), **drawn)
    local = here(REPO)
    (known,) = generate(adapter_path=[str(local)], output=str(tmp_path / "b.png"), **drawn)
    from PIL import Image

    assert Image.open(made).tobytes() == Image.open(known).tobytes()
    assert fuse(model=str(tiny_flux), adapter_path=[REPO], save_path=str(tmp_path / "fused")).is_dir()
    with pytest.raises(UserError, match="--data: someone/dog is no adapter directory that records it"):
        evaluate(adapter_path=REPO, model=str(tiny_flux))


@pytest.mark.parametrize(
    ("text", "where"), [(REPO, "dog-evaluation"), (f"{REPO}/my.dog.safetensors", "my.dog-evaluation")]
)
def test_an_evaluation_is_never_written_into_the_hubs_cache(text, where):
    assert str(evaluation_directory(text)) == where


def test_a_file_that_says_it_is_for_another_architecture_is_said(tiny_flux, lora, tmp_path):
    model = open_model(tiny_flux)
    tensors = files.load_lazily(tmp_path / "lora.safetensors")
    mx.eval(tensors)
    for metadata, said in (
        (
            {"modelspec.architecture": "flux-1-schnell/lora"},
            ["for flux-1-schnell, and the model is flux-1-dev"],
        ),
        ({"modelspec.architecture": "flux-1-dev/lora"}, []),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, ["for sdxl_base_v1-0, and the model is flux1"]),
        ({"ss_base_model_version": "flux1"}, []),
        ({}, []),
    ):
        files.save_tensors(tmp_path / "said.safetensors", dict(tensors), metadata)
        heard = []
        with listening(heard.append):
            load_adapter(model, tmp_path / "said.safetensors")
        warnings = [event.message for event in heard if isinstance(event, Warning)]
        assert [any(text in w for w in warnings) for text in said] == [True] * len(said), (metadata, warnings)
        assert len(warnings) == len(said)


OTHERS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "Stable Diffusion",
    "lora_te2_text_model_encoder.alpha": "Stable Diffusion XL",
    "diffusion_model.layers.0.attention.to_q.lora_A.weight": "Z-Image",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": "FLUX.2",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight": "Qwen-Image",
    "diffusion_model.blocks.0.cross_attn.q.lora_A.weight": "Wan",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "a language model",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_for_another_model_is_named_with_the_likely_one(tiny_flux, tmp_path, name):
    tensors = {name: mx.ones((2, 2)), name.replace("lora_A", "lora_B").replace("lora_down", "lora_up"): mx.ones((2, 2))}
    if name.endswith(".alpha"):
        tensors["lora_unet_input_blocks_1.lora_down.weight"] = mx.ones((2, 2))
    files.save_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=rf"has no layer .*its names are those of {OTHERS[name]}\)"):
        load_adapter(open_model(tiny_flux), tmp_path / "x.safetensors")
