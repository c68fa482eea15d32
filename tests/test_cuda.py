"""On a GPU: torch.nn's results on both paths, and what else a GPU has that a CPU has not.

FASTRNN_TEST_DEVICE=cpu runs what needs no GPU on the CPU, such as with emulated kernels:

    PYTHONPATH=tests/cuda FASTRNN_TEST_DEVICE=cpu pytest -p emulated tests/test_cuda.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from helpers import (
    FUSED_DTYPES,
    HALF_DTYPES,
    Case,
    Inputs,
    assert_equal,
    build,
    call,
    cases,
    loss,
    make_inputs,
    run,
    to_double,
)

DEVICE = os.environ.get("FASTRNN_TEST_DEVICE", "cuda")


def reason_to_skip() -> str:
    """Returns why nothing here can run, or an empty string."""
    if DEVICE == "cpu":
        return ""
    if fastrnn.build_info()["cuda"] is None:
        return "fastrnn is built without CUDA"
    return "" if torch.cuda.is_available() else "there is no GPU"


REASON = reason_to_skip()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(REASON), reason=REASON)]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="of a GPU alone")

# Roundings allowed between two right results, in units of eps and of the largest value. The 16-bit
# types round what goes from step to step, float32 and float64 the sums.
ROUNDINGS = {torch.float32: 100, torch.float64: 100, torch.float16: 8, torch.bfloat16: 8}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32, in cuDNN or cuBLAS."""
    switches = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture(params=["persistent", "stepwise"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a layer runs."""
    monkeypatch.setenv("FASTRNN_CUDA_PATH", request.param)
    return request.param


def on_device(inputs: Inputs, device: str = DEVICE) -> Inputs:
    """Returns `inputs` with its tensors moved."""
    return inputs._replace(
        **{n: t.to(device) for n, t in inputs._asdict().items() if isinstance(t, Tensor)}
    )


def ours_and_theirs(case: Case) -> tuple[nn.RNNBase, nn.RNNBase, Inputs]:
    """Returns both libraries' modules with the same weights, and inputs, on the device."""
    return (
        build(fastrnn, case).to(DEVICE),
        build(nn, case).to(DEVICE),
        on_device(make_inputs(case)),
    )


def packed_rows(case: Case, inputs: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """Returns x, of a packed case its rows, and what else a PackedSequence of them has."""
    if case.lengths is None:
        return inputs.x, ()
    x, *rest = pack_padded_sequence(inputs.x, list(case.lengths), enforce_sorted=False)
    return x, tuple(rest)


def assert_near(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Asserts that two runs differ by ROUNDINGS of `dtype`, or of the results' own."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.device) == (want.shape, want.device), name
        rounding = torch.finfo(dtype or want.dtype)
        atol = ROUNDINGS[dtype or want.dtype] * rounding.eps * max(1.0, want.abs().max().item())
        torch.testing.assert_close(
            got.to(want.dtype), want, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def kinked(case: Case) -> bool:
    """Whether a rounding may switch a ReLU, and so change a gradient by all of it."""
    return case.kind == "RNN_RELU" and case.dtype in HALF_DTYPES


CASES = [
    *cases(dtype=FUSED_DTYPES),
    *cases(dtype=FUSED_DTYPES, L=[2], D=[2], hx=[True], lengths=[(3, 7, 1)]),
    *cases(D=[2], L=[2], batch_first=[True], hx=[True]),
    *cases(["LSTM"], dtype=FUSED_DTYPES, P=[6], D=[2], L=[2], hx=[True]),
    *cases(["LSTM"], P=[6], lengths=[(3, 7, 1)], batch_first=[True]),
    *cases(N=[None], bias=[False]),
    *cases(T=[1], N=[1]),
    *cases(H=[130], N=[9], dtype=[torch.float32, torch.float16]),
    # More blocks than a cluster has: all of a grid wait for each other.
    *cases(H=[530], dtype=[torch.float32, torch.bfloat16]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_torch(case: Case, path: str) -> None:
    ours, theirs, inputs = ours_and_theirs(case)
    actual, expected = run(ours, inputs), run(theirs, inputs)
    if kinked(case):
        actual, expected = ({k: r[k] for k in ("y", "h_n")} for r in (actual, expected))
    assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in expected.items()}
    assert_near(actual, expected)
    exact = on_device(make_inputs(replace(case, dtype=torch.float64)))
    truth = run(to_double(theirs, case).to(DEVICE), exact)
    if case.dtype not in HALF_DTYPES:  # whose inputs are not those of the truth
        assert_near(actual, {name: truth[name] for name in actual}, case.dtype)


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
def test_path_is_taken(dtype: torch.dtype, path: str) -> None:
    ours, _, inputs = ours_and_theirs(Case(dtype=dtype))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(ours, inputs)
    of_paths = ("fastrnn::persistent_", "fastrnn::stepwise_")
    names = {event.name for event in profile.events() if event.name.startswith(of_paths)}
    taken = "stepwise" if dtype == torch.float64 else path
    # A launch that the device refuses would add the other path's.
    assert names == {f"fastrnn::{taken}_forward", f"fastrnn::{taken}_backward"}


@pytest.mark.parametrize("case", cases(L=[3], D=[2], dropout=[0.5], dtype=FUSED_DTYPES), ids=str)
def test_two_runs_are_bitwise_the_same(case: Case, path: str) -> None:
    ours, _, inputs = ours_and_theirs(case)
    assert_equal(run(ours, inputs), run(ours, inputs))


@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[3], D=[2], dropout=[0.3], dtype=[torch.float32, torch.bfloat16]),
        *cases(L=[3], D=[2], dropout=[0.3], lengths=[(3, 7, 1)], dtype=[torch.float32]),
        *cases(["LSTM"], L=[2], dropout=[0.3], batch_first=[True]),
    ],
    ids=str,
)
def test_dropout(case: Case, path: str) -> None:
    """The layers in one call, with dropout, and each in a call of its own."""
    ours, _, inputs = ours_and_theirs(case)
    x, rest = packed_rows(case, inputs)
    sizes = rest[0] if rest else None
    steps_first = x.transpose(0, 1) if case.batch_first else x
    shape = (case.L - 1, *steps_first.shape[:-1], case.D * case.H)
    masks = torch.rand(shape, device=DEVICE) > case.dropout
    kept = masks.transpose(1, 2) if case.batch_first else masks

    def run_layers(x: Tensor, begin: int, end: int, masks: Tensor | None) -> Tensor:
        count = 4 * case.D
        weights = list(ours.parameters())[begin * count : end * count]
        options = (end - begin, True, case.D == 2, case.batch_first)
        dropout = 0.0 if masks is None else case.dropout
        run = torch.ops.fastrnn.recurrent
        return run(case.kind, x, sizes, None, None, weights, *options, masks, dropout)[0]

    def one_call(x: Tensor) -> Tensor:
        return run_layers(x, 0, case.L, masks)

    def in_turn(x: Tensor) -> Tensor:
        for layer in range(case.L):
            x = x if layer == 0 else x * kept[layer - 1] / (1 - case.dropout)
            x = run_layers(x, layer, layer + 1, None)
        return x

    assert_near(differentiated(ours, x, one_call), differentiated(ours, x, in_turn))


def differentiated(
    module: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Returns function(x), and what it gives as gradients of x and of the module's parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.float().square().sum().backward()
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[2], D=[2], lengths=[None, (3, 7, 1)]),
        *cases(["LSTM"], P=[6], dtype=FUSED_DTYPES),
    ],
    ids=str,
)
def test_gradients_of_each_sample(case: Case, path: str) -> None:
    """vmap(grad) over four samples, and four backward passes."""
    ours, _, inputs = ours_and_theirs(case)
    x, rest = packed_rows(case, inputs)
    samples = torch.stack([x, x / 2, -x, x.flip(0)])
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        given = x if case.lengths is None else PackedSequence(x, *rest)
        y = torch.func.functional_call(ours, parameters, (given,))[0]
        return (y if case.lengths is None else y.data).float().square().sum()

    per_sample = torch.func.vmap(torch.func.grad(total), (None, 0))(parameters, samples)
    expected = []
    for sample in samples:
        ours.zero_grad()
        total(dict(ours.named_parameters()), sample).backward()
        expected.append({name: p.grad for name, p in ours.named_parameters()})
    together = {name: torch.stack([one[name] for one in expected]) for name in parameters}
    assert_near(per_sample, together)


@pytest.mark.parametrize("case", cases(L=[2], lengths=[None, (3, 7, 1)]), ids=str)
def test_vmap(case: Case, path: str) -> None:
    ours, _, inputs = ours_and_theirs(case)
    x, rest = packed_rows(case, inputs)
    samples = torch.stack([x, x / 2, -x])

    def output(x: Tensor) -> Tensor:
        return ours(x)[0] if case.lengths is None else ours(PackedSequence(x, *rest))[0].data

    with torch.no_grad():
        actual, expected = torch.vmap(output)(samples), torch.stack([*map(output, samples)])
    assert_near({"y": actual}, {"y": expected})


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0]), ids=str)
def test_output_written_to(case: Case, path: str) -> None:
    ours, _, inputs = ours_and_theirs(case)

    def in_place(x: Tensor) -> Tensor:
        return ours(x)[0].mul_(2)

    expected = differentiated(ours, inputs.x, lambda x: ours(x)[0] * 2)
    assert_near(differentiated(ours, inputs.x, in_place), expected)


