"""The copy that convert makes of a model: what in it leads to modules leads to the copy's."""

import collections
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

import fastrnn
from helpers import takes_fused_path


def test_containers_of_a_copy_are_its_own() -> None:
    model = nn.Sequential(nn.LSTM(5, 8))
    model.scales = nn.ParameterDict({"a": torch.ones(1)})
    model.notes, model.seen = ["kept"], {"kept"}
    converted = fastrnn.convert(model)
    converted.scales["b"] = nn.Parameter(torch.ones(1))
    converted.notes.append("added")
    converted.seen.add("added")
    assert list(model.scales) == ["a"] and list(converted.scales) == ["a", "b"]
    assert converted.scales["a"] is model.scales["a"]
    assert model.notes == ["kept"] and model.seen == {"kept"}


class Leading(nn.Module):
    """Runs an LSTM with dropout to which attributes lead, as `lead` makes them."""

    def __init__(self, lead: Callable[["Leading"], Callable[[Tensor], Any]]) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, dropout=0.5)
        self.step = lead(self)

    def run(self, x: Tensor, scale: float = 1) -> Any:
        return self.lstm(x * scale)

    def forward(self, x: Tensor) -> Tensor:
        if callable(self.step):
            return self.step(x)[0]
        held = self.step.values() if isinstance(self.step, dict) else self.step
        return next(iter(held))(x)[0]


def run_by_keyword(x: Tensor, model: Leading) -> Any:
    """Runs a model that a keyword names."""
    return model.run(x)


LEADS: dict[str, Callable[[Leading], Any]] = {
    "method": lambda model: model.run,
    "partial": lambda model: functools.partial(model.run, scale=2),
    "partial_argument": lambda model: functools.partial(Leading.run, model),
    "partial_keyword": lambda model: functools.partial(run_by_keyword, model=model),
    "list": lambda model: [model.lstm],
    "tuple": lambda model: (model.lstm,),
    "set": lambda model: {model.lstm},
    "frozenset": lambda model: frozenset({model.lstm}),
    "deque": lambda model: collections.deque([model.lstm]),
    "namedtuple": lambda model: Parts(model.lstm, 0.5),
    "unchangeable_list": lambda model: immutable_list([model.lstm]),
    "unchangeable_dict": lambda model: immutable_dict(lstm=model.lstm),
    "forbidding_dict": lambda model: Forbidding(lstm=model.lstm),
    "dict_of_lists": lambda model: {"all": Held([model.lstm])},
}


class Parts(NamedTuple):
    """A tuple with names."""

    lstm: nn.Module
    rate: float


class Forbidding(collections.OrderedDict[str, nn.Module]):
    """A dictionary of fixed keys, as the outputs of some libraries' models are."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("not to be updated")

    clear = update


class Attributes(dict[str, Any]):
    """A dictionary whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Frozen(list[Any]):
    """A list that its own methods do not fill."""

    __slots__ = ("lstm",)

    def append(self, _: Any) -> None:
        raise TypeError("not to be changed")

    extend = append

    def __copy__(self) -> None:
        raise TypeError("not to be copied")


def frozen(lstm: nn.LSTM) -> Frozen:
    found = Frozen([1])
    found.lstm = lstm
    return found


class WithSlots(Leading):
    """Keeps what leads to the LSTM in a slot."""

    __slots__ = ("lead",)

    def __init__(self) -> None:
        super().__init__(lambda model: model.lstm)
        self.lead = (self.lstm,)


class Held(list[nn.Module]):
    """A list of one module, which can be called."""

    def __call__(self, x: Tensor) -> Any:
        return self[0](x)


@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
def test_what_leads_to_modules_leads_to_the_copys(lead: Callable[[Leading], Any]) -> None:
    model, x = Leading(lead), torch.randn(4, 5)
    converted = fastrnn.convert(model).eval()
    assert model.lstm.training
    assert takes_fused_path(lambda: converted(x)) and not takes_fused_path(lambda: model(x))
    assert torch.equal(converted(x), converted(x))
    reverted = fastrnn.revert(converted)
    assert not takes_fused_path(lambda: reverted(x))
    torch.testing.assert_close(reverted(x), converted(x))


