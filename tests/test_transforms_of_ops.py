"""Transforms that meet the ops themselves: called directly, or recorded by a graph before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from programs import (
    ALL,
    MODULES,
    WAYS_TO_DERIVE,
    build_both,
    draw,
    first,
    flat,
)


def by_old_api(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        found = autograd.grad(y, inputs, forward_ad.make_dual(v, t), retain_graph=True)
        return [tuple(forward_ad.unpack_dual(g)) for g in found]


def by_jvp(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    return jvp(lambda v: autograd.grad(y, inputs, v, retain_graph=True), (v,), (t,))


def by_jacfwd(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    scale = torch.tensor(1.0, dtype=torch.float64)
    return jacfwd(lambda s: autograd.grad(y, inputs, s * v, retain_graph=True))(scale)


def by_grad_of_a_graph(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    def size(s: Tensor) -> Tensor:
        found = autograd.grad(y, inputs, s * v, retain_graph=True, create_graph=True)
        return sum(g.square().sum() for g in found)

    return grad(size)(torch.tensor(2.0, dtype=torch.float64))


def by_vmap_of_jvp(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    return vmap(lambda t: by_jvp(y, inputs, v, t)[1])(torch.stack([t, v, t.sin()]))


def by_jvp_of_vmap(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    scales = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def gradients(v: Tensor) -> Any:
        return vmap(lambda s: autograd.grad(y, inputs, s * v, retain_graph=True))(scales)

    return jvp(gradients, (v,), (t,))


WAYS = [by_old_api, by_jvp, by_jacfwd, by_grad_of_a_graph, by_vmap_of_jvp, by_jvp_of_vmap]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", MODULES)
def test_gradient_that_is_transformed(kind: str, way: Callable[..., Any]) -> None:
    x = draw(kind).requires_grad_()
    v, t = torch.randn(2, *first(build_both(kind)[0](x)).shape, dtype=torch.float64)
    torch.manual_seed(0)
    ours, theirs = build_both(kind)
    found, expected = (flat(way(first(m(x)), [x, *m.parameters()], v, t)) for m in (ours, theirs))
    assert_close(found, expected)
    assert any(tensor.abs().max() > 1e-3 for tensor in found)


def test_packed_gradient_that_is_transformed() -> None:
    ours, _ = build_both("LSTM", "stack")
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    packed = PackedSequence(x, torch.tensor([3, 2, 1]))
    v, t = torch.randn(2, 6, 10, dtype=torch.float64)
    y = ours(packed)[0].data
    (found,) = by_jvp(y, [x], v, t)[1]
    (expected,) = autograd.grad(y, x, t)  # it is linear
    assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_gradient_under_dropout_that_is_transformed(options: dict[str, bool]) -> None:
    ours = fastrnn.LSTM(4, 5, num_layers=3, dropout=0.5, dtype=torch.float64, **options)
    x = draw("LSTM").requires_grad_()
    y = first(ours(x))
    v, t = torch.randn(2, *y.shape, dtype=torch.float64)
    found = by_jvp_of_vmap(y, [x, *ours.parameters()], v, t)[1]
    expected = autograd.grad(y, [x, *ours.parameters()], t)  # it is linear
    assert_close(found, tuple(torch.stack([g, -2 * g, 3 * g]) for g in expected))


@pytest.mark.parametrize("kind", MODULES)
def test_jacobian_of_nothing(kind: str) -> None:
    ours, theirs = build_both(kind)
    x = draw(kind)
    found, expected = (jacrev(lambda x, m=m: first(m(x))[:0])(x) for m in (ours, theirs))
    assert found.shape == expected.shape and found.numel() == 0
    name = next(name for name, _ in ours.named_parameters() if "weight_hh" in name)
    by_weight = jacrev(lambda w: first(functional_call(ours, {name: w}, (x,)))[:0])
    assert by_weight(ours.get_parameter(name)).shape[-2:] == ours.get_parameter(name).shape


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_gradients_share_no_memory(kind: str, options: str, batched: bool) -> None:
    ours, _ = build_both(kind, options)
    y = first(ours(draw(kind)))
    v = torch.ones(2, *y.shape, dtype=torch.float64) if batched else torch.ones_like(y)
    graph = {"is_grads_batched": batched, "create_graph": not batched}
    gradients = autograd.grad(y, list(ours.parameters()), v, **graph)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


class Counter(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS_TO_DERIVE)
@pytest.mark.parametrize("name", ["recurrent_backward", "reference_backward"])
@pytest.mark.parametrize(("kind", "mode"), [("LSTM", "LSTM"), ("RNN", "RNN_TANH")])
def test_states_that_are_not_given_have_no_gradients(
    kind: str, mode: str, name: str, way: str
) -> None:
    ops = torch.ops.fastrnn
    x, weights = draw(kind), [p.detach() for p in build_both(kind)[0].parameters()]
    inputs, options = (x, None, None, None, weights), (1, True, False, False)
    y, *_, reserve = ops.recurrent_forward(mode, *inputs, *options, None)
    kept = (
        {"y": y, "reserve": reserve, "masks": None, "dropout": 0.0}
        if name == "recurrent_backward"
        else {}
    )
    keys = ("num_layers", "has_biases", "bidirectional", "batch_first")
    results = []
    for of_states in (False, True):

        def gradients(dy: Tensor, of_states: bool = of_states) -> Any:
            return getattr(ops, name)(
                mode,
                dy,
                None,
                None,
                *inputs,
                **kept,
                **dict(zip(keys, options, strict=True)),
                needs=[True, of_states, of_states, *[True] * 4],
                samples=None,
            )

        results.append(flat(WAYS_TO_DERIVE[way](gradients, y.cos())))
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_jacobian_of_all_results_of_an_rnn(kind: str) -> None:
    """Among which is a cell state, of no elements."""
    ops = torch.ops.fastrnn
    weights = [p.detach() for p in build_both(kind)[0].parameters()]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if kind == "RNN":
            options = (1, True, False, False, None)
            return ops.recurrent("RNN_TANH", x, None, None, None, weights, *options)
        return ops.cell("RNN_TANH", x, None, None, weights, True)

    x = draw(kind)
    *found, of_nothing = jacrev(run)(x)
    assert_close(found, list(jacfwd(lambda x: run(x)[:-1])(x)))
    assert of_nothing.shape == (0, *x.shape)


def test_only_wanted_gradients_are_computed() -> None:
    ours, _ = build_both("LSTM")
    x, weights = draw("LSTM"), list(ours.requires_grad_(False).parameters())
    dy = torch.ones_like(first(ours(x)))
    counts = []
    for wanted in (range(5), [0], [1], [3]):  # of x and the weights
        needs = [0 in wanted, False, False, *(i + 1 in wanted for i in range(4))]
        with Counter() as counter:
            torch.ops.fastrnn.reference_backward(
                "LSTM",
                dy,
                None,
                None,
                x,
                None,
                None,
                None,
                weights,
                1,
                True,
                False,
                False,
                needs,
                None,
            )
        counts.append(counter.products)
    steps = x.size(0)
    assert counts == [steps + 3, steps + 1, steps + 1, steps]


@pytest.mark.parametrize("kind", ["LSTM", "RNN_TANH"])
def test_second_derivatives_of_gradients_of_one_run_with_dropout(kind: str) -> None:
    """Whose masks vmap's samples share."""
    make = nn.LSTM if kind == "LSTM" else nn.RNN
    module = make(3, 4, num_layers=3, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    masks = torch.rand(2, 5, 2, 8) < 0.5
    options = (3, True, True, False, masks, 0.5)
    y, *_ = torch.ops.fastrnn.recurrent_forward(kind, x, None, None, None, wanted[1:], *options)

    def gradients(v: Tensor) -> tuple[Tensor, ...]:
        return autograd.grad(y, wanted, v, create_graph=True)

    vectors = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = vmap(gradients)(vectors)
    looped = [torch.stack(each) for each in zip(*map(gradients, vectors), strict=True)]
    total, expected = (sum(g.sin().sum() for g in found) for found in (batched, looped))
    assert_close(autograd.grad(total, wanted, retain_graph=True), autograd.grad(expected, wanted))