@pytest.mark.parametrize("case", cases(["LSTM", "RNN_TANH"], D=[2]), ids=str)
def test_gradients_of_gradients_and_tangents(case: Case, path: str) -> None:
    ours, _, inputs = ours_and_theirs(case)
    exact = to_double(ours, case)  # on the CPU, where torch.nn has them, too

    def results(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
        return {"dx": dx.detach(), "ddx": leaf.grad, **gradients}

    actual = {name: t.cpu() for name, t in results(ours, inputs.x).items()}
    assert_near(actual, results(exact, inputs.x.cpu().double()), torch.float32)
    _, tangent = torch.func.jvp(lambda x: ours(x)[0], (inputs.x,), (torch.ones_like(inputs.x),))
    step = 1e-6
    x = inputs.x.cpu().double()
    difference = (exact(x + step)[0] - exact(x - step)[0]).detach() / (2 * step)
    assert_near({"y": tangent.cpu()}, {"y": difference}, torch.float32)


@pytest.mark.parametrize("freed", ["x", "weight_hh_l0"])
def test_memory_that_was_freed(freed: str) -> None:
    ours, _, inputs = ours_and_theirs(Case())
    tensors = {"x": inputs.x, **dict(ours.named_parameters())}
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="that fastrnn is to read was freed"):
        ours(inputs.x)


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("name", ["LSTMCell", "RNNCell"])
def test_cells(name: str, dtype: torch.dtype, path: str) -> None:
    options = {"device": DEVICE, "dtype": dtype}
    ours, theirs = getattr(fastrnn, name)(5, 17, **options), getattr(nn, name)(5, 17, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, **options)

    def results(cell: nn.Module) -> dict[str, Tensor]:
        state = cell(x, cell(x))
        h, c = state if name == "LSTMCell" else (state, state)
        (h.sum() + (c * c).sum()).backward()
        return {"h": h.detach(), "c": c.detach(), **{n: p.grad for n, p in cell.named_parameters()}}

    assert_near(results(ours), results(theirs))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("case", cases(["LSTM", "RNN_TANH"], L=[2], D=[2]), ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    ours, _, inputs = ours_and_theirs(case)
    expected = run(ours, inputs)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer.zero_grad()
    with torch.autocast(DEVICE, dtype=dtype):
        outputs = call(ours, inputs)
    # Where torch.nn's come from cuDNN, they are float16 under bfloat16 too.
    assert DEVICE == "cpu" or {output.dtype for output in outputs.values()} == {dtype}
    scaler.scale(loss(outputs, outputs.keys())).backward()
    scaler.unscale_(optimizer)
    gradients = {f"d{name}": p.grad.clone() for name, p in ours.named_parameters()}
    results = {name: output.detach() for name, output in outputs.items()} | gradients
    assert_near(results, {name: expected[name] for name in results}, dtype)
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, before[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("lower", HALF_DTYPES)
def test_backward_under_autocast_rounds_nothing(lower: torch.dtype, path: str) -> None:
    ours, _, inputs = ours_and_theirs(Case(L=2, D=2))
    expected = run(ours, inputs)
    ours.zero_grad()
    x = inputs.x.clone().requires_grad_()
    total = loss(call(ours, inputs._replace(x=x)), ("y", "h_n", "c_n"))
    with torch.autocast(DEVICE, dtype=lower):
        total.backward()
    gradients = {"dx": x.grad, **{f"d{n}": p.grad for n, p in ours.named_parameters()}}
    assert_near(gradients, {name: expected[name] for name in gradients})


@pytest.mark.usefixtures("path")
def test_sums_in_float16() -> None:
    ours, theirs, inputs = ours_and_theirs(Case(dtype=torch.float16, L=2, D=2))
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert_near(run(ours, inputs), run(theirs, inputs))
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lengths", [None, (3, 7, 1)], ids=["plain", "packed"])
def test_compile(lengths: tuple[int, ...] | None, backend: str) -> None:
    case = Case(L=2, D=2, hx=True, batch_first=True, lengths=lengths)
    ours, _, inputs = ours_and_theirs(case)
    expected = run(ours, inputs)
    ours.compile(fullgraph=True, backend=backend)
    assert_near(run(ours, inputs), expected)


@needs_gpu
@pytest.mark.usefixtures("fresh_compiler", "path")
def test_compiled_into_a_graph() -> None:
    ours, _, inputs = ours_and_theirs(Case(L=2, D=2))
    expected = differentiated(ours, inputs.x, lambda x: ours(x)[0])
    compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # it is recorded at the second call, and then replayed
        torch.compiler.cudagraph_mark_step_begin()
        actual = differentiated(ours, inputs.x, lambda x: compiled(x)[0].clone())
        assert_near({name: t.clone() for name, t in actual.items()}, expected)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 6], batch_first=[True]), ids=str)
