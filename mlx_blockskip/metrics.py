"""Cosine of embeddings: the similarity of DreamBooth's DINO, CLIP-I and CLIP-T, and the distance D of Eq. 2.

cos(a, b) = <a, b> / (|a| |b|),   D(a, b) = 1 - cos(a, b)
"""

import numpy as np

from mlx_blockskip.engine.errors import UserError


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length one.

    rows: (N, D) of any float type. Returns (N, D) float64. Raises UserError where a row has no direction: zeros, or
    values that are not finite.
    """
    wide = np.asarray(rows, np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise UserError("an embedding has no direction (zeros, or not finite); look at the image and the encoder")
    return wide / length


def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of `a` with every row of `b`: (N, D), (M, D) -> (N, M) float64. Raises as `unit`."""
    return unit(a) @ unit(b).T


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine of paired rows: (N, D), (N, D) -> (N,) float64, in [0, 2]. Source: D of Eq. 2. Raises as `unit`."""
    if a.shape != b.shape:
        raise ValueError(f"rows of {a.shape} and {b.shape} do not pair")
    return 1.0 - np.sum(unit(a) * unit(b), axis=-1)


def mean_pairwise(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine over all pairs of a row of `a` and a row of `b`. Source: DreamBooth (arXiv 2208.12242), section 4."""
    return float(pairwise(a, b).mean())


def mean_among(a: np.ndarray) -> float | None:
    """Mean cosine over all pairs of different rows of `a`: what real images of one subject reach. None for one row."""
    found = pairwise(a, a)
    return float(found[~np.eye(len(found), dtype=bool)].mean()) if len(found) > 1 else None
