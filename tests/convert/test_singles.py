"""Single files: in whatever layout the same weights lie, the same directory comes out of them."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import float8, singles
from mlx_blockskip.converters.run import load_table, read_components
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import listening
from mlx_blockskip.models import presets
from mlx_blockskip.models.registry import find_family, open_model
from mlx_blockskip.tasks.checkpoint import resolve, single
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.hub_files import choose
from support import singles as theirs
from support.models import assets
from support.stored import write

TINY, VAE = assets() / "tiny-flux", "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def parts():
    return theirs.parts_of(TINY)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the diffusers layout gives, by file."""
    path = tmp_path_factory.mktemp("a") / "mlx"
    return content(convert(hf_path=str(TINY), mlx_path=str(path), dtype="bfloat16", quantize=True))


def content(path):
    """Every file of a model directory to the byte, but for where it says it is from."""
    found = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    config = files.read_json(found.pop("config.json"))
    config.pop("source")
    return {name: files.sha256(file) for name, file in found.items()} | {"config.json": config}


@pytest.fixture
def base(tmp_path):
    """tiny-flux without any weights: what single files have not."""
    return shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))


def converted(tmp_path, source, base, **options):
    options = {"dtype": "bfloat16", "quantize": True, "mlx_path": str(tmp_path / "mlx"), **options}
    return convert(hf_path=str(source), base=str(base) if base else None, **options)


def test_a_folder_of_single_files_gives_the_same_directory(tmp_path, parts, base, expected):
    (tmp_path / "flat").mkdir()
    for name, tensors in parts.items():
        files.save_tensors(tmp_path / "flat" / f"{name}.{'sft' if name == 'ae' else 'safetensors'}", tensors)
    (tmp_path / "flat" / "._ae.sft").write_bytes(b"\0\5\x16\7")
    assert content(converted(tmp_path, tmp_path / "flat", base)) == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_one_file_with_everything_gives_the_same_directory(tmp_path, parts, base, expected, prefix):
    files.save_tensors(tmp_path / "all.safetensors", theirs.all_in_one(parts, prefix))
    assert content(converted(tmp_path, tmp_path / "all.safetensors", base)) == expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["authors", "diffusers"])
def test_a_transformer_alone_takes_the_rest_from_the_base(tmp_path, parts, expected, prefix, layout):
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    tensors = parts["flux1-dev"] if layout == "authors" else theirs.weights(TINY / "transformer")
    files.save_tensors(tmp_path / "flux1-dev.safetensors", theirs.prefixed(tensors, prefix))
    assert content(converted(tmp_path, tmp_path / "flux1-dev.safetensors", base)) == expected


def test_a_file_in_a_whole_checkpoint_needs_no_base(tmp_path, parts, expected):
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    files.save_tensors(base / "ae.safetensors", parts["ae"])
    assert content(converted(tmp_path, base / "ae.safetensors", None)) == expected