def test_fakes_are_laid_out_like_the_real_ones(case: Case) -> None:
    ours, _, inputs = ours_and_theirs(case)
    for x in (inputs.x, inputs.x.transpose(0, 1).contiguous().transpose(0, 1)):
        arguments = (case.kind, x, None, None, None, ours._flat_weights, 2, True, True, True, None)
        torch.library.opcheck(
            torch.ops.fastrnn.recurrent, arguments, test_utils=("test_schema", "test_faketensor")
        )


def training_step(case: Case) -> tuple[nn.RNNBase, Tensor, Callable[[], dict[str, Tensor]]]:
    """Returns a module, its input, and a function that runs forward and backward on both.

    The function makes nothing on the CPU; it returns y, dx and the weights' gradients.
    """
    ours, _, inputs = ours_and_theirs(case)
    x, rest = packed_rows(case, inputs)
    x = x.detach().requires_grad_()
    hx = None if not case.hx else (inputs.h0, inputs.c0) if case.kind == "LSTM" else inputs.h0

    def step() -> dict[str, Tensor]:
        ours.zero_grad()
        x.grad = None
        y = ours(PackedSequence(x, *rest) if rest else x, hx)[0]
        y = y.data if rest else y
        (y * y).sum().backward()
        gradients = {f"d{name}": p.grad for name, p in ours.named_parameters()}
        return {"y": y.detach(), "dx": x.grad, **gradients}

    return ours, x, step


