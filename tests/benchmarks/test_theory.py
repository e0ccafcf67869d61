"""The experiments on the theory's own ground: what they claim holds on small sizes, and the page is the records'."""

import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))

import theory  # noqa: E402
import theory_descent as descent  # noqa: E402
import theory_page  # noqa: E402
import theory_regression as regression  # noqa: E402


PAGE = " ".join((ROOT / "benchmarks" / "evidence" / "README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def records():
    return {name: theory_page.load(name) for name in theory.EXPERIMENTS}


def factors(out=7, n_in=9, r=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return descent.gaussian(r, n_in, generator=generator), descent.gaussian(out, r, generator=generator)


def test_matrix_factorization_is_fastest_with_reflora_and_its_pair_is_balanced():
    settings = {"sizes": [[30, 30, 3]], "learning_rates": [0.03], "grid": [0.03, 10.0], "seeds": 2}
    settings |= {"steps": 150, "plotted_steps": 150, "reached": 1e-2, "std_A": 1.0}
    result = descent.matrix_factorization(settings)
    steps = {entry["method"]: entry["steps"] for entry in result["reached"]}
    assert all(s < o for s, o in zip(steps["RefLoRA"], steps["RefLoRA-S"], strict=True))
    assert all(s < 150 for s in steps["RefLoRA-S"])
    assert not any(isinstance(s, int) and s < 2 * max(steps["RefLoRA"]) for s in (*steps["LoRA"], *steps["ScaledGD"]))
    for entry in result["grid"]:
        assert entry["steps"] == (steps[entry["method"]] if entry["lr"] == 0.03 else ["diverged"] * 2)
    curves = {curve["method"]: curve for curve in result["curves"]}
    for method, balanced in (("LoRA", False), ("ScaledGD", False), ("RefLoRA-S", True), ("RefLoRA", True)):
        A, B, *_ = curves[method]["norms"][20]
        assert (abs(A / B - 1) < 1e-6) is balanced, method


def test_norms_are_those_of_the_refactored_pair():
    A, B = factors()
    A.grad, B.grad = torch.ones_like(A), 2 * torch.ones_like(B)
    assert descent.norms("LoRA", A, B) == pytest.approx([M.norm().item() for M in (A, B, A.grad, B.grad)])
    S, _ = descent.refactoring_of("RefLoRA", A, B)
    values, vectors = torch.linalg.eigh(S)
    root = vectors @ values.sqrt().diag() @ vectors.T
    inverse = torch.linalg.inv(root)
    expected = [root @ A, B @ inverse, inverse @ A.grad, B.grad @ root]
    assert descent.norms("RefLoRA", A, B) == pytest.approx([M.norm().item() for M in expected], rel=1e-6)


def test_scaled_gd_projects_the_gradient_onto_the_factors_spaces():
    A, B = factors()
    G = descent.gaussian(7, 9, generator=torch.Generator().manual_seed(5))
    A.grad, B.grad = B.T @ G, G @ A.T
    descent.scaled_gd(A, B)
    torch.testing.assert_close(B @ A.grad, B @ torch.linalg.pinv(B) @ G)
    torch.testing.assert_close(B.grad @ A, G @ torch.linalg.pinv(A) @ A)
    A.grad, B.grad = B.T @ G, G @ A.T
    descent.scaled_gd(A, torch.zeros_like(B))
    torch.testing.assert_close(A.grad, B.T @ G)


def test_one_step_of_linear_regression():
    """The bound (6) holds, RefLoRA minimizes (8), and below Theorem 3's threshold its other branch makes it 0."""
    A, B = factors(out=6, n_in=8)
    X, Y = (descent.gaussian(n, 12, generator=torch.Generator().manual_seed(n)) for n in (8, 6))
    problem = regression.Regression(X, Y, A, B)
    eta = problem.step_sizes(200)
    steps = {method: problem.step(method, eta) for method in regression.REGRESSION_METHODS}
    for step in steps.values():
        assert (step["bound"] >= step["loss"]).all()
    A_, B_ = A - eta[50] * B.T @ problem.G, B - eta[50] * problem.G @ A.T
    assert steps["LoRA"]["loss"][50].item() == pytest.approx(((B_ @ A_ @ X - Y) ** 2).sum().item() / 24)

    threshold = problem.curves(eta)["threshold"]
    assert ((steps["RefLoRA"]["objective"] <= steps["RefLoRA-S"]["objective"]) | (eta < threshold)).all()
    assert ((steps["RefLoRA-S"]["objective"] <= steps["LoRA"]["objective"]) | (eta < threshold)).all()
    small = problem.step("RefLoRA", eta, small=True)
    below = eta < threshold * 0.999
    assert below.any()
    assert small["objective"][below].max() < 1e-12
    # The package's own branch and the objective's c are the same S: a second-order check of the step itself.
    S, S_inv = descent.refactoring_of("RefLoRA", A, B)
    t = (A @ A.T * S).sum()  # tr(P S) = tr(Q S⁻¹)
    goal = 1 / (problem.L * eta[0])
    c = (goal + (goal**2 - 4 * t**2).sqrt()) / (2 * t)
    A_, B_ = A - eta[0] * S_inv / c @ B.T @ problem.G, B - eta[0] * problem.G @ A.T @ S * c
    assert small["loss"][0].item() == pytest.approx(problem.loss_at(B_ @ A_).item(), rel=1e-6)
    torch.testing.assert_close(small["loss"][~below][5:], steps["RefLoRA"]["loss"][~below][5:])


def test_regression_from_unbalanced_factors_takes_larger_steps_with_reflora():
    settings = {**regression.REGRESSION, "std_B": [0.2], "plotted_std_B": [0.2], "points": 200, "plotted_points": 20}
    result = regression.linear_regression({**settings, "draws": 5})
    for draw in result["draws"]:
        widest = {method: summary["widest"] for method, summary in draw["methods"].items()}
        assert widest["RefLoRA"] > 1.5 * widest["LoRA"]
        assert all(summary["bound_holds"] for summary in draw["methods"].values())
    assert [len(result["curves"][0]["methods"][m]["loss"]) for m in ("LoRA", "RefLoRA, small η")] == [20, 20]
    eta = torch.tensor([1e-9, 1e-8], dtype=torch.float64)
    X, Y = (descent.gaussian(6, 12, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    problem = regression.Regression(X, Y, *factors(6, 6, 2))
    with pytest.raises(ValueError, match="too small"):
        regression.summary(problem.step("LoRA", eta), eta, problem.loss)


def test_gauge():
    """Under SGD RefLoRA's curves coincide, RefLoRA-S's for scales only, LoRA's never; under Adam none does."""
    result = descent.gauge({**descent.GAUGE, "size": [12, 10, 3], "steps": 60, "scales": [1, 3, 27]})
    differences = {(run["optimizer"], run["method"], run["start"]): run["difference"] for run in result["runs"]}

    def coincide(kind, method, start):
        difference = differences[kind, method, start]
        return difference is not None and difference["largest"] < 1e-3

    for start in ("c = 3", "c = 27", "T"):
        assert coincide("SGD", "RefLoRA", start)
        assert coincide("SGD", "ScaledGD", start)
        assert coincide("SGD", "RefLoRA-S", start) is (start != "T")
        assert not coincide("SGD", "LoRA", start)
        assert not any(coincide("Adam", method, start) for method in descent.GAUGE_METHODS["Adam"])
    runs = {(run["optimizer"], run["method"], run["start"]): run["loss"] for run in result["runs"]}
    assert runs["SGD", "RefLoRA", "c = 1"][-1] < runs["SGD", "RefLoRA", "c = 1"][0] / 3


def test_page_is_drawn_from_the_records_alone(tmp_path, monkeypatch, capsys):
    for name in theory.EXPERIMENTS:
        shutil.copy(theory.RECORDS / f"{name}.json", tmp_path)
    monkeypatch.setattr(theory_page, "RECORDS", tmp_path)
    theory_page.write()
    printed = capsys.readouterr().out
    for name, (_, tables) in theory_page.PARTS.items():
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert all(table(theory_page.load(name)) in printed for table in tables)
        assert f"(../records/evidence/theory/{name}.png)" in PAGE


def test_tables_are_the_records(records):
    page = (ROOT / "benchmarks" / "evidence" / "README.md").read_text(encoding="utf-8")
    for name, (_, tables) in theory_page.PARTS.items():
        assert all(table(records[name]) in page for table in tables)
        assert records[name]["environment"]["uncommitted_changes"] is False
        assert records[name]["settings"] == theory.EXPERIMENTS[name][1]
    seconds = sum(record["seconds"] for record in records.values())
    assert f"{seconds:.0f} s on one core" in PAGE


def test_what_the_page_says_of_matrix_factorization(records):
    record = records["matrix_factorization"]
    entries = {(*entry["size"], entry["lr"], entry["method"]): entry for entry in record["reached"]}

    def median(size, lr, method):
        return statistics.median(entries[(*size, lr, method)]["steps"])

    sizes = record["settings"]["sizes"]
    for size in sizes:
        for lr in record["settings"]["learning_rates"]:
            assert median(size, lr, "RefLoRA") < median(size, lr, "RefLoRA-S")
        assert median(size, 0.03, "RefLoRA-S") < median(size, 0.03, "ScaledGD")
    ratios = [median(size, 0.03, "ScaledGD") / median(size, 0.03, "RefLoRA") for size in sizes]
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times fewer steps than ScaledGD" in PAGE
    assert set(entries[100, 100, 8, 0.03, "LoRA"]["steps"]) == {"diverged"}
    assert not any("diverged" in entries[(*size, 0.03, "LoRA")]["steps"] for size in sizes[1:])
    assert median([50, 30, 5], 0.03, "LoRA") < median([50, 30, 5], 0.03, "ScaledGD")
    losses = next(c["loss"] for c in record["curves"] if c["method"] == "RefLoRA-S" and c["lr"] == 0.03)
    lowest = min(range(len(losses)), key=losses.__getitem__)
    assert losses[-1] > 10 * losses[lowest]
    assert f"rises again after step {lowest}" in PAGE
    for entries_of_size in theory_page.best_rates(record).values():
        best = {method: theory_page.median_steps(entry) for method, entry in entries_of_size.items()}
        assert best["ScaledGD"] < best["RefLoRA"] < best["RefLoRA-S"] < best["LoRA"]
        # The best of each method lies inside the grid.
        assert all(min(entry["lr"] for entry in record["grid"]) < e["lr"] < 1 for e in entries_of_size.values())
    assert max(entries[100, 100, 8, 0.03, "RefLoRA-S"]["end"][1:]) < 1e-20


def test_what_the_page_says_of_linear_regression(records):
    draws = records["linear_regression"]["draws"]
    assert all(s["bound_holds"] for draw in draws for s in draw["methods"].values())
    for std_B, lower, wider in ((1.0, 161, 90), (0.2, 91, 200), (0.05, 49, 200)):
        methods = [draw["methods"] for draw in draws if draw["std_B"] == std_B]
        assert sum(m["RefLoRA"]["least"] < m["LoRA"]["least"] for m in methods) == lower
        assert sum(m["RefLoRA"]["widest"] > m["LoRA"]["widest"] for m in methods) == wider
        assert f"{lower} of {len(methods)}" in PAGE
    ratios = {}
    for std_B in (0.2, 0.05):
        widest = {
            m: statistics.median(d["methods"][m]["widest"] for d in draws if d["std_B"] == std_B)
            for m in ("LoRA", "RefLoRA")
        }
        ratios[std_B] = widest["RefLoRA"] / widest["LoRA"]
    assert f"{ratios[0.2]:.1f} and {ratios[0.05]:.1f} times as large in the median" in PAGE


def test_what_the_page_says_of_the_gauge(records):
    runs = {(run["optimizer"], run["method"], run["start"]): run for run in records["gauge"]["runs"]}
    for start in ("c = 3", "c = 9", "c = 27", "T"):
        assert runs["SGD", "RefLoRA", start]["difference"]["largest"] < 1e-10
    assert runs["SGD", "LoRA", "c = 3"]["difference"]["largest"] > 1
    assert runs["SGD", "LoRA", "c = 9"]["difference"] is None
    ends = {m: runs["Adam", m, "c = 27"]["loss"][-1] for m in descent.GAUGE_METHODS["Adam"]}
    best = runs["Adam", "LoRA", "c = 1"]["loss"][-1]
    for method, end in ends.items():
        assert f"{end / best:.1f} times for {method}" in PAGE
    T = {m: runs["Adam", m, "T"]["difference"]["last"] for m in descent.GAUGE_METHODS["Adam"]}
    assert min(T, key=T.get) == "RefLoRA"
    assert max(T, key=T.get) == "RefLoRA-O"
