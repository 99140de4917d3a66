"Rivals: each against the closed form of its paper; and the board: fair, resumable, and judged by its rule."
import json
from dataclasses import replace
from functools import partial
from importlib.resources import files

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.testing import assert_close
from test_unlearn import TINY, gen, norm, refused, request_of, setting, tiny

from unlearn_nb import baselines
from unlearn_nb.baselines import (climb, concept_cut, cut_loss, erasediff, fisher, importance, neggrad, no_edit,
                                  noise_states, ordinary, pictures, restrict, salient, salun, selective_amnesia,
                                  noised_evenly, towards)
from unlearn_nb.cli import leaderboard
from unlearn_nb.leaderboard import (METHODS, RULE, Board, board_table, tune_and_test, forgotten, beyond_edge, score,
                                    short, summary)
from unlearn_nb.files import fingerprint
from unlearn_nb.surgery import symmetric
from unlearn_nb.parametrization import Full
from unlearn_nb.states import own_paths
from unlearn_nb.unlearn import Problem, unlearn
from unlearn_nb.weights import unit_eps
from unlearn_nb.zoo import load

RAW = replace(TINY, damping=0.)
ALL = {name: method for name, (method, _) in METHODS.items()}
seeds = st.integers(0, 2**31)


@pytest.fixture
def problem():
    model, request, retain = setting()
    x_f, x_s = model.encode([request.image]), model.encode([request.surrogate])
    form = Full(model, {})
    yield Problem(model, x_f, x_s, own_paths(model, [request], x_s, 4), retain, form, RAW, PartialState())
    form.restore()


def flat(g): return torch.cat([v.flatten() for v in g])
def lists(seed, n=2): return ([torch.randn(s, generator=g) for s in ((3, 4), (5,))] for g in [gen(seed)] for _ in range(n))


# --- states ---

@given(st.integers(1, 40), st.integers(0, 999), seeds)
@settings(max_examples=30)
def test_levels_are_spread_evenly(n, t_min, seed):
    model = setting()[0]
    x = torch.zeros(n, *model.shape)
    x_t, t = spread(model, x, gen(seed), t_min)
    width = (1000 - t_min)/n
    assert x_t.shape == x.shape and all(int(t_min + k*width) <= level <= t_min + (k + 1)*width for k, level in enumerate(t.tolist())) and t.max() <= 999


def test_ordinary_states_lead_to_their_own_picture():
    model, _, retain = setting()
    x = pictures(retain)
    assert x.shape == retain.x0.shape and torch.equal(pictures([(1, retain), (2, retain)]), torch.cat([x, x]))
    x_t, t, goal = ordinary(model, x, 12, gen())
    assert all(any(torch.equal(y, z) for z in x) for y in goal)
    a, s = model.scales(t)
    assert ((x_t - a*goal)/s).std().item() == pytest.approx(1, abs=.1)


def test_noise_is_the_right_answer_for_noise_states():
    model, request, _ = setting()
    x_t, t, goal = noise_states(model, model.encode([request.image]), 64, gen())
    a, s = model.scales(t)
    eps = (x_t - a*goal)/s
    assert -1e-3 <= eps.min() and eps.max() <= 1 + 1e-3 and eps.mean().item() == pytest.approx(.5, abs=.05)


# --- closed forms ---

@given(st.floats(.01, .99), st.floats(.05, .999), seeds)
@settings(max_examples=60)
def test_importance_weights_are_ratios_of_densities(lam, a, seed):
    "Against torch's own normal densities; and (1 - lam) w_x + lam w_f = 1."
    g, s = gen(seed), (1 - a*a)**.5
    x, x_f = torch.randn(2, 3, 1, 2, 2, generator=g, dtype=torch.float64)
    m = a*x + s*torch.randn(x.shape, generator=g, dtype=torch.float64)
    p, p_f = (Normal(a*y, s).log_prob(m).flatten(1).sum(1) for y in (x, x_f))
    mix = torch.logaddexp(p + torch.tensor(1 - lam).log(), p_f + torch.tensor(lam).log())
    ones = torch.ones(3, dtype=torch.float64)
    w_x, w_f = importance(m, x, x_f, a*ones.view(-1, 1, 1, 1), s*ones.view(-1, 1, 1, 1), lam)
    assert_close(w_x, (p - mix).exp(), rtol=1e-5, atol=1e-12)
    assert_close(w_f, (p_f - mix).exp(), rtol=1e-5, atol=1e-12)
    assert_close((1 - lam)*w_x + lam*w_f, ones)


