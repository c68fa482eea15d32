"""The output may be written to before the backward pass, which then reads what it was.

torch.nn allows that in float64, for which nothing of its own keeps the output.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import fastrnn
from helpers import FUSED_DTYPES, Case, assert_same, build, call, cases, loss, make_inputs

Write = Callable[[Tensor], object]


def without_grad(y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(3)


RECORDED: dict[str, Write] = {
    "mul": lambda y: y.mul_(2),
    "slice": lambda y: y[0].zero_(),
    "view": lambda y: y.transpose(0, -1)[2:].relu_(),
}
UNSEEN: dict[str, Write] = {
    "no_grad": without_grad,
    "data": lambda y: y.data.mul_(3),
    "detach": lambda y: y.detach()[1:].fill_(7),
    "numpy": lambda y: y.detach().numpy().fill(7),
    "dlpack": lambda y: torch.from_dlpack(y.detach()).fill_(7),
    "storage": lambda y: y.untyped_storage().fill_(1),
}
WRITES = RECORDED | UNSEEN


def gradients(module: nn.RNNBase, case: Case, write: Write) -> dict[str, Tensor]:
    """Returns the written output, and gradients of a loss of it."""
    inputs = make_inputs(case)
    x = inputs.x.requires_grad_()
    y = call(module, inputs)["y"]
    write(y)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss({"y": y.square()}, ["y"]), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["x", *parameters], found, strict=True))}


F64 = {"dtype": [torch.float64]}
PLAIN = cases(D=[2], **F64)
LAYOUTS = [
    *PLAIN,
    *cases(["LSTM"], L=[2], P=[3], **F64),
    *cases(["RNN_TANH"], L=[2], batch_first=[True], **F64),
    *cases(["RNN_RELU"], N=[None], **F64),
    *cases(["LSTM", "RNN_TANH"], lengths=[(2, 7, 4)], **F64),
]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_gradients_are_torchs(case: Case, write: Write) -> None:
    ours, theirs = (gradients(build(package, case), case, write) for package in (fastrnn, nn))
    assert_same(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_after_a_compiled_call(case: Case, backend: str, write: Write) -> None:
    compiled = build(fastrnn, case)
    compiled.compile(fullgraph=True, backend=backend)
    assert_same(gradients(compiled, case, write), gradients(build(nn, case), case, write))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("write", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_within_a_compiled_function(case: Case, write: Write) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(x: Tensor) -> Tensor:
        y = module(x)[0]
        write(y)
        return y.square().sum()

    total(x.requires_grad_()).backward()
    assert_same({"x": x.grad}, {"x": gradient_of_squares(nn, case, write)})


def gradient_of_squares(package: ModuleType, case: Case, write: Write) -> Tensor:
    """Returns the gradient of x under torch.func.grad."""
    module = build(package, case)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def total(x: Tensor) -> Tensor:
        y = functional_call(module, parameters, (x,))[0]
        write(y)
        return y.square().sum()

    return torch.func.grad(total)(make_inputs(case).x)


@pytest.mark.parametrize("write", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_under_a_transform(case: Case, write: Write) -> None:
    ours, theirs = (gradient_of_squares(package, case, write) for package in (fastrnn, nn))
    assert_same({"x": ours}, {"x": theirs})


@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=FUSED_DTYPES), ids=str)
def test_nothing_is_copied_unless_written(case: Case) -> None:
    module, saved = build(fastrnn, case), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = call(module, make_inputs(case))["y"]
    (kept,) = (tensor for tensor in saved if torch._C._is_cow_tensor(tensor))
    assert torch._C._data_address(kept) == torch._C._data_address(y)
    y.sum().backward()
    assert torch._C._data_address(kept) == torch._C._data_address(y)
    with torch.no_grad():
        y.add_(1)
    assert torch._C._data_address(kept) != torch._C._data_address(y)
