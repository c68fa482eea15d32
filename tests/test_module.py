"""The modules as modules: names, initial values, state_dict, copies, and writes to weights."""

import copy
import inspect
import io
import pickle
import sys
import typing
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    Case,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
    takes_fused_path,
)

CONFIGURATIONS = [
    *cases(L=[1, 3], D=[1, 2], bias=[True, False], P=[0, 4]),
    *cases(L=[2], batch_first=[True], dropout=[0.25], dtype=DTYPES),
]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_same_parameters(case: Case) -> None:
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for names, names_nn in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert [weight.shape for weight in names] == [weight.shape for weight in names_nn]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_same_repr_and_attributes(case: Case) -> None:
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNBase)
    for name in nn.RNNBase.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)
    assert ours.flatten_parameters() is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no overloads")
@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_signature(kind: str) -> None:
    """help(), notebooks and command lines made of signatures see what torch.nn only documents."""

    def arguments(init: Callable) -> list[tuple[str, object]]:
        parameters = inspect.signature(init).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD]

    documented = typing.get_overloads(getattr(nn, kind).__init__)[0]
    assert arguments(getattr(fastrnn, kind).__init__) == arguments(documented)


def test_positional_arguments() -> None:
    arguments = (5, 8, 2, "relu", False, True, 0.5, True)
    ours, theirs = fastrnn.RNN(*arguments), nn.RNN(*arguments)
    assert repr(ours) == repr(theirs) and ours.mode == theirs.mode == "RNN_RELU"
    arguments = (5, 8, 2, False, True, 0.5, True, 3, "cpu", torch.float64)
    ours, theirs = fastrnn.LSTM(*arguments), nn.LSTM(*arguments)
    assert repr(ours) == repr(theirs) and ours.weight_hr_l0.dtype == torch.float64


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_state_dict_both_ways(case: Case) -> None:
    ours, theirs = build(fastrnn, case, seed=1), build(nn, case, seed=2)
    inputs = make_inputs(case)
    ours.load_state_dict(theirs.state_dict())
    assert_same(call(ours.eval(), inputs), call(theirs.eval(), inputs))
    ours = build(fastrnn, case, seed=3).eval()
    theirs.load_state_dict(ours.state_dict())
    assert_same(call(ours, inputs), call(theirs, inputs))


def through_pickle(module: nn.Module) -> nn.Module:
    """Returns a copy made by pickle."""
    return pickle.loads(pickle.dumps(module))


def through_save(module: nn.Module) -> nn.Module:
    """Returns a copy made by torch.save."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], hx=[True]), ids=str)
def test_copies(case: Case, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    twin = copied(module)
    assert type(twin) is type(module) and repr(twin) == repr(module)
    assert_equal(run(twin, inputs), expected)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert_equal(run(module, inputs), expected)
    assert not torch.equal(run(twin, inputs)["y"], expected["y"])


@pytest.mark.parametrize("kind", KINDS)
def test_conversions(kind: str) -> None:
    case = Case(kind, L=2)
    ours, theirs = build(fastrnn, case), build(nn, case)
    inputs = make_inputs(case)
    double = inputs._replace(x=inputs.x.double())
    assert_same(run(ours.double(), double), run(theirs.double(), double))
    assert takes_fused_path(lambda: call(ours, double))
    assert_same(run(ours.float(), inputs), run(theirs.float(), inputs))
    assert takes_fused_path(lambda: call(ours, inputs))


def write_data(module: nn.RNNBase) -> None:
    """Writes through .data."""
    module.weight_hh_l0.data.mul_(0.5)


def write_in_place(module: nn.RNNBase) -> None:
    """Writes under no_grad."""
    with torch.no_grad():
        module.weight_ih_l1[1:].add_(0.1)
        module.bias_hh_l0.fill_(0.3)


def replace_data(module: nn.RNNBase) -> None:
    """Gives a parameter other storage."""
    module.weight_hh_l1.data = module.weight_hh_l1.data.flip(0)


def replace_parameter(module: nn.RNNBase) -> None:
    """Assigns a new parameter, whose rows are not contiguous."""
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().t().contiguous().t() * 0.5)


def load_state(module: nn.RNNBase) -> None:
    """Loads other weights."""
    module.load_state_dict({name: 0.5 * value for name, value in module.state_dict().items()})


def assign_state(module: nn.RNNBase) -> None:
    """Loads other weights by assignment."""
    halves = {name: 0.5 * value for name, value in module.state_dict().items()}
    module.load_state_dict(halves, assign=True)


def step_optimizer(module: nn.RNNBase) -> None:
    """Takes an optimizer's step."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(module.parameters(), lr=0.1).step()


def normalize_weight(module: nn.RNNBase) -> None:
    """Parametrizes a weight."""
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(0.5)


def prune_weight(module: nn.RNNBase) -> None:
    """Prunes a weight, which makes it a plain tensor that a hook computes."""
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def reset(module: nn.RNNBase) -> None:
    """Draws the weights anew."""
    torch.manual_seed(9)
    module.reset_parameters()


