"""Swaps torch.nn's recurrent modules in a model for fastrnn's, and back."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from functools import partial
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _WrappedHook

from fastrnn.cells import LSTMCell, RNNCell
from fastrnn.modules import LSTM, RNN, check_flat_weights

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
}
_PLAIN = {ours: theirs for theirs, ours in _FUSED.items()}

# A model keeps its class, unless it is itself one of those that are swapped.
Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, inplace: bool = False) -> Model:
    """Puts fastrnn's modules in the place of every torch.nn RNN, LSTM, RNNCell and LSTMCell.

    Parameters and buffers stay the very same objects, so optimizers keep working. Names, hooks,
    attributes and the training flag stay too. Convert before torch.compile or a wrapper such as
    DistributedDataParallel, which keep what they have seen of the model.

    Args:
        model: A module that is one of the four, or holds them at any depth.
        inplace: Whether `model` itself changes. If not, it stays as it is, and the result is
            another tree of modules over the same parameters, with containers, bound methods and
            hooks of its own. Modules that TorchScript made, lazy ones that have not run, and
            everything else that the model holds are shared by both.

    Returns:
        The converted model; `model` itself if inplace. (Type checkers take it to be of `model`'s
        class, also where it is itself one of the four.)

    Raises:
        TypeError: `model` is not a module.
        AttributeError: A module's `_flat_weights`, with which torch.nn computes, are not its
            parameters.

    Warns:
        UserWarning: Some modules are of a subclass of the four, which may compute something else;
            they are left alone, and the warning names them. Or `inplace` is False, and some modules
            were compiled: the copy still runs what was compiled, with the modules of `model`. Or an
            object of another class, such as a closure, leads to modules: the copy shares it, and
            so what it does with the modules of `model`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(5, 8))
        >>> type(fastrnn.convert(model)[0])
        <class 'fastrnn.modules.LSTM'>
    """
    return _swap(model, _FUSED, inplace, swapped=tuple(_PLAIN))


def revert(model: Model, inplace: bool = False) -> Model:
    """Undoes `convert`: puts torch.nn's modules back, on the very same parameters.

    Args:
        model: A module that is one of fastrnn's, or holds them at any depth.
        inplace: Whether `model` itself changes; see `convert`.

    Returns:
        The model with torch.nn's modules; `model` itself if inplace.

    Raises:
        TypeError: `model` is not a module.
        ValueError: The weights of an RNN or LSTM have other sizes than its `input_size` and
            `hidden_size` say, which torch.nn would compute with.

    Warns:
        UserWarning: Some modules are of a subclass of fastrnn's; they are left alone, and the
            warning names them. Or some were compiled, or objects lead to them, as for `convert`.

    Example:
        >>> model = fastrnn.convert(torch.nn.Sequential(torch.nn.LSTM(5, 8)))
        >>> type(fastrnn.revert(model)[0])
        <class 'torch.nn.modules.rnn.LSTM'>
    """
    return _swap(model, _PLAIN, inplace, swapped=())


def _compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile returns, or had its own `compile` called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _swap(
    model: Model,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    inplace: bool,
    swapped: tuple[type[nn.Module], ...],
) -> Model:
    """Swaps modules of `classes`; warns of those of subclasses, but for the classes `swapped`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert and revert take a torch.nn.Module, not {type(model).__name__}")
    if not inplace:
        compiled = [name or "the model itself" for name, m in model.named_modules() if _compiled(m)]
        twins = _Twins(model)
        if compiled:
            warnings.warn(
                f"compiled before, so the copy still runs the original's: {', '.join(compiled)}",
                UserWarning,
                stacklevel=3,
            )
        elif twins.shared:  # not of what torch.compile made, which is such an object
            warnings.warn(
                "the copy shares objects that lead to the original's modules, of class "
                f"{', '.join(sorted(twins.shared))}: inplace=True does without a copy",
                UserWarning,
                stacklevel=3,
            )
        model = twins.of(model)
    modules = list(model.named_modules())
    for name, module in modules:
        if type(module) in classes:
            _check_weights(module)
            if type(module) in _PLAIN:
                _check_sizes(name or "the model itself", module)
    left_alone = []
    for name, module in modules:
        if type(module) in classes:
            _become(module, classes[type(module)])
        elif isinstance(module, tuple(classes)) and not isinstance(module, swapped):
            left_alone.append(f"{name or 'the model itself'} ({type(module).__qualname__})")
    for _, module in modules:
        for name, value in module.__dict__.items():
            module.__dict__[name] = _rebound(value, classes)
    if left_alone:
        warnings.warn(
            f"left as they are, because they are of subclasses: {', '.join(left_alone)}",
            UserWarning,
            stacklevel=3,
        )
    return model


def _become(module: nn.Module, target: type[nn.Module]) -> None:
    """Makes `module` one of `target`, which keeps the same state, but for a list of weights."""
    module.__class__ = target
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)  # fastrnn reads the parameters themselves
        module._init_flat_weights()


