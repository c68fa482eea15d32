"""Calls the ops with random arguments, mostly wrong ones. Run by test_fuzz.py, in its own process.

    python fuzz_worker.py SEED CALLS

Every call must raise a Python exception or return what torch's own operators compute. The number of
the call under way is in the file fuzz-SEED of the working directory, should the process die.
"""

import math
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrnn  # noqa: F401  (registers the ops)
from fuzz_changes import change

ops = torch.ops.fastrnn
MODES = ["LSTM", "RNN_TANH", "RNN_RELU"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Largest difference allowed, as a share of the largest value or of 1.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-13,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
# What huge sizes must fail at, rather than fill the machine's memory.
ADDRESS_SPACE = 16 << 30

Arguments = dict[str, Any]
Check = Callable[[], None]  # of a call that was accepted


def draw_arguments(rng: random.Random) -> Arguments:
    """Returns good arguments of `recurrent`."""
    mode, dtype = rng.choice(MODES), rng.choice(DTYPES)
    T, N, I, H = (rng.choice([1, 2, 3, 5]) for _ in range(4))  # noqa: E741
    layers, directions = rng.choice([1, 1, 2, 3]), rng.choice([1, 2])
    H = H * rng.choice([1, 1, 1, 4, 7])
    P = rng.randint(1, H - 1) if mode == "LSTM" and H > 1 and rng.random() < 0.3 else 0
    width, gates = P or H, H * (4 if mode == "LSTM" else 1)
    has_biases = rng.random() < 0.7

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    weights = []
    for layer in range(layers):
        for _ in range(directions):
            shapes = [(gates, I if layer == 0 else width * directions), (gates, width)]
            shapes += [(gates,)] * (2 * has_biases) + [(P, H)] * (P > 0)
            weights += [0.3 * normal(*shape) for shape in shapes]
    kind = rng.choice(["padded", "padded", "unbatched", "packed"])
    batch_first = rng.random() < 0.4
    batch_sizes, batch = None, [N]
    if kind == "packed":
        sizes = sorted((rng.randint(1, N) for _ in range(T)), reverse=True)
        batch_sizes, batch = torch.tensor(sizes), [sizes[0]]
        x = normal(sum(sizes), I)
    elif kind == "unbatched":
        x, batch = normal(T, I), []
    else:
        x = normal(N, T, I) if batch_first else normal(T, N, I)
    drops = layers > 1 and rng.random() < 0.3
    rows = (T, N) if kind == "padded" else x.shape[:1]
    states = rng.random() < 0.6
    stacked = layers * directions
    return {
        "mode": mode,
        "x": x,
        "batch_sizes": batch_sizes,
        "h0": normal(stacked, *batch, width) if states else None,
        "c0": normal(stacked, *batch, H) if states and mode == "LSTM" else None,
        "weights": weights,
        "num_layers": layers,
        "has_biases": has_biases,
        "bidirectional": directions == 2,
        "batch_first": batch_first,
        "masks": normal(layers - 1, *rows, directions * width) > 0 if drops else None,
        "dropout": 0.25 if drops else 0.0,
    }


def plain_sizes(sizes: Tensor | None) -> Tensor | None:
    """Returns batch sizes as torch's operators read them, whatever their strides and dtype."""
    return None if sizes is None else torch.tensor(sizes.tolist(), dtype=torch.int64)


def expected(arguments: Arguments) -> tuple[Tensor, ...]:
    """Returns what torch's own operators give, in float64."""
    a = {
        k: v.double().clone() if k in ("x", "h0", "c0") and v is not None else v
        for k, v in arguments.items()
    }
    x, mode, sizes = a["x"], a["mode"], plain_sizes(a["batch_sizes"])
    lstm = mode == "LSTM"
    weights = [weight.double().clone() for weight in a["weights"]]
    unbatched = sizes is None and x.dim() == 2
    if unbatched:
        x = x.unsqueeze(1)
    stacked = a["num_layers"] * (2 if a["bidirectional"] else 1)
    steps_first = a["batch_first"] and not unbatched and sizes is None
    batch = int(sizes[0]) if sizes is not None else x.size(0 if steps_first else 1)
    hidden = weights[0].size(0) // (4 if lstm else 1)

    def state(given: Tensor | None, width: int) -> Tensor:
        if given is None:
            return x.new_zeros(stacked, batch, width)
        return given.unsqueeze(1) if unbatched else given

    h0 = state(a["h0"], weights[1].size(1))
    c0 = state(a["c0"], hidden)
    function = getattr(torch._VF, mode.lower())
    flags = bool(a["has_biases"]), bool(a["bidirectional"])
    per_layer, directions = len(weights) // a["num_layers"], 1 + flags[1]
    states = []
    for layer in range(a["num_layers"]):
        if layer > 0 and a["masks"] is not None:
            mask = a["masks"][layer - 1].double() / (1 - a["dropout"])
            mask = mask.unsqueeze(1) if unbatched else mask
            x = x * (mask.transpose(0, 1) if steps_first else mask)
        strands = slice(layer * directions, (layer + 1) * directions)
        of_layer = weights[layer * per_layer : (layer + 1) * per_layer]
        options = (of_layer, flags[0], 1, 0.0, False, flags[1])
        hx: Any = (h0[strands], c0[strands]) if lstm else h0[strands]
        if sizes is not None:
            x, *final = function(x, sizes, hx, *options)
        else:
            x, *final = function(x, hx, *options, bool(steps_first))
        states.append(final)
    results = [x, *map(torch.cat, zip(*states, strict=True))]
    return tuple(result.squeeze(1) for result in results) if unbatched else tuple(results)


def assert_near(ours: Tensor, truth: Tensor) -> None:
    """Asserts that `ours` is the truth but for rounding."""
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    if ours.numel():
        limit = TOLERANCE[ours.dtype] * max(1.0, truth.abs().max().item())
        difference = (ours.double() - truth).abs().max().item()
        assert difference <= limit or math.isnan(truth.sum().item()), (difference, limit)


def check_outputs(arguments: Arguments, outputs: Any) -> None:
    """Asserts that the outputs of a call that was accepted are right."""
    x = arguments["x"]
    if x.is_meta:
        assert outputs[0].size(-2 if x.dim() > 1 else 0) == x.size(-2 if x.dim() > 1 else 0)
        return
    if arguments["num_layers"] > 0 and x.numel() == 0:
        assert outputs[0].numel() == 0
        return
    for ours, truth in zip(outputs, expected(arguments), strict=False):
        assert ours.dtype == x.dtype
        assert_near(ours, truth)


def as_list(arguments: Arguments) -> Arguments:
    """Returns arguments as the ops `reference` and `check` take them, with no masks."""
    given = {name: value for name, value in arguments.items() if name not in ("masks", "dropout")}
    sizes = arguments["batch_sizes"]
    return given | {"batch_sizes": sizes.tolist() if isinstance(sizes, Tensor) else sizes}


def call_recurrent(rng: random.Random, changes: int) -> Check:
    """Calls recurrent or recurrent_forward."""
    arguments = change(rng, draw_arguments(rng), changes)
    op = rng.choice([ops.recurrent, ops.recurrent_forward])
    outputs = op(**arguments)[:3]
    return lambda: check_outputs(arguments, outputs)


def call_reference(rng: random.Random, changes: int) -> Check:
    """Calls reference, which takes no masks."""
    arguments = change(rng, draw_arguments(rng), changes) | {"masks": None, "dropout": 0.0}
    outputs = ops.reference(**as_list(arguments))
    return lambda: check_outputs(arguments, outputs)


def call_check(rng: random.Random, changes: int) -> Check:
    """Calls check, which must refuse what recurrent refuses."""
    arguments = change(rng, draw_arguments(rng), changes) | {"masks": None, "dropout": 0.0}
    ops.check(**as_list(arguments))

    def check() -> None:
        sizes = plain_sizes(arguments["batch_sizes"])  # it took numbers, of whatever dtype
        try:
            ops.recurrent(**arguments | {"batch_sizes": sizes})
        except RuntimeError as error:
            assert not str(error).startswith("fastrnn:"), error

    return check


def call_cell(rng: random.Random, changes: int) -> Check:
    """Calls cell: one step."""
    arguments = draw_arguments(rng)
    while arguments["num_layers"] > 1 or arguments["bidirectional"] or is_projected(arguments):
        arguments = draw_arguments(rng)
    lstm = arguments["mode"] == "LSTM"
    N, (rows, width) = rng.choice([1, 2, 5]), arguments["weights"][1].shape
    I = arguments["weights"][0].size(1)  # noqa: E741
    x = torch.randn(N, I).to(arguments["x"].dtype)
    h0 = x.new_ones(N, width) if arguments["h0"] is not None else None
    given = {
        "mode": arguments["mode"],
        "x": x,
        "h0": h0,
        "c0": h0 if lstm else None,
        "weights": arguments["weights"],
        "has_biases": arguments["has_biases"],
    }
    assert rows == width * (4 if lstm else 1)
    given = change(rng, given, changes)
    outputs = ops.cell(**given)
    stacked = {k: v[None] if isinstance(v, Tensor) else v for k, v in given.items()}
    stacked |= {"batch_sizes": None, "num_layers": 1, "bidirectional": False}
    stacked |= {"batch_first": False, "masks": None, "dropout": 0.0}

    def check() -> None:
        h, c = outputs
        check_outputs(stacked, (h[None], h[None], c[None]))

    return check


def is_projected(arguments: Arguments) -> bool:
    """Returns whether h is narrower than c, or might be."""
    per_layer = 4 if arguments["has_biases"] else 2
    return len(arguments["weights"]) != per_layer


def call_backward(rng: random.Random, changes: int) -> Check:
    """Calls recurrent_backward."""
    arguments = draw_arguments(rng)
    y, h_n, c_n, reserve = ops.recurrent_forward(**arguments)
    lstm = arguments["mode"] == "LSTM"
    inputs = [arguments["x"], arguments["h0"], arguments["c0"], *arguments["weights"]]
    needs = [rng.random() < 0.7 and given is not None for given in inputs]
    gradients = [
        torch.randn(output.shape).to(y.dtype) if rng.random() < 0.8 else None
        for output in (y, h_n, c_n)
    ]
    given = {
        "mode": arguments["mode"],
        "dy": gradients[0],
        "dh_n": gradients[1],
        "dc_n": gradients[2] if lstm else None,
        **{k: v for k, v in arguments.items() if k != "mode"},
        "y": y,
        "reserve": reserve,
        "needs": needs,
    }
    if rng.random() < 0.3:
        sizes = arguments["batch_sizes"]
        rows = h_n.shape[1:-1].numel() if sizes is None else math.gcd(*sizes.tolist())
        given["samples"] = rng.choice([n for n in (1, 2, 3, 5) if rows % n == 0])
    given = change(rng, given, changes)
    results = ops.recurrent_backward(**given)

    def check() -> None:
        taken = [given["x"], given["h0"], given["c0"], *given["weights"]]
        wanted = [t is not None and need for t, need in zip(taken, given["needs"], strict=True)]
        assert len(results) == sum(wanted)
        # A rounding to 16 bits may take an element across relu's corner, and its gradient with it.
        cornered = arguments["mode"] == "RNN_RELU" and y.element_size() == 2
        if not (changes or cornered):
            of_inputs, of_weights = results[: sum(needs[:3])], results[sum(needs[:3]) :]
            if "samples" in given:
                of_weights = [gradient.sum(0) for gradient in of_weights]
            check_gradients(arguments, inputs, gradients, needs, of_inputs + of_weights)

    return check


def check_gradients(
    arguments: Arguments,
    inputs: list[Tensor | None],
    gradients: list[Tensor | None],
    needs: list[bool],
    results: list[Tensor],
) -> None:
    """Asserts that `results` are what autograd gives for the inputs that `needs` names."""
    leaves = [v.double().requires_grad_() if v is not None else None for v in inputs]
    truth = dict(zip(("x", "h0", "c0"), leaves, strict=False)) | {"weights": leaves[3:]}
    outputs = expected(arguments | truth)
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=False) if g is not None]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not pairs or not wanted:
        return
    total = sum((o * g.double()).sum() for o, g in pairs)
    for ours, gradient in zip(
        results, torch.autograd.grad(total, wanted, materialize_grads=True), strict=True
    ):
        assert_near(ours, gradient)


CALLS: list[Callable[[random.Random, int], Check]] = [
    call_recurrent,
    call_recurrent,
    call_reference,
    call_check,
    call_cell,
    call_backward,
    call_backward,
]


def main() -> None:
    """Makes the calls; fails on the first whose result is wrong."""
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)  # torch crawls where its threads lack cores
    accepted = 0
    progress = Path(f"fuzz-{seed}")
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        torch.manual_seed(index)
        progress.write_text(str(index), encoding="utf-8")
        changes = rng.choice([0, 1, 1, 2, 3])
        call = rng.choice(CALLS)
        try:
            check = call(rng, changes)
        except Exception as error:
            if changes:
                continue
            raise AssertionError(f"call {index}, {call.__name__}, is right") from error
        accepted += 1
        try:
            check()
        except Exception as error:
            raise AssertionError(f"call {index}, {call.__name__}, {changes} changes") from error
    print(f"{accepted} of {count} accepted")


if __name__ == "__main__":
    main()
