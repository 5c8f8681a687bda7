"""fixed_point inside of what torch.compile traces, and functions that do not return what they were given."""

import pytest
import torch
from problems import F64, TIGHT, normal
from torch.testing import assert_close

from hopdeq_lwpf import fixed_point
from hopdeq_lwpf.models import Hopfield
from hopdeq_lwpf.models.sdm import SDM, Attention, Circle, effective_betas


def f(z, x):
    """A contraction."""
    return torch.tanh(0.5 * z.roll(1, -1) + x)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("steps", [None, 3])
def test_fixed_point_inside_of_a_compiled_function(steps):
    def network(x):
        return 2 * fixed_point(f, x + 1, torch.zeros_like(x), steps=steps, stop=TIGHT).value

    x = normal(3, 4).requires_grad_()
    expected = network(x)
    found = torch.compile(network, backend="eager")(x)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    assert_close(*slopes, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_layer_keeps_no_queries_and_that_is_said():
    layer = Hopfield(4)
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="call the layer uncompiled"):
        effective_betas(torch.compile(layer, backend="eager"), x)


@pytest.mark.parametrize(
    "answer",
    [lambda z: (z[1], z[0], z[0]), lambda z: [z[0], z[1]], lambda z: (z[0], z[1][:, :1]), lambda z: z[0]],
)
def test_a_state_of_two_tensors_must_come_back_as_such(answer):
    z0 = (torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises((TypeError, ValueError), match="f "):
        fixed_point(lambda z, x: answer(z), None, z0)


def test_sets_of_patterns_of_their_own_stay_with_their_queries_when_others_are_done():
    sets = (normal(3, 1, 5, 12) > 0).to(F64)
    query = sets[:, :, 0].clone()
    query[1, :, :4] = 1 - query[1, :, :4]
    for weights in (Circle(4), Attention(6.0)):
        memory = SDM(weights)
        together = memory(query, sets, return_solution=True)
        for i in range(3):
            alone = memory(query[i : i + 1], sets[i : i + 1], return_solution=True)
            assert torch.equal(alone.value, together.value[i : i + 1])
            assert torch.equal(alone.steps, together.steps[i : i + 1])
