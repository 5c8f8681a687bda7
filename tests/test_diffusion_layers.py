"""The layers whose patterns and states diffuse: options, masks, graphs of one's own, training."""

import copy
import io
import math

import pytest
import torch
from references_diffusion import F64, heat, knn_weights, laplacian, resolvent
from torch.testing import assert_close

from hopdeq_lwpf import Termination
from hopdeq_lwpf.data import BitPatternSet
from hopdeq_lwpf.graphs import KNN, Graph
from hopdeq_lwpf.models import Hopfield, HopfieldLayer, HopfieldPooling, build
from hopdeq_lwpf.models.diffusion import DiffusionHopfield, DiffusionLayer, DiffusionPooling
from hopdeq_lwpf.solvers import Implicit

TIGHT = Termination(rtol=1e-11, atol=1e-13, max_steps=3000)
WIDTHS = {"input_size": 8, "hidden_size": 3, "num_heads": 2, "stop": TIGHT}
STEPS = [1, 3, None]
# Most of these solve from a start that would train, to look at what is computed.
pytestmark = pytest.mark.filterwarnings("ignore:z0 was detached")


def layer_of(kind=DiffusionHopfield, seed=0, **options):
    torch.manual_seed(seed)
    layer = kind(**{**WIDTHS, "beta": 2.0, "adjoint": Implicit(rtol=1e-12), **options}).double()
    for parameter in layer.parameters():  # as after some training: scores that matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7)
    return layer