def test_importance_far_apart_is_a_choice_and_not_a_nan():
    x, y = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    one = torch.ones(1, 1, 1, 1)
    for m, expected in ((x, (2., 0.)), (y, (0., 2.))):
        assert [w.item() for w in importance(m, x, y, one, .01*one, .5)] == pytest.approx(expected)


@given(seeds)
def test_restrict_with_one_is_symmetric(seed):
    g_f, g_r = lists(seed)
    assert_close(flat(restrict(g_f, g_r, 1.)), flat(symmetric(g_f, g_r)))


@given(seeds, st.floats(.1, 10))
def test_restrict_harms_neither(seed, lam):
    g_f, g_r = lists(seed)
    d = flat(restrict(g_f, g_r, lam))
    assert d @ flat(g_f) >= -1e-4*(1 + lam) and d @ flat(g_r) >= -1e-4*(1 + lam)


@given(seeds)
def test_concept_cut_projects_gradients_of_length_one(seed):
    g_f, g_r = lists(seed)
    g_f = [f/f.norm() for f in g_f]
    for d, f, r in zip(concept_cut(g_f, g_r), g_f, g_r):
        dot = (f*r).sum()
        if dot >= 0: assert torch.equal(d, f)
        else: assert_close(d, f - dot/r.square().sum()*r)


@given(seeds, st.floats(.01, 10))
def test_a_climb_has_its_length(seed, length):
    g_r, g_f = lists(seed)
    assert norm([d - r for d, r in zip(climb(g_r, g_f, length), g_r)]).item() == pytest.approx(length, rel=1e-3)
    assert torch.equal(flat(climb(g_r, [torch.zeros_like(f) for f in g_f], length)), flat(g_r))


def test_retrack_with_one_neighbour_is_the_surrogate_loss(problem):
    y = pictures(problem.retain)[:1]
    x_t, t, _ = ordinary(problem.denoiser, problem.x_f, 6, gen())
    assert_close(towards(problem.denoiser, x_t, t, y), y.expand(6, -1, -1, -1))


def test_retrack_has_the_gradient_of_its_sum_of_squares(problem):
    "sum_k p_k ||eps - eps_k||^2, as its paper writes it, with autograd as the judge."
    y, d = pictures(problem.retain)[:3], problem.denoiser
    x_t, t, _ = ordinary(d, problem.x_f, 5, gen())
    a, s = d.scales(t)
    eps_k = (x_t[:, None] - a[:, None]*y)/s[:, None]
    p = (-eps_k.square().flatten(2).sum(2)/2).softmax(1)
    _, ours = problem.gradient((x_t, t, towards(d, x_t, t, y)), unit_eps)
    out = d(x_t, t)
    x0 = torch.stack([d.predict(x[None], int(level))[0] for x, level in zip(x_t, t)])
    assert_close(d.target(x_t, x0, t), out.detach(), rtol=1e-3, atol=1e-3)
    scale = d.snr(t).view(-1, 1, 1, 1)*d.gain(t)**2
    written = sum((p[:, k].view(-1, 1, 1, 1)*scale*(out - d.target(x_t, y[k].expand_as(x_t), t)).square()).mean() for k in range(3))
    theirs = torch.autograd.grad(written, problem.parametrization.weights)
    assert_close(flat(ours), flat(theirs), rtol=1e-3, atol=1e-4*flat(theirs).abs().max().item())


