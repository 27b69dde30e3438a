"""Repos shaped as published ones lie on the Hub, with the weights of the bundled models: their files by name."""

import json
import struct
from pathlib import Path

from mlx_blockskip.engine import files
from support.models import assets

BESIDE = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "LICENSE.md": b"FLUX.1 [dev] Non-Commercial License\n",
    "README.md": b"---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n# FLUX.1 [dev]\n",
    "dev_grid.jpg": b"\xff\xd8" + bytes(3000),
}
SINGLE = {"flux1-dev.safetensors": b"\0" * 700_000, "ae.safetensors": b"\0" * 90_000}
"""What other tools read, of no use here."""


def folder(path: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def flux_dev() -> dict[str, bytes]:
    """As FLUX.1-dev: the transformer in three shards, T5 in two, single files, a picture and a licence at the top."""
    found = folder(assets() / "tiny-flux")
    del found["defaults.json"]
    sharded = in_shards(found, "transformer/diffusion_pytorch_model", 3)
    return {**in_shards(sharded, "text_encoder_2/model", 2), **BESIDE, **SINGLE}


def sana(*variants: str) -> dict[str, bytes]:
    """As Sana_1600M_1024px: the transformer twice in full, in shards and as one file; and what else of `variants`."""
    found = folder(assets() / "tiny-sana")
    whole = recast(found["transformer/diffusion_pytorch_model.safetensors"], "fp32")
    found["transformer/diffusion_pytorch_model.safetensors"] = whole
    found = {**in_shards(found, "transformer/diffusion_pytorch_model", 2), "LICENSE": b"MIT\n"}
    found["transformer/diffusion_pytorch_model.safetensors"] = whole
    for variant in variants:
        for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
            found[f"{name}.{variant}.safetensors"] = recast(found[f"{name}.safetensors"], variant)
    return found


def in_shards(found: dict[str, bytes], name: str, count: int) -> dict[str, bytes]:
    """The files with one of weights in `count` shards and an index. A block's tensors lie in more than one."""
    found = dict(found)
    header, data = _parse(found.pop(f"{name}.safetensors"))
    names = sorted(header)
    bounds = [len(names) * i // count for i in range(count + 1)]
    weight_map = {}
    for i in range(count):
        shard = f"{name}-{i + 1:05d}-of-{count:05d}.safetensors"
        inside = names[bounds[i] : bounds[i + 1]]
        found[shard] = _pack({key: (header[key], data) for key in inside})
        weight_map.update(dict.fromkeys(inside, shard.rpartition("/")[2]))
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    found[f"{name}.safetensors.index.json"] = json.dumps(index).encode()
    return found


def recast(whole: bytes, variant: str) -> bytes:
    """The same weights in another type."""
    import mlx.core as mx

    dtype = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}[variant]
    header, data = _parse(whole)
    fields = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = mx.array(memoryview(data[begin:end])).view(files.mlx_dtype(entry["dtype"]))
        raw = bytes(memoryview(array.astype(dtype).view(mx.uint8)))
        fields[name] = ({**entry, "dtype": variant.upper().replace("FP", "F"), "data_offsets": [0, len(raw)]}, raw)
    return _pack(fields)


def _parse(whole: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, whole[8 + length :]


def _pack(tensors: dict[str, tuple[dict, bytes]]) -> bytes:
    header, body, offset = {}, [], 0
    for name, (entry, data) in tensors.items():
        begin, end = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [offset, offset + end - begin]}
        body.append(data[begin:end])
        offset += end - begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body)
