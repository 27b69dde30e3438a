"""Whatever is in a file that is read, it is read, or refused in a sentence; soon, and in bounded memory."""

import random
import shutil
import time

import hypothesis
import mlx.core as mx
import pytest
from hypothesis import strategies as st
from PIL import Image

from mlx_blockskip import lora
from mlx_blockskip.blockskip import plan, records
from mlx_blockskip.converters import run, singles, source
from mlx_blockskip.data import load_dataset, load_image
from mlx_blockskip.engine import files, owned
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.options import merge
from mlx_blockskip.settings import TrainSettings, VerifySettings
from mlx_blockskip.tasks.checkpoint import card
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter, save_adapter
from mlx_blockskip.tasks.checkpoint.cache import kept
from mlx_blockskip.tasks.checkpoint.recognise import family_of, is_converted, is_encoder
from mlx_blockskip.tasks.checkpoint.resolve import known_commits
from mlx_blockskip.tasks.checkpoint.verify import verify
from mlx_blockskip.tasks.running import running
from mlx_blockskip.tasks.train import checkpoints
from mlx_blockskip.tasks.train.checkpoints import State
from mlx_blockskip.tasks.train.moments import Moments
from support import mutants, scenes
from support.models import assets, convert, random_tree
from support.toy import make_toy

CASES = 12
"""Of each reader. By `--long 280` 100,000 in all."""
SECONDS = 5.0


