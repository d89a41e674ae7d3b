import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kimi_linear.kernels.gpu.direct_calls import called_directly


@pytest.fixture(scope="module")
def operator():
    @torch.library.custom_op("kimi_test_direct_calls::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    seen = []

    class Counted:
        _init_fn = staticmethod(twice._init_fn)
        register_fake, register_autograd = twice.register_fake, twice.register_autograd

        def __call__(self, *args):
            seen.append(args)
            return twice(*args)

    called = called_directly(Counted())
    called.register_fake(torch.empty_like)
    return called, seen


def test_the_dispatcher_is_left_out_where_nothing_listens(operator):
    twice, seen = operator
    x = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(twice(x), 2 * x) and not seen
        with FakeTensorMode() as mode:
            assert type(twice(mode.from_tensor(x))).__name__ == "FakeTensor"
        assert len(seen) == 1
        torch.func.vmap(lambda y: torch.sin(y))(x)  # a transform that has ended
        assert torch.equal(twice(x), 2 * x) and len(seen) == 1
    twice(x)
    assert len(seen) == 2  # gradients: the operator says that it has none
    with pytest.raises(RuntimeError, match="no autograd formula"):
        twice(x.requires_grad_()).sum().backward()


@torch.no_grad()
def test_an_exported_graph_has_the_operator(operator):
    twice, _ = operator

    class Twice(torch.nn.Module):
        def forward(self, x):
            return twice(x)

    graph = torch.export.export(Twice(), (torch.ones(3),)).graph
    assert "twice" in str(graph)
