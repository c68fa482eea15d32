"""Gradients: gradcheck, any subset of inputs and outputs, and autograd's other demands."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastrnn
from helpers import (
    DTYPES,
    FUSED_DTYPES,
    KINDS,
    Case,
    Inputs,
    Recorder,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    loss,
    make_inputs,
    run,
)

SMALL = {"T": [3], "N": [2], "I": [2], "H": [3], "dtype": [torch.float64]}

GRADCHECKED = [
    *cases(**SMALL, hx=[False, True]),
    *cases(**SMALL, hx=[True], L=[2], D=[2], P=[0, 2]),
    *cases(**SMALL, hx=[True], lengths=[(1, 3)], D=[2], P=[0, 2]),
    *cases(**SMALL, bias=[False], batch_first=[True], L=[2]),
    *cases(T=[5], N=[None], I=[3], H=[9], dtype=[torch.float64], hx=[True]),
]

OUTPUTS = {"LSTM": ["y", "h_n", "c_n"], "RNN_TANH": ["y", "h_n"], "RNN_RELU": ["y", "h_n"]}


def leaves_of(inputs: Inputs) -> Inputs:
    """Returns `inputs` with tensors that require grad."""
    return Inputs(*(v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in inputs))


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case: Case) -> None:
    module, inputs = build(fastrnn, case), leaves_of(make_inputs(case))
    tensors = [t for t in inputs if isinstance(t, Tensor)]

    # gradcheck moves the very tensors that the module reads, so the function ignores its own.
    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(module, inputs).values())

    assert torch.autograd.gradcheck(outputs, (*tensors, *module.parameters()))


@pytest.mark.parametrize("lengths", [None, (2, 7, 4)], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("kind", "use"),
    [(k, use) for k in KINDS for n in (1, 2) for use in combinations(OUTPUTS[k], n)],
)
def test_any_outputs_used(kind: str, use: tuple[str, ...], lengths: tuple[int, ...] | None) -> None:
    case = Case(kind, L=2, D=2, hx=True, lengths=lengths)
    inputs = make_inputs(case)
    assert_same(run(build(fastrnn, case), inputs, use), run(build(nn, case), inputs, use))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [-1, 0, (slice(None), 1), (..., slice(None, None, 2))], ids=str)
def test_part_of_the_output_used(kind: str, part: object) -> None:
    case = Case(kind, L=2)
    gradients = []
    for package in (fastrnn, nn):
        module, inputs = build(package, case), leaves_of(make_inputs(case))
        call(module, inputs)["y"][part].square().sum().backward()
        parameters = {name: p.grad for name, p in module.named_parameters()}
        gradients.append({"x": inputs.x.grad, **parameters})
    assert_same(*gradients)


WEIGHTS = ("weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1_reverse")
WANTED = [("x",), ("h0",), *((name,) for name in WEIGHTS), ("x", "h0"), WEIGHTS]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [*((k, w) for k in KINDS for w in WANTED), ("LSTM", ("c0",)), ("LSTM", ("x", "h0", "c0"))],
)
def test_any_inputs_wanted(kind: str, wanted: tuple[str, ...]) -> None:
    case = Case(kind, L=2, D=2, hx=True)
    gradients = []
    for package in (fastrnn, nn):
        module, inputs = build(package, case).requires_grad_(False), make_inputs(case)
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        named = dict(zip(("x", "h0", "c0"), tensors, strict=False)) | dict(
            module.named_parameters()
        )
        for name in wanted:
            named[name].requires_grad_()
        loss(call(module, inputs), OUTPUTS[kind]).backward()
        gradients.append({name: t.grad for name, t in named.items() if t.grad is not None})
    assert set(gradients[0]) == set(wanted)
    assert_same(*gradients)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"])
@pytest.mark.parametrize("case", cases(T=[9], N=[33], H=[64], L=[2], dtype=FUSED_DTYPES), ids=str)
def test_a_frozen_weight_leaves_the_others_gradients(case: Case, frozen: str) -> None:
    """So many rows that w_hh is packed, in memory of its own or in its gradient's."""
    inputs, module = make_inputs(case), build(fastrnn, case)
    expected = run(module, inputs)
    getattr(module, frozen).requires_grad_(False)
    assert expected.pop(f"d{frozen}") is not None
    assert_same(run(module, inputs), expected)


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("case", cases(dtype=FUSED_DTYPES), ids=str)
def test_one_bias_wanted(case: Case, name: str) -> None:
    inputs, module = make_inputs(case), build(fastrnn, case)
    expected = run(module, inputs)[f"d{name}"]
    module.requires_grad_(False)
    getattr(module, name).requires_grad_()
    assert_same({name: run(module, inputs)[f"d{name}"]}, {name: expected})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_wanted(kind: str) -> None:
    case = Case(kind, L=2, hx=True)
    outputs = call(build(fastrnn, case).requires_grad_(False), make_inputs(case))
    assert all(output.grad_fn is None for output in outputs.values())


