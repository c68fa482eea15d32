"""RNNCell and LSTMCell against torch.nn's: results, gradients, contract and errors."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

import fastrnn
from helpers import DTYPES, Recorder, assert_equal, assert_same, takes_fused_path

KINDS = {"LSTM": ("LSTMCell", {}), "TANH": ("RNNCell", {}), "RELU": ("RNNCell", {"relu": True})}


def build(package: ModuleType, kind: str, **options: Any) -> nn.RNNCellBase:
    """Returns a cell of 5 inputs and 17 units."""
    torch.manual_seed(0)
    if kind != "LSTM":
        options["nonlinearity"] = kind.lower()
    return getattr(package, KINDS[kind][0])(5, 17, **options)


def make_inputs(kind: str, N: int | None, hx: bool, dtype: torch.dtype = torch.float32) -> list:
    """Returns x and, if asked for, hx."""
    generator = torch.Generator().manual_seed(1)
    batch = () if N is None else (N,)

    def draw(width: int) -> Tensor:
        return torch.randn(*batch, width, generator=generator).to(dtype)

    x, h, c = draw(5), draw(17), draw(17)
    return [x, (h, c) if kind == "LSTM" else h] if hx else [x]


def run(cell: nn.RNNCellBase, arguments: list) -> dict[str, Tensor]:
    """Runs three steps forward and backward; returns the states and all gradients."""
    leaves: list[Tensor] = []

    def leaf(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(leaf, given))
        leaves.append(given.clone().requires_grad_())
        return leaves[-1]

    cell.zero_grad()
    x, *hx = map(leaf, arguments)
    state = cell(x, *hx)
    for _ in range(2):
        state = cell(x, state)
    states = state if isinstance(state, tuple) else (state,)
    sum(s.square().sum() * (i + 1) for i, s in enumerate(states)).backward()
    results = {f"state{i}": s.detach() for i, s in enumerate(states)}
    results |= {f"d{i}": t.grad for i, t in enumerate(leaves)}
    return results | {f"d{n}": p.grad.clone() for n, p in cell.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("N", [None, 0, 1, 3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(
    kind: str, N: int | None, hx: bool, bias: bool, dtype: torch.dtype
) -> None:
    arguments = make_inputs(kind, N, hx, dtype)
    ours, theirs = (build(p, kind, bias=bias, dtype=dtype) for p in (fastrnn, nn))
    assert_same(run(ours, arguments), run(theirs, arguments))
    with torch.no_grad():
        (got, want) = (cell(*arguments) for cell in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert takes_fused_path(lambda: ours(*arguments))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_contract(kind: str, bias: bool) -> None:
    ours, theirs = (build(p, kind, bias=bias, dtype=torch.float64) for p in (fastrnn, nn))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    other = build(nn, kind, bias=bias, dtype=torch.float64)
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(other.state_dict())


BAD: dict[str, Callable[[str], list]] = {
    "x_0d": lambda kind: [torch.ones(())],
    "x_3d": lambda kind: [torch.ones(2, 3, 5)],
    "x_width": lambda kind: [torch.ones(3, 6)],
    "x_double": lambda kind: [torch.ones(3, 5).double()],
    "x_int": lambda kind: [torch.ones(3, 5).long()],
    "x_none": lambda kind: [None],
    "hx_width": lambda kind: [torch.ones(3, 5), states(kind, torch.ones(3, 16))],
    "hx_batch": lambda kind: [torch.ones(3, 5), states(kind, torch.ones(2, 17))],
    "hx_3d": lambda kind: [torch.ones(3, 5), states(kind, torch.ones(1, 3, 17))],
    "hx_unbatched": lambda kind: [torch.ones(3, 5), states(kind, torch.ones(17))],
    "hx_batched": lambda kind: [torch.ones(5), states(kind, torch.ones(1, 17))],
    "hx_double": lambda kind: [torch.ones(3, 5), states(kind, torch.ones(3, 17).double())],
}


def states(kind: str, h: Tensor) -> Any:
    """Returns hx of which each state is `h`."""
    return (h, h) if kind == "LSTM" else h


def outcome(cell: nn.RNNCellBase, arguments: list) -> Any:
    """Returns the result, or the error's type and words."""
    try:
        return cell(*arguments)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind: str, arguments: Callable[[str], list]) -> None:
    ours, theirs = (outcome(build(p, kind), arguments(kind)) for p in (fastrnn, nn))
    assert isinstance(theirs, tuple) and isinstance(theirs[1], str)
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_no_views(kind: str) -> None:
    # As torch.nn's: the steps of truncated backpropagation detach them in place.
    cell = build(fastrnn, kind)
    x = torch.ones(3, 5)
    outputs = cell(x) if kind == "LSTM" else (cell(x),)
    expected = [output.detach().clone() for output in outputs]
    for output in outputs:
        assert output.requires_grad and not output._is_view()
        output.detach_()
    cell(x, outputs if kind == "LSTM" else outputs[0])
    assert_equal(dict(enumerate(outputs)), dict(enumerate(expected)))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
