"""The units against numbers recorded from the authors' code (tests/data/lwpf_reference.json)."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hopdeq_lwpf.forgetting import PFU, Forgetting, ReLU

RECORD = json.loads((Path(__file__).parent / "data" / "lwpf_reference.json").read_text())
CASES = RECORD["cases"]
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-7}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


def unit_of(case: dict, **options) -> Forgetting:
    spec = case["spec"]
    if spec["unit"] == "relu":
        return ReLU().eval()
    threshold = "median" if spec["mu"] == "dmedian" else float(spec["mu"])
    bias = "threshold" if spec["bias"] == "mu" else spec["bias"]
    return PFU(threshold, bias, scope="tensor", **options).eval()


def tensor(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def same(actual: Tensor, recorded: object) -> None:
    assert_close(actual, tensor(recorded, actual.dtype), **TOLERANCE[actual.dtype])


def run_unit(case: dict) -> None:
    value, kept = unit_of(case)(tensor(case["x"]))
    same(value, case["D"])
    same(kept, case["mask"])
    same(kept * torch.softmax(value, -1), case["activation"])
    if "softmax_D_lastdim" in case:
        same(torch.softmax(value, -1), case["softmax_D_lastdim"])
    if "mu_value" in case:
        unit = unit_of(case)
        median = unit.draw(tensor(case["x"]))
        same(tensor(unit.threshold) if median is None else median, case["mu_value"])


def run_train(case: dict) -> None:
    x, spec = tensor(case["x"]), case["spec"]
    middle = x.median() if spec["mu"] == "dmedian" else float(spec["mu"])
    unit = unit_of(case)
    value, kept = unit(x, threshold=middle + tensor(case["eps_applied"][0]))
    same(value, case["D"])
    same(kept, case["mask"])
    # The official sigma is squared; one seed, one scalar for the whole tensor.
    seeded = unit_of(case, noise=spec["sigma"] ** 2, generator=torch.Generator().manual_seed(case["seed"]))
    value, kept = seeded.train()(x)
    same(value, case["D"])
    same(kept, case["mask"])


def run_attention(case: dict) -> None:
    q, k, v = (tensor(case[name]) for name in "qkv")
    logits = q @ k.transpose(-1, -2) * case["scale"]
    value, kept = unit_of(case)(logits)
    attn = kept * torch.softmax(value, -1)
    for name, actual in {"logits": logits, "attn": attn, "rowsum": attn.sum(-1)}.items():
        if name in case:
            same(actual, case[name])
    same(value, case["D"])
    same(kept, case["mask"])
    same(attn @ v, case["out"])


def run_pool(case: dict) -> None:
    # The recorded pooling runs down the instances, dimension 0.
    value, kept = unit_of(case)(tensor(case["logits"]).T)
    weights = (kept * torch.softmax(value, -1)).T
    same(weights, case["weights"])
    same((weights * tensor(case["emb"])).sum(0), case["pooled"])


def run_gradient(case: dict) -> None:
    upstream = tensor(case["upstream"])
    x = tensor(case["x"]).requires_grad_()
    value, kept = unit_of(case)(x)
    (of_value,) = torch.autograd.grad((value * upstream).sum(), x, retain_graph=True)
    same(of_value, case["grad_of_D"])
    (of_activation,) = torch.autograd.grad((kept * torch.softmax(value, -1) * upstream).sum(), x)
    same(of_activation, case["grad_of_activation"])


def run_retrieval(case: dict) -> None:
    patterns, z, beta = tensor(case["X"], torch.float64), tensor(case["z0"], torch.float64), case["beta"]
    median = case["spec"].get("mu") == "dmedian"
    unit = unit_of(case, tracked=True) if median else unit_of(case)

    def step(z: Tensor, unit: Forgetting = unit, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        value, kept = unit.project(beta * patterns @ z, threshold)
        weights = kept * torch.softmax(value, -1)
        energy = 0.5 * z @ z - torch.logsumexp(value, -1) / beta
        return patterns.T @ weights, energy, kept, weights

    iterates, energies = [], []
    for _ in range(2 * case["converged_at"] + 200):
        after, energy, kept, weights = step(z)
        energies.append(energy)
        iterates.append(after)
        z = after
    same(torch.stack(iterates[:6]), case["iterates_1_to_6"])
    same(z, case["fixed_point"])
    recorded = case["energies_first_8"]  # fewer where the recorded run stopped earlier
    same(torch.stack(energies[: len(recorded)]), recorded)
    rises = bool((torch.stack(energies).diff() > 1e-12).any())
    assert rises is not case["energy_monotone"]
    assert not (unit.has_energy and rises)
    same(kept, case["mask"])
    same(weights.sum(), case["activation_sum"])
    # Recorded as beta X^T (diag f - f f^T) X, in which the threshold does not move with the state.
    frozen = unit_of(case)
    threshold = frozen.draw(beta * patterns @ z)
    jacobian = torch.autograd.functional.jacobian(lambda z: step(z, frozen, threshold)[0], z)
    radius = tensor(case["jacobian_rho_smooth_units_only"], torch.float64)
    assert_close(torch.linalg.eigvals(jacobian).abs().max(), radius, rtol=0, atol=1e-9)


RUNNERS = {
    "relu_unit": run_unit,
    "pfu_eval": run_unit,
    "pfu_median_edge": run_unit,
    "pfu_train": run_train,
    "attention_2d": run_attention,
    "attention_4d_whole_tensor": run_attention,
    "deeprc_pool_dim0": run_pool,
    "gradient": run_gradient,
    "retrieval": run_retrieval,
}


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_recorded_case(case):
    RUNNERS[case["kind"]](case)


def test_every_recorded_case_is_run():
    (run,) = (mark for mark in test_recorded_case.pytestmark if mark.name == "parametrize")
    assert len({case["id"] for case in run.args[1]}) == RECORD["n_cases"] == 64
    assert {case["kind"] for case in CASES} == set(RUNNERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [ReLU(), PFU(scope="tensor"), PFU(0.5, 0.0)], ids=repr)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dtypes_that_the_recorded_code_refuses_or_changes(unit, dtype, mode):
    assert "heaviside" in RECORD["quirks"]["ReLU on bfloat16"]
    assert RECORD["quirks"]["PFU train mode on float16 -> dtype"] == "torch.float32"
    unit = PFU(unit.threshold, unit.bias, noise=0.1) if isinstance(unit, PFU) else unit
    value, kept = unit.train(mode == "train")(torch.tensor([[2.0, -1.0, 3.0, -4.0]], dtype=dtype))
    assert value.dtype == kept.dtype == dtype
    assert kept.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_defaults_and_number_that_the_recorded_code_cannot_take():
    assert "TypeError" in RECORD["quirks"]["PFU()"]
    assert "TypeError" in RECORD["quirks"]["PFU(bias='mu',mu=0.5)"]
    x = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert PFU()(x)[0].tolist() == [4.0, 2.0, 3.0, 2.0]
    assert PFU(0.5)(x - 1)[0].tolist() == [3.0, 0.5, 2.0, 1.0]


def test_minus_infinity_is_padding_not_nan():
    assert "nan" in RECORD["quirks"]["PFU(bias='mu',mu='0.5') with -inf"]
    value, kept = PFU(0.5)(torch.tensor([[1.0, -torch.inf]]))
    assert value.tolist() == [[1.0, -torch.inf]]
    assert kept.tolist() == [[1.0, 0.0]]


def test_recorded_limit_cycle():
    text = RECORD["quirks"]["cycle: X, beta=1, D(x)=x if x>.5 else -5 (PFU bias=-5,mu=0.5), period 2"]
    cycle = json.loads(text.replace("'", '"'))
    patterns, unit = tensor(cycle["X"], torch.float64), PFU(0.5, -5.0)
    z = tensor([cycle["orbit"][0]], torch.float64)
    orbit = []
    for _ in range(40):
        value, kept = unit.project(patterns @ z)
        z = patterns.T @ (kept * torch.softmax(value, -1))
        orbit.append(z.item())
    assert not unit.has_energy
    assert sorted(orbit[-2:]) == pytest.approx(sorted(cycle["orbit"]), abs=1e-10)