def test_erasediff_never_improves_forgetting_less_than_it_says(problem):
    eta = .1
    d, _ = erasediff(problem, eta)(1, gen(3))
    _, g_u = problem.gradient(noise_states(problem.denoiser, problem.x_f, 4, gen(3)), unit_eps)
    assert (flat(d) @ flat(g_u)/flat(g_u).square().sum()).item() >= eta - 1e-4


def test_salun_moves_its_share_and_nothing_else(problem):
    mask = salient(problem, .5)
    assert flat(mask).mean().item() == pytest.approx(.5, abs=.01) and set(flat(mask).tolist()) == {0., 1.}
    model, request, retain = setting()
    problem.parametrization.restore()
    moved = unlearn(model, [request], retain, RAW, method=salun).delta
    still = 1 - torch.cat([(moved[k] != 0).float().flatten() for k in moved]).mean().item()
    assert still == pytest.approx(.5, abs=.01)


def test_the_spring_of_selective_amnesia_holds(problem):
    F = fisher(problem, n=4)
    assert all((f >= 0).all() for f in F) and flat(F).sum() > 0
    model, request, retain = setting()
    problem.parametrization.restore()
    loose, held = (unlearn(model, [request], retain, replace(RAW, steps=6), method=partial(selective_amnesia, lam=lam)).delta for lam in (0., 1e8))
    weight = {k: f.sqrt() for k, f in zip(dict(model.net.named_parameters()), F)}
    assert norm([weight[k]*held[k].float() for k in held]) < .8*norm([weight[k]*loose[k].float() for k in loose])


def test_a_cut_loss_pulls_no_further_than_its_cut(problem):
    states = ordinary(problem.denoiser, problem.x_f, 4, gen())
    loss, g = problem.gradient(states, unit_eps, cut_loss(1e-9))
    assert loss == pytest.approx(-1e-9, rel=.05) and flat(g).abs().max() == 0
    loss, g = problem.gradient(states, unit_eps, cut_loss(1e9))
    ascent = problem.gradient(states, unit_eps)
    assert loss == pytest.approx(-ascent[0], rel=1e-4)
    assert_close(flat(g), -flat(ascent[1]), rtol=1e-4, atol=1e-6)


def test_climbing_is_minus_descending(problem):
    d, _ = neggrad(problem)(1, gen(1))
    _, g = problem.gradient(ordinary(problem.denoiser, problem.x_f, 8, gen(1)), unit_eps)
    assert_close(flat(d), -flat(g))


def test_no_edit_points_at_a_kept_picture(problem, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "edit_weigh_project", seen.append)
    no_edit(problem)
    assert any(torch.equal(seen[0].x_s[0], x) for x in pictures(problem.retain)) and torch.equal(seen[0].own.goal[0, 0], seen[0].x_s[0])
    assert torch.equal(seen[0].x_f, problem.x_f)


# --- the same work for all ---