def test_h0_and_c0_the_same_tensor() -> None:
    case = Case("LSTM", hx=True)
    gradients = []
    for package in (fastrnn, nn):
        inputs = leaves_of(make_inputs(case))
        call(build(package, case), inputs._replace(c0=inputs.h0))["y"].sum().backward()
        gradients.append({"h0": inputs.h0.grad})
    assert_same(*gradients)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], P=[0, 3], dtype=DTYPES), ids=str)
def test_backward_twice(case: Case) -> None:
    inputs = leaves_of(make_inputs(case))
    module = build(fastrnn, case)
    total = loss(call(module, inputs), OUTPUTS[case.kind])
    wanted = [t for t in inputs if isinstance(t, Tensor)] + list(module.parameters())
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    second = torch.autograd.grad(total, wanted)
    assert_equal(dict(enumerate(second)), dict(enumerate(first)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, wanted)


@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[2], D=[2], P=[0, 3], dtype=DTYPES),
        *cases(N=[1, 3, None], batch_first=[True]),
        *cases(T=[1], N=[1, 3]),
        *cases(L=[2], lengths=[(2, 7, 4)]),
    ],
    ids=str,
)
def test_output_modified_in_place(case: Case) -> None:
    """torch.nn allows it, except for the LSTMs that it gives to oneDNN."""
    inputs, module = leaves_of(make_inputs(case)), build(fastrnn, case)
    outputs = call(module, inputs)
    for output in outputs.values():
        output.mul_(2)
    loss(outputs, OUTPUTS[case.kind]).backward()
    gradients = {"dx": inputs.x.grad, **{f"d{n}": p.grad for n, p in module.named_parameters()}}
    expected = run(build(nn, case), make_inputs(case))
    assert_same(gradients, {name: 2 * expected[name] for name in gradients})


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((k, n) for k in KINDS for n in ("x", "h0", *WEIGHTS[:2])), ("LSTM", "c0")],
)
def test_input_modified_in_place(kind: str, name: str) -> None:
    case = Case(kind, L=2, hx=True)
    for package in (fastrnn, nn):
        module, leaves = build(package, case), leaves_of(make_inputs(case))
        inputs = Inputs(*(t * 1 if isinstance(t, Tensor) else t for t in leaves))
        total = call(module, inputs)["y"].sum()
        target = getattr(inputs if hasattr(inputs, name) else module, name)
        with torch.no_grad():
            target.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_features_made_under_inference_mode(kind: str, dtype: torch.dtype) -> None:
    """By a frozen part of a model. torch.nn, too, takes them where it copies x for its layout."""
    case = Case(kind, T=6, N=3, batch_first=True, dtype=dtype)
    gradients = []
    for package in (nn, fastrnn):
        module = build(package, case)
        with torch.inference_mode():
            x = make_inputs(case).x * 2
        module(x)[0].sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert_same(gradients[1], gradients[0])
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        build(fastrnn, replace(case, batch_first=False))(x)


