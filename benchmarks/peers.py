"""Other runtimes that run a trained RNN or LSTM on a CPU: ONNX Runtime and OpenVINO.

Each gets the workload's weights as an ONNX model, prepared once before anything is timed: their own
packed copies of the weights are theirs to keep. Inputs and outputs are bound once, so that a call
is their run and nothing else. Float32 inference of padded input, without a projection.

pip install 'fastrnn[peers]' brings them; `run.py --peers` times them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from cells import Cell
from implementations import Build, Step, Workload

_OPSET = 17
# ONNX orders an LSTM's gates i, o, f, c; torch.nn i, f, g, o.
_GATES = {"lstm": (0, 3, 1, 2), "rnn": (0,)}


def _reorder(weight: Tensor, kind: str) -> np.ndarray:
    gates = weight.chunk(4 if kind == "lstm" else 1)
    return torch.cat([gates[g] for g in _GATES[kind]]).numpy()


def _can_run(work: Workload) -> bool:
    cell = work.cell
    return (
        work.mode == "inference"
        and cell.dtype == torch.float32
        and cell.fill == 100
        and not cell.P
        and not cell.hx
    )


def make_model(work: Workload) -> onnx.ModelProto:
    """The workload as an ONNX model: x to output, and h_n and c_n of each layer (D, N, H)."""
    cell, state = work.cell, work.state
    nodes, initializers = [], []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(label: str, layer: int) -> list[Tensor]:
        suffixes = ["", "_reverse"][: cell.D]
        return [state[f"{label}_l{layer}{suffix}"] for suffix in suffixes]

    shape = constant("shape", np.array([0, 0, -1], dtype=np.int64))
    data = "x"
    if cell.batch_first:
        nodes.append(helper.make_node("Transpose", [data], ["x_time_first"], perm=[1, 0, 2]))
        data = "x_time_first"
    states: list[str] = []
    for layer in range(cell.L):
        parameters = {
            name: constant(
                f"{name}{layer}",
                np.stack([_reorder(tensor, cell.kind) for tensor in weight(label, layer)]),
            )
            for name, label in (("W", "weight_ih"), ("R", "weight_hh"))
        }
        biases = [
            np.concatenate([_reorder(a, cell.kind), _reorder(b, cell.kind)])
            for a, b in zip(weight("bias_ih", layer), weight("bias_hh", layer), strict=True)
        ]
        activations: dict[str, Any] = {"activations": [cell.nonlinearity.capitalize()] * cell.D}
        finals = [f"{name}{layer}" for name in (("h", "c") if cell.kind == "lstm" else ("h",))]
        nodes.append(
            helper.make_node(
                cell.kind.upper(),
                [data, parameters["W"], parameters["R"], constant(f"B{layer}", np.stack(biases))],
                [f"y{layer}", *finals],
                hidden_size=cell.H,
                direction="bidirectional" if cell.D == 2 else "forward",
                **(activations if cell.kind == "rnn" else {}),
            )
        )
        # (T, D, N, H) to (T, N, D * H)
        nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"t{layer}", shape], [f"o{layer}"]))
        data = f"o{layer}"
        states += finals
    last: dict[str, Any] = {"perm": [1, 0, 2]} if cell.batch_first else {}
    nodes.append(helper.make_node("Transpose" if last else "Identity", [data], ["output"], **last))

    leading = [cell.N, cell.T] if cell.batch_first else [cell.T, cell.N]
    sizes = {"output": [*leading, cell.D * cell.H]} | {s: [cell.D, cell.N, cell.H] for s in states}
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*leading, cell.I])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, size) for n, size in sizes.items()],
        initializers,
    )
    opset = helper.make_opsetid("", _OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def _named(cell: Cell, outputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The model's outputs as torch.nn shapes them."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in outputs.items()}
    named = {"output": tensors["output"]}
    for kind in ("h", "c") if cell.kind == "lstm" else ("h",):
        named[f"{kind}_n"] = torch.cat([tensors[f"{kind}{layer}"] for layer in range(cell.L)])
    return named


def _input(work: Workload) -> np.ndarray:
    assert isinstance(work.x, Tensor)
    return np.ascontiguousarray(work.x.numpy())


def build_onnxruntime(work: Workload) -> Step | None:
    """A session with its input and outputs bound to memory of its own."""
    if not _can_run(work):
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        make_model(work).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding: Any = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(_input(work)))
    names = [output.name for output in session.get_outputs()]
    for output in session.get_outputs():
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32)
        binding.bind_ortvalue_output(output.name, value)

    def run() -> None:
        session.run_with_iobinding(binding)

    def results() -> dict[str, Tensor]:
        run()
        values = [value.numpy() for value in binding.get_outputs()]
        return _named(work.cell, dict(zip(names, values, strict=True)))

    return Step(run, results)


def build_openvino(work: Workload) -> Step | None:
    """A compiled model's infer request, its input shared."""
    if not _can_run(work):
        return None
    core, proto = openvino.Core(), make_model(work)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", settings)
    request = model.create_infer_request()
    x = _input(work)
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    names = [output.name for output in proto.graph.output]

    def run() -> None:
        request.infer()

    def results() -> dict[str, Tensor]:
        run()
        values = [request.get_output_tensor(i).data for i in range(len(names))]
        return _named(work.cell, dict(zip(names, values, strict=True)))

    return Step(run, results)


PEERS: dict[str, Build] = {"onnxruntime": build_onnxruntime, "openvino": build_openvino}