@pytest.mark.parametrize("name", ALL)
def test_every_method_runs_and_does_the_same_work(name):
    "States through the net in a step: 8 (forward 1, back 2: 24 units of work); SISS, whose states go back twice, 4 (5 units each: 20)."
    model, request, retain = setting()
    before, rows = {k: v.clone() for k, v in model.net.state_dict().items()}, []
    hook = model.net.register_forward_hook(lambda net, inputs, out: rows.append(len(inputs[0])) if torch.is_grad_enabled() else None)
    own, method = METHODS[name][1][0], METHODS[name][0]
    known = set(vars(RAW))
    method = partial(method, **{k: v for k, v in own.items() if k not in known})
    try:
        unlearn(model, [request], retain, replace(RAW, steps=1), method=method)
        one, rows[:] = sum(rows), []
        fix = unlearn(model, [request], retain, replace(RAW, steps=3), method=method)
    finally: hook.remove()
    assert sum(rows) - one == 2*(8 if "SISS" not in name or name == "SISS without IS" else 8*3//5)
    assert any(v.any() for v in fix.delta.values()) and all(torch.equal(v, model.net.state_dict()[k]) for k, v in before.items())
    assert len(fix.card["log"]) == 3


@pytest.mark.parametrize("name", ["SISS", "SISS without IS", "Selective Amnesia"])
def test_a_rival_goes_on_bit_for_bit(name, tmp_path):
    "What a method remembers is in the checkpoint."
    model, request, retain = setting()
    cfg, method = replace(RAW, steps=12), METHODS[name][0]
    def stopping(problem):   # by its name the same method
        direction = method(problem)
        def stops(step, g):
            if step == 11: raise KeyboardInterrupt
            return direction(step, g)
        stops.memory = getattr(direction, "memory", {})
        return stops
    stopping.__name__ = method.__name__
    straight = unlearn(model, [request], retain, cfg, method=method)
    with pytest.raises(KeyboardInterrupt): unlearn(model, [request], retain, cfg, checkpoint=tmp_path/"run", method=stopping)
    assert (tmp_path/"run").exists()
    resumed = unlearn(model, [request], retain, cfg, checkpoint=tmp_path/"run", method=method)
    assert all(torch.equal(straight.delta[k], v) for k, v in resumed.delta.items()) and straight.card["log"] == resumed.card["log"] and straight.card["method"] == method.__name__
    refused(lambda: unlearn(model, [request], retain, cfg, checkpoint=tmp_path/"run", method=neggrad), "method", "neggrad")


@pytest.mark.parametrize("name", ALL)
def test_eight_settings_each(name):
    assert len(METHODS[name][1]) == len({json.dumps(s, sort_keys=True) for s in METHODS[name][1]}) == 8
    assert name.startswith("ours") or all(s["damping"] == 0 for s in METHODS[name][1])
    assert "," not in name   # `--methods` splits there


# --- the board ---

def row(F=(.8, None), psnr=30., **kw): return {"forget": {"reconstruction": [{"F": f} for f in F[1:]], "same_seed": {"F": F[0]}}, "psnr_median": psnr, "psnr_p5": psnr - 5, "cosine_median": .9, "kid_before": 0., "kid_after": .01, "core_seconds": 1., "evaluations": 8, "setting": {}} | kw


def test_merit_follows_the_rule():
    assert merit([row((.9,), 25)]) > merit([row((.6,), 40)]) and merit([row((.9,), 25)]) < merit([row((.75,), 26)])
    assert merit([row(), {"diverged": "at step 3"}]) == (-1., 0.) and forgotten(row((.8, None, .3))) == .3


def test_summary_and_table():
    m = summary([row((.8,), 30), row((1.2,), 34), {"diverged": "at step 1"}])
    assert m["F"] == pytest.approx(.9) and m["psnr_median"] == pytest.approx(32) and m["kid_change"] == pytest.approx(.01) and summary([{"diverged": ""}]) is None
    lines = board_table({"a": {"setting": {"lr": 1., "damping": 0.}, "rows": [row(psnr=20), row(psnr=21)]}, "ours": {"setting": {}, "rows": [row(), row()]}, "b": {"setting": {}, "rows": [{"diverged": ""}]}}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ours", "a", "b"] and "lr=1" in lines[2] and "damping" not in lines[2] and "diverged" in lines[3]


@pytest.fixture
def small(monkeypatch):
    "A board of a tiny model in four evaluations a run."
    model = tiny()
    monkeypatch.setattr(baselines, "Config", lambda **kw: replace(TINY, **kw))
    monkeypatch.setattr(baselines, "propose", lambda d, x: request_of(d).surrogate)
    monkeypatch.setattr(baselines, "fields", lambda _: [type("field", (), {"name": k}) for k in vars(TINY)])
    monkeypatch.setattr(baselines, "LEVELS", (100,))
    monkeypatch.setattr(baselines, "PANELS", {True: range(20, 24), False: range(10, 14)})
    monkeypatch.setattr(baselines, "METHODS", {k: (METHODS[k][0], METHODS[k][1][:4]) for k in ("naive", "NegGrad", "ours")})
    return model


def test_a_board_is_computed_once(small, tmp_path, monkeypatch):
    "Killed in the middle, it goes on; done, it computes nothing; a board of another budget is another board."
    runs, real = [], baselines.measured
    def counted(*what):
        runs.append(what)
        if len(runs) == 6: raise KeyboardInterrupt
        return real(*what)
    monkeypatch.setattr(baselines, "measured", counted)
    what = dict(methods=("naive", "ours"), seeds=(5, 6), tuning=(7, 8), budget=1, echo=lambda line: None)
    with pytest.raises(KeyboardInterrupt): leaderboard(small, tmp_path, **what)
    assert len(list((tmp_path/"rows").iterdir())) == 5
    results = leaderboard(small, tmp_path, **what)
    each = {name: len(r["search"]) + 2 for name, r in results.items()}                  # all settings and those beyond, the best two again; the test
    done = sum(each.values())
    assert all(4 + 2 + 2 <= n <= 4 + 2 + 2 + 2 for n in each.values())
    assert len(runs) == done + 1 and leaderboard(small, tmp_path, **what) == results and len(runs) == done + 1
    assert {p.name for p in tmp_path.iterdir()} == {"rows", "leaderboard.json", "leaderboard.txt", "leaderboard.png"}
    written = json.loads((tmp_path/"leaderboard.json").read_text())
    assert written["rule"] == RULE and written["results"] == results and written["budget"] == 1
    assert [r["seed"] for r in results["ours"]["rows"]] == [5, 6] and all(r["panel"] == [10, 14] for r in results["ours"]["rows"])
    leaderboard(small, tmp_path, **what | {"budget": 2, "methods": ("naive",)})
    assert done + 1 + 8 <= len(runs) <= done + 1 + 10


def test_other_defaults_are_other_rows(small, tmp_path, monkeypatch):
    "A row that was made before a default changed is not taken for one that was made after it."
    board, runs = Board(small, tmp_path, budget=1), []
    monkeypatch.setattr(baselines, "measured", lambda *what: runs.append(what) or {"made": len(runs)})
    assert [board.row("ours", {}, 5, False)["made"] for _ in range(2)] == [1, 1]
    monkeypatch.setattr(baselines, "Config", lambda **kw: replace(TINY, lr=.123, **kw))
    assert board.row("ours", {}, 5, False)["made"] == 2 and runs[1][2].lr == .123


def searched(small, tmp_path, monkeypatch, score):
    "The search of `naive` where a learning rate has the (F, PSNR) that score gives it for a seed: (result, learning rates in the order of their runs)."
    runs = []
    def fake(self, name, setting, seed, tuning):
        runs.append(setting["lr"])
        F, psnr = score(setting["lr"], seed)
        return row((F,), psnr, seed=seed, setting=setting)
    monkeypatch.setattr(Board, "row", fake)
    return tune_and_test(Board(small, tmp_path), "naive", (7, 8), (5,), echo=lambda line: None), runs


def test_a_setting_that_diverges_loses_and_the_search_goes_on(small, tmp_path, monkeypatch):
    rates, said = [s["lr"] for s in METHODS["naive"][1][:4]], []
    def fake(self, name, setting, seed, tuning):
        what = {"seed": seed, "setting": setting}
        return what | {"diverged": "at step 3"} if setting["lr"] >= rates[2] else row((.5,), 30., **what)
    monkeypatch.setattr(Board, "row", fake)
    result = tune_and_test(Board(small, tmp_path), "naive", (7, 8), (5,), echo=said.append)
    assert result["setting"]["lr"] < rates[2] and sum("diverged" in line for line in said) == 2 and any("F 0.50, 30.0 dB" in line for line in said)


def test_the_best_setting_is_chosen_by_the_rule(small, tmp_path, monkeypatch):
    rates = [s["lr"] for s in METHODS["naive"][1][:4]]
    score = dict(zip(rates, ((.2, 50.), (.9, 30.), (.8, 28.), (.8, 20.))))
    result, runs = searched(small, tmp_path, monkeypatch, lambda lr, seed: (score[lr][0], score[lr][1] - 25*(lr == rates[1] and seed == 8)))
    assert result["setting"]["lr"] == rates[2] and runs == [*rates, rates[1], rates[2], rates[2]]
    assert [r["setting"]["lr"] for r in result["rows"]] == [rates[2]] and len(result["search"]) == 6


@pytest.mark.parametrize("up, expected", [(1, (3, 9)), (-1, (1/3, 1/9))])
def test_a_search_whose_best_lies_at_the_edge_goes_on(small, tmp_path, monkeypatch, up, expected):
    "At most two further; and it stops where it gets worse."
    rates = [s["lr"] for s in METHODS["naive"][1][:4]]
    edge = (max if up > 0 else min)(rates)
    result, runs = searched(small, tmp_path, monkeypatch, lambda lr, seed: (.9, 30 + up*100*lr))
    assert runs[4:6] == pytest.approx([edge*k for k in expected]) and len(runs) == 4 + 2 + 2 + 1
    assert result["setting"]["lr"] == pytest.approx(edge*expected[1])
    _, runs = searched(small, tmp_path, monkeypatch, lambda lr, seed: (.9, 30 - abs(lr/edge - 1)))
    assert len(runs) == 4 + 1 + 2 + 1


@given(st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)))
@settings(max_examples=60)
def test_short_keeps_five_digits(v):
    assert short(short(v)) == short(v) and short([v, {"a": v}]) == [short(v), {"a": short(v)}]
    if isinstance(v, float): assert short(v) == pytest.approx(v, rel=1e-4)
    elif not isinstance(v, (list, dict)): assert short(v) is v