def test_in_the_place_of_torch_nns_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, name, getattr(fastrnn, name))
    cell = getattr(nn, name)(5, 8)
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 6 expected 5"):
        cell(torch.ones(3, 6))
    cell = cell.to("meta")  # where torch.nn computes
    assert cell(torch.ones(3, 5, device="meta"))[0].shape[-1] == 8


def without_biases(cell: nn.RNNCellBase) -> None:
    """Takes both biases away."""
    cell.bias_ih = cell.bias_hh = None


def without_one_bias(cell: nn.RNNCellBase) -> None:
    """Takes one bias away, which torch.nn's own computation allows."""
    cell.bias_ih = None


def with_biases_after_all(cell: nn.RNNCellBase) -> None:
    """Gives a bias to a cell whose flag says that it has none."""
    cell.bias = False
    cell.bias_ih = nn.Parameter(2 * cell.bias_hh.detach())


def with_another_attribute(cell: nn.RNNCellBase) -> None:
    """Uses the name of the flag, as a subclass may."""
    cell.bias = nn.Parameter(torch.ones(17))


def with_a_parametrized_bias(cell: nn.RNNCellBase) -> None:
    """Computes a bias at each call."""
    parametrize.register_parametrization(cell, "bias_ih", nn.Softplus(), unsafe=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "change",
    [
        without_biases,
        without_one_bias,
        with_biases_after_all,
        with_another_attribute,
        with_a_parametrized_bias,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_those_that_it_has(kind: str, change: Callable[[nn.RNNCellBase], None]) -> None:
    ours, theirs = (build(package, kind, dtype=torch.float64) for package in (fastrnn, nn))
    for cell in (ours, theirs):
        change(cell)
    arguments = make_inputs(kind, 3, True, torch.float64)
    want = theirs(*arguments)
    torch.testing.assert_close(ours(*arguments), want)
    if change is not without_one_bias:  # which compiled code refuses
        torch.testing.assert_close(torch.compile(ours, backend="eager")(*arguments), want)


def test_unknown_nonlinearity() -> None:
    ours, theirs = (p.RNNCell(5, 8, nonlinearity="gelu") for p in (fastrnn, nn))
    assert outcome(ours, [torch.ones(5)]) == outcome(theirs, [torch.ones(5)])


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind: str) -> None:
    cell = build(fastrnn, kind, dtype=torch.float64)
    arguments = make_inputs(kind, 2, True, torch.float64)
    leaves = [arguments[0], *(arguments[1] if kind == "LSTM" else arguments[1:])]

    def step(x: Tensor, *states: Tensor) -> Any:
        return cell(x, states if kind == "LSTM" else states[0])

    leaves = [leaf.requires_grad_() for leaf in leaves]
    check = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(step, leaves, check_forward_ad=True, **check)
    assert torch.autograd.gradgradcheck(step, leaves, check_fwd_over_rev=True, **check)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind: str) -> None:
    cell = build(fastrnn, kind)
    weights = {name: p.detach() for name, p in cell.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        state = functional_call(cell, weights, (x,))
        return (state[0] if kind == "LSTM" else state).square().sum()

    x = torch.randn(4, 5)
    got = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    each = [grad(loss)(weights, sample) for sample in x]
    assert_same(got, {name: torch.stack([g[name] for g in each]) for name in weights})


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind: str) -> None:
    torch._dynamo.reset()
    arguments = make_inputs(kind, 3, True)
    expected = run(build(fastrnn, kind), arguments)
    compiled = build(fastrnn, kind)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, arguments), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), build(fastrnn, kind)(*arguments))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_fused_call(kind: str) -> None:
    cell, arguments = build(fastrnn, kind), make_inputs(kind, 1, True)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        cell(*arguments)
    names = [event.name for event in profile.events()]
    assert names.count("fastrnn::cell") == 1
    assert not {"aten::linear", "aten::addmm", "aten::copy_"} & set(names)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, requires_grad: bool) -> None:
    cell = build(fastrnn, kind).requires_grad_(requires_grad)
    with Recorder("fastrnn::cell") as recorder, torch.inference_mode():
        cell(*make_inputs(kind, 3, True))
    (call,) = recorder.calls
    x, *rest = call[0][1:4]
    arguments = (call[0][0], x, *rest, list(cell.parameters()), True)
    torch.library.opcheck(torch.ops.fastrnn.cell.default, arguments)


