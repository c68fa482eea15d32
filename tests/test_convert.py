"""convert and revert: the same parameters, hooks, flags and names under other classes."""

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastrnn
from helpers import takes_fused_path

PAIRS = {name: (getattr(nn, name), getattr(fastrnn, name)) for name in fastrnn.cells.__all__}
PAIRS |= {name: (getattr(nn, name), getattr(fastrnn, name)) for name in fastrnn.modules.__all__}


class Model(nn.Module):
    """Every class that is swapped, at several depths, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.body = nn.ModuleDict({"rnn": nn.Sequential(nn.RNN(16, 8, nonlinearity="relu"))})
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.RNNCell(8, 8, bias=False)])
        self.again = self.cells[1]
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body["rnn"](self.lstm(x)[0])[0]
        h = self.again(self.cells[1](self.cells[0](y[:, -1])[0]))
        return self.head(h)


def make(seed: int = 0) -> tuple[Model, Tensor]:
    """Returns a model in evaluation, and an input."""
    torch.manual_seed(seed)
    return Model().eval(), torch.randn(3, 6, 5)


def classes(model: nn.Module) -> list[type]:
    """Returns the class of every module."""
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_there_and_back(inplace: bool) -> None:
    model, x = make()
    before, expected, text = classes(model), model(x), repr(model)
    converted = fastrnn.convert(model, inplace=inplace)
    assert (converted is model) == inplace
    swapped = dict(PAIRS.values())
    assert classes(converted) == [swapped.get(c, c) for c in before]
    assert inplace or classes(model) == before
    assert repr(converted) == text
    torch.testing.assert_close(converted(x), expected)
    assert takes_fused_path(lambda: converted(x))

    reverted = fastrnn.revert(converted, inplace=inplace)
    assert classes(reverted) == before
    assert torch.equal(reverted(x), expected)
    assert not takes_fused_path(lambda: reverted(x))
    assert converted.again is converted.cells[1] and reverted.again is reverted.cells[1]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_model_that_is_itself_one(pair: tuple[type, type]) -> None:
    module = pair[0](5, 8)
    x = torch.randn(4, 5)
    assert type(fastrnn.convert(module)) is pair[1] and type(module) is pair[0]
    assert fastrnn.convert(module, inplace=True) is module and type(module) is pair[1]
    twin = fastrnn.revert(module)
    assert type(twin) is pair[0] and type(module) is pair[1]
    torch.testing.assert_close(twin(x), module(x))
    assert type(copy.deepcopy(module)) is pair[1]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_the_same_parameters(inplace: bool) -> None:
    model, x = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    names = {name: id(p) for name, p in model.named_parameters()}
    converted = fastrnn.convert(model, inplace=inplace)
    assert {name: id(p) for name, p in converted.named_parameters()} == names
    before = converted(x)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(converted(x), before)
    for each in (model, fastrnn.revert(converted, inplace=inplace)):
        torch.testing.assert_close(each(x), converted(x))


def test_copies_are_independent_trees() -> None:
    model, x = make()
    converted = fastrnn.convert(model)
    expected = model(x)
    converted.lstm.weight_hh_l0 = nn.Parameter(torch.zeros(32, 8))
    converted.head.register_forward_hook(lambda *_: torch.zeros(3, 3))
    del converted.cells[0]
    assert torch.equal(model(x), expected)


def test_of_no_module() -> None:
    for swap in (fastrnn.convert, fastrnn.revert):
        with pytest.raises(TypeError, match=r"take a torch\.nn\.Module, not list$"):
            swap([nn.LSTM(5, 8)])


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_hooks_flags_and_attributes(inplace: bool) -> None:
    model, x = make()
    seen: list[str] = []
    model.lstm.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.lstm.register_forward_hook(lambda *_: seen.append("post"))
    model.cells[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.register_state_dict_post_hook(lambda *_: seen.append("state"))
    model.lstm.train().note = "kept"
    model.lstm.weight_hh_l0.requires_grad_(False)
    for swap in (fastrnn.convert, fastrnn.revert):
        model = swap(model, inplace=inplace)
        seen.clear()
        model(x).sum().backward()
        model.state_dict()
        assert seen == ["pre", "post", "backward", "state"]
        assert model.lstm.training and not model.cells[0].training and not model.training
        assert model.lstm.note == "kept" and not model.lstm.weight_hh_l0.requires_grad


def through_torch_save(model: nn.Module) -> nn.Module:
    """Returns a copy made by torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_saved_and_copied() -> None:
    model, x = make()
    expected = model(x)
    converted = fastrnn.convert(model)
    for each in (copy.deepcopy(converted), through_torch_save(converted)):
        assert classes(each) == classes(converted)
        torch.testing.assert_close(each(x), expected)
        assert torch.equal(fastrnn.revert(each)(x), expected)
    twin, _ = make(seed=1)
    twin.load_state_dict(converted.state_dict())
    assert torch.equal(twin(x), expected)


class MyLSTM(nn.LSTM):
    """A subclass, which may compute something else."""


class MyFastLSTM(fastrnn.LSTM):
    """A subclass of the other side."""


class MyFastCell(fastrnn.LSTMCell):
    """Another, whose base is itself a subclass of torch.nn's."""


def test_compiled_modules_are_reported() -> None:
    model = nn.Sequential(nn.LSTM(5, 8), torch.compile(nn.RNN(5, 8), backend="eager"))
    for compiled, name in (
        (nn.Sequential(*model), "1"),
        (torch.compile(nn.LSTM(5, 8), backend="eager"), "the model itself"),
    ):
        said = f"^compiled before, so the copy still runs the original's: {name}$"
        with pytest.warns(UserWarning, match=said) as warned:
            fastrnn.convert(compiled)
        assert [warning.filename for warning in warned] == [__file__]
    model[0].compile(backend="eager")
    with pytest.warns(UserWarning, match="original's: 0, 1$"):
        fastrnn.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(model, inplace=True)