def test_every_coefficient_at_its_edge_is_taken_further():
    tried = [{"lr": lr, "c": c, "damping": 0.} for lr in (1., 2., 4.) for c in (12., 24.)]
    assert beyond_edge(tried, {"lr": 2., "c": 24., "damping": 0.}) == [{"lr": 2., "c": 72., "damping": 0.}]
    assert beyond_edge(tried, {"lr": 1., "c": 12., "damping": 0.}) == [{"lr": 1/3, "c": 12., "damping": 0.}, {"lr": 1., "c": 4., "damping": 0.}]
    assert beyond_edge(tried + [{"lr": 1., "c": 5.}, {"lr": 1., "c": 40.}], {"lr": 2., "c": 24.}) == []


def test_what_cannot_be_compared_is_refused(small, tmp_path):
    refused(lambda: leaderboard(small, tmp_path, methods=("nobody",)), "nobody", "naive")
    refused(lambda: leaderboard(small, tmp_path, methods=("naive",), seeds=(200,)), "200", "tuning")


def test_a_run_that_diverges_is_a_row(small, tmp_path, monkeypatch):
    def explode(*_, **__): raise FloatingPointError("the gradient is not finite at step 0")
    monkeypatch.setattr(baselines, "unlearn", explode)
    r = Board(small, tmp_path, budget=1).prompt_id("NegGrad", METHODS["NegGrad"][1][0], 5, False)
    assert "step 0" in r["diverged"] and merit([r]) == (-1., 0.) and not small.net._forward_hooks


def test_the_shipped_board_is_whole_and_follows_its_rule():
    "Every method, all its settings, the test seeds; and what was chosen is what the rule chooses."
    board = json.loads((files("unlearn_nb")/"assets/leaderboard.json").read_text())
    assert board["rule"] == RULE and set(board["results"]) == set(METHODS) and board["base"] == fingerprint(load("faces"))
    for name, result in board["results"].items():
        tried = {}
        for r in result["search"]: tried.setdefault(json.dumps(r["setting"], sort_keys=True), {})[r["seed"]] = r
        assert {json.dumps(short(s), sort_keys=True) for s in METHODS[name][1]} <= set(tried) and len(tried) <= 10 and all(200 in rows for rows in tried.values()), name
        whole = [list(rows.values()) for rows in tried.values() if tuple(rows) == baselines.TUNING]
        assert len(whole) == 2 and merit([r for r in result["search"] if r["setting"] == result["setting"]]) == max(map(merit, whole)), name
        assert [r["seed"] for r in result["rows"]] == list(baselines.TESTS) and all(r["setting"] == result["setting"] for r in result["rows"]), name