class Readers:
    """A directory with one good file of each kind, and how each is read. `name: (file, mutation, reading)`."""

    def __init__(self, base):
        self.base, self.toy = base, make_toy(base / "toy")
        self.flux = convert(assets() / "tiny-flux", base / "flux")
        (self.flux / "manifest.json").unlink()  # its checksums keep all that it names from being read
        model = open_model(self.toy)
        tree = random_tree(model, (1, 2))
        self.model = model
        save_adapter(base / "adapter", tree, model, {"family": "toy", "rank": 3, "scale": 2.0, "captions": ["a"]})
        self.state = checkpoints.save(base / "run", State(tree, Moments(), 3), model.stack, {"rank": 3, "seed": 0})
        files.write_json(base / "plan.json", {"depth": 5, "runs": [[0, 1], [4, 5]]})
        plans = {"1": {"n": 1, "m": 0}, "2": {"n": 1, "m": 1}}
        files.write_json(base / "selection.json", {"format": 1, "depth": 5, "plans": plans, "first": [0.0, 0.1, 0.2]})
        owned.begin(base / "owned", ("*.png",), {"seed": 1})
        self.photos = scenes.photos(base / "photos")
        (self.photos / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n')
        for name, options in (("x.jpg", {}), ("x.gif", {}), ("x.webp", {}), ("x.tif", {"compression": "tiff_lzw"})):
            Image.open(self.photos / "1.png").convert("RGB").save(base / name, **options)
        shutil.copytree(assets() / "tiny-flux", base / "hf")
        files.write_json(base / "hf" / "vae" / source.INDEX, {"metadata": {}, "weight_map": {"a": "x.safetensors"}})
        (base / "README.md").write_text("---\nlicense: mit\nbase_model: [a/b]\n---\n# A card\n")
        files.save_tensors(base / "chunk.safetensors", {"0.captions": mx.zeros((1,), mx.int32)}, {"fingerprint": "x"})
        files.write_json(base / "cache" / "a" / "config.json", {"format": 1, "source": "x"})
        files.write_json(base / "models" / "commits.json", {"a/b@main": "0" * 40})
        self.adapted = open_model(self.flux)
        files.save_tensors(base / "lora.safetensors", of_every_kind(), {"lora_adapter_metadata": '{"lora_alpha": 2}'})
        files.save_tensors(base / "peft" / "adapter_model.safetensors", of_every_kind())
        described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}, "rank_pattern": {}}
        files.write_json(base / "peft" / "adapter_config.json", described)
        (base / "run.yaml").write_text("data: photos\niters: 3\nsample_prompt: [a, b]\n")

    def __call__(self, name):
        base, flux = self.base, self.flux
        j, b, t = mutants.of_json, mutants.of_bytes, mutants.of_safetensors
        adapter = base / "adapter"
        state = lambda: checkpoints.load(self.state, self.model.stack, {"rank": 3, "seed": 0}, Moments())  # noqa: E731
        return {
            "header": (flux / "transformer" / "rest.safetensors", t, files.read_header),
            "index": (flux / "transformer" / "model.safetensors.index.json", j, lambda _: self.opened()),
            "component": (flux / "transformer" / "config.json", j, lambda _: self.opened()),
            "model": (flux / "config.json", j, lambda _: self.opened()),
            "adapter": (adapter / "adapters.safetensors", t, lambda _: self.worn(False)),
            "adapter config": (adapter / "adapter_config.json", j, lambda _: self.worn(True)),
            "checkpoint": (self.state / "state.json", j, lambda _: state()),
            "moments": (self.state / "moments.safetensors", t, lambda _: state()),
            "plan": (base / "plan.json", j, lambda path: plan.choose(5, file=str(path))),
            "selection": (base / "selection.json", j, lambda path: plan.choose(5, ratio=0.4, file=str(path))),
            "marker": (
                base / "owned" / owned.MARKER,
                j,
                lambda path: owned.begin(path.parent, ("*.png",), {"seed": 1}),
            ),
            "jsonl": (self.photos / "metadata.jsonl", j, lambda path: load_dataset(path.parent, "a")),
            "caption": (self.photos / "2.txt", b, lambda path: self.captions()),
            "png": (self.photos / "2.png", b, load_image),
            "jpeg": (base / "x.jpg", b, load_image),
            "gif": (base / "x.gif", b, load_image),
            "webp": (base / "x.webp", b, load_image),
            "tiff": (base / "x.tif", b, load_image),
            "pipeline": (base / "hf" / "model_index.json", j, lambda path: family_of(path.parent)),
            "their config": (base / "hf" / "transformer" / "config.json", j, lambda path: self.checkpoint()),
            "their scheduler": (base / "hf" / "scheduler" / "scheduler_config.json", j, lambda _: self.checkpoint()),
            "their index": (base / "hf" / "vae" / source.INDEX, j, lambda path: source.open_source(path.parent)),
            "single file": (base / "hf" / "vae" / "diffusion_pytorch_model.safetensors", t, singles.weights_in),
            "card": (base / "README.md", b, card.metadata_of),
            "chunk": (base / "chunk.safetensors", t, lambda path: records.problems(path) and records.valid(path, "x")),
            "kept": (base / "cache" / "a" / "config.json", j, lambda path: kept(path.parents[1])),
            "lora": (base / "lora.safetensors", t, lambda path: self.changed(path)),
            "peft config": (base / "peft" / "adapter_config.json", j, lambda path: self.changed(path.parent)),
            "yaml": (base / "run.yaml", b, lambda path: merge(TrainSettings, str(path), {})),
            "commits": (base / "models" / "commits.json", j, lambda path: known_commits()),
            "scheduler": (flux / "scheduler" / "scheduler_config.json", j, lambda _: self.opened()),
            "verify": (flux / "config.json", j, lambda path: verify(VerifySettings(str(path.parent)))),
            "recognise": (flux / "config.json", j, lambda path: (is_converted(path.parent), is_encoder(path.parent))),
        }[name]

    def opened(self):
        model = open_model(self.flux)
        model.reader.shards.load(model.reader.shards.under("transformer_blocks.0.norm"))

    def worn(self, sealed_too):
        config = self.base / "adapter" / "adapter_config.json"
        if not sealed_too:  # as of a file whose checksum is right
            config.write_text(config.read_text().replace('"sha256"', '"was"'))
        load_adapter(self.model, self.base / "adapter")

    def changed(self, path):
        """Weights are read with all that the adapter adds."""
        adapter, _ = load_adapter(self.adapted, path)
        with lora.worn(self.adapted, adapter):
            self.adapted.reader.shards.load(self.adapted.reader.shards.under("transformer_blocks.0.attn.to_"))

    def captions(self):
        (self.photos / "metadata.jsonl").rename(self.photos / "x")
        try:
            load_dataset(self.photos, "a")
        finally:
            (self.photos / "x").rename(self.photos / "metadata.jsonl")

    def checkpoint(self):
        run.open_checkpoint(self.base / "hf", "flux1")


