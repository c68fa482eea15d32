"""Swaps torch.nn's recurrent modules in a model for fastrnn's, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastrnn.cells import LSTMCell, RNNCell
from fastrnn.modules import LSTM, RNN

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
}
_PLAIN = {ours: theirs for theirs, ours in _FUSED.items()}


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Puts fastrnn's modules in the place of every torch.nn RNN, LSTM, RNNCell and LSTMCell.

    Parameters and buffers stay the very same objects, so that optimizers keep working, and so do
    names, hooks, attributes and the training flag. Convert before torch.compile or a wrapper such
    as DistributedDataParallel, which keep what they have seen of the model.

    Args:
        model: A module; itself one of the four, or holding them at any depth.
        inplace: Whether `model` itself changes. If not, it stays as it is, and the result is
            another tree of modules over the same parameters. Modules that TorchScript made, and
            lazy ones that have not run, are in both.

    Returns:
        The converted model; `model` itself if inplace.

    Raises:
        TypeError: `model` is no module.

    Warns:
        UserWarning: Some modules are of a subclass of the four, which may compute something else;
            they are left alone. The warning names them.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(5, 8))
        >>> fastrnn.convert(model)
        Sequential(
          (0): LSTM(5, 8)
        )
    """
    return _swap(model, _FUSED, inplace, swapped=tuple(_PLAIN))


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Undoes `convert`: puts torch.nn's modules back, on the very same parameters.

    Args:
        model: A module; itself one of fastrnn's, or holding them at any depth.
        inplace: Whether `model` itself changes; see `convert`.

    Returns:
        The model with torch.nn's modules; `model` itself if inplace.

    Raises:
        TypeError: `model` is no module.

    Warns:
        UserWarning: Some modules are of a subclass of fastrnn's; they are left alone. The warning
            names them.
    """
    return _swap(model, _PLAIN, inplace, swapped=())


def _swap(
    model: nn.Module,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    inplace: bool,
    swapped: tuple[type[nn.Module], ...],
) -> nn.Module:
    """Swaps modules of `classes`; warns of those of subclasses, but for the classes `swapped`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert and revert take a torch.nn.Module, not {type(model).__name__}")
    if not inplace:
        model = _twin(model, {})
    left_alone = []
    for name, module in model.named_modules():
        if type(module) in classes:
            _become(module, classes[type(module)])
        elif isinstance(module, tuple(classes)) and not isinstance(module, swapped):
            left_alone.append(f"{name or 'the model itself'} ({type(module).__qualname__})")
    if left_alone:
        warnings.warn(
            f"left alone, being of subclasses: {', '.join(left_alone)}", UserWarning, stacklevel=3
        )
    return model


def _become(module: nn.Module, target: type[nn.Module]) -> None:
    """Makes `module` one of `target`, which keeps the same state, but for a list of weights."""
    module.__class__ = target
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)  # fastrnn reads the parameters themselves
        module._init_flat_weights()


def _has_no_twin(module: nn.Module) -> bool:
    """Whether a module is bound to its own object.

    What TorchScript compiled lives in C++, and a lazy module's hooks are about to change it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """Returns another module over the same parameters and buffers, and so for those it holds."""
    if id(module) in twins:
        return twins[id(module)]
    if _has_no_twin(module):
        return module
    twin = object.__new__(type(module))  # torch.fx's own __new__ makes another class
    twins[id(module)] = twin
    for name, value in module.__dict__.items():  # parameters, buffers and hooks among them
        if isinstance(value, dict | list | set):
            value = copy.copy(value)
        elif isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, twin)
        twin.__dict__[name] = value
    for name, child in module._modules.items():
        twin._modules[name] = child if child is None else _twin(child, twins)
    return twin
