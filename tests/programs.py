"""Small modules in float64 beside torch.nn's, programs made of them, and transforms of either."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import fastrnn

MODULES = ["LSTM", "RNN", "LSTMCell", "RNNCell"]

OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "proj": {"proj_size": 3, "batch_first": True},
}

STACKS = [("LSTM", "plain"), ("LSTM", "stack"), ("LSTM", "proj"), ("RNN", "plain")]

ALL = [*STACKS, ("RNN", "stack"), ("LSTMCell", "plain"), ("RNNCell", "plain")]


def build_both(kind: str, options: str = "plain") -> tuple[nn.Module, nn.Module]:
    """Returns fastrnn's module and torch.nn's, of the same weights, in float64."""
    ours, theirs = (
        getattr(package, kind)(4, 5, dtype=torch.float64, **OPTIONS[options])
        for package in (fastrnn, nn)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def draw(kind: str) -> Tensor:
    return (
        torch.randn(2, 4, dtype=torch.float64)
        if "Cell" in kind
        else torch.randn(3, 2, 4, dtype=torch.float64)
    )


def flat(outputs: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


def first(outputs: Any) -> Tensor:
    return flat(outputs)[0]


def exported(module: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(module, (x,)).module()


def traced(module: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.jit.trace(module, (x,))


def losses(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: sum(t.sin().sum() for t in flat(call(x)))


def each(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda x: flat(call(x))


TRANSFORMS = {
    "grad": lambda call, x: grad(losses(call))(x),
    "jacrev": lambda call, x: jacrev(each(call))(x),
    "hessian": lambda call, x: hessian(losses(call))(x),
    "grad_of_grad": lambda call, x: grad(lambda x: grad(losses(call))(x).square().sum())(x),
    "jvp": lambda call, x: jvp(each(call), (x,), (x.cos(),)),
    "jvp_of_grad": lambda call, x: jvp(grad(losses(call)), (x,), (x.cos(),)),
    "vmap": lambda call, x: vmap(each(call))(torch.stack([x, x.sin()])),
    "per_sample": lambda call, x: vmap(grad(losses(call)))(torch.stack([x, x.sin()])),
}

WAYS_TO_DERIVE: dict[str, Callable[..., Any]] = {
    "plain": lambda f, dy: f(dy),
    "grad": lambda f, dy: grad(lambda dy: sum(g.square().sum() for g in f(dy)))(dy),
    "jvp": lambda f, dy: jvp(f, (dy,), (dy.cos(),)),
    "vmap": lambda f, dy: vmap(f)(torch.stack([dy, dy.sin()])),
}
