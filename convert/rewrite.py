"""A component of an MLX model directory once more, with what adapters add, or without quantization; a part of one
tensor in memory at a time. Files in which nothing changes are copied byte for byte.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters.whole import Whole, module_of
from mlx_blockskip.converters.write import parts
from mlx_blockskip.engine import files
from mlx_blockskip.engine.shards import INDEX


@dataclass(frozen=True)
class Rewriting:
    """What becomes of one component. dequantize: layers are written whole; else what was quantized is again, with its
    group size and bits.
    """

    whole: Whole
    dequantize: bool = False

    @property
    def shard_files(self) -> list[str]:
        """Its shards, in the order of its index."""
        return list(dict.fromkeys(self.whole.shards.weight_map.values()))

    def nbytes(self) -> int:
        """Bytes of the tensors that will be written or copied."""
        return sum(entry.nbytes for file in self.shard_files for entry in self.entries(file))

    def changes(self, name: str) -> bool:
        """Whether a tensor is not written as it is: of a layer, that is asked of its weight."""
        quantized = self.whole.quantized(name) is not None
        return self.whole.changes(name) or (self.dequantize and quantized)

    def entries(self, file: str) -> list[files.TensorEntry]:
        """The tensors that one shard will have."""
        found = []
        for name, held in self.whole.shards.weight_map.items():
            if held != file:
                continue
            if self.dequantize and self.whole.quantized(name):
                found.append(files.TensorEntry(name, self.whole.shape(name), self.whole.dtype(name)))
            elif not (self.dequantize and self._beside_packed(name)):
                shape, dtype = self.whole.shards.shape(name), self.whole.shards.dtype(name)
                found.append(files.TensorEntry(name, shape, dtype))
        return found

    def _beside_packed(self, name: str) -> bool:
        """Whether these are the scales or biases of a quantized layer."""
        module, _, kind = name.rpartition(".")
        return kind in ("scales", "biases") and self.whole.quantized(f"{module}.weight") is not None

    def write(self, target: Path) -> Iterator[str]:
        """Fill the directory `target`; yields each shard's name when it is done. Raises UserError for a damaged one."""
        shards = self.whole.shards
        checksums, weight_map = dict(shards.checksums), dict[str, str]()
        for file in self.shard_files:
            entries = self.entries(file)
            if any(self.changes(entry.name) for entry in entries):
                self._rewrite(target / file, entries)
                checksums[file] = files.sha256(target / file)
            else:
                shards.verify(file)
                shutil.copyfile(shards.path / file, target / file)
            weight_map |= {entry.name: file for entry in entries}
            yield file
        metadata = {"total_size": self.nbytes(), "sha256": checksums}
        if shards.group_sizes and not self.dequantize:
            metadata["group_sizes"] = shards.group_sizes
        files.write_json(target / INDEX, {"metadata": metadata, "weight_map": weight_map})
        gone = ("quantization",) if self.dequantize else ()
        files.write_json(target / "config.json", {k: v for k, v in shards.config.items() if k not in gone})

    def _rewrite(self, path: Path, entries: list[files.TensorEntry]) -> None:
        with files.SafetensorsWriter(path, entries, {"format": "mlx"}) as writer:
            for entry in entries:
                weight = f"{entry.name.rpartition('.')[0]}.weight"
                if self.changes(entry.name):
                    self._write_layer(writer, entry.name)
                elif self._beside_packed(entry.name) and self.changes(weight):
                    continue  # they come with their weight
                else:
                    for start, stop in parts(entry.shape):
                        writer.write(entry.name, self.whole.shards.part(entry.name, start, stop), start)

    def _write_layer(self, writer: files.SafetensorsWriter, name: str) -> None:
        """A layer that changes: where it stays quantized, with its scales and biases."""
        stored, module = self.whole.quantized(name), module_of(name)
        for start, stop in parts(self.whole.shape(name)):
            rows = self.whole.read(name, start, stop)
            if stored is None or self.dequantize:
                writer.write(name, rows, start)
                continue
            packed, scales, biases = mx.quantize(rows, group_size=stored[0], bits=stored[1])
            for key, value in ((name, packed), (f"{module}.scales", scales), (f"{module}.biases", biases)):
                writer.write(key, value, start)