def _rebound(value: Any, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Any:
    """Returns, for the bound `forward` of a module that was swapped, that of its new class."""
    if isinstance(value, MethodType):
        for source, target in classes.items():
            if value.__func__ is source.forward and type(value.__self__) is target:
                return MethodType(target.forward, value.__self__)
    return value


def _check_weights(module: nn.Module) -> None:
    """Makes sure that torch.nn's module computes with the weights that it has by name.

    Raises:
        AttributeError: It computes with others.
    """
    if not isinstance(module, nn.RNNBase):
        return
    if module._weights_have_changed():  # as its forward does
        module._init_flat_weights()
    # Dropout of weights takes a parameter away, and sets its name before each call.
    check_flat_weights(module, module._flat_weights, set_later=True)


def _check_sizes(name: str, module: nn.Module) -> None:
    """Makes sure that weights have the sizes by which torch.nn's LSTM reads them, unchecked.

    Raises:
        ValueError: They have others.
    """
    if not isinstance(module, nn.RNNBase):
        return
    like_it = nn.RNNBase(
        module.mode,
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        device="meta",
    )
    for weight, expected in like_it.named_parameters():
        given = module._parameters.get(weight)
        # FSDP's first version keeps flat shards in the place of weights.
        if given is not None and given.dim() == 2 and given.shape != expected.shape:
            raise ValueError(
                f"{name}: {weight} is {tuple(given.shape)}, and by input_size and hidden_size, "
                f"with which torch.nn computes, {tuple(expected.shape)}: set them first"
            )


def _has_no_twin(module: nn.Module) -> bool:
    """Whether a module is bound to its own object.

    What TorchScript compiled lives in C++, and a lazy module's hooks are about to change it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


_CONTAINERS: tuple[type[Any], ...] = (OrderedDict, defaultdict, dict, list, set, deque)


def _empty(base: Any, container: Any) -> Any:
    """Returns an empty container of the same class, by the methods of `base`."""
    try:
        twin = base.__new__(type(container))
    except TypeError:  # the class is written in C
        twin = copy.copy(container)
        base.clear(twin)
    if base is deque:
        deque.__init__(twin, (), container.maxlen)
    return twin


def _slots(value: Any) -> list[MemberDescriptorType]:
    """Returns the descriptors of an object's __slots__."""
    of_classes = (vars(cls).values() for cls in type(value).__mro__)
    return [m for members in of_classes for m in members if isinstance(m, MemberDescriptorType)]


class _Twins:
    """Other modules over the same parameters and buffers: one for each in a model.

    An attribute is the original's, but for what leads to a module of the model: containers,
    methods, hooks, weak references and functools.partial are made anew, and lead to its twin.

    Attributes:
        copies: Of each value met its copy, by the value's id.
        shared: Classes of objects that lead to modules and are not known here: they stay the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shared: set[str] = set()
        self.copies: dict[int, Any] = {}
        for module in model.modules():
            if _has_no_twin(module):
                continue
            # torch.fx's own __new__ makes another class.
            self.copies[id(module)] = twin = object.__new__(type(module))
            for weak in weakref.getweakrefs(module):  # a proxy does not tell what it leads to
                if type(weak) is weakref.ref:
                    self.copies[id(weak)] = weakref.ref(twin)
                elif type(weak) in weakref.ProxyTypes:
                    self.copies[id(weak)] = weakref.proxy(twin)
        for module in model.modules():
            if id(module) in self.copies:
                self._copy_attributes(module, self.copies[id(module)])

    def _copy_attributes(self, value: Any, twin: Any) -> None:
        """Gives `twin` what an object has in its __dict__ and __slots__."""
        attributes = getattr(value, "__dict__", {})
        if attributes is value:  # a dict whose items are its attributes
            twin.__dict__ = twin
        else:
            for name, attribute in attributes.items():
                twin.__dict__[name] = self.of(attribute)
        for slot in _slots(value):
            if hasattr(value, slot.__name__):
                slot.__set__(twin, self.of(slot.__get__(value)))

    def of(self, value: Any) -> Any:
        """Returns a module's twin, or a value that leads to twins as `value` to modules."""
        if id(value) in self.copies:
            return self.copies[id(value)]
        if type(value) in weakref.ProxyTypes:  # isinstance would ask what it leads to
            return value
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if type(value) is partial:
            keywords = {name: self.of(argument) for name, argument in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if isinstance(value, _WrappedHook):  # torch's, of a function that takes its module
            hook = copy.copy(value)
            hook.hook = self.of(value.hook)
            if value.with_module:
                hook.module = weakref.ref(self.of(value.module()))
            return hook
        if type(value) in (tuple, frozenset):
            return type(value)(map(self.of, value))
        if isinstance(value, tuple) and hasattr(value, "_make"):  # a namedtuple
            return value._make(map(self.of, value))
        base = next((base for base in _CONTAINERS if isinstance(value, base)), None)
        if base is None:
            # torch.fx's graphs lead to modules, too, but run code that is given one.
            if not type(value).__module__.startswith("torch.") and self._leads_to_module(value):
                self.shared.add(type(value).__qualname__)
            return value
        return self._container(base, value)

    def _leads_to_module(self, value: Any) -> bool:
        """Whether one of the model's modules is reached from what an object holds."""
        seen: set[int] = set()
        held = [value]
        while held:
            item = held.pop()
            if id(item) in self.copies and isinstance(item, nn.Module):
                return True
            if id(item) in seen or type(item) in weakref.ProxyTypes:
                continue
            if isinstance(item, (type, ModuleType, Tensor)):
                continue
            seen.add(id(item))
            if isinstance(item, FunctionType):  # without its globals
                held += [item.__closure__, item.__defaults__, item.__kwdefaults__]
            elif isinstance(item, weakref.ref):
                held.append(item())
            else:
                held += gc.get_referents(item)
        return False

    def _container(self, base: Any, value: Any) -> Any:
        """The same of a container, by the methods of `base`: its own class may forbid them."""
        container = _empty(base, value)
        self.copies[id(value)] = container  # before it is filled: it may hold itself
        self._copy_attributes(value, container)
        if issubclass(base, dict):
            for key, item in value.items():
                base.__setitem__(container, self.of(key), self.of(item))
        else:
            fill = base.update if base is set else base.extend
            fill(container, map(self.of, value))
        return container
