"""What each kind of adapter adds to a layer of theirs: LoRA, with LyCORIS' LoCon, LoHa and LoKr, differences as they
are, and DoRA around any of them.

Linear layers are (out, in), convolutions (out, in, height, width); ours have `in` last. Low-rank factors are read at
once, all else when a weight is. Sources: PEFT's `tuners`, LyCORIS' modules, ComfyUI's `weight_adapter`.
"""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import lora_keys, lora_scales
from mlx_blockskip.converters.lora_parts import MisfitError, Parts, Shape
from mlx_blockskip.converters.lora_scales import Strengths
from mlx_blockskip.converters.views import FLOATS, View
from mlx_blockskip.differences import Decomposed, Full, Hadamard, Held, Kronecker, LowRank, Product, Values
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Difference

KINDS = {"a": "LoRA", "b": "LoRA", "mid": "LoRA", "bias": "LoRA", "lokr": "LoKr", "hada": "LoHa", "diff": "difference"}


def added(
    layer: str, given: Parts, strengths: Strengths, shape: Shape, source: Path
) -> tuple[Difference | None, mx.array | None]:
    """What is added to the weight, and (rows,) to the bias, of a layer; None for nothing.

    Raises MisfitError for shapes that do not go together, and UserError.
    """
    if any(not given[part].view.shape for part in given if part != "alpha"):
        raise MisfitError
    kinds = {KINDS[part.partition("_")[0] if part != "diff_b" else part] for part in given if part not in BESIDE}
    if len(kinds) > 1:
        raise UserError(f"{source}: {layer} has a {' and a '.join(sorted(kinds))}; keep one of them")
    kind = kinds.pop() if kinds else None
    scale, weight = 1.0, None
    if kind is not None:
        scale = strength(layer, given, strengths, source)
        weight = COMPUTED[kind](given, scale, shape, source)
    if (lengths := given.keys() & {"magnitude", "lengths"}) and weight is None:
        raise UserError(
            f"{source}: {given[lengths.pop()].name} is of a DoRA whose factors are missing; get the file again"
        )
    for part in lengths:
        inner = _unread(given, scale) if isinstance(weight, LowRank) and not shape.kernel else weight
        weight = Decomposed(inner or weight, _lengths(given, part, shape, source)) if weight else weight
    return weight, _bias(given, scale, shape)


BESIDE = ("alpha", "magnitude", "lengths", "diff_b")
"""Parts that go with any kind."""