@pytest.mark.parametrize(
    "write",
    [
        write_data,
        write_in_place,
        replace_data,
        replace_parameter,
        load_state,
        assign_state,
        step_optimizer,
        normalize_weight,
        prune_weight,
        reset,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_are_seen(kind: str, write: Callable[[nn.RNNBase], None]) -> None:
    case = Case(kind, L=2, hx=True)
    inputs = make_inputs(case)
    ours, theirs = build(fastrnn, case), build(nn, case)
    before = run(ours, inputs)
    for module in (ours, theirs):
        write(module)
    after = run(ours, inputs)
    assert not torch.equal(after["y"], before["y"])
    assert_same(after, run(theirs, inputs))
    assert takes_fused_path(lambda: call(ours, inputs))


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_flat_weights(name: str) -> None:
    # torch.nn computes with what _flat_weights holds, which here are the parameters themselves.
    module = getattr(fastrnn, name)(5, 8)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    with pytest.raises(AttributeError, match="set weight_ih_l0 and the others"):
        module._flat_weights = [torch.zeros_like(weight) for weight in module._flat_weights]
    with pytest.raises(AttributeError, match="set weight_ih_l0 and the others"):
        module._flat_weights = module._flat_weights[:2]
    with pytest.raises(AttributeError, match="set weight_ih_l0 and the others"):
        module._flat_weights[0] = torch.zeros_like(module.weight_ih_l0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{"device": "meta"}, {"dtype": torch.complex64}], ids=str)
def test_compiled_where_torch_computes(options: dict) -> None:
    module = fastrnn.LSTM(5, 8, **options)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(torch.randn(7, 3, 5, **options))[0].shape == (7, 3, 8)


def test_weight_that_is_gone() -> None:
    module = fastrnn.LSTM(5, 8)
    weights = list(module._flat_weights)
    del module.weight_hh_l0
    module.double().float()  # torch collects the weights that are left
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(torch.ones(3, 2, 5))
    with pytest.raises(AttributeError, match="set weight_ih_l0 and the others"):
        module._flat_weights = weights  # with which torch.nn would compute
    module.weight_hh_l0 = weights[1].detach()
    assert module(torch.ones(3, 2, 5))[0].shape == (3, 2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    case = Case(kind, L=2)
    ours, theirs = build(fastrnn, case), build(nn, case)
    inputs = make_inputs(case)
    before = call(ours, inputs)["y"]
    halves = {n: (0.5 * p).detach().requires_grad_() for n, p in ours.named_parameters()}
    y, _ = functional_call(ours, halves, (inputs.x,))
    y_nn, _ = functional_call(theirs, halves, (inputs.x,))
    assert_same({"y": y}, {"y": y_nn})
    names, values = halves.keys(), list(halves.values())
    gradients, gradients_nn = (
        dict(zip(names, torch.autograd.grad(output.sum(), values), strict=True))
        for output in (y, y_nn)
    )
    assert_same(gradients, gradients_nn)
    assert torch.equal(call(ours, inputs)["y"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights(kind: str) -> None:
    case = Case(kind, I=17, L=2)
    inputs = make_inputs(case)
    ours, theirs = build(fastrnn, case), build(nn, case)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l0 = module.weight_ih_l1
    assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=[torch.float64]), ids=str)
def test_training_loop(case: Case, optimizer: type[torch.optim.Optimizer]) -> None:
    x = make_inputs(case).x
    target = torch.randn_like(build(nn, case)(x)[0])
    losses = []
    for package in (fastrnn, nn):
        module = build(package, case)
        steps = optimizer(module.parameters(), lr=0.01)
        for _ in range(6):
            loss = (module(x)[0] - target).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.detach())
    ours, theirs = torch.stack(losses).chunk(2)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_hooks(kind: str) -> None:
    module, seen = build(fastrnn, Case(kind)), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    module.register_forward_hook(lambda _, args, result: seen.append(result[0].shape))
    module(torch.ones(7, 3, 5))
    assert seen == [(7, 3, 5), (7, 3, 17)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_may_have_a_run_of_its_own(kind: str) -> None:
    case = Case(kind)
    inputs, base = make_inputs(case), build(fastrnn, case)

    class Encoder(type(base)):  # type: ignore[misc]
        def _run(self, *arguments: Tensor) -> tuple:
            return super().forward(*arguments)

        def forward(self, *arguments: Tensor) -> tuple:
            return self._run(*arguments)

    expected = call(base, inputs)
    base.__class__ = Encoder
    assert_equal(call(base, inputs), expected)
    assert takes_fused_path(lambda: call(base, inputs))


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_methods_that_another_class_takes(kind: str) -> None:
    """torchrl gives a class of its own all that torch.nn.LSTM, or what stands there, defines."""

    def take(package: ModuleType) -> nn.RNNBase:
        theirs = getattr(package, kind)
        methods = {name: value for name, value in vars(theirs).items() if name != "__init__"}
        return type(kind, (nn.RNNBase,), methods)(theirs(5, 8).mode, 5, 8)

    ours, theirs = take(fastrnn), take(nn)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            module(x[..., :4])