def bags(batch=4, count=6, width=8, seed=1):
    return torch.randn(batch, count, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
def test_without_diffusion_the_layers_are_the_plain_ones(steps, unit):
    off = {"lam": 0.0, "eta": 0.0, "logit_eta": 0.0}
    for kind, plain in (
        (DiffusionHopfield, Hopfield),
        (DiffusionPooling, HopfieldPooling),
        (DiffusionLayer, HopfieldLayer),
    ):
        options = {"steps": steps, "forgetting": unit}
        if kind is not DiffusionHopfield:
            options["quantity"] = 3
        mine, theirs = layer_of(kind, **options, **off), layer_of(plain, **options)
        theirs.load_state_dict(mine.state_dict())
        data = bags()
        assert_close(mine(data), theirs(data), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", STEPS)
def test_the_layer_is_what_its_parts_make(steps):
    layer = layer_of(steps=steps, lam=0.7, eta=0.4, neighbors=2, separation="softmax")
    data = bags()
    out = layer(data)
    for i in range(len(data)):
        stored, state, values = (
            norm(data[i])
            for norm in (layer.norm_stored_pattern, layer.norm_state_pattern, layer.norm_pattern_projection)
        )
        of_stored = laplacian(knn_weights(stored.detach(), 2))
        of_state = laplacian(knn_weights(state.detach(), 2))
        heads = []
        for head in range(2):
            cut = slice(3 * head, 3 * head + 3)
            q = layer.state_projection(state)[:, cut]
            k = heat(of_stored, 0.4) @ layer.stored_projection(stored)[:, cut]
            v = layer.value_projection(values)[:, cut]
            for _ in range((400 if steps is None else steps) - 1):
                q = resolvent(of_state, 0.7) @ torch.softmax(2.0 * q @ k.T, -1) @ k
            heads.append(resolvent(of_state, 0.7) @ torch.softmax(2.0 * q @ k.T, -1) @ v)
        assert_close(out[i], layer.output_projection(torch.cat(heads, -1)), rtol=1e-7, atol=1e-9)


OPTIONS = {
    "plain": {},
    "combinatorial": {"laplacian": "combinatorial"},
    "every pair": {"neighbors": None},
    "rbf mean": {"similarity": "rbf", "symmetrize": "mean"},
    "sparse": {"sparse": True},
    "implicit": {"diffusion": "implicit"},
    "explicit": {"diffusion": "explicit", "diffusion_steps": 3},
    "adaptive": {"adaptive_eta": True},
    "graph attention": {"attention": "graph"},
    "logits": {"logit_eta": 0.3},
    "extras": {"concat_bias_pattern": True, "add_zero_association": True, "attention": "graph"},
    "learned": {"learn_lam": True, "learn_eta": True},
    "relu": {"forgetting": "relu"},
    "pfu": {"forgetting": "pfu"},
    "sparsemax": {"separation": "sparsemax"},
    "input": {"inject": "input"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("steps", [1, None])
def test_a_sample_alone_gives_what_it_gives_in_a_batch(name, steps):
    layer = layer_of(steps=steps, eta=0.5, **{"neighbors": 2, **OPTIONS[name]})
    data = bags()
    together = layer(data)
    for i in range(len(data)):
        assert_close(layer(data[i : i + 1])[0], together[i], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("steps", [1, None])
def test_order_moves_with_the_states_and_padding_is_as_if_it_were_not_there(name, steps):
    layer = layer_of(steps=steps, eta=0.5, **{"neighbors": 2, **OPTIONS[name]})
    data = bags()
    plain = layer(data)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(layer(data[:, order]), plain[:, order], rtol=1e-7, atol=1e-9)
    padded = torch.cat([data, torch.full((4, 2, 8), torch.nan, dtype=F64)], 1)
    mask = torch.tensor([False] * 6 + [True] * 2).expand(4, -1)
    out = layer(padded, mask)
    assert_close(out[:, :6], plain, rtol=1e-7, atol=1e-9)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("attention", ["dense", "graph"])
def test_queries_and_keys_may_differ_in_number(steps, attention):
    layer = layer_of(steps=steps, attention=attention, neighbors=1)
    stored, state = bags(count=7), bags(count=3, seed=2)
    out = layer((stored, state, stored))
    assert out.shape == (4, 3, 8)
    matrix = layer.get_association_matrix((stored, state, stored))
    assert matrix.shape == (4, 2, 3, 7)
    if attention == "graph" and steps == 1:
        layer = layer_of(steps=1, attention="graph", neighbors=1, lam=0.0)
        matrix = layer.get_association_matrix((stored, state, stored))
        near = KNN(1)(layer.norm_stored_pattern(stored)).connected()
        for sample, head, row in torch.cartesian_prod(
            torch.arange(4), torch.arange(2), torch.arange(3)
        ).tolist():
            reached = matrix[sample, head, row] > 0
            anchor = int((layer.q[sample, head, row] @ layer.k[sample, head].mT).argmax())
            expected = near[sample, anchor].clone()
            expected[anchor] = True
            assert_close(reached, expected)


def test_in_self_association_graph_attention_reaches_a_pattern_and_its_neighbours():
    layer = layer_of(steps=1, attention="graph", neighbors=2, lam=0.0)
    data = bags()
    reached = layer.get_association_matrix(data) > 0
    near = KNN(2)(layer.norm_stored_pattern(data)).connected() | torch.eye(6, dtype=torch.bool)
    assert_close(reached, near[:, None].expand(-1, 2, -1, -1))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_graph_of_ones_own_is_used_for_both_or_for_each(sparse):
    layer = layer_of(steps=None, lam=0.5, eta=0.5)
    data = bags()
    weight = torch.rand(4, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    weight = weight + weight.mT
    graph = Graph.from_adjacency(weight)
    graph = graph.to_sparse() if sparse else graph
    once = layer(data, stored_graph=graph)
    assert_close(layer(data, stored_graph=weight, state_graph=weight), once, rtol=1e-8, atol=1e-10)
    assert_close(layer(data, state_graph=graph), once, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(layer(data), once)
    shared = Graph.from_adjacency(weight[0])
    assert_close(layer(data[:1], stored_graph=shared), once[:1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [1, None])
def test_gradients_reach_strengths_input_and_graph(steps):
    # From one shared start, the gradient of a solve to its start is zero: the query enters every step.
    layer = layer_of(
        steps=steps,
        learn_lam=True,
        learn_eta=True,
        learn_logit_eta=True,
        logit_eta=0.2,
        inject="input",
        neighbors=2,
    )
    data = bags(2, 4)[:, :, :8].requires_grad_()
    names = dict(layer.named_parameters())
    strengths = [parameter for name, parameter in names.items() if name.endswith("raw")]
    assert len(strengths) == 3
    assert torch.autograd.gradcheck(lambda *_: layer(data), (data, *strengths), atol=1e-6)
    detached = layer_of(steps=steps, detach_graph=True, neighbors=2, inject="input")
    attached = layer_of(steps=steps, neighbors=2, inject="input")
    slopes = [torch.autograd.grad(each(data).square().sum(), data)[0] for each in (detached, attached)]
    assert not torch.allclose(*slopes)


@pytest.mark.parametrize("kind", [DiffusionPooling, DiffusionLayer])
@pytest.mark.parametrize("steps", STEPS)
def test_pooling_and_lookup_diffuse_their_learned_patterns_and_train(kind, steps):
    layer = layer_of(kind, steps=steps, quantity=4, learn_lam=True, neighbors=2)
    data = bags()
    out = layer(data)
    assert out.shape == ((4, 4 * 8) if kind is DiffusionPooling else (4, 6, 8))
    out.square().mean().backward()
    lonely = [name for name, p in layer.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # A state that only starts a solve has no gradient.
    silent = ("state",) if steps is None and kind is DiffusionLayer else ()
    assert [name for name in lonely if not any(part in name for part in silent)] == []
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = layer(data[:, order])
    assert_close(moved, out if kind is DiffusionPooling else out[:, order], rtol=1e-7, atol=1e-9)


def test_padded_bags_pool_to_the_same():
    layer = layer_of(DiffusionPooling, quantity=2, steps=None, eta=0.5)
    data = bags()
    padded = torch.cat([data, torch.full((4, 3, 8), torch.inf, dtype=F64)], 1)
    mask = torch.tensor([False] * 6 + [True] * 3).expand(4, -1)
    assert_close(layer(padded, mask), layer(data), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", STEPS)
def test_the_solution_has_one_entry_a_head_and_sample(steps):
    layer = layer_of(steps=steps)
    layer(bags())
    assert layer.last_solution.result.shape == (4, 2)
    assert layer.last_solution.residual.shape == (4, 2)
    assert bool(layer.last_solution.converged.all()) == (steps is None)
    assert layer.energy.shape == (4, 2)
    assert layer.association_matrix.shape == (4, 2, 6, 6)
    layer((bags(), bags()[:, :0], bags()))
    assert layer.energy.shape == (4, 2)


def test_clear_recall_diffuses_less_than_unclear_recall():
    data = bags()
    sharp, blurred = (
        layer_of(beta=1e3, adaptive_eta=True, eta=1.0),
        layer_of(beta=1e-4, adaptive_eta=True, eta=1.0),
    )
    for layer, expected in ((sharp, 0.0), (blurred, 1.0)):
        parts = layer._unpack(data)
        clarity = layer._clarity(layer._project(parts, None, None), None).detach()
        assert clarity.shape == (4, 2)
        assert float((clarity - 1 / (1 + math.exp(-10 * (expected - 0.5)))).abs().max()) < 0.05


def test_copies_files_and_pickles_give_the_same_layer():
    layer = layer_of(steps=None, learn_lam=True)
    data = bags()
    out = layer(data)
    for other in (copy.deepcopy(layer), _through_file(layer)):
        assert_close(other(data), out)
    fresh = layer_of(seed=5, steps=None, learn_lam=True)
    fresh.load_state_dict(layer.state_dict())
    assert_close(fresh(data), out)


def _through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_strengths_may_differ_by_head():
    layer = layer_of(lam=torch.tensor([0.0, 2.0]), eta=torch.tensor([0.3, 0.0]), steps=3)
    data = bags()
    found = layer.get_association_matrix(data)
    for head, (lam, eta) in enumerate([(0.0, 0.3), (2.0, 0.0)]):
        alike = layer_of(lam=lam, eta=eta, steps=3)
        alike.load_state_dict(layer.state_dict(), strict=False)
        assert_close(found[:, head], alike.get_association_matrix(data)[:, head], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(dtype):
    layer, data = layer_of(steps=2), bags()
    exact = layer(data)
    found = copy.deepcopy(layer).to(dtype)(data.to(dtype))
    assert found.dtype == dtype
    # A few dozen roundings of sums of some ten terms, of an output of size one.
    apart = (found.double() - exact).abs().max() / exact.abs().max()
    assert float(apart.detach()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_autocast_is_near_float32(steps, sparse):
    layer, data = layer_of(steps=steps, sparse=sparse, neighbors=2).float(), bags().float()
    exact = layer(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(data)
    assert out.dtype == torch.bfloat16
    # A few roundings of each of the projections, scores and sums; a graph that was rounded would change its edges.
    apart = (out.float() - exact).abs().max() / exact.abs().max()
    assert float(apart.detach()) < 12 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.5}, "lam must be >= 0"),
        ({"lam": torch.nn.Parameter(torch.ones(()))}, "learn_lam=True"),
        ({"eta": torch.ones(3)}, r"one entry a head, \(2,\)"),
        ({"learn_eta": True, "eta": 0.0}, "eta must be > 0, to be learned"),
        ({"diffusion": "spectral"}, "not one of"),
        ({"diffusion_steps": 3}, "needs diffusion='explicit'"),
        ({"attention": "sparse"}, "not one of"),
        ({"laplacian": "normalised"}, "Did you mean 'normalized'"),
        ({"k_neighbors": 5}, "is called neighbo"),
        ({"energy_stop_tol": 1e-3}, "atol=sqrt"),
        ({"adaptive_temperature": float("inf")}, "adaptive_temperature must be a finite number"),
        ({"mask_in_loop": True, "separation": "lsr"}, "similarity='dot'"),
        ({"neighbors": 0}, "neighbo"),
    ],
)
def test_options_that_cannot_be_meant_are_errors_that_help(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DiffusionHopfield(**{**WIDTHS, **options})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stored_graph": torch.ones(4, 5, 5, dtype=F64)}, "stored_graph has 5 nodes"),
        ({"stored_graph": "knn"}, "must be a Graph or an adjacency tensor"),
        ({"stored_graph": -torch.ones(6, 6, dtype=F64)}, ">= 0"),
        ({"state_pattern_padding_mask": torch.zeros(4, 3, dtype=torch.bool)}, "state_pattern_padding_mask"),
    ],
)
def test_graphs_and_masks_that_do_not_fit_are_errors(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        layer_of()(bags(), **given)


def test_layers_are_built_from_settings():
    layer = build({"model": "diffusion", "input_size": 8, "lam": 2.0})
    assert isinstance(layer, DiffusionHopfield)
    assert isinstance(build({"model": "diffusion_pooling", "input_size": 8}), DiffusionPooling)
    assert isinstance(build({"model": "diffusion_lookup", "input_size": 8}), DiffusionLayer)


@pytest.mark.parametrize("steps", [1, None])
def test_predictions_of_a_trained_network_do_not_depend_on_the_batch(steps):
    bags = BitPatternSet(num_bags=160)
    items = [bags[i] for i in range(160)]
    data = torch.stack([item["data"] for item in items]).float()
    target = torch.stack([item["target"] for item in items]).float()
    torch.manual_seed(0)
    layer = DiffusionHopfield(
        input_size=8, num_heads=2, hidden_size=8, steps=steps, inject="input", eta=0.5, lam=0.5
    )
    network = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(128, 1), torch.nn.Flatten(0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for rows in torch.arange(160).repeat(6).split(32):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(data[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        together = torch.cat([network(part) for part in data.split(32)])
        alone = torch.cat([network(part) for part in data.split(1)])
    assert float((together - alone).abs().max()) < 1e-4
    assert torch.equal(together > 0, alone > 0)
    assert float(together.std()) > 0.01