def test_attributes_of_containers_and_slots_lead_to_the_copys() -> None:
    model = WithSlots()
    model.parts, model.frozen = Attributes(lstm=model.lstm, rate=0.1), frozen(model.lstm)
    model.recent = collections.deque([1, 2], maxlen=2)
    converted = fastrnn.convert(model)
    assert converted.parts["lstm"] is converted.parts.lstm is converted.lstm
    assert converted.frozen.lstm is converted.lead[0] is converted.lstm
    assert type(converted.frozen) is Frozen and list(converted.frozen) == [1]
    converted.parts.rate = 0.2
    converted.recent.append(3)
    assert converted.parts["rate"] == 0.2 and model.parts.rate == 0.1
    assert (list(converted.recent), list(model.recent)) == ([2, 3], [1, 2])
    assert type(model.lstm) is nn.LSTM and model.frozen.lstm is model.parts.lstm is model.lstm


def test_weak_references_lead_to_the_copys() -> None:
    model = nn.Sequential(nn.LSTM(5, 8))
    other = nn.LSTM(5, 8)
    model.first, model.other = weakref.ref(model[0]), weakref.ref(other)
    converted = fastrnn.convert(model)
    assert converted.first() is converted[0] and model.first() is model[0]
    assert converted.other() is other


def test_proxies_lead_to_the_copys() -> None:
    model, other = nn.Sequential(nn.LSTM(5, 8)), nn.LSTM(5, 8)
    model.child = weakref.proxy(model[0])  # which torch takes for a module
    model[0].parents = [weakref.proxy(model), weakref.proxy(other)]
    model.settings = types.SimpleNamespace(other=weakref.proxy(other))
    del other
    converted = fastrnn.convert(model)
    assert type(converted[0]) is fastrnn.LSTM and type(model[0]) is nn.LSTM
    assert converted.child.forward.__self__ is converted[0]
    assert converted[0].parents[0].forward.__self__ is converted


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def run(self) -> None: ...


class Partial(functools.partial[Any]): ...


SHARED = {
    "SimpleNamespace": lambda module: types.SimpleNamespace(module=module),
    "SimpleNamespace, by a list": lambda module: types.SimpleNamespace(modules=[1, module]),
    "Slotted": Slotted,
    "Slotted, by a method": lambda module: Slotted(module).run,
    "UserDict": lambda module: collections.UserDict(module=module),
    "WeakSet": lambda module: weakref.WeakSet([module]),
    "WeakMethod": lambda module: weakref.WeakMethod(module.forward),
    "SimpleNamespace, by a proxy": lambda module: types.SimpleNamespace(p=weakref.proxy(module)),
    "Partial": lambda module: Partial(module),
    "function, of a defaultdict": lambda module: collections.defaultdict(lambda: module),
    "function, by its closure": lambda module: lambda x: module(x),
    "function, by a default": lambda module: lambda x, module=module: module(x),
    "function, by a default of a keyword": lambda module: lambda x, *, module=module: module(x),
}


@pytest.mark.parametrize("name", SHARED)
def test_objects_that_lead_to_modules_are_reported(name: str) -> None:
    model, x, other = nn.Sequential(nn.LSTM(5, 8), nn.Linear(8, 2)), torch.ones(5), nn.MSELoss()
    model.trainer = SHARED[name](model[0])
    common = [torch.ones(1), types.ModuleType("library"), type("Registry", (), {})]
    for each in common:  # the same for every model, or for both
        each.module = model[0]
    model.settings = types.SimpleNamespace(rate=0.1, other=[nn.LSTM(5, 8)], common=common)
    model.loss = lambda y, other=other: other(y, x)
    matching = f"of class {name.split(',')[0]}: inplace=True"
    with pytest.warns(UserWarning, match=matching) as warned:
        converted = fastrnn.convert(model)
    assert [warning.filename for warning in warned] == [__file__]
    assert type(model[0]) is nn.LSTM and type(converted[0]) is fastrnn.LSTM
    del model.trainer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(model)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_method_of_a_child(inplace: bool) -> None:
    model, x = Leading(lambda model: model.lstm.forward).eval(), torch.randn(4, 5)
    want = model(x)
    converted = fastrnn.convert(model, inplace=inplace)
    torch.testing.assert_close(converted(x), want)
    assert takes_fused_path(lambda: converted(x))
    plain = fastrnn.revert(converted, inplace=inplace)
    assert torch.equal(plain(x), want) and not takes_fused_path(lambda: plain(x))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_other_methods_of_children_stay_what_they_are(inplace: bool) -> None:
    class MyLSTM(nn.LSTM): ...

    model = nn.Sequential(nn.LSTM(5, 8), MyLSTM(5, 8))
    model.reset, model.step = model[0].reset_parameters, model[1].forward
    with pytest.warns(UserWarning, match="MyLSTM"):
        converted = fastrnn.convert(model, inplace=inplace)
    assert converted.reset == converted[0].reset_parameters
    assert converted.step == converted[1].forward