zeros = torch.zeros
BAD_OP: dict[str, dict[str, Any]] = {
    "mode": {"mode": "GRU"},
    "x_0d": {"x": zeros(())},
    "x_3d": {"x": zeros(1, 3, 5)},
    "x_width": {"x": zeros(3, 4)},
    "x_no_width": {"x": zeros(3, 0)},
    "x_int": {"x": zeros(3, 5, dtype=torch.int64)},
    "x_meta": {"x": zeros(3, 5, device="meta")},
    "h0_width": {"h0": zeros(3, 16)},
    "h0_1d": {"h0": zeros(17)},
    "h0_double": {"h0": zeros(3, 17).double()},
    "c0_batch": {"c0": zeros(2, 17)},
    "no_weights": {"weights": []},
    "one_weight": {"weights": [zeros(68, 5)]},
    "weights_0d": {"weights": [zeros(())] * 4},
    "projected": {"weights": [zeros(68, 5), zeros(68, 3), *[zeros(68)] * 2, zeros(3, 17)]},
    "no_biases": {"has_biases": False},
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("changes", BAD_OP.values(), ids=BAD_OP)
def test_op_raises(changes: dict[str, Any], requires_grad: bool) -> None:
    weights = list(build(fastrnn, "LSTM").requires_grad_(requires_grad).parameters())
    arguments = {"mode": "LSTM", "x": torch.ones(3, 5), "h0": None, "c0": None}
    arguments |= {"weights": weights, "has_biases": True}
    assert torch.ops.fastrnn.cell(**arguments)[0].shape == (3, 17)
    with pytest.raises(RuntimeError):
        torch.ops.fastrnn.cell(**(arguments | changes))


@pytest.mark.parametrize("trained", [False, True])
def test_the_op_takes_no_projection(trained: bool) -> None:
    shapes = [(32, 5), (32, 3), (32,), (32,), (3, 8)]
    weights = [torch.zeros(shape).requires_grad_(trained) for shape in shapes]
    with pytest.raises(RuntimeError, match=r"^fastrnn: a cell has"):
        torch.ops.fastrnn.cell("LSTM", torch.zeros(2, 5), None, None, weights, True)
