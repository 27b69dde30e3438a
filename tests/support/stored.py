"""safetensors files with dtypes that MLX does not have."""

from mlx_blockskip.converters.source import stored_in
from mlx_blockskip.engine import files


def write(path, **tensors):
    """A file of numpy arrays, each with safetensors' name of its dtype: (dtype, array). Returns its tensors."""
    entries = [files.TensorEntry(name, array.shape, dtype) for name, (dtype, array) in tensors.items()]
    header, _ = files.encode_header(entries)
    path.write_bytes(header + b"".join(array.tobytes() for _, array in tensors.values()))
    return stored_in(path)