def test_keys_lead_to_the_copys_and_containers_keep_their_class() -> None:
    model = nn.Sequential(nn.LSTM(5, 8))
    model.rates, model.counts = {model[0]: 0.1}, collections.defaultdict(int, seen=1)
    model.size, model.order = torch.Size([5]), collections.OrderedDict({model[0]: 2, "a": 1})
    converted = fastrnn.convert(model)
    assert converted.rates == {converted[0]: 0.1} and model.rates == {model[0]: 0.1}
    assert converted.counts == {"seen": 1} and converted.counts["new"] == 0
    assert type(converted.size) is torch.Size
    assert list(converted.order.items()) == [(converted[0], 2), ("a", 1)]
    assert list(model.order.items()) == [(model[0], 2), ("a", 1)]


def test_nothing_is_left_of_what_torch_nn_kept() -> None:
    model = fastrnn.convert(nn.LSTM(5, 8))
    assert "_flat_weights" not in vars(model)  # which would hold weights since replaced


def test_containers_that_hold_themselves() -> None:
    model = nn.Sequential(nn.LSTM(5, 8))
    model.loop = [model[0]]
    model.loop.append(model.loop)
    converted = fastrnn.convert(model)
    assert converted.loop[0] is converted[0] and converted.loop[1] is converted.loop


class Probe(nn.Module):
    """Keeps an activation by a hook that is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8)
        self.last: Tensor | None = None
        self.lstm.register_forward_hook(self.keep)
        self.loaded: list[nn.Module] = []
        self.register_load_state_dict_pre_hook(self.note)

    def keep(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        assert module is self.lstm
        self.last = outputs[0].detach()

    def note(self, module: nn.Module, *_: Any) -> None:
        self.loaded.append(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_hooks_of_a_copy_are_its_own() -> None:
    model, x = Probe(), torch.randn(4, 5)
    converted = fastrnn.convert(model)
    assert torch.equal(converted(x), converted.last) and model.last is None
    converted.load_state_dict(model.state_dict())
    assert converted.loaded == [converted] and not model.loaded


class StaysLazy(nn.LazyLinear):
    """A lazy module that keeps its class when it has run."""

    cls_to_become = None


@pytest.mark.parametrize("lazy", [nn.LazyLinear, StaysLazy])
def test_a_lazy_module_that_has_run_is_copied(lazy: type[nn.LazyLinear]) -> None:
    model = nn.Sequential(lazy(5), nn.LSTM(5, 8))
    model(torch.ones(4, 3))
    converted = fastrnn.convert(model)
    assert converted[0] is not model[0] and converted[0].weight is model[0].weight


NEIGHBOURS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(nn.Linear(5, 5)),
    "jit_traced": lambda: torch.jit.trace(nn.Linear(5, 5), torch.ones(2, 5)),
    "fx_traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(5, 5))),
    "exported": lambda: torch.export.export(nn.Linear(5, 5), (torch.ones(4, 5),)).module(),
    "lazy": lambda: nn.LazyLinear(5),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_beside_other_modules(neighbour: Callable[[], nn.Module], inplace: bool) -> None:
    model = nn.Sequential(neighbour(), nn.LSTM(5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = fastrnn.convert(model, inplace=inplace)
    assert type(converted[1]) is fastrnn.LSTM
    x = torch.randn(4, 5)
    expected = converted(x)
    for each in (converted, model, fastrnn.revert(converted)):
        torch.testing.assert_close(each(x), expected)


@pytest.mark.parametrize("name", ["scripted", "jit_traced", "lazy"])
def test_what_has_no_twin_is_in_both(name: str) -> None:
    model = nn.Sequential(NEIGHBOURS[name](), nn.LSTM(5, 8))
    assert fastrnn.convert(model)[0] is model[0]