@pytest.mark.parametrize("case", cases(L=[2], T=[1, 4], N=[1, 3], hx=[True], P=[0, 3]), ids=str)
def test_outputs_are_new_tensors(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        outputs = call(module, inputs)
    sources = [t for t in inputs if isinstance(t, Tensor)] + list(module.parameters())
    storages = [t.untyped_storage().data_ptr() for t in [*outputs.values(), *sources]]
    kept = [t.clone() for t in sources]
    assert len(set(storages)) == len(storages)
    for output in outputs.values():
        output.fill_(torch.nan)
    assert all(torch.equal(source, before) for source, before in zip(sources, kept, strict=True))


@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], lengths=[None, (2, 7, 4)]), ids=str)
def test_saved_tensors_go_through_hooks(case: Case) -> None:
    """Hooks that copy into other strides, as one that compresses may."""
    inputs, packed = make_inputs(case), []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.repeat_interleave(2, dim=-1)

    module = build(fastrnn, case)
    with saved_tensors_hooks(pack, lambda tensor: tensor[..., ::2]):
        results = run(module, inputs)
    assert packed
    assert_equal(results, run(module, inputs))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_hooks_meet_data_alone(name: str, packed: bool) -> None:
    """Numbers, and some of them: a hook may scale them by the largest, or keep fewer bits."""
    if packed and "Cell" in name:
        pytest.skip("takes one step")
    module, kept = getattr(fastrnn, name)(5, 8), []
    x = torch.randn(6, 5, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = module(PackedSequence(x, torch.tensor([3, 2, 1])) if packed else x)
    tree_leaves(results)[0].sum().backward()
    assert kept
    assert all(tensor.is_floating_point() and tensor.numel() > 0 for tensor in kept)


@pytest.mark.parametrize("case", cases(L=[2], dropout=[0.0, 0.5]), ids=str)
def test_checkpoint(case: Case) -> None:
    gradients = []
    for package in (fastrnn, nn):
        module, inputs = build(package, case), leaves_of(make_inputs(case))
        torch.manual_seed(3)
        y, _ = checkpoint(module, inputs.x, use_reentrant=False)
        y.square().sum().backward()
        gradients.append({"x": inputs.x.grad, "weight_hh_l0": module.weight_hh_l0.grad})
    assert_same(*gradients)


@pytest.mark.parametrize("case", cases(L=[2], dropout=[0.0, 0.5]), ids=str)
def test_selective_checkpoint(case: Case) -> None:
    """A stack that a policy keeps is not run again; the rest of the region is."""
    module, x = build(fastrnn, case), make_inputs(case).x
    contexts = partial(
        create_selective_checkpoint_contexts, [torch.ops.fastrnn.recurrent_forward.default]
    )

    def region(x: Tensor) -> Tensor:
        return module(x)[0].sin().exp()

    def gradients(y: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        return dict(zip(dict(module.named_parameters()), found, strict=True))

    torch.manual_seed(3)
    expected = gradients(region(x))
    torch.manual_seed(3)
    with Recorder("fastrnn::recurrent_forward") as stacks, Recorder("aten::sin") as rest:
        y = checkpoint(region, x, use_reentrant=False, context_fn=contexts)
        assert_equal(gradients(y), expected)
    assert (len(stacks.calls), len(rest.calls)) == (1, 2)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_selective_checkpoint_sees_a_write(name: str) -> None:
    """What it keeps is the output itself, which another run of the region would write to again."""
    module = getattr(fastrnn, name)(5, 8)
    contexts = partial(
        create_selective_checkpoint_contexts, [torch.ops.fastrnn.recurrent_forward.default]
    )

    def region(x: Tensor) -> Tensor:
        result = module(x)
        y = result[0] if isinstance(result, tuple) else result
        return y.mul_(2).exp()

    y = checkpoint(region, torch.randn(3, 5), use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="has been mutated"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_either_mode(kind: str, training: bool) -> None:
    case = Case(kind, L=2, hx=True)
    inputs = make_inputs(case)
    ours, theirs = (build(package, case).train(training) for package in (fastrnn, nn))
    assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    for _ in range(2):
        loss(call(module, inputs), OUTPUTS[kind]).backward()
    once = run(build(nn, case), inputs)
    parameters = dict(module.named_parameters())
    assert_same(
        {name: parameter.grad for name, parameter in parameters.items()},
        {name: 2 * once[f"d{name}"] for name in parameters},
    )


BATCHES_OF_CHUNKS = [
    # Chunks of one step, whose gate gradients are read, panel after panel, by the one before.
    *cases(T=[3], N=[800], H=[130], P=[0, 90], hx=[True]),
    # The last chunk: two rows of one sequence, added to the sums of many.
    *cases(T=[40], N=[300], lengths=[(40, *[3] * 299)], H=[8], D=[2], dtype=DTYPES),
    # More than 512 rows that w_ih, with still more columns, is multiplied with.
    *cases(["RNN_TANH"], T=[2], N=[600], I=[700], H=[64]),
]


@pytest.mark.parametrize("case", BATCHES_OF_CHUNKS, ids=str)
def test_many_rows(case: Case) -> None:
    inputs = make_inputs(case)
    assert_same(run(build(fastrnn, case), inputs), run(build(nn, case), inputs), factor=2)


@pytest.mark.parametrize("case", cases(T=[1], N=[1, 4], I=[9001], H=[8]), ids=str)
def test_wide_input_of_few_rows(case: Case) -> None:
    """w_ih is read in place, and so many sums are in memory at once."""
    inputs = make_inputs(case, scale=1e-2)
    assert_same(run(build(fastrnn, case), inputs), run(build(nn, case), inputs))
