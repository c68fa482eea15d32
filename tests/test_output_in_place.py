"""The output may be written to before the backward pass, which then computes it again.

torch.nn allows that in float64, for which nothing of its own keeps the output. What autograd does
not see (a write to `.data`, to the array of `.numpy()`, or to the storage) goes unnoticed here, as
with any op of torch's that keeps its output.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from helpers import (
    FUSED_DTYPES,
    Case,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    loss,
    make_inputs,
)

Write = Callable[[Tensor], object]


def without_grad(y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(3)


RECORDED: dict[str, Write] = {
    "mul": lambda y: y.mul_(2),
    "slice": lambda y: y[0].zero_(),
    "view": lambda y: y.transpose(0, -1)[2:].relu_(),
}
WRITES = RECORDED | {
    "no_grad": without_grad,
    "detach": lambda y: y.detach()[1:].fill_(7),
    "resize": lambda y: y.detach().resize_(2000).fill_(1),
    "out": lambda y: torch.ones(2000, dtype=y.dtype, out=y.detach()),
}


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
@pytest.mark.parametrize("write", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_after_a_compiled_call(backend: str, write: Write) -> None:
    """A compiled program keeps what it returns, and says so."""
    case = PLAIN[0]
    compiled = build(fastrnn, case)
    compiled.compile(fullgraph=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(compiled, case, write)


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


AGAIN = [
    *cases(D=[2], dtype=FUSED_DTYPES),
    *cases(["LSTM"], L=[3], D=[2], P=[0, 3], hx=[True], dropout=[0.0, 0.4]),
    *cases(["LSTM", "RNN_TANH"], L=[2], N=[3, None], batch_first=[True], bias=[False]),
    *cases(["LSTM", "RNN_RELU"], L=[2], D=[2], lengths=[(2, 7, 4)], hx=[True], dropout=[0.0, 0.4]),
]


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_gradients_have_the_same_bits(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)

    def gradients_after(write: Write) -> dict[str, Tensor]:
        torch.manual_seed(0)  # of dropout
        y = call(module, inputs)["y"]
        total = loss({"y": y}, ["y"])
        write(y.detach())
        found = torch.autograd.grad(total, list(module.parameters()))
        return dict(zip(dict(module.named_parameters()), found, strict=True))

    assert_equal(gradients_after(Tensor.zero_), gradients_after(Tensor.numel))


@pytest.mark.parametrize("case", cases(dtype=FUSED_DTYPES), ids=str)
def test_memory_of_the_output(case: Case) -> None:
    """Backward reads it where it is; it is no memory that torch copies when it is first touched."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = call(build(fastrnn, case), make_inputs(case))["y"]
    assert sum(t.data_ptr() == y.data_ptr() for t in saved) == 1
    assert not any(map(torch._C._is_cow_tensor, [y, *saved]))


def test_output_whose_memory_is_gone() -> None:
    case = Case()
    y = call(build(fastrnn, case), make_inputs(case))["y"]
    y.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was freed"):
        y.backward(torch.ones(y.shape))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function_that_writes_takes_any_size(backend: str, packed: bool) -> None:
    """The last layer's output is one node more; nothing of it depends on numbers or on data."""
    torch.manual_seed(0)
    module = fastrnn.LSTM(5, 8, num_layers=2, batch_first=not packed)
    counter = CompileCounterWithBackend(backend)

    def total(x: Tensor, sizes: Tensor | None) -> Tensor:
        y = module(x if sizes is None else PackedSequence(x, sizes))[0]
        y = y if sizes is None else y.data
        return F.dropout(y.relu_(), 0.0, inplace=True).square().sum()

    compiled, compilations = torch.compile(total, fullgraph=True, dynamic=True, backend=counter), []
    for steps in (4, 7, 9, 12):
        sizes = torch.tensor([3] * steps) if packed else None
        x = torch.randn((3 * steps, 5) if packed else (3, steps, 5))
        gradients = {}
        for name, function in (("ours", compiled), ("expected", total)):
            module.zero_grad()
            function(x, sizes).backward()
            gradients[name] = {key: p.grad for key, p in module.named_parameters()}
        assert_same(gradients["ours"], gradients["expected"])
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_under_compiled_autograd() -> None:
    """It hashes what a node keeps beside tensors, and may run what it compiled for another call."""
    torch.manual_seed(0)
    module, x = fastrnn.LSTM(5, 8), torch.randn(7, 3, 5)
    gradients = []
    for write in (Tensor.numel, Tensor.zero_, Tensor.numel):
        module.zero_grad()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y = module(x)[0]
            total = y.sum()
            write(y.detach())
            total.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert_equal(gradients[1], gradients[0])
    assert_equal(gradients[2], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_under_autocast(dtype: torch.dtype) -> None:
    def gradient(write: bool) -> Tensor:
        torch.manual_seed(0)
        module = fastrnn.LSTM(5, 8, num_layers=2, dtype=dtype)
        y = module(torch.randn(7, 3, 5, dtype=dtype))[0]
        total = y.sum()
        if write:
            y.detach().zero_()
        with torch.autocast("cpu"):
            total.backward()
        assert module.weight_hh_l1.grad is not None
        return module.weight_hh_l1.grad

    assert torch.equal(gradient(True), gradient(False))