def test_a_folder_of_shards_of_one_network_is_read_with_its_own_config(tmp_path, base, parts, events):
    shutil.copytree(TINY / "text_encoder_2", base / "text_encoder_2", dirs_exist_ok=True)
    for name in ("text_encoder", "vae"):
        shutil.copytree(TINY / name, base / name, dirs_exist_ok=True)
    own = tmp_path / "mine"
    own.mkdir()
    tensors = theirs.weights(TINY / "transformer")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("single_transformer_blocks.7.")}
    for i in range(2):
        part = {name: kept[name] for name in sorted(kept)[i::2]}
        files.save_tensors(own / f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors", part)
    given = files.read_json(TINY / "transformer" / "config.json")
    files.write_json(own / "config.json", {**given, "num_single_layers": 7, "mine": True})
    path = converted(tmp_path, own, base)
    assert files.read_json(path / "transformer" / "config.json")["mine"] is True
    assert "num_single_layers 7 for 8" in notes(events)


@pytest.fixture
def events():
    found = []
    with listening(found.append):
        yield found


def notes(events):
    return " ".join(getattr(event, "message", "") for event in events)


def test_other_sizes_are_told_by_the_shapes_and_said(tmp_path, parts, events):
    base = shutil.copytree(TINY, tmp_path / "base")
    config = files.read_json(base / "transformer" / "config.json")
    last = ("double_blocks.3.", "single_blocks.7.")
    smaller = {name: tensor for name, tensor in parts["flux1-dev"].items() if not name.startswith(last)}
    width = smaller["img_in.weight"].shape[0]
    for name in ("in_layer", "out_layer"):
        inputs = 256 if name == "in_layer" else width
        smaller[f"guidance_in.{name}.weight"] = mx.zeros((width, inputs))
        smaller[f"guidance_in.{name}.bias"] = mx.zeros((width,))
    files.save_tensors(tmp_path / "flux1.safetensors", smaller)
    path = converted(tmp_path, tmp_path / "flux1.safetensors", base)
    changed = {"num_layers": 3, "num_single_layers": 7, "guidance_embeds": True}
    written = files.read_json(path / "transformer" / "config.json")
    assert {key: value for key, value in written.items() if key != "quantization"} == {**config, **changed}
    assert "guidance_embeds true for false, num_layers 3 for 4, num_single_layers 7 for 8" in notes(events)
    assert open_model(path).identity


@pytest.mark.parametrize("name", presets.folders())
def test_what_shapes_tell_of_a_published_transformer_is_what_its_config_says(name):
    folder = presets.folders()[name]
    family = find_family(files.read_json(folder / "model_index.json")).name
    (component,) = (c for c in read_components(folder, family) if c.folder == "transformer")
    told = singles.networks_of(family)["transformer"].measured({row.name: row.their_shape() for row in component.rows})
    config = load_table(family).CONFIGS["transformer"].read(folder / "transformer" / "config.json")
    assert len(told) >= 7
    assert told == {key: getattr(config, key) for key in told}


def missing_tensor(parts):
    return {name: t for name, t in parts["flux1-dev"].items() if name != "single_blocks.3.linear1.weight"}


def undivided(parts):
    return parts["flux1-dev"] | {"double_blocks.1.img_attn.qkv.weight": mx.zeros((5, 64))}


def twice(parts):
    return parts["ae"] | theirs.prefixed(parts["ae"], "vae.")


def lora(parts):
    return {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": mx.zeros((2, 2))}


def other(parts):
    return {"model.diffusion_model.input_blocks.0.0.weight": mx.zeros((2, 2))}


def sanas(parts):
    return theirs.weights(assets() / "tiny-sana" / "transformer")


def surplus(parts):
    return parts["flux1-dev"] | {"controlnet.0.weight": mx.zeros((2, 2))}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            missing_tensor,
            r"x.safetensors: lacks single_transformer_blocks.3.attn.to_q.weight.*no config of FLUX.1's",
        ),
        (undivided, "x.safetensors: lacks transformer_blocks.1.attn.to_q.weight"),
        (twice, "x.safetensors: holds the VAE more than once .no prefix and vae"),
        (lora, "x.safetensors: is a LoRA.*--adapter-path"),
        (other, "x.safetensors: holds model.diffusion_model.input_blocks.0.0.weight, which is no network"),
        (sanas, "x.safetensors: is of sana, and .*base is of flux1; give another --base"),
        (surplus, "x.safetensors: has unexpected controlnet.0.weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, parts, base, make, match):
    files.save_tensors(tmp_path / "x.safetensors", make(parts))
    with pytest.raises(UserError, match=match):
        converted(tmp_path, tmp_path / "x.safetensors", base)
    assert not (tmp_path / "mlx").exists()


def test_the_same_network_in_two_files_is_named(tmp_path, parts, base):
    (tmp_path / "flat").mkdir()
    for name in ("ae", "other"):
        files.save_tensors(tmp_path / "flat" / f"{name}.safetensors", parts["ae"])
    with pytest.raises(UserError, match=r"other.safetensors: holds the VAE, and so does .*ae.safetensors"):
        converted(tmp_path, tmp_path / "flat", base)


def test_without_a_base_the_way_out_is_said_and_with_a_whole_checkpoint_it_is_refused(tmp_path, parts):
    files.save_tensors(tmp_path / "ae.safetensors", parts["ae"])
    with pytest.raises(UserError, match=r"ae.safetensors: has no tokenizers.*--base black-forest-labs/FLUX.1-dev"):
        converted(tmp_path, tmp_path / "ae.safetensors", None)
    with pytest.raises(UserError, match=r"--base: is for single files"):
        converted(tmp_path, TINY, TINY)
    with pytest.raises(UserError, match=r"--base: nowhere is no directory, and not a repo id"):
        converted(tmp_path, tmp_path / "ae.safetensors", "nowhere")


def test_tensors_of_no_network_are_said_and_left_out(tmp_path, parts, base, events, expected):
    tensors = theirs.all_in_one(parts) | {"denoiser.sigmas": mx.zeros((3,))}
    files.save_tensors(tmp_path / "all.safetensors", tensors)
    assert content(converted(tmp_path, tmp_path / "all.safetensors", base)) == expected
    assert "1 tensors are of no network that is read: denoiser.sigmas" in notes(events)


def test_a_gguf_or_a_pickle_in_the_place_of_a_file_is_named(tmp_path, base):
    (tmp_path / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "sana.pth").write_bytes(b"PK\3\4" + bytes(60))
    with pytest.raises(UserError, match="gguf: is a GGUF file"):
        converted(tmp_path, tmp_path / "flux1-dev-Q4_K_S.gguf", base)
    with pytest.raises(UserError, match="pth: is a pickled file"):
        converted(tmp_path, tmp_path / "sana.pth", base)


def test_both_families_know_files():
    assert singles.kinds(TINY, {}) == {}
    assert set(singles.networks_of("flux1")) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert set(singles.networks_of("sana")) == {"transformer", "text_encoder", "vae"}


def test_of_a_base_on_the_hub_the_weights_that_a_file_has_are_not_downloaded(tmp_path, parts, monkeypatch, expected):
    asked = []

    def download(repo, layouts, precision):
        names = [str(path.relative_to(TINY)) for path in TINY.rglob("*") if path.is_file()]
        needs = layouts[0].needs(TINY, precision.dtype)
        asked.append((repo, choose(dict.fromkeys(names, 1), needs.folders, needs.copied, needs.beside)))
        return TINY

    monkeypatch.setattr(single, "download", download)
    files.save_tensors(tmp_path / "flux1.safetensors", parts["flux1-dev"])
    path = converted(tmp_path, tmp_path / "flux1.safetensors", "someone/flux@v2")
    assert content(path) == expected
    ((repo, names),) = asked
    assert repo == Repo("someone/flux", "v2")
    weights = {name for name in names if "safetensors" in name}
    assert weights == {f"{f}.safetensors" for f in ("text_encoder/model", "text_encoder_2/model", "vae/" + VAE)}
    assert "transformer/config.json" in names


def test_a_file_as_a_model_says_how_to_make_one(tmp_path, parts):
    files.save_tensors(tmp_path / "ae.safetensors", parts["ae"])
    with pytest.raises(UserError, match="ae.safetensors: is a file; make a model of it with `mlx-blockskip convert"):
        resolve.resolve(str(tmp_path / "ae.safetensors"))


@pytest.mark.parametrize("rows", [False, True], ids=["a scale", "a scale a row"])
def test_float8_under_a_prefix_is_divided_with_its_scales(tmp_path, parts, base, rows):
    """ComfyUI's way: the blocks' matrices in float8, fused layers with a scale of their own, a marker, whole norms."""
    shutil.copytree(TINY, base, dirs_exist_ok=True)
    tensors, exact, prefix = {}, {}, "model.diffusion_model."
    for name, tensor in parts["flux1-dev"].items():
        whole = np.array(tensor.astype(mx.float32))
        if "_blocks." not in name or tensor.ndim != 2:
            tensors[prefix + name], exact[name] = ("F32", whole), mx.array(whole)
            continue
        count = tensor.shape[0]
        scale = np.linspace(0.1, 0.2, count, dtype=np.float32)[:, None] if rows else np.array(0.125, np.float32)
        codes = np.array(mx.to_fp8(mx.array(whole / scale)))
        tensors[prefix + name] = "F8_E4M3", codes
        tensors[prefix + name.removesuffix("weight") + "scale_weight"] = "F32", scale
        exact[name] = mx.array(float8.VALUES["F8_E4M3"][codes] * scale)
    marker = {f"{prefix}scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8))}
    write(tmp_path / "fp8.safetensors", **tensors, **marker)
    files.save_tensors(tmp_path / "exact.safetensors", exact)
    options = {"dtype": "float32", "quantize": False}
    one = converted(tmp_path, tmp_path / "fp8.safetensors", base, mlx_path=str(tmp_path / "one"), **options)
    two = converted(tmp_path, tmp_path / "exact.safetensors", base, mlx_path=str(tmp_path / "two"), **options)
    assert content(one) == content(two)
