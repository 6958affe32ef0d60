"""Functions and methods of torch that a traced network may call.

Each entry of ``FUNCTIONS`` takes the recorder ``r`` and the call's arguments, which are nodes where
they are images. It notes the operation and returns whether it could.
"""

from collections.abc import Callable, Sequence

from torch import fx

from common.network import graph as kinds


def _unary(kind: str) -> Callable[..., bool]:
    return lambda r, input, inplace=False: r.add(kind, input)


def _binary(kind: str) -> Callable[..., bool]:
    return lambda r, input, other, alpha=1: alpha == 1 and r.add(kind, input, other)


def _nothing(r, input: fx.Node, *args: object, **kwargs: object) -> bool:
    return r.same(input)


def _concatenate(r, tensors: Sequence[fx.Node], dim: int = 0) -> bool:
    return dim in (1, 1 - r.value.ndim) and r.add(kinds.CONCATENATE, *tensors)


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def _max_pool(
    r, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False,
) -> bool:  # fmt: skip
    return not return_indices and r.add(
        kinds.MAX_POOL, input, kernel=_pair(kernel_size), stride=_pair(stride or kernel_size),
        padding=_pair(padding), dilation=_pair(dilation), ceil=bool(ceil_mode),
    )  # fmt: skip


def _average_pool(
    r, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
) -> bool:  # fmt: skip
    kernel, padding = _pair(kernel_size), _pair(padding)
    if kernel == list(r.env[input].shape[2:]) and not any(padding):
        return r.add(kinds.GLOBAL_POOL, input, keep=True)
    return divisor_override is None and r.add(
        kinds.AVERAGE_POOL, input, kernel=kernel, stride=_pair(stride or kernel_size),
        padding=padding, ceil=bool(ceil_mode), count_padding=bool(count_include_pad),
    )  # fmt: skip


def _adaptive_pool(r, input: fx.Node, output_size: object) -> bool:
    size = list(r.env[input].shape[2:])
    wanted = [old if n is None else n for old, n in zip(size, _pair(output_size), strict=True)]
    if wanted == size:
        return r.same(input)
    if wanted == [1, 1]:
        return r.add(kinds.GLOBAL_POOL, input, keep=True)
    if all(old % new == 0 for old, new in zip(size, wanted, strict=True)):
        kernel = [old // new for old, new in zip(size, wanted, strict=True)]
        return _average_pool(r, input, kernel)
    return r.add(kinds.ADAPTIVE_POOL, input, size=wanted, source_size=size)


def _mean(r, input: fx.Node, dim: object = None, keepdim=False, dtype=None) -> bool:
    is_image = r.env[input].ndim == 4 and isinstance(dim, tuple | list)
    is_global = is_image and sorted(d % 4 for d in dim) == [2, 3]
    return is_global and r.add(kinds.GLOBAL_POOL, input, keep=bool(keepdim))


def _reshape(r, input: fx.Node, *args: object, **kwargs: object) -> bool:
    """Note what keeps an image's numbers in their order, such as view, flatten and squeeze."""
    old, new = r.env[input].shape, r.value.shape
    if not new or new[0] != old[0]:
        return False
    if new == old:
        return r.same(input)
    if len(new) == 2:
        return r.add(kinds.FLATTEN, input)
    return r.add(kinds.RESHAPE, input, shape=list(new[1:]))


def _permute(r, input: fx.Node, *args: object, dims: object = None) -> bool:
    dims = dims or (args[0] if len(args) == 1 else args)
    order = [d % r.value.ndim for d in dims]
    return order[0] == 0 and r.add(kinds.PERMUTE, input, order=order)


def _transpose(r, input: fx.Node, dim0: int, dim1: int) -> bool:
    order = list(range(r.value.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(r, input, order)


def _pad(r, input, pad, mode="constant", value=None) -> bool:
    is_zeros = mode == "constant" and not value and min(pad) >= 0 and len(pad) <= 6
    is_zeros = is_zeros and r.env[input].ndim == 4
    return is_zeros and r.add(kinds.PAD, input, padding=list(pad))


def _split(r, input: fx.Node, *args: object, **kwargs: object) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % r.env[input].ndim
    r.splits[r.node] = input, dim
    return dim != 0


def _item(r, source: fx.Node, index: object) -> bool:
    if source in r.splits:
        whole, dim = r.splits[source]
        sizes = [part.shape[dim] for part in r.env[source]]
        index %= len(sizes)
        start = sum(sizes[:index])
        return r.add(kinds.SLICE, whole, parts=[[dim, start, start + sizes[index], 1]])
    shape, index = r.env[source].shape, index if isinstance(index, tuple) else (index,)
    if len(index) > len(shape) or not all(isinstance(i, slice) for i in index):
        return False
    parts = [[d, *i.indices(shape[d])] for d, i in enumerate(index) if i != slice(None)]
    if not parts:
        return r.same(source)
    return parts[0][0] != 0 and r.add(kinds.SLICE, source, parts=parts)


def _clamp(r, input: fx.Node, min: float | None = None, max: float | None = None) -> bool:
    return min == 0 and max in (None, 6) and r.add("relu" if max is None else "relu6", input)


def _hardtanh(r, input, min_val=-1.0, max_val=1.0, inplace=False) -> bool:
    return _clamp(r, input, min_val, max_val)


FUNCTIONS: dict[str, Callable[..., bool]] = {
    **{kind: _unary(kind) for kind in kinds.ACTIVATIONS},
    **{f"{kind}_": _unary(kind) for kind in ("relu", "sigmoid")},
    **dict.fromkeys(("add", "add_", "iadd"), _binary(kinds.ADD)),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply"), _binary(kinds.MULTIPLY)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    **dict.fromkeys(("max_pool2d", "boolean_dispatch"), _max_pool),
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _reshape),
    "permute": _permute,
    "transpose": _transpose,
    "pad": _pad,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _split),
    "getitem": _item,
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _hardtanh),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "dropout", "dropout2d", "stochastic_depth", "drop_path"),
        _nothing,
    ),
}