STEPS = [
    *cases(L=[2], D=[2], dtype=[torch.float32, torch.bfloat16]),
    *cases(L=[2], D=[2], lengths=[(3, 7, 1)], hx=[True]),
    *cases(["LSTM"], P=[6], lengths=[None, (3, 7, 1)]),
    *cases(H=[530], D=[2], lengths=[(3, 7, 1)]),  # as above, of a grid
]


# The steps that the tests below record or watch are steps on any device.
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_training_step(case: Case, path: str) -> None:
    module, x, step = training_step(case)
    first = {name: t.clone() for name, t in step().items()}
    assert_equal(step(), first)
    assert first.keys() == {"y", "dx", *(f"d{n}" for n, _ in module.named_parameters())}
    with torch.no_grad():
        x.mul_(2)
    assert not torch.equal(step()["dx"], first["dx"])


@needs_gpu
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_nothing_waits_for_the_device(case: Case, path: str) -> None:
    module, _, step = training_step(case)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    step()  # what is done once may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_graph(case: Case, path: str) -> None:
    _, x, step = training_step(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for scale in (1.5, 0.5):
        with torch.no_grad():
            x.mul_(scale)
        graph.replay()
        replayed = {name: t.clone() for name, t in recorded.items()}
        assert_near(replayed, step())


@needs_gpu
def test_current_stream(path: str) -> None:
    ours, _, inputs = ours_and_theirs(Case(L=2, D=2, hx=True))
    expected = run(ours, inputs)
    late = on_device(inputs)
    late = late._replace(x=torch.zeros_like(inputs.x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads zeros
        late.x.copy_(inputs.x)
        actual = run(ours, late)
    stream.synchronize()
    assert_near(actual, expected)


@needs_gpu
@pytest.mark.parametrize("case", cases(H=[17, 400], L=[2]), ids=str)
def test_second_device(case: Case, path: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    ours, _, inputs = ours_and_theirs(case)
    expected = run(ours, inputs)
    actual = run(build(fastrnn, case).to("cuda:1"), on_device(inputs, "cuda:1"))
    assert {t.device for t in actual.values()} == {torch.device("cuda:1")}
    assert_near({name: t.to(expected[name].device) for name, t in actual.items()}, expected)
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_inputs_on_another_device_are_rejected_in_torchs_words() -> None:
    ours, theirs, inputs = ours_and_theirs(Case())
    for module_device, x in [("cuda", inputs.x.cpu()), ("cpu", inputs.x)]:
        said = []
        for module in (ours, theirs):
            with pytest.raises(RuntimeError) as error:
                module.to(module_device)(x)
            said.append(str(error.value))
        assert said[0] == said[1]


@needs_gpu
def test_more_elements_than_int32_counts(path: str) -> None:
    steps, batch, hidden = 2, 2**22 + 3, 64
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("less than 48 GB of the GPU's memory are free")
    assert steps * batch * 4 * hidden > 2**31
    lstm = fastrnn.LSTM(8, hidden, device=DEVICE, dtype=torch.float16)
    x = torch.randn(steps, batch, 8, device=DEVICE, dtype=torch.float16, requires_grad=True)
    last = x[:, -5:].detach().clone().requires_grad_()
    results = []
    for given in (x, last):
        y = lstm(given)[0]
        y[:, -5:].sum().backward()
        results.append({"y": y[:, -5:].detach(), "dx": given.grad[:, -5:]})
    assert_near(*results)
