"""torch.func.vmap over inputs, weights or both, and per-sample gradients, against a loop."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map

import fastrnn
import helpers
from helpers import DTYPES, KINDS, Case, Recorder, build, cases, draw_masks, make_inputs

SAMPLES = 3
Results = dict[str, Tensor]

SHAPES = [
    *cases(T=[4], N=[1, 2], H=[9], dtype=DTYPES),
    *cases(T=[4], N=[2], H=[9], L=[2], D=[2], P=[0, 3], batch_first=[False, True]),
    *cases(T=[4], N=[None], H=[9], L=[2], batch_first=[False, True]),
]


def samples_of(case: Case, dim: int = 0) -> Tensor:
    """Returns an input for each sample, stacked along `dim`."""
    return torch.stack([make_inputs(case, seed=seed).x for seed in range(SAMPLES)], dim)


def states_of(case: Case, dim: int = 0) -> Any:
    """Returns an hx for each sample, stacked along `dim`."""
    drawn = [make_inputs(case, seed=seed) for seed in range(SAMPLES)]
    h0 = torch.stack([each.h0 for each in drawn], dim)
    return (h0, torch.stack([each.c0 for each in drawn], dim)) if case.kind == "LSTM" else h0


def flat(result: Any) -> Results:
    """Names the outputs of a module."""
    y, hidden = result
    states = hidden if isinstance(hidden, tuple) else (hidden,)
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def loop(function: Callable[..., Results], *columns: Any) -> Results:
    """Stacks `function` of each sample."""
    results = [function(*sample) for sample in zip(*columns, strict=True)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def assert_same(actual: Results, expected: Results, factor: float = 1) -> None:
    """Asserts that results agree; those of vmap are views whose samples need not come first."""
    dense = {name: result.contiguous() for name, result in actual.items()}
    helpers.assert_same(dense, expected, factor)


def per_sample(states: Any) -> list[Any]:
    """Returns each sample's hx."""
    return list(zip(*states, strict=True)) if isinstance(states, tuple) else list(states)


@pytest.mark.parametrize("dim", [0, -2])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_over_inputs(case: Case, dim: int) -> None:
    module = build(fastrnn, case)
    f = vmap(lambda x: flat(module(x)), in_dims=dim)
    assert_same(f(samples_of(case, dim)), loop(lambda x: flat(module(x)), samples_of(case)))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_over_no_samples(case: Case) -> None:
    module = build(fastrnn, case)
    one = flat(module(samples_of(case)[0]))
    results = vmap(lambda x: flat(module(x)))(samples_of(case)[:0])
    for name, none in results.items():
        assert none.shape == (0, *one[name].shape)
    results["y"].sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize("given", ["x", "hx", "both"])
@pytest.mark.parametrize(
    "case",
    cases(T=[4], N=[None, 2], H=[9], L=[2], D=[2], P=[0, 3], hx=[True], batch_first=[False, True]),
    ids=str,
)
def test_over_inputs_and_states(case: Case, given: str) -> None:
    module = build(fastrnn, case)
    x, hx = samples_of(case), states_of(case, dim=1)
    one_x, one_hx = x[0], per_sample(states_of(case))[0]
    arguments, in_dims, columns = {
        "x": ((x, one_hx), (0, None), (x, [one_hx] * SAMPLES)),
        "hx": ((one_x, hx), (None, 1), ([one_x] * SAMPLES, per_sample(states_of(case)))),
        "both": ((x, hx), (0, 1), (x, per_sample(states_of(case)))),
    }[given]
    f = vmap(lambda x, hx: flat(module(x, hx)), in_dims=in_dims)
    assert_same(f(*arguments), loop(lambda x, hx: flat(module(x, hx)), *columns))


@pytest.mark.parametrize("case", cases(T=[4], N=[3], L=[2], D=[2], P=[0, 3], H=[9]), ids=str)
def test_over_packed_data(case: Case) -> None:
    module = build(fastrnn, case)
    packed = pack_padded_sequence(make_inputs(case).x, [4, 2, 1])
    data = torch.stack([packed.data * (i + 1) for i in range(SAMPLES)])

    def f(data: Tensor) -> Results:
        y, hidden = module(PackedSequence(data, packed.batch_sizes))
        return flat((y.data, hidden))

    assert_same(vmap(f)(data), loop(f, data))


def models_of(case: Case) -> list[nn.Module]:
    """Returns a module for each sample."""
    return [build(fastrnn, case, seed=seed) for seed in range(SAMPLES)]


