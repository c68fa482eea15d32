"""torch.compile takes a module whole, and gives eager's results."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from helpers import Case, assert_same, build, call, cases, make_inputs, run


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True]), ids=str)
def test_compiled_is_eager(case: Case, backend: str) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    module.compile(fullgraph=True, backend=backend)
    assert_same(run(module, inputs), expected)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], hx=[True]), ids=str)
def test_fake_tensors(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = call(module, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = inputs._replace(
            **{n: mode.from_tensor(t) for n, t in inputs._asdict().items() if t is not None}
        )
        outputs = call(module, fakes)
    for name, output in outputs.items():
        assert output.shape == expected[name].shape and output.stride() == expected[name].stride()


@pytest.mark.parametrize("case", cases(L=[2]), ids=str)
def test_traced_is_eager(case: Case) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x
    traced = torch.jit.trace(module, x)
    longer = torch.cat([x, x])
    torch.testing.assert_close(traced(longer), module(longer))
