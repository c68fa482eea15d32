"""Tools that look into a model: the counter of its operations, and torch.fx."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import build_from_modules, make_workload
from helpers import Case, build, call, cases, make_inputs, run

STACKS = [
    *cases(L=[1, 3], D=[1, 2], P=[0, 4], hx=[False, True], dtype=[torch.float64]),
    *cases(T=[7, 11], N=[None, 1], bias=[False], batch_first=[False, True], dtype=[torch.float64]),
    *cases(N=[4], lengths=[(3, 7, 1, 7)], hx=[False, True], dtype=[torch.float64]),
]


def flops(function: Any, *arguments: Any) -> int:
    """Returns what torch counts of a call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_flops(case: Case) -> None:
    # torch.nn's float64 modules multiply by operations that are counted.
    inputs = make_inputs(case)
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert flops(run, ours, inputs) == flops(run, theirs, inputs) > 0
    with torch.no_grad():
        assert flops(call, ours, inputs) == flops(call, theirs, inputs) > 0


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_flops_of_a_frozen_first_layer(name: str, bidirectional: bool) -> None:
    counts = []
    for package in (fastrnn, nn):
        options = {"num_layers": 2, "bidirectional": bidirectional, "dtype": torch.float64}
        module = getattr(package, name)(5, 8, **options)
        module.weight_ih_l0.requires_grad_(False)
        x = torch.randn(7, 3, 5, dtype=torch.float64)  # wants no gradient
        counts.append(flops(lambda m=module, x=x: m(x)[0].sum().backward()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("shape", ["rnn-B3-T7-I5-H9-L2-bi", "lstm-B3-T7-I5-H9-L2-bi-proj4-hx"])
def test_flops_of_benchmarks(shape: str, mode: str) -> None:
    shape = Shape.parse(shape)
    step = build_from_modules(fastrnn, make_workload(shape, mode))
    with torch.inference_mode(mode == "inference"):
        rel = 0.1 if mode == "training" else 0
        assert flops(step.run) == pytest.approx(shape.flops(mode), rel=rel)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
def test_flops_of_a_cell(name: str, training: bool) -> None:
    def step(cell: nn.Module) -> None:
        x, h = (torch.ones(3, n, dtype=torch.float64, requires_grad=True) for n in (5, 8))
        with torch.set_grad_enabled(training):
            outputs = cell(x, (h, h) if name == "LSTMCell" else h)
        if training:
            sum(output.sum() for output in outputs).backward()

    counts = [flops(step, getattr(p, name)(5, 8, dtype=torch.float64)) for p in (fastrnn, nn)]
    assert counts[0] == counts[1] > 0


def test_flops_of_an_output_that_is_computed_again() -> None:
    module, x = fastrnn.LSTM(5, 8, num_layers=2), torch.randn(7, 3, 5)
    counts = []
    for write in (False, True):
        y, _ = module(x)
        if write:
            y.mul_(2)
        counts.append(flops(y.sum().backward))
    last_layer = fastrnn.LSTM(8, 8)
    assert counts[1] - counts[0] == flops(last_layer, y.detach()) > 0


class Model(nn.Module):
    """A module of each class, in what torch.fx can follow: it does not unpack."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.rnn = fastrnn.LSTM(5, 8), fastrnn.RNN(8, 8)
        self.lstm_cell, self.rnn_cell = fastrnn.LSTMCell(8, 8), fastrnn.RNNCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        results = self.lstm(x)
        states = results[1]
        y = self.rnn(results[0], hx=states[0])[0]
        h = self.lstm_cell(y[0], (states[0][0], states[1][0]))[0]
        return self.rnn_cell(h, self.rnn_cell(h))


def test_fx_sees_modules_as_leaves() -> None:
    model, x = Model(), torch.randn(7, 3, 5)
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["lstm", "rnn", "lstm_cell", "rnn_cell", "rnn_cell"]
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x[:2]), model(x[:2]))


class Decoder(nn.Module):
    """Begins from a constant, with a state that is traced: as it is, or in a pair."""

    def __init__(self, module: nn.Module, start: Tensor, given: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rnn, self.start, self.given = module, start, given

    def forward(self, state: Any) -> Any:
        return self.rnn(self.start, self.given(state))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
@pytest.mark.parametrize("given", ["whole", "pair", "list", "second"])
def test_fx_of_a_traced_state(name: str, given: str) -> None:
    lstm, cell = name.startswith("LSTM"), name.endswith("Cell")
    if given != "whole" and not lstm:
        pytest.skip("has one state")
    module = getattr(fastrnn, name)(5, 8, **({} if cell else {"num_layers": 2, "dropout": 0.5}))
    state = torch.zeros(3, 8) if cell else torch.zeros(2, 3, 8)
    ways = {"whole": lambda s: s, "pair": lambda s: (s, s)}
    ways |= {"list": lambda s: [s, s], "second": lambda s: (state, s)}
    model = Decoder(module, torch.ones(3, 5) if cell else torch.ones(7, 3, 5), ways[given])
    hx = (state, state) if lstm and given == "whole" else state
    traced = fx.symbolic_trace(model).eval()
    assert [n.target for n in traced.graph.nodes if n.op.startswith("call")] == ["rnn"]
    torch.testing.assert_close(traced(hx), model.eval()(hx))
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(fx.proxy.TraceError, match="is_leaf_module"):
        fx.symbolic_trace(model)


class Prelude(nn.Module):
    """Runs a module on a constant, of which nothing is traced."""

    def __init__(self, module: nn.Module, start: Tensor) -> None:
        super().__init__()
        self.rnn = module
        self.register_buffer("start", start)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.start)[0] + x


class ShapeTracer(fx.Tracer):
    """Runs each module that it records, as tracers do that note the shapes of results."""

    def create_proxy(self, kind: str, target: Any, *arguments: Any, **options: Any) -> fx.Proxy:
        if kind == "call_module":
            module = self.root.get_submodule(target)
            module.forward(torch.ones(2, module.input_size))
        return super().create_proxy(kind, target, *arguments, **options)


@pytest.mark.parametrize("tracer", [fx.Tracer, ShapeTracer])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_fx_of_a_call_on_nothing_traced(name: str, tracer: type[fx.Tracer]) -> None:
    ours, theirs = (Prelude(getattr(p, name)(5, 8), torch.ones(2, 5)) for p in (fastrnn, nn))
    graph = tracer().trace(ours)
    found, expected = (
        [(node.op, str(node.target)) for node in g.nodes]
        for g in (graph, fx.Tracer().trace(theirs))
    )
    assert found == expected
    nn.init.zeros_(next(ours.rnn.parameters()))  # which what was traced sees
    assert torch.equal(fx.GraphModule(ours, graph)(torch.ones(8)), ours(torch.ones(8)))


class Last(fastrnn.LSTM):
    """A subclass whose forward does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0][-1]


def hooked() -> nn.Module:
    """Returns a module whose call does more than its forward."""
    module = fastrnn.RNN(5, 8)
    module.register_forward_hook(lambda module, x, y: y[0])
    return module


HOOKS = ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_fx_does_not_lose_hooks(hook: str) -> None:
    module = fastrnn.RNN(5, 8)
    getattr(module, f"register_{hook}")(lambda *_: None)
    with pytest.raises(fx.proxy.TraceError, match="is_leaf_module"):
        fx.symbolic_trace(nn.Sequential(module))


@pytest.mark.parametrize("make", [lambda: Last(5, 8), hooked])
def test_fx_traces_no_call_twice(make: Any) -> None:
    model, x = nn.Sequential(make()), torch.randn(7, 3, 5)
    with pytest.raises(fx.proxy.TraceError, match="is_leaf_module"):
        fx.symbolic_trace(model)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.RNNBase)

    traced = fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(fastrnn.LSTM(5, 8))