@pytest.mark.parametrize("x_dim", [None, 0], ids=["one_input", "input_each"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_over_weights(case: Case, x_dim: int | None) -> None:
    models, x = models_of(case), samples_of(case)
    weights, buffers = stack_module_state(models)

    def f(weights: Results, x: Tensor) -> Results:
        return flat(functional_call(models[0], (weights, buffers), (x,)))

    inputs = x if x_dim == 0 else [x[0]] * SAMPLES
    result = vmap(f, in_dims=(0, x_dim))(weights, x if x_dim == 0 else x[0])
    assert_same(result, loop(lambda model, x: flat(model(x)), models, inputs))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_one_weight(kind: str, name: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x
    weights = torch.stack([module.get_parameter(name).detach() * (i + 1) for i in range(SAMPLES)])

    def gradients(weight: Tensor) -> Results:
        weights = dict(module.named_parameters()) | {name: weight}
        return loss_gradients(module, weights, x)

    results = vmap(gradients, in_dims=-1)(weights.movedim(0, -1))
    assert_same(results, loop(gradients, weights), factor=4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_the_same_for_each_sample_has_no_samples(kind: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x
    y = vmap(lambda _: module(x)[0], out_dims=None)(torch.arange(SAMPLES))
    assert torch.equal(y, module(x)[0])


def sum_of_squares(module: nn.Module, weights: Results, x: Tensor) -> Tensor:
    """Returns a loss of a module's outputs."""
    outputs = flat(functional_call(module, weights, (x,)))
    return torch.stack([output.pow(2).sum() for output in outputs.values()]).sum()


def loss_gradients(module: nn.Module, weights: Results, x: Tensor) -> Results:
    """Returns the gradients of a loss by the weights and the input."""
    dweights, dx = grad(lambda w, x: sum_of_squares(module, w, x), argnums=(0, 1))(weights, x)
    return dweights | {"dx": dx}


def eager_gradients(module: nn.Module, x: Tensor) -> Results:
    """Returns the same by .backward()."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    outputs = flat(module(x))
    torch.stack([output.pow(2).sum() for output in outputs.values()]).sum().backward()
    return {name: p.grad for name, p in module.named_parameters()} | {"dx": x.grad}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_per_sample_gradients(case: Case) -> None:
    module, x = build(fastrnn, case), samples_of(case)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    result = vmap(lambda w, x: loss_gradients(module, w, x), in_dims=(None, 0))(weights, x)
    twin = build(nn, case)
    assert_same(result, loop(lambda x: eager_gradients(twin, x), x), factor=4)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients_of_an_ensemble(case: Case) -> None:
    models, x = models_of(case), samples_of(case)
    weights, _ = stack_module_state(models)
    weights = {name: w.detach() for name, w in weights.items()}
    result = vmap(lambda w, x: loss_gradients(models[0], w, x))(weights, x)
    assert_same(result, loop(eager_gradients, models, x), factor=4)


@pytest.mark.parametrize(
    "case",
    [
        *cases(
            T=[4], N=[None, 2], H=[9], L=[2], D=[2], P=[0, 3], hx=[True], batch_first=[False, True]
        ),
        *cases(T=[4], N=[3], H=[9], L=[2], D=[2], P=[0, 3], hx=[True], lengths=[(4, 2, 1)]),
    ],
    ids=str,
)
def test_gradients_of_inputs_and_states(case: Case) -> None:
    module, x, hx = build(fastrnn, case).requires_grad_(False), samples_of(case), states_of(case, 1)
    packed = case.lengths and pack_padded_sequence(x[0], case.lengths)
    if packed:
        x = torch.stack([packed.data * (i + 1) for i in range(SAMPLES)])

    def gradients(x: Tensor, hx: Any) -> Results:
        def loss(x: Tensor, hx: Any) -> Tensor:
            y, hidden = module(packed._replace(data=x) if packed else x, hx)
            outputs = flat((y.data if packed else y, hidden))
            return torch.stack([output.pow(2).sum() for output in outputs.values()]).sum()

        return flat(grad(loss, argnums=(0, 1))(x, hx))

    f = vmap(gradients, in_dims=(0, 1))
    expected = loop(gradients, x, per_sample(states_of(case)))
    assert_same(f(x, hx), expected, factor=4)
    none = f(x[:0], tree_map(lambda state: state[:, :0], hx))
    assert {n: t.shape for n, t in none.items()} == {n: t[:0].shape for n, t in expected.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_x_over_weights(kind: str) -> None:
    case = Case(kind, T=4, N=2, H=9)
    models = models_of(case)
    weights, _ = stack_module_state(models)
    x = make_inputs(case).x

    def gradient(weights: Results) -> Results:
        return {"dx": grad(lambda x: functional_call(models[0], weights, (x,))[0].sum())(x)}

    expected = loop(gradient, [dict(model.named_parameters()) for model in models])
    assert_same(vmap(gradient)(weights), expected)


@pytest.mark.parametrize("beside", ["nothing", "x", "weights"])
@pytest.mark.parametrize(
    "case",
    [
        *cases(T=[4], N=[2], H=[9], L=[3], D=[2], P=[0, 3], batch_first=[False, True]),
        *cases(T=[4], N=[None], H=[9], L=[2], batch_first=[False, True]),
        *cases(T=[4], N=[3], H=[9], L=[2], lengths=[(4, 2, 1)]),
    ],
    ids=str,
)
def test_over_masks_of_dropout(case: Case, beside: str) -> None:
    case = replace(case, dropout=0.5)
    x, weights = make_inputs(case).x, [p.detach() for p in build(nn, case).parameters()]
    sizes = None
    if case.lengths:
        x, sizes, *_ = pack_padded_sequence(x, case.lengths)
    masks = torch.stack([draw_masks(case, x) for _ in range(SAMPLES)])
    factors = {name: torch.ones(SAMPLES) for name in ("x", "weights")}
    if beside in factors:
        factors[beside] = torch.linspace(0.8, 1.1, SAMPLES)

    def derive(masks: Tensor, of_x: Tensor, of_weights: Tensor) -> Results:
        def total(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Results]:
            options = (case.L, True, case.D == 2, case.batch_first, masks, case.dropout)
            outputs = torch.ops.fastrnn.recurrent(
                case.kind, x, sizes, None, None, weights, *options
            )
            return outputs[0].square().sum(), dict(zip(("y", "h_n", "c_n"), outputs, strict=True))

        at, given = of_x * x, [of_weights * weight for weight in weights]
        (dx, dweights), outputs = grad(total, argnums=(0, 1), has_aux=True)(at, given)
        along = (torch.ones_like(at),)
        _, tangent = jvp(lambda x: total(x, given)[1]["y"], (at,), along)
        _, second = jvp(lambda x: grad(total, has_aux=True)(x, given)[0], (at,), along)
        gradients = {"dx": dx, **{f"dw{i}": dw for i, dw in enumerate(dweights)}}
        return outputs | gradients | {"tangent": tangent, "second": second}

    columns = (masks, factors["x"], factors["weights"])
    in_dims = (0, *(0 if name == beside else None for name in factors))
    given = [
        column if dim == 0 else column[0] for column, dim in zip(columns, in_dims, strict=True)
    ]
    assert_same(vmap(derive, in_dims)(*given), loop(derive, *columns))


def test_sizes_of_steps_that_are_a_samples_own() -> None:
    weights = [p.detach() for p in build(nn, Case("LSTM")).parameters()]
    x, sizes = torch.randn(6, 5), torch.tensor([[3, 2, 1], [2, 2, 2]])

    def run(sizes: Tensor) -> Tensor:
        inputs, options = (x, sizes, None, None, weights), (1, True, False, False, None)
        return torch.ops.fastrnn.recurrent("LSTM", *inputs, *options)[0]

    with pytest.raises(RuntimeError, match="batch_sizes must be the same"):
        vmap(run)(sizes)


@pytest.mark.parametrize("name", ["LSTM", "RNN", "LSTMCell"])
def test_a_tensor_that_has_left_vmap(name: str) -> None:
    module, kept = getattr(fastrnn, name)(5, 8), []
    vmap(lambda x: (kept.append(x), x.sum())[1])(torch.randn(3, 4, 5))
    for call in (module, torch.no_grad()(module)):
        with pytest.raises(RuntimeError, match=r"escaped|has left"):
            call(kept[0])


@pytest.mark.parametrize("name", ["recurrent", "recurrent_forward", "cell"])
def test_samples_of_too_few_dimensions(name: str) -> None:
    """Samples as many as features, which would do for the dimension that is missing."""
    weights = [p.detach() for p in build(fastrnn, Case("RNN_TANH", I=5)).parameters()]
    states, options = [None] * 3, (1, True, False, False, None)
    if name == "cell":
        states, options = [None] * 2, (True,)

    def run(x: Tensor) -> Tensor:
        return getattr(torch.ops.fastrnn, name)("RNN_TANH", x, *states, weights, *options)[0]

    with pytest.raises(RuntimeError, match="dimensions"):
        vmap(run)(torch.randn(5) if name == "cell" else torch.randn(5, 7))


@pytest.mark.parametrize("rows", [(), (2,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("count", [0, SAMPLES])
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_of_a_cell(kind: str, count: int, rows: tuple[int, ...]) -> None:
    weights = [p.detach() for p in build(fastrnn, Case(kind)).parameters()]

    def step(x: Tensor) -> Results:
        return dict(
            zip("hc", torch.ops.fastrnn.cell(kind, x, None, None, weights, True), strict=True)
        )

    x = torch.randn(SAMPLES, *rows, 5)
    expected = {name: states[:count] for name, states in loop(step, x).items()}
    assert_same(vmap(step)(x[:count]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nested(kind: str) -> None:
    case = Case(kind, T=4, N=2, H=9, L=2)
    module = build(fastrnn, case)
    x = torch.stack([samples_of(case), 2 * samples_of(case)], dim=2)

    def f(x: Tensor) -> Results:
        return flat(module(x))

    nested = vmap(vmap(f), in_dims=2)(x)
    assert_same(nested, loop(lambda x: loop(f, x), x.unbind(2)))


@pytest.mark.parametrize("outer", ["vmap", "jvp", "grad", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_per_sample_gradients(kind: str, outer: str) -> None:
    case = Case(kind, T=4, N=2, H=9, L=2, dtype=torch.float64)
    module, twin, x = build(fastrnn, case), build(nn, case), samples_of(case)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def gradients(model: nn.Module, weights: Results, x: Tensor) -> Results:
        return grad(lambda w: sum_of_squares(model, w, x))(weights)

    def ours(weights: Results, x: Tensor) -> Results:
        return vmap(lambda x: gradients(module, weights, x))(x)

    def theirs(weights: Results, x: Tensor) -> Results:
        return loop(lambda x: gradients(twin, weights, x), x)

    def derive(f: Callable[[Results, Tensor], Results]) -> Results:
        def norm(weights: Results, x: Tensor) -> Tensor:
            return torch.stack([g.pow(2).sum() for g in f(weights, x).values()]).sum()

        if outer == "jvp":
            return jvp(f, (weights, x), (tree_map(torch.cos, weights), x.cos()))[1]
        if outer == "grad":
            dweights, dx = grad(norm, argnums=(0, 1))(weights, x)
            return dweights | {"dx": dx}
        leaves = tree_map(lambda t: t.clone().requires_grad_(), weights)
        leaf = x.clone().requires_grad_()
        norm(leaves, leaf).backward()
        return {name: each.grad for name, each in leaves.items()} | {"dx": leaf.grad}

    if outer == "vmap":
        batches = torch.stack([x, x.cos()], 1)
        over = vmap(lambda x: ours(weights, x), in_dims=1)(batches)
        assert_same(over, loop(lambda x: theirs(weights, x), batches.unbind(1)))
    else:
        assert_same(derive(ours), derive(theirs), factor=100)


@pytest.mark.parametrize("case", cases(T=[4], N=[1, 2], H=[9], L=[2], D=[2], P=[0, 3]), ids=str)
def test_jacobian_by_weights_is_one_fused_call(case: Case) -> None:
    module, twin, x = build(fastrnn, case), build(nn, case), make_inputs(case).x
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def last(model: nn.Module) -> Callable[[Results], Tensor]:
        return lambda weights: functional_call(model, weights, (x,))[0][-1, 0]

    assert_same(jacrev(last(module))(weights), jacrev(last(twin))(weights), factor=4)
    counts = calls_of(lambda: jacrev(last(module))(weights))
    assert counts == {"fastrnn::recurrent_forward": 1, "fastrnn::recurrent_backward": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_tangents(kind: str) -> None:
    case = Case(kind, T=4, N=2, H=9, L=2, dtype=torch.float64)
    module, x = build(fastrnn, case), samples_of(case)

    def tangents(x: Tensor) -> Results:
        return jvp(lambda x: flat(module(x)), (x,), (x.cos(),))[1]

    assert_same(vmap(tangents)(x), loop(tangents, x))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_vmap(kind: str) -> None:
    case = Case(kind, T=4, N=2, H=9, L=2)
    module, x = build(fastrnn, case), samples_of(case)
    gradients = []
    for f in (vmap(lambda x: flat(module(x))), lambda x: loop(lambda x: flat(module(x)), x)):
        module.zero_grad()
        torch.stack([output.pow(2).sum() for output in f(x).values()]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert_same(*gradients, factor=4)


def drop(kind: str, randomness: str) -> Tensor:
    """Returns y of samples that are all the same, under dropout."""
    case = Case(kind, N=2, L=2, dropout=0.5)
    module, x = build(fastrnn, case), make_inputs(case).x
    torch.manual_seed(0)
    return vmap(lambda x: module(x)[0], randomness=randomness)(torch.stack([x] * SAMPLES))


@pytest.mark.parametrize("kind", KINDS)
def test_randomness_of_dropout(kind: str) -> None:
    same = drop(kind, "same")
    assert torch.equal(same[0], same[1])
    different = drop(kind, "different")
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        drop(kind, "error")


def calls_of(function: Callable[[], object]) -> dict[str, int]:
    """Returns how often `function` comes to each op of fastrnn, below all transforms."""
    names = ["fastrnn::recurrent", "fastrnn::recurrent_forward", "fastrnn::recurrent_backward"]
    with ExitStack() as stack:
        recorders = [stack.enter_context(Recorder(name)) for name in names]
        function()
    return {r.name: len(r.calls) for r in recorders if r.calls}


@pytest.mark.parametrize(
    "case", cases(N=[1], L=[2], D=[2], P=[0, 3], hx=[True], dropout=[0.0, 0.5]), ids=str
)
def test_over_inputs_and_states_is_one_fused_call(case: Case) -> None:
    module, arguments = build(fastrnn, case), (samples_of(case), states_of(case))
    f = vmap(module, randomness="different")
    with torch.no_grad():
        assert calls_of(lambda: f(*arguments)) == {"fastrnn::recurrent": 1}


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=["weights", "inputs", "both"])
@pytest.mark.parametrize("case", cases(N=[1], L=[2], D=[2], P=[0, 3], dropout=[0.0, 0.5]), ids=str)
def test_gradients_are_one_fused_call(case: Case, argnums: Any) -> None:
    module, x = build(fastrnn, case).requires_grad_(False), samples_of(case)
    loss = grad(lambda w, x: sum_of_squares(module, w, x), argnums)
    f = vmap(loss, in_dims=(None, 0), randomness="different")
    counts = calls_of(lambda: f(dict(module.named_parameters()), x))
    assert counts == {"fastrnn::recurrent_forward": 1, "fastrnn::recurrent_backward": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_ensemble_run_it_once(kind: str) -> None:
    models, x = models_of(Case(kind)), samples_of(Case(kind))
    weights, _ = stack_module_state(models)
    weights = {name: w.detach() for name, w in weights.items()}
    f = vmap(grad(lambda w, x: sum_of_squares(models[0], w, x)))
    counts = calls_of(lambda: f(weights, x))
    assert counts == {"fastrnn::recurrent_forward": SAMPLES, "fastrnn::recurrent_backward": SAMPLES}


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    "case", cases(T=[4], N=[None, 2], H=[5], L=[1, 2], P=[0, 3], dtype=[torch.float64]), ids=str
)
def test_jacobians_of_samples(case: Case, levels: int) -> None:
    """The directions of each sample's Jacobian share what one forward pass kept of all samples."""
    module = build(fastrnn, case).requires_grad_(False)
    x = make_inputs(case).x
    samples = torch.stack([x, x.sin(), 2 * x, x + 1, x.cos(), -x])
    jacobian = jacrev(lambda x: module(x)[0].sum(-1))
    expected = torch.stack([jacobian(sample) for sample in samples])
    if levels == 2:
        results = vmap(vmap(jacobian))(samples.unflatten(0, (2, 3))).flatten(0, 1)
    else:
        results = vmap(jacobian)(samples)
    assert_same({"jacobian": results}, {"jacobian": expected})


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_of_samples_in_compiled_code(kind: str) -> None:
    module = build(fastrnn, Case(kind, T=4, N=2, H=5, L=2)).requires_grad_(False)
    jacobian = jacrev(lambda x: module(x)[0].sum(-1))
    compiled = torch.compile(
        lambda samples: vmap(jacobian)(samples), backend="aot_eager", dynamic=True
    )
    for count in (2, 3):
        samples = torch.randn(count, 4, 2, 5)
        expected = torch.stack([jacobian(sample) for sample in samples])
        assert_same({"jacobian": compiled(samples)}, {"jacobian": expected})
