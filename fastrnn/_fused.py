"""When a module's call goes to the fused ops, and what becomes of arguments that they refuse."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map_only

_MODULE_CALL = nn.Module.__call__  # which torch.fx replaces while it traces
# Which of the two there is depends on the version of torch.
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)

HAS_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("fastrnn::recurrent", "CUDA")
# What a call on arguments of wrong types, sizes or devices may raise.
REFUSALS: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, IndexError)
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_too_old(device: torch.device) -> bool:
    """Returns whether a GPU is older than the CUDA kernels; a fake tensor's need not exist."""
    exists = device.index < torch.cuda.device_count()
    return exists and torch.cuda.get_device_properties(device).major < 8


# Compilers cannot trace torch.cuda.device_count. torch.compiler.assume_constant_result says so too,
# but imports the compiler, which takes as long as all else of torch.
_is_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fx_traces() -> bool:
    """Returns whether torch.fx traces what runs; most calls pay for one comparison."""
    return nn.Module.__call__ is not _MODULE_CALL and bool(_is_fx_tracing())


def find_tracer(x: Any, hx: Any) -> Any:
    """Returns the tracer of torch.fx that is to record a module's call, or None."""
    for value in (x, *(hx if isinstance(hx, (tuple, list)) else (hx,))):
        if isinstance(value, fx.Proxy):
            return value.tracer
    if is_dynamo_compiling() or not fx_traces() or get_proxy_mode():
        return None
    # Nothing that the call is given is traced, such as a buffer. A tracer stands where the model
    # calls the module, and not where it runs one itself, to learn the shape of its result.
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        tracer = frame.f_locals.get("self")
        if isinstance(tracer, fx.Tracer):
            return tracer if frame.f_code.co_name == "call_module" else None
    return None


def can_fuse(x: Any, *states: Any) -> bool:
    """Returns whether the fused ops cover input `x` here; what they do not, torch.nn computes."""
    if not isinstance(x, Tensor) or find_tracer(x, states) is not None:
        return False
    if not (x.is_cpu or (HAS_CUDA and x.is_cuda)):
        return False
    if x.is_cuda and _is_too_old(x.device):
        return False  # the op would refuse, which compiled code learns when it is too late
    return x.layout is torch.strided and not x.is_nested and x.dtype in FUSED_DTYPES


def unpack(hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the two states of an LSTM.

    Raises:
        TypeError, ValueError: They are not two.
    """
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError("hx must be a tuple")
    h0, c0 = hx
    if h0 is None or c0 is None:
        raise TypeError("hx must be None or two tensors")
    return h0, c0


def call_traced(tracer: Any, module: nn.Module, x: Any, hx: Any) -> Any:
    """Records the call of `module` as one node, as torch.fx does with torch.nn's own modules.

    Raises:
        fx.proxy.TraceError: `module` is what is traced; or its call does more than its forward,
            which would be done twice: once while the call is traced, once by the node.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks)
    hooked = any(hooks) or bool(module._backward_hooks)
    if hooked or type(module).__module__.split(".")[0] != "fastrnn" or module is tracer.root:
        raise fx.proxy.TraceError(
            f"{type(module).__qualname__} has hooks, is a subclass of fastrnn's, or is itself what "
            "is traced: let is_leaf_module of a torch.fx.Tracer say that it is a leaf"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, hx), {})


class NameOfClass:
    """The `__name__` of a module, which torch.func.vmap asks of what it is given, for each result.

    Without one it takes the repr, which torch.compile cannot trace, and a tenth of a small call.
    """

    def __get__(self, module: nn.Module | None, owner: type[nn.Module]) -> str:
        return owner.__name__


def refuse_script(module: nn.Module) -> nn.Module:
    """What torch.jit.script asks for a module of torch.nn in the place of this one.

    It would put that into the user's model, too, for good.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script does not take fastrnn's modules, such as {type(module).__qualname__}: "
        "script what fastrnn.revert(model) returns"
    )


def torch_forward(torch_class: type[nn.Module], module: nn.Module, x: Any, hx: Any) -> Any:
    """torch.nn's own computation, and its words for arguments that it rejects."""
    tracer = find_tracer(x, hx)
    if tracer is not None:
        return call_traced(tracer, module, x, hx)
    return torch_class.forward(module, x, hx)


def call_op(op: torch._ops.OpOverload | Callable[..., Any], *arguments: Any) -> Any:
    """Calls a fused op, so that torch.nn can compute, and be traced, where the op raises."""
    if not is_dynamo_compiling() and torch.jit.is_tracing():
        _call_untraced(op, *arguments)
    try:
        return op(*arguments)
    except REFUSALS:
        mode = get_proxy_mode()
        if mode is not None:  # a call that raised is no part of what make_fx or torch.export traces
            last = next(reversed(mode.tracer.graph.nodes))
            if last.target is op and not last.users:
                mode.tracer.graph.erase_node(last)
        raise


def _call_untraced(op: Callable[..., Any], *arguments: Any) -> None:
    """Calls an op while torch.jit.trace pauses, before it is traced.

    What a traced op raises leaves torch.jit.trace without a graph, on which anything that follows
    ends the process.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        # Detached, as autocast would keep its casts of parameters, which are not traced either.
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        op(*detached)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _raised_within(error: Exception) -> bool:
    """Returns whether an error was raised in torch's or fastrnn's code, or in C++ called there."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in ("fastrnn", "torch")


def is_refusal(error: Exception) -> bool:
    """Returns whether `error` says that the ops do not take the arguments.

    Such arguments are given to torch.nn, which either takes them after all or raises in its own
    words; good arguments pay nothing for that. A failure of the op itself is no refusal, nor is
    what the user's own code raised meanwhile: a hook, a mode or a parametrization.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError):
        return is_dynamo_compiling() or _raised_within(error)
    return str(error).startswith("fastrnn:")


def weights_of(module: nn.Module, names: list[str]) -> list[Any]:
    """Returns the parameters of those names, or what a parametrization puts in their place.

    Raises:
        AttributeError: There is none of some name.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:  # parametrized, or replaced by a plain tensor
        return [getattr(module, name) for name in names]
