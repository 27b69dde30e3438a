"""Which of a repo's files are needed: of each network one copy of its weights, the smallest that is precise enough."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlx_blockskip.converters.source import VARIANTS, preferred

INDEX = "model_index.json"
TOP = (INDEX, "defaults.json", "LICENSE*", "README.md")
STANDARD = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weights. Other weights in such a folder are other tools'."""

SUFFICIENT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""The variant that holds all that a type can. fp16 is no such thing for bfloat16, nor bf16 for float16: of one each
keeps fewer digits, of the other a smaller range.
"""

WEIGHTS = re.compile(
    r"(?P<base>[^/.]+?)(?:\.(?P<variant>\w+))?(?:-(?P<shard>\d+)-of-(?P<count>\d+))?\.safetensors"
    r"|(?P<indexed>[^/.]+)\.safetensors\.index(?:\.(?P<of>\w+))?\.json"
)


@dataclass
class Copy:
    """One copy of a network's weights. variant: "" or one of VARIANTS. sharded: in numbered files with an index."""

    base: str
    variant: str
    sharded: bool
    files: list[str] = field(default_factory=list)
    shards: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        return self.shards == self.count


def copies(names: Iterable[str]) -> list[Copy]:
    """The copies of the weights in one folder, by the names of its files. An index alone is none."""
    found: dict[tuple[str, str, bool], Copy] = {}
    for name in sorted(names):
        match = WEIGHTS.fullmatch(name.rpartition("/")[2])
        if match is None:
            continue
        base, variant = match["base"] or match["indexed"], match["variant"] or match["of"] or ""
        sharded = match["shard"] is not None or match["indexed"] is not None
        copy = found.setdefault((base, variant, sharded), Copy(base, variant, sharded))
        copy.files.append(name)
        if not match["indexed"]:
            copy.shards, copy.count = copy.shards + 1, int(match["count"] or 1)
    return [copy for copy in found.values() if copy.shards]


def weights(missing: Mapping[str, int], dtype: str) -> set[str]:
    """Of the files in one folder, those of the copy that is taken: of the variants that hold all that `dtype` can, the
    one of which the fewest bytes are `missing`, preferably the smaller type.

    Where there is none of these, the first of VARIANTS; where no name is a usual one, as the converter reads it.
    """
    found = [copy for copy in copies(missing) if copy.base in STANDARD and copy.variant in VARIANTS]
    if not found:
        return preferred(name for name in missing if re.search(r"\.safetensors(\.index(\.\w+)?\.json)?$", name))
    enough = (SUFFICIENT[dtype], "", "fp32")
    order = list(dict.fromkeys((*enough, *VARIANTS)))

    def rank(copy: Copy) -> tuple[bool, int, int, int]:
        place = order.index(copy.variant)
        return not copy.whole, 0 if copy.variant in enough else place, _bytes(copy, missing), place

    return set(min(_once(found, missing), key=rank).files)


def _once(found: list[Copy], missing: Mapping[str, int]) -> list[Copy]:
    """One of the two where the same weights lie there in shards and as one file: the shards, as diffusers reads them,
    unless one is missing on the Hub or the other is here.
    """
    twins = {(copy.base, copy.variant, copy.sharded): copy for copy in found}

    def wanted(copy: Copy) -> bool:
        other = twins.get((copy.base, copy.variant, not copy.sharded))
        if other is None:
            return True
        shards, single = (copy, other) if copy.sharded else (other, copy)
        best = shards if shards.whole and (_bytes(single, missing) or not _bytes(shards, missing)) else single
        return copy is best

    return [copy for copy in found if wanted(copy)]


def _bytes(copy: Copy, missing: Mapping[str, int]) -> int:
    return sum(missing[name] for name in copy.files)


def choose(
    missing: Mapping[str, int],
    folders: Mapping[str, str | None],
    copied: Iterable[str] = (),
    beside: Iterable[str] = (),
) -> list[str]:
    """Of a repo's files, those that are converted.

    missing: every file, with the bytes of it that would have to be downloaded. folders: those of networks ("" for the
    repo itself), each with the dtype that it is converted to: their config and one copy of their weights, or with None:
    their config alone. copied: folders taken whole. beside: patterns of files at the top.
    """
    kept = [name for name in missing if "/" not in name and any(fnmatch.fnmatch(name, p) for p in (*TOP, *beside))]
    kept += [name for folder in copied for name in missing if name.startswith(f"{folder}/")]
    for folder, dtype in folders.items():
        inside = {name: size for name, size in missing.items() if name.rpartition("/")[0] == folder}
        taken = set() if dtype is None else weights(inside, dtype)
        kept += [name for name in inside if name in taken or (folder and name == f"{folder}/config.json")]
    return list(dict.fromkeys(kept))
