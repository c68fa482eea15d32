"""A module as a function of all its arguments, and the ways that torch has to differentiate one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from helpers import Inputs, call

Results = dict[str, Tensor]


def arguments_of(module: nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    """Returns everything that the outputs can be differentiated by: x, h0, c0 and parameters."""
    given = {name: t for name, t in inputs._asdict().items() if isinstance(t, Tensor)}
    return given | {name: p.detach() for name, p in module.named_parameters()}


def pack(x: Tensor, lengths: tuple[int, ...]) -> PackedSequence:
    """Packs x (T, N, I) by indexing, which forward-mode AD takes and pack_padded_sequence not."""
    T, N = x.shape[:2]
    places = torch.arange(T * N).view(T, N)
    packed = pack_padded_sequence(places, list(lengths), enforce_sorted=False)
    return PackedSequence(x.flatten(0, 1)[packed.data], *packed[1:])


class Called(nn.Module):
    """A module on padded input and lengths, whose weights functional_call can put."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Inputs) -> Results:
        x, lengths, h0, c0 = inputs
        if lengths is None:
            return call(self.module, inputs)
        if isinstance(self.module, nn.LSTM | nn.RNN):
            return self.one_by_one(inputs)
        y, hidden = self.module(pack(x, lengths), h0 if c0 is None else (h0, c0))
        states = hidden if isinstance(hidden, tuple) else (hidden,)
        return {"y": y.data, **dict(zip(("h_n", "c_n"), states, strict=False))}

    def one_by_one(self, inputs: Inputs) -> Results:
        """What a packed sequence gives, of a module that is not transformed on one."""
        x, lengths, h0, c0 = inputs
        runs = [
            call(self.module, Inputs(x[:T, n], None, h0[:, n], c0 if c0 is None else c0[:, n]))
            for n, T in enumerate(lengths)
        ]
        padded = torch.nn.utils.rnn.pad_sequence([outputs.pop("y") for outputs in runs])
        states = {name: torch.stack([r[name] for r in runs], dim=1) for name in runs[0]}
        return {"y": pack(padded, lengths).data, **states}


def as_function(module: nn.RNNBase, inputs: Inputs) -> Callable[[Results], Results]:
    """Returns the map from `arguments_of(module, inputs)` to the outputs, differently weighted."""
    called = Called(module)

    def function(arguments: Results) -> Results:
        given = inputs._replace(**{n: t for n, t in arguments.items() if n in inputs._fields})
        weights = {f"module.{n}": t for n, t in arguments.items() if n not in inputs._fields}
        outputs = functional_call(called, weights, (given,))
        return {name: (i + 1) * t for i, (name, t) in enumerate(outputs.items())}

    return function


def directions(tensors: Results) -> Results:
    """Returns a fixed random direction for each of `tensors`."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for name, t in tensors.items()
    }


def total(outputs: Results) -> Tensor:
    """Returns a curved scalar function of all outputs."""
    return torch.stack([output.pow(2).sum() for output in outputs.values()]).sum()


def by_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Gradients by torch.func.grad."""
    return grad(lambda a: total(f(a)))(arguments)


def by_vjp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a vector-Jacobian product by torch.func.vjp."""
    outputs, pull = vjp(f, arguments)
    return outputs | {f"d{n}": g for n, g in pull(directions(outputs))[0].items()}


def by_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a Jacobian-vector product by torch.func.jvp."""
    outputs, tangents = jvp(f, (arguments,), (directions(arguments),))
    return outputs | {f"t{n}": t for n, t in tangents.items()}


def by_dual_numbers(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a Jacobian-vector product by torch.autograd.forward_ad."""
    moves = directions(arguments)
    with forward_ad.dual_level():
        outputs = f({n: forward_ad.make_dual(t, moves[n]) for n, t in arguments.items()})
        duals = {n: forward_ad.unpack_dual(t) for n, t in outputs.items()}
        return {n: d.primal for n, d in duals.items()} | {
            f"t{n}": d.tangent for n, d in duals.items()
        }


def by_one_dual_number(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Jacobian-vector product where only a weight has a tangent."""
    name = "weight_hh_l0"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        outputs = f(arguments | {name: dual})
        return {n: forward_ad.unpack_dual(t).tangent for n, t in outputs.items()}


def by_grad_of_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Gradients of a function of gradients."""
    return grad(lambda a: total(grad(lambda b: total(f(b)))(a)))(arguments)


def by_jvp_of_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Hessian-vector product, forward over reverse."""
    return jvp(grad(lambda a: total(f(a))), (arguments,), (directions(arguments),))[1]


def by_grad_of_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Hessian-vector product, reverse over forward."""
    moves = directions(arguments)
    return grad(lambda a: jvp(lambda b: total(f(b)), (a,), (moves,))[1])(arguments)


def by_jvp_of_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Second directional derivatives."""
    moves = directions(arguments)
    return jvp(lambda a: jvp(f, (a,), (moves,))[1], (arguments,), (moves,))[1]


def with_tangent(function: Callable[[Tensor], Results], x: Tensor) -> Results:
    """Returns the tangents of function's results, for a tangent of ones at x."""
    torch.manual_seed(3)
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, torch.ones_like(x)))
        return {name: forward_ad.unpack_dual(t).tangent for name, t in outputs.items()}