def strength(layer: str, given: Parts, strengths: Strengths, source: Path) -> float:
    """By which what the factors give is multiplied: alpha / r, where r is that of the factors."""
    ranked = ("a", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    part = next((part for part in ranked if part in given), None)
    if "diff" in given:
        return 1.0
    if part is None:  # LoKr of two whole matrices has no rank but what PEFT's config says
        return strengths.of(lora_keys.stripped(layer))
    rank = given[part].view.shape[0]
    if part == "a" and _is_bare(given):
        rank = given["a"].view.shape[1]
    if "alpha" in given:
        return lora_scales.stored(given["alpha"].name, given["alpha"].values, source) / rank
    return strengths.of(lora_keys.stripped(layer), rank)


def _is_bare(given: Parts) -> bool:
    """Whether the factors are (in, r) and (r, out): both may be, and their inner lengths meet only so."""
    if not (given["a"].bare and "b" in given and given["b"].bare):
        return False
    a, b = (given[part].view.shape for part in "ab")
    return len(a) == len(b) == 2 and a[1] == b[0]


def _lora(given: Parts, scale: float, shape: Shape, source: Path) -> Difference:
    for part in "ab":
        if part not in given:
            raise UserError(f"{source}: {next(iter(given.values())).name} has no other half; get the file again")
    a, b = given.value("a"), given.value("b")
    if shape.kernel and a.ndim == 4 and a.shape[1] == shape.rows and shape.kernel[2] == 1 < shape.rows:
        raise UserError(
            f"{source}: {given['a'].name} sees all channels of a depth-wise convolution, which is not applied here; "
            "train or export it without"
        )
    if "mid" in given:  # what lies between is exactly a part of the first
        a = _through(given.value("mid"), a)
    if a.ndim == 4:
        a = a.transpose(0, 2, 3, 1)
    if min(a.ndim, b.ndim) < 2:
        raise MisfitError
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    bare_fits = a.shape[0] == shape.width and b.shape == (a.shape[1], shape.rows)
    if not (_is_bare(given) and bare_fits):
        if a.shape[1] != shape.width or b.shape != (shape.rows, a.shape[0]):
            raise MisfitError
        a, b = a.T, b.T
    a, b = mx.contiguous(a), mx.contiguous(b * scale)
    mx.eval(a, b)
    return LowRank(a, b)


def _unread(given: Parts, scale: float) -> Difference | None:
    """The same product, read when a weight is; None for factors that have to be changed first."""
    if _is_bare(given) or "mid" in given:
        return None
    return Full(Product(given.matrix("b"), given.matrix("a")), scale)


def _through(mid: mx.array, first: mx.array) -> mx.array:
    """(p, in, h, w): the kernel of a 1 x 1 convolution (q, in, 1, 1) and then of mid (p, q, h, w)."""
    if mid.ndim != 4 or mid.shape[1] != len(first):
        raise MisfitError
    return mx.einsum("pqhw,qi->pihw", mid, first.reshape(len(first), -1))


def _loha(given: Parts, scale: float, shape: Shape, source: Path) -> Difference:
    _complete(given, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), source)
    if "hada_t1" in given or "hada_t2" in given:
        _complete(given, ("hada_t1", "hada_t2"), source)
        first, second = (_core(given, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        return _held(first * second * scale, shape)
    one, two = given.whole("hada_w1"), given.whole("hada_w2")
    for factors in (one, two):
        _check_product(factors)
        if factors.shape != (shape.rows, shape.width):
            raise MisfitError
    if shape.kernel:
        return _held(_as_kernel(one.read() * two.read() * scale, shape), shape)
    return Hadamard(one, two, scale)


def _lokr(given: Parts, scale: float, shape: Shape, source: Path) -> Difference:
    for name in ("lokr_w1", "lokr_w2"):
        if name not in given:
            _complete(given, (f"{name}_a", f"{name}_b"), source)
    one = given.whole("lokr_w1")
    _check_product(one)
    if "lokr_t2" in given:
        _complete(given, ("lokr_w2_a", "lokr_w2_b"), source)
        return _held(_kron(one.read(), _core(given, "lokr_t2", "lokr_w2_a", "lokr_w2_b")) * scale, shape)
    if shape.kernel:
        two = given.whole("lokr_w2").read()
        h, w, _ = shape.kernel
        if two.shape[1] % (h * w):
            raise MisfitError
        return _held(_kron(one.read(), two.reshape(len(two), -1, h, w)) * scale, shape)
    other = given.whole("lokr_w2")
    _check_product(other)
    if tuple(p * q for p, q in zip(one.shape, other.shape, strict=True)) != (shape.rows, shape.width):
        raise MisfitError
    return Kronecker(one, other, scale)


def _full(given: Parts, scale: float, shape: Shape, source: Path) -> Difference | None:
    values = given.matrix("diff")
    if values.shape != (shape.rows, shape.width):
        raise MisfitError
    if not any(bool((values.read(start, start + ROWS) != 0).any()) for start in range(0, shape.rows, ROWS)):
        return None
    return _held(_as_kernel(given.value("diff"), shape), shape) if shape.kernel else Full(values, scale)


ROWS = 1024
COMPUTED = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "difference": _full}


def _kron(first: mx.array, second: mx.array) -> mx.array:
    """(p r, q s, h, w) of (p, q) and (r, s, h, w)."""
    (p, q), (r, s, h, w) = first.shape, second.shape
    return (first[:, None, :, None, None, None] * second[None, :, None]).reshape(p * r, q * s, h, w)


def _core(given: Parts, core: str, out: str, inner: str) -> mx.array:
    """Tucker's product: core (i, j, h, w), out (i, rows), inner (j, in) -> (rows, in, h, w)."""
    try:
        return mx.einsum("ijhw,ip,jr->prhw", given.value(core), given.value(out), given.value(inner))
    except ValueError:
        raise MisfitError from None


def _as_kernel(matrix: mx.array, shape: Shape) -> mx.array:
    """(rows, in, h, w) of (rows, in h w)."""
    h, w, channels = shape.kernel or (1, 1, shape.width)
    return matrix.astype(mx.float32).reshape(shape.rows, channels, h, w)


def _held(kernel: mx.array, shape: Shape) -> Full:
    """A convolution's whole difference, (rows, in, h, w), as ours lie."""
    if kernel.size != shape.rows * shape.width or len(kernel) != shape.rows:
        raise MisfitError
    found = mx.contiguous(kernel.transpose(0, 2, 3, 1).reshape(shape.rows, -1))
    mx.eval(found)
    return Full(Held(found))


def _check_product(values: Values) -> None:
    if isinstance(values, Product) and values.first.shape[1] != values.second.shape[0]:
        raise MisfitError


def _lengths(given: Parts, part: str, shape: Shape, source: Path) -> mx.array:
    """(rows,): PEFT's magnitudes, or LyCORIS' where they are of rows."""
    found = given.value(part)
    of_columns = part == "lengths" and found.ndim > 1 and len(found) == 1 and shape.rows > 1
    if of_columns:
        raise UserError(
            f"{source}: {given[part].name} has lengths of columns and not of rows, which is not applied here; "
            "train with wd_on_out, or export it as a LoRA"
        )
    if found.size != shape.rows:
        raise MisfitError
    found = mx.contiguous(found.reshape(-1))
    mx.eval(found)
    return found


def _bias(given: Parts, scale: float, shape: Shape) -> mx.array | None:
    """(rows,), with the strength where it is that of the second factor; None where it is zero."""
    found = None
    for part, times in (("bias", scale), ("diff_b", 1.0)):
        if part in given:
            own = given.value(part).reshape(-1) * times
            if own.size != shape.rows:
                raise MisfitError
            found = own if found is None else found + own
    if found is None or not bool((found != 0).any()):
        return None
    return found


def _complete(given: Parts, names: tuple[str, ...], source: Path) -> None:
    for name in names:
        if name not in given:
            raise UserError(f"{source}: {next(iter(given.values())).name} has no {name} beside it; get the file again")


def is_floating(view: View) -> bool:
    """Whether a tensor holds floating-point numbers."""
    return view.dtype in FLOATS