def test_subclasses_are_left_alone_and_reported() -> None:
    model = nn.Sequential(
        nn.LSTM(5, 8), MyLSTM(5, 8), parametrizations.weight_norm(nn.Linear(5, 8))
    )
    parametrizations.weight_norm(model.append(nn.RNN(5, 8))[3], "weight_hh_l0")
    with pytest.warns(UserWarning, match=r"1 \(MyLSTM\), 3 \(ParametrizedRNN\)$"):
        converted = fastrnn.convert(model)
    with pytest.warns(UserWarning) as warned:
        fastrnn.revert(MyFastLSTM(5, 8))
    assert warned[0].filename == __file__
    assert classes(converted)[1:3] == [fastrnn.LSTM, MyLSTM]
    for subclass in (MyFastLSTM, MyFastCell):
        with pytest.warns(UserWarning, match=rf"the model itself \({subclass.__name__}\)$"):
            assert type(fastrnn.revert(subclass(5, 8))) is subclass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(fastrnn.convert(make()[0]))
        assert type(fastrnn.convert(MyFastCell(5, 8))) is MyFastCell


def as_numpy(outputs: Any) -> list[np.ndarray]:
    """Returns all tensors of a module's outputs."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.detach().numpy() for leaf in leaves]


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_onnx_of_what_is_reverted(name: str, dynamo: bool, tmp_path: Any) -> None:
    model = getattr(fastrnn, name)(5, 8, num_layers=2, bidirectional=True).eval()
    x = torch.randn(6, 3, 5)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(fastrnn.revert(model), (x,), path, dynamo=dynamo)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for got, want in zip(results, as_numpy(model(x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_script_is_refused_with_what_to_do(name: str) -> None:
    model = nn.Sequential(PAIRS[name][1](5, 8))
    with pytest.raises(RuntimeError, match=rf"such as {name}: script what fastrnn.revert"):
        torch.jit.script(model)
    assert type(model[0]) is PAIRS[name][1]
    torch.jit.script(fastrnn.revert(model))


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_other_than_the_parameters(inplace: bool) -> None:
    """torch.nn computes with them, fastrnn would not."""
    model = nn.Sequential(nn.RNN(5, 8), nn.LSTM(5, 8))
    lstm = model[1]
    lstm._flat_weights = [torch.zeros_like(weight) for weight in lstm._flat_weights]
    with pytest.raises(AttributeError, match="set weight_ih_l0 and the others"):
        fastrnn.convert(model, inplace=inplace)
    assert type(model[0]) is nn.RNN and type(lstm) is nn.LSTM
    assert not lstm(torch.ones(3, 2, 5))[0].any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "weight_hh_l1_reverse"])
@pytest.mark.parametrize("make", [fastrnn.RNN, fastrnn.LSTM, partial(fastrnn.LSTM, proj_size=3)])
def test_sizes_that_are_not_the_weights(
    make: Callable[..., nn.RNNBase], name: str, inplace: bool
) -> None:
    """By which torch.nn's LSTM would read them."""
    model = nn.Sequential(make(5, 8, num_layers=2, bidirectional=True), nn.Identity())
    right = getattr(model[0], name)
    setattr(model[0], name, nn.Parameter(torch.ones(2, 2)) if "weight" in name else 12)
    with pytest.raises(ValueError, match=r"0: weight_.h_l.* is .*: set them first"):
        fastrnn.revert(model, inplace=inplace)
    assert isinstance(model[0], type(make(5, 8)))
    setattr(model[0], name, right)
    assert fastrnn.revert(model, inplace=inplace)[0](torch.ones(3, 2, 5))[0].isfinite().all()


class WeightDrop(nn.Module):
    """Drops entries of a weight anew at each call, as AWD-LSTM does."""

    def __init__(self, module: nn.LSTM) -> None:
        super().__init__()
        self.module = module
        self.raw = nn.Parameter(module.weight_hh_l0.detach())
        del module.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5)
        return self.module(x)[0]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_a_weight_that_is_set_at_each_call(called: bool, inplace: bool) -> None:
    plain, x = WeightDrop(nn.LSTM(5, 8)), torch.randn(3, 2, 5)
    model = copy.deepcopy(plain)
    if called:
        model(x)
    torch.manual_seed(0)
    want = plain(x)
    converted = fastrnn.convert(model, inplace=inplace)
    torch.manual_seed(0)
    torch.testing.assert_close(converted(x), want)
    assert takes_fused_path(lambda: converted(x))


STALE: dict[str, Callable[[nn.LSTM], object]] = {
    "functional_call": lambda lstm: torch.func.functional_call(
        lstm, {name: 2 * p.detach() for name, p in lstm.named_parameters()}, torch.ones(3, 2, 5)
    ),
    "register_parameter": lambda lstm: lstm.register_parameter(
        "weight_hh_l0", nn.Parameter(torch.ones(32, 8))
    ),
}


@pytest.mark.parametrize("change", STALE.values(), ids=STALE)
def test_list_that_torch_brings_up_to_date_at_its_next_call(
    change: Callable[[nn.LSTM], object],
) -> None:
    lstm, x = nn.LSTM(5, 8), torch.randn(3, 2, 5)
    change(lstm)
    converted = fastrnn.convert(lstm)
    torch.testing.assert_close(converted(x)[0], lstm(x)[0])


def test_a_model_that_makes_its_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/models.md says of code that cannot be changed."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "LSTM", fastrnn.LSTM)
        module = torch.nn.LSTM(5, 8)
    assert type(module) is fastrnn.LSTM
    torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(3, 2, 5))
