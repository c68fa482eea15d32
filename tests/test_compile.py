"""torch.compile takes a module whole, and gives eager's results."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import _fused
from helpers import Case, assert_same, build, call, cases, make_inputs, run, run_python

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True]), ids=str)
def test_compiled_is_eager(case: Case, backend: str) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    module.compile(fullgraph=True, backend=backend)
    assert_same(run(module, inputs), expected)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], hx=[True]), ids=str)
def test_fake_tensors(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = call(module, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = inputs._replace(
            **{n: mode.from_tensor(t) for n, t in inputs._asdict().items() if t is not None}
        )
        outputs = call(module, fakes)
    for name, output in outputs.items():
        assert output.shape == expected[name].shape and output.stride() == expected[name].stride()


@pytest.mark.parametrize(
    "hx", [torch.zeros(2, 3, 8), (torch.zeros(3, 8),) * 3], ids=["one", "three"]
)
def test_errors_in_compiled_code_are_of_the_arguments(hx: object) -> None:
    """And not of how fastrnn looks at an error."""
    first_lines = []
    for package in (fastrnn, nn):
        compiled = torch.compile(package.LSTMCell(5, 8), backend="eager", fullgraph=True)
        with pytest.raises(Exception) as error:
            compiled(torch.ones(3, 5), hx)
        first_lines.append(str(error.value).splitlines()[0])
    assert first_lines[0] == first_lines[1]


@pytest.mark.parametrize("case", cases(L=[2]), ids=str)
def test_traced_is_eager(case: Case) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x
    traced = torch.jit.trace(module, x)
    longer = torch.cat([x, x])
    torch.testing.assert_close(traced(longer), module(longer))


REFUSED = """
import torch, fastrnn
from torch import nn

def trace(package):
    lstm, cell = package.LSTM(5, 8).double(), package.LSTMCell(5, 8)
    narrow, x = package.RNNCell(0, 8), torch.ones(2, 3, 5)
    yield lstm, (x.double(), (torch.ones(1, 3, 8).double(), torch.ones(1, 3, 8)))
    yield cell, (x[0], (torch.ones(3, 8), torch.ones(3, 8).double()))
    yield narrow, (torch.ones(3, 0),)

for ours, theirs in zip(trace(fastrnn), trace(nn)):
    theirs[0].load_state_dict(ours[0].state_dict())
    results = [torch.jit.trace(m, x, check_trace=False)(*x) for m, x in (ours, theirs)]
    torch.testing.assert_close(*results)
"""


def test_trace_of_what_only_torch_takes() -> None:
    """In a process of its own, which torch ends where an op that it traces raises."""
    result = run_python("-c", REFUSED)
    assert result.returncode == 0, result.stderr


# What users compile with: Inductor, in each mode; it takes seconds a case.
INDUCTED = [
    *cases(L=[2], D=[2], hx=[True], dropout=[0.5]),
    *cases(["LSTM"], P=[3], batch_first=[True]),
    *cases(["LSTM", "RNN_TANH"], L=[2], lengths=[(2, 7, 4)]),
]


@pytest.mark.parametrize(
    "options",
    [{"fullgraph": True}, {"dynamic": True}, {}],
    ids=["fullgraph", "dynamic", "default"],
)
@pytest.mark.parametrize("case", INDUCTED, ids=str)
def test_inductor_is_eager(case: Case, options: dict[str, bool]) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch._inductor.config.patch(fallback_random=True):  # eager's dropout masks
        expected = run(module, inputs)
        compiled = build(fastrnn, case)
        compiled.compile(**options)
        assert_same(run(compiled, inputs), expected)
        compiled.eval(), module.eval()
        with torch.no_grad():
            assert_same(call(compiled, inputs), call(module, inputs))


class Counter:
    """A backend that runs graphs as they are, and counts them and the fused nodes in them."""

    def __init__(self) -> None:
        self.graphs = self.stacks = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> Callable:
        self.graphs += 1
        targets = [node.target for node in graph.graph.nodes]
        self.stacks += targets.count(torch.ops.fastrnn.recurrent.default)
        return graph.forward


@pytest.mark.parametrize("case", cases(L=[3], D=[2], P=[0, 3], dropout=[0.5]), ids=str)
def test_no_recompilation_for_other_lengths_and_batches(case: Case) -> None:
    counter, module = Counter(), build(fastrnn, case)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for T, N in ((7, 3), (5, 2), (40, 64)):
        x = make_inputs(replace(case, T=T, N=N)).x
        torch.manual_seed(0)
        y = compiled(x)[0]
        torch.manual_seed(0)
        assert torch.equal(y, module(x)[0])
    assert (counter.graphs, counter.stacks) == (1, 1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_calls_on_the_same_input_draw_masks_of_their_own(kind: str, backend: str) -> None:
    """Compilers make one node of equal ones; R-Drop and the like would train on nothing."""
    module = getattr(fastrnn, kind)(6, 10, 2, dropout=0.5)
    compiled = torch.compile(lambda x: (module(x)[0], module(x)[0]), backend=backend)
    first, second = compiled(torch.randn(5, 3, 6))
    assert not torch.equal(first, second)
    (first - second).square().sum().backward()
    assert module.weight_hh_l0.grad.norm() > 0


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_frozen_calls_on_the_same_input_draw_masks_of_their_own(kind: str) -> None:
    module = getattr(fastrnn, kind)(6, 10, 2, dropout=0.5)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(lambda x: (module(x)[0], module(x)[0]))
        first, second = compiled(torch.randn(5, 3, 6))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_recomputation_of_all_but_random_ops_meets_the_same_masks(backend: str) -> None:
    module = fastrnn.RNN(6, 10, 3, dropout=0.5, nonlinearity="relu", bias=False)
    x = torch.rand(5, 3, 6, requires_grad=True)
    # Inductor's own random numbers torch draws again, those of nn.Dropout too.
    fallback = torch._inductor.config.patch(fallback_random=True)
    with torch._functorch.config.patch(aggressive_recomputation=True), fallback:
        y, _ = torch.compile(module, fullgraph=True, backend=backend)(x)
        y.sum().backward()
    assert y.any()
    torch.testing.assert_close((x * x.grad).sum(), y.sum())  # Euler: y is homogeneous in x


def test_constant_results_are_marked_as_torch_marks_them() -> None:
    def marked() -> None:
        """A function for torch to mark."""

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) and vars(_fused._is_too_old) == vars(marked)
