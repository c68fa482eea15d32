"""Random changes to the arguments of the ops, most of which make them wrong."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 16, 20, 32]
HUGE = [2**31, 2**40, 2**61, 2**62]
ALL_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
]
SCALARS: dict[str, list[Any]] = {
    "mode": ["LSTM", "RNN_TANH", "RNN_RELU", "GRU", "", "LSTM\0", "\u00e9" * 100, None, 3],
    "num_layers": [0, 1, 2, 3, -1, 2**31, 2**62, -(2**63), 2**64, 1.5, None],
    "has_biases": [True, False, None, 2],
    "bidirectional": [True, False, None],
    "batch_first": [True, False, None],
    "dropout": [0.5, 1.0, -0.1, 1.1, float("nan"), float("inf"), -float("inf"), None, "a"],
}
NO_TENSORS: list[Any] = [None, 1, "a", [], [1.0], object()]


def draw_tensor(rng: random.Random, like: Tensor | None) -> Any:
    """Returns a tensor that shares no more than its dtype with the one it replaces."""
    shape = [rng.choice(SIZES) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.2:
        return rng.choice(NO_TENSORS)
    dtype = like.dtype if like is not None and rng.random() < 0.7 else rng.choice(ALL_DTYPES)
    return torch.ones(shape).to(dtype)


def expand_hugely(rng: random.Random, tensor: Tensor) -> Tensor:
    """Returns a view of one element, of sizes whose product no memory holds, or that overflows."""
    shape = [rng.choice([*HUGE, size]) for size in tensor.shape] or [2**62]
    return tensor.new_ones(1).expand(shape)


def other_layout(rng: random.Random, tensor: Tensor) -> Tensor:
    """Returns the same numbers in a tensor of another kind."""
    kinds: list[Callable[[Tensor], Tensor]] = [
        Tensor.to_sparse,
        Tensor.to_mkldnn,
        lambda t: t.to("meta"),
        lambda t: torch.nested.nested_tensor([t, t]),
        torch._neg_view,
        lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda t: t.rename(*(f"d{i}" for i in range(t.dim()))),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        lambda t: t.clone().requires_grad_(),
        torch.nn.Parameter,
    ]
    return rng.choice(kinds)(tensor)


def other_strides(rng: random.Random, tensor: Tensor) -> Tensor:
    """Returns a tensor of that shape whose elements do not lie one behind the other."""
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda t: t[:1].expand(t.shape),
        lambda t: t.new_ones(t.numel() + 3)[3:].view(t.shape),
        lambda t: t.as_strided(t.shape, (0,) * t.dim()),
        lambda t: t.new_ones(sum(t.shape)).as_strided(t.shape, (1,) * t.dim()),
    ]
    return rng.choice(kinds)(tensor)


def other_shape(rng: random.Random, tensor: Tensor) -> Tensor:
    """Returns a tensor of one size more or less, or of one dimension more or less."""
    shape = list(tensor.shape)
    kind = rng.randint(0, 3)
    if kind == 0 or not shape:
        shape.insert(rng.randint(0, len(shape)), rng.choice([0, 1, 2]))
    elif kind == 1:
        del shape[rng.randrange(len(shape))]
    elif kind == 2:
        i = rng.randrange(len(shape))
        shape[i] = max(0, shape[i] + rng.choice([-1, 1]))
    else:
        rng.shuffle(shape)
    return tensor.new_ones(shape)


def change_tensor(rng: random.Random, tensor: Any) -> Any:
    """Returns another tensor, or what is none."""
    if not isinstance(tensor, Tensor) or rng.random() < 0.2:
        return draw_tensor(rng, tensor if isinstance(tensor, Tensor) else None)
    if rng.random() < 0.1:
        return tensor.to(rng.choice(ALL_DTYPES))
    return rng.choice([expand_hugely, other_layout, other_strides, other_shape])(rng, tensor)


def change_sizes(rng: random.Random, sizes: Any) -> Any:
    """Returns other batch_sizes, most of which do not fit."""
    if rng.random() < 0.2:
        return change_tensor(rng, sizes)
    values = [*range(-1, 5), 2**31, 2**62, -(2**63)]
    length = rng.choice([0, 1, 2, 3, 7, 100])
    if rng.random() < 0.2:
        return torch.ones(1, dtype=torch.int64).expand(rng.choice([2**20, 2**33, 2**40]))
    return torch.tensor([rng.choice(values) for _ in range(length)], dtype=torch.int64)


def change_weights(rng: random.Random, weights: Any) -> Any:
    """Returns other weights."""
    if not isinstance(weights, list) or not weights or rng.random() < 0.1:
        return rng.choice([[], None, 1, torch.ones(4, 4), [None]])
    weights = list(weights)
    i, j = rng.randrange(len(weights)), rng.randrange(len(weights))
    kind = rng.randint(0, 9)
    if kind == 0:
        del weights[i]
    elif kind == 1:
        weights.insert(i, weights[j])
    elif kind == 2:
        weights[i], weights[j] = weights[j], weights[i]
    elif kind == 3:
        weights = [weight.to(rng.choice(ALL_DTYPES)) for weight in weights]
    elif kind == 4:
        weights = weights[: rng.randint(0, len(weights))] * rng.choice([1, 2, 3])
    else:
        weights[i] = change_tensor(rng, weights[i])
    return weights


def change(rng: random.Random, arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """Returns `arguments` with so many random changes."""
    changed = dict(arguments)
    for _ in range(times):
        name = rng.choice(list(arguments))
        with suppress(RuntimeError, IndexError, TypeError, ValueError):  # no such tensor exists
            changed[name] = change_argument(rng, name, changed[name])
    return changed


def change_argument(rng: random.Random, name: str, value: Any) -> Any:
    """Returns another value for the argument of that name."""
    if name in SCALARS:
        return rng.choice(SCALARS[name])
    if name == "weights":
        return change_weights(rng, value)
    if name == "batch_sizes":
        return change_sizes(rng, value)
    if name == "needs":
        return [rng.random() < 0.5 for _ in range(rng.randint(0, 12))]
    return change_tensor(rng, value)
