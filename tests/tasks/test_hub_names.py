"""What a repo may be called, and which of its files are chosen by their names."""

import pytest

from mlx_blockskip.converters import flux1, vision
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named
from mlx_blockskip.tasks.checkpoint.hub_files import choose

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("a/b", Repo("a/b")),
        ("a/b.c-d_1@v1.0", Repo("a/b.c-d_1", "v1.0")),
        ("a/b@refs/pr/7", Repo("a/b", "refs/pr/7")),
        (f"a/b@{SHA}", Repo("a/b", SHA)),
        ("flux1-dev", Repo("black-forest-labs/FLUX.1-dev")),
        ("FLUX.1-dev@v2", Repo("black-forest-labs/FLUX.1-dev", "v2")),
        ("https://huggingface.co/a/b", Repo("a/b")),
        ("https://huggingface.co/a/b/", Repo("a/b")),
        ("http://www.huggingface.co/a/b?library=diffusers#usage", Repo("a/b")),
        ("huggingface.co/a/b", Repo("a/b")),
        ("hf.co/a/b", Repo("a/b")),
        ("hf://a/b@v2", Repo("a/b", "v2")),
        ("https://huggingface.co/a/b/tree/main", Repo("a/b", "main")),
        ("https://huggingface.co/a/b/tree/main/transformer", Repo("a/b", "main")),
        ("https://huggingface.co/a/b/blob/v1/model_index.json", Repo("a/b", "v1")),
        ("https://huggingface.co/a/b/resolve/v1/vae/config.json?download=true", Repo("a/b", "v1")),
        (f"https://huggingface.co/a/b/commit/{SHA}", Repo("a/b", SHA)),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F3", Repo("a/b", "refs/pr/3")),
        ("https://huggingface.co/a/b/tree/refs/pr/3", Repo("a/b", "refs/pr/3")),
        ("https://huggingface.co/a/b/discussions/3", Repo("a/b")),
        ("nowhere", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("", None),
    ],
)
def test_what_a_repo_may_be_called(text, repo):
    assert repo_named(text) == repo


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/a/b",
        "https://huggingface.co/spaces/a/b",
        "https://huggingface.co/a",
        "https://civitai.com/models/1",
        "https://huggingface.co.evil.org/a/b",
    ],
)
def test_an_address_that_is_no_models_is_named(text):
    with pytest.raises(UserError, match="is not the address of a model's page; give one such as"):
        repo_named(text)


def test_every_preset_has_its_repo():
    assert set(presets.REPOS) == set(presets.folders())
    assert all(
        presets.folder(name) is not None and repo_named(name) == Repo(presets.REPOS[name]) for name in presets.REPOS
    )


T = "transformer/diffusion_pytorch_model"
SHARDS = [f"{T}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = f"{T}.safetensors.index.json"
DEV = (
    *("model_index.json", "flux1-dev.safetensors", "ae.safetensors", "transformer/config.json", "README.md"),
    *(INDEX, *SHARDS, "text_encoder/model.safetensors", "text_encoder/config.json", "vae/model.onnx", "dev_grid.jpg"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "tokenizer_2/spiece.model"),
    *("scheduler/scheduler_config.json", "LICENSE.md", ".gitattributes"),
)
NOT = {
    *("flux1-dev.safetensors", "ae.safetensors", "text_encoder/pytorch_model.bin", "vae/model.onnx", "dev_grid.jpg"),
    *("text_encoder/model.fp16.safetensors", ".gitattributes"),
}


def chosen(sizes, dtype="bfloat16"):
    sizes = sizes if isinstance(sizes, dict) else dict.fromkeys(sizes, 10)
    return choose(sizes, dict.fromkeys(flux1.FOLDERS, dtype), flux1.COPIED)


def test_only_what_is_converted_is_downloaded():
    kept = chosen(DEV)
    assert len(kept) == len(set(kept))
    assert set(kept) == set(DEV) - NOT


V, FP16 = "vae/diffusion_pytorch_model", "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("there", "dtype", "taken"),
    [
        ([f"{V}.safetensors", f"{V}.fp16.safetensors"], "bfloat16", [f"{V}.safetensors"]),
        ([f"{V}.safetensors", f"{V}.fp16.safetensors"], "float16", [f"{V}.fp16.safetensors"]),
        ([f"{V}.safetensors", f"{V}.bf16.safetensors"], "float16", [f"{V}.safetensors"]),
        ([f"{V}.safetensors", f"{V}.bf16.safetensors"], "float32", [f"{V}.safetensors"]),
        ([f"{V}.fp16.safetensors", f"{V}.bf16.safetensors"], "float32", [f"{V}.bf16.safetensors"]),
        ([f"{V}.fp16.safetensors"], "bfloat16", None),
        ([f"{V}.int4.safetensors", f"{V}.safetensors"], "bfloat16", [f"{V}.safetensors"]),
        ([f"{V}.safetensors", "vae/svdq-int4.safetensors"], "bfloat16", [f"{V}.safetensors"]),
        ([FP16, f"{T}.safetensors.index.fp16.json"], "bfloat16", None),
        ([INDEX, *SHARDS, f"{T}.safetensors"], "bfloat16", [INDEX, *SHARDS]),
        ([INDEX, *SHARDS[:2], f"{T}.safetensors"], "bfloat16", [f"{T}.safetensors"]),
        ([INDEX, f"{T}.safetensors"], "bfloat16", [f"{T}.safetensors"]),
        (["vae/m.safetensors", "text_encoder/m.fp16.safetensors"], "bfloat16", None),
        (["controlnet/m.safetensors", "loras/subject.safetensors", "vae/old/m.safetensors"], "bfloat16", []),
    ],
)
def test_one_copy_of_each_network_and_no_other_folder(there, dtype, taken):
    assert sorted(chosen(there, dtype)) == sorted(there if taken is None else taken)


def test_what_is_here_already_is_taken_where_it_is_precise_enough():
    sizes = {f"{V}.safetensors": 0, f"{V}.bf16.safetensors": 10}
    assert chosen(sizes) == [f"{V}.safetensors"]
    assert chosen({f"{V}.safetensors": 10, f"{V}.bf16.safetensors": 0}, "float32") == [f"{V}.safetensors"]
    single = {INDEX: 1, **dict.fromkeys(SHARDS, 10), f"{T}.safetensors": 0}
    assert chosen(single) == [f"{T}.safetensors"]


def test_of_an_encoder_only_what_lies_at_the_top():
    there = dict.fromkeys(
        (
            "config.json",
            "model.safetensors",
            "onnx/model.safetensors",
            "vocab.json",
            "tf_model.h5",
            "open_clip.safetensors",
        ),
        10,
    )
    assert set(choose(there, {"": "float32"}, beside=vision.PLAIN)) == {
        "config.json",
        "model.safetensors",
        "vocab.json",
    }