def of_every_kind():
    """LoRA with an alpha, LoKr, LoHa, DoRA, a difference and a bias, for layers of tiny-flux."""
    one = "transformer.transformer_blocks.0.attn"
    pair, ones = {"lora_A.weight": (2, 128), "lora_B.weight": (128, 2)}, (128,)
    kinds = {
        "to_q": {**pair, "alpha": (1,)},
        "to_k": {"lokr_w1": (4, 4), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 32)},
        "to_v": {"hada_w1_a": (128, 2), "hada_w1_b": (2, 128), "hada_w2_a": (128, 2), "hada_w2_b": (2, 128)},
        "to_out.0": {**pair, "lora_magnitude_vector": ones, "diff_b": ones},
        "norm_q": {"diff": (32,)},
    }
    return {f"{one}.{layer}.{part}": mx.ones(shape) for layer, parts in kinds.items() for part, shape in parts.items()}


NAMES = (
    *(
        "header",
        "index",
        "component",
        "model",
        "adapter",
        "adapter config",
        "checkpoint",
        "moments",
        "plan",
        "selection",
    ),
    *("marker", "jsonl", "caption", "png", "jpeg", "gif", "webp", "tiff", "pipeline", "their config", "card", "chunk"),
    *("their scheduler", "their index", "single file", "kept", "commits", "verify", "recognise", "scheduler"),
    *("lora", "peft config", "yaml"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return Readers(tmp_path_factory.mktemp("fuzz") / "base")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_or_refused_in_a_sentence(readers, monkeypatch, long, name):
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(readers.base / "models"))
    path, mutate, read = readers(name)
    good = path.read_bytes()
    config = readers.base / "adapter" / "adapter_config.json"
    described = config.read_bytes()

    @hypothesis.settings(max_examples=CASES * long, database=None, deadline=None)
    @hypothesis.given(st.integers(0, 2**64))
    def one(seed):
        path.write_bytes(mutate(good, random.Random(seed)))
        started = time.perf_counter()
        try:
            with running("verify"):
                read(path)
        except UserError as error:
            assert str(error)
        finally:
            path.write_bytes(good)
            config.write_bytes(described)
        assert time.perf_counter() - started < SECONDS

    one()


def hostile(kind: str) -> bytes:
    """The header of a safetensors file that is as large as one may be."""
    size = 85 << 20
    if kind == "tensors":
        one = b'"0000000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        return b"{" + one * (size // len(one)) + b'"z":{}}'
    if kind == "metadata":
        return b'{"__metadata__":{' + b'"0000000":"",' * (size // 13) + b'"z":""}}'
    if kind == "wide":
        return '{"__metadata__":{"a":"\U0001f994'.encode() + b"x" * size + b'"}}'
    return {"deep": b"[" * size, "commas": b"[" + b"0," * (size // 2) + b"0]"}[kind]


@pytest.mark.parametrize("kind", ["tensors", "metadata", "wide", "deep", "commas"])
def test_a_hostile_header_is_refused_soon_and_in_little_memory(tmp_path, kind):
    header = hostile(kind)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"x\.safetensors: not a safetensors file \(has .* the most that is read\)"):
        files.read_header(tmp_path / "x.safetensors")
    assert time.perf_counter() - started < SECONDS


def test_tensors_that_share_bytes_and_odd_numbers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for fields, said in (
        (
            '"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}',
            "b lies",
        ),
        ('"a":{"dtype":"U8","shape":[-2,-4],"data_offsets":[0,8]}', "no number"),
        ('"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}', "no number"),
        ('"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}', "no number"),
        ('"__metadata__":{"a":1}', "its metadata is not text"),
    ):
        text = f"{{{fields}}}".encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
        with pytest.raises(UserError, match=said):
            files.read_header(path)
