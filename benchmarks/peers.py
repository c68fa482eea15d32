"""Other runtimes that a user might pick for inference: ONNX Runtime and OpenVINO.

Each gets the shape as the same ONNX model (onnx_model.py) of static sizes, float32, and as many
threads as torch. Session, compiled model, packed weights and the buffers of inputs and outputs are
made once, outside the time; a call is the shortest way to have fresh results: neither copies an
input, and neither allocates an output, where torch.nn and fastrnn do.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import torch
from onnxruntime import InferenceSession, OrtValue
from torch import Tensor

from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import Build, Step, Workload
from onnx_model import make_model


def _does(work: Workload) -> bool:
    """Whether the peers do this workload: float32 inference, not packed, without a projection."""
    shape = work.shape
    plain = shape.fill == 100 and shape.P == 0 and shape.dtype == torch.float32
    return plain and work.mode == "inference"


def _inputs(work: Workload) -> dict[str, Tensor]:
    """The model's inputs by name; the states of a layer are views."""
    assert isinstance(work.x, Tensor)
    inputs = {"x": work.x}
    if work.hx is not None:
        states = work.hx if work.shape.kind == "lstm" else (work.hx,)
        for letter, state in zip("hc", states, strict=False):
            for layer, value in enumerate(state.split(work.shape.D)):
                inputs[f"{letter}0_l{layer}"] = value
    return inputs


def _results(shape: Shape, outputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The model's outputs as torch.nn would shape them."""
    leading = (shape.N, shape.T) if shape.batch_first else (shape.T, shape.N)
    output = torch.tensor(outputs["output"])
    results = {"output": output.reshape(*leading, shape.D * shape.H)}
    for name in ("h_n", "c_n") if shape.kind == "lstm" else ("h_n",):
        layers = [torch.tensor(outputs[f"{name}_l{layer}"]) for layer in range(shape.L)]
        results[name] = torch.cat(layers)
    return results


def _make_session(work: Workload) -> InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    model = make_model(work.shape, work.state).SerializeToString()
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


def build_with_onnxruntime(work: Workload) -> Step | None:
    """A step through an InferenceSession with bound inputs and outputs.

    That is a few microseconds less a call than `session.run`, which makes its outputs anew.
    """
    if not _does(work):
        return None
    session = _make_session(work)
    binding = session.io_binding()
    for name, value in _inputs(work).items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value.numpy()))
    outputs = {}
    for port in session.get_outputs():
        outputs[port.name] = OrtValue.ortvalue_from_shape_and_type(port.shape, np.float32)
        binding.bind_ortvalue_output(port.name, outputs[port.name])

    def run() -> None:
        session.run_with_iobinding(binding)

    def results() -> dict[str, Tensor]:
        run()
        return _results(work.shape, {name: value.numpy() for name, value in outputs.items()})

    return Step(run, results, own_threads=True)


def build_with_openvino(work: Workload) -> Step | None:
    """A step through an InferRequest of a model compiled for latency, with its inputs set before.

    `infer` in the calling thread, without inputs and with outputs shared, is its shortest call.
    """
    if not _does(work):
        return None
    import openvino

    core = openvino.Core()
    model = core.read_model(make_model(work.shape, work.state).SerializeToString())
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for name, value in _inputs(work).items():
        request.set_tensor(name, openvino.Tensor(value.numpy(), shared_memory=True))

    def run() -> None:
        request.infer(share_inputs=True, share_outputs=True)

    def results() -> dict[str, Tensor]:
        run()
        names = [port.any_name for port in request.model_outputs]
        return _results(work.shape, {name: request.get_tensor(name).data for name in names})

    return Step(run, results, own_threads=True)


def step_with_onnxruntime(work: Workload) -> Step:
    """A stepper for latency.py: the states swap places from one call to the next, uncopied."""
    session = _make_session(work)
    *states, output = session.get_outputs()
    y = OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32)
    given = _inputs(work)
    x = OrtValue.ortvalue_from_numpy(given.pop("x").numpy())
    pairs = [
        [OrtValue.ortvalue_from_numpy(state.numpy().copy()) for _ in range(2)]
        for state in given.values()
    ]
    bindings = []
    for turn in range(2):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output(output.name, y)
        for name, port, pair in zip(given, states, pairs, strict=True):
            binding.bind_ortvalue_input(name, pair[turn])
            binding.bind_ortvalue_output(port.name, pair[1 - turn])
        bindings.append(binding)
    turns = itertools.cycle(bindings)
    last = bindings[0]

    def run() -> None:
        nonlocal last
        last = next(turns)
        session.run_with_iobinding(last)

    def results() -> dict[str, Tensor]:
        run()
        names = [output.name, *(port.name for port in states)]  # as they were bound
        values = [value.numpy() for value in last.get_outputs()]
        return _results(work.shape, dict(zip(names, values, strict=True)))

    return Step(run, results, own_threads=True)


def versions() -> dict[str, str]:
    """The version of each peer.

    Raises:
        ImportError: One is not installed.
    """
    import openvino

    return {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__}


PEERS: dict[str, Build] = {
    "onnxruntime": build_with_onnxruntime,
    "openvino": build_with_openvino,
}
