"The board: fair, resumable, and judged by its rule."
import json
from dataclasses import replace
from functools import partial
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_baselines import TINY, request_of, tiny
from unlearn_nb import leaderboard as L
from unlearn_nb.leaderboard import (BLOCKS, METHODS, RULE, Board, beyond_edge, board_figure, board_table, forgotten,
                                    invited, judge, leaderboard, read_board, score, short, sign_flip, summary, tune)
from unlearn_nb.unlearn import Config

RATES = [s["lr"] for s in METHODS["naive"][1][:4]]
quiet = dict(echo=lambda line: None)


def row(F=.8, psnr=30., seed=100, **kw):
    "A row of a test."
    return {"F": F, "psnr_median": psnr, "psnr_p5": psnr - 5, "cosine_median": .9, "fails": [],
            "quality": {"kid_before": 0., "kid_after": .01}, "core_seconds": 1., "evaluations": 8, "setting": {},
            "seed": seed, "test": True} | kw


def test_six_settings_each():
    for name, (_, choices) in METHODS.items():
        assert len(choices) == len({json.dumps(s, sort_keys=True) for s in choices}) == 6
        assert "," not in name and all("damping" not in s for s in choices)   # `--methods` splits there


def test_blocks_lend_what_they_say():
    assert L.blocks_of("ours") == ["everything"] and L.blocks_of("paper") == ["as published"]
    assert L.blocks_of("ours without edit") == ["everything"]
    assert L.blocks_of("ours without directions") == ["our keeping"]
    assert L.blocks_of("DUO", ("everything", "as published")) == ["as published", "everything"]
    for block, damping, near in zip(BLOCKS, (0., 0., Config.damping), (0, Config.near_images, Config.near_images)):
        cfg, rest = L.split(L.Run("x", block, {"lr": 1., "c": 2.}, 5, False), 7)
        assert (cfg.damping, cfg.near_images, cfg.steps, cfg.lr, rest) == (damping, near, 7, 1., {"c": 2.})
    def without(problem): pass
    def with_them(problem, paths=False): pass
    assert [L.lent(f, b) is f for f in (without, with_them) for b in BLOCKS] == [True, True, True, True, False, False]
    assert L.lent(partial(with_them), "everything").keywords == {"paths": True}


def test_settings_of_a_later_block_are_made_from_what_was_chosen_before():
    own = [{"lr": 1e-3, "c": .1}, {"lr": 2e-3, "c": .1}]
    assert L.settings_of(own, "as published") == own == L.settings_of(own, "our keeping")
    assert [s["lr"] for s in L.settings_of(own, "everything")] == pytest.approx([1e-2, 2e-2])
    made = L.settings_of(own, "everything", ("our keeping", {"lr": 3e-4, "c": .7}))
    assert [s["lr"] for s in made] == pytest.approx([1e-3, 3e-3, 9e-3]) and {s["c"] for s in made} == {.7}
    made = L.settings_of(own, "our keeping", ("as published", {"lr": 3e-4}))
    assert max(s["lr"] for s in made) == pytest.approx(9e-4)


def test_the_score_follows_the_rule():
    assert score([row(1.5, 33)]) == score([row(1., 33)]) == 20. < score([row(.8, 40)]) == pytest.approx(21.6)
    assert score([row(), {"diverged": "at step 3"}]) == score([row()]) / 2 and score([row(-.1)]) == 0.


def test_forgotten_is_as_if_never_learned():
    "Levels together, the seed apart; a level where others come back as well has nothing to forget."
    def line(b, a, t=0): return {"to_forget_before": b, "to_forget_after": a, "t": t}
    def report(levels, seed, again=None):
        rows = [line(b, a, t) for t, (b, a) in enumerate(levels)]
        return {"forget": {"reconstruction": rows, "same_seed": seed, "strangers": .4}, "regeneration": again}
    u = {0: .9, 1: .6, 2: .4}
    assert forgotten(report([(.9, .5), (.8, .7), (.6, .4)], line(1., .4)), u) == pytest.approx(.3 / .4)
    assert forgotten(report([(.9, .5), (.8, .6), (.6, .4)], line(1., .7)), u) == pytest.approx(.5)
    assert forgotten(report([(.8, .8)], None), u) == 0.
    assert forgotten(report([], None, {"before": 40, "after": 10}), u) == .75


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=10))
@settings(max_examples=30)
def test_the_sign_flip_test_is_that_of_scipy(d):
    from scipy.stats import permutation_test
    def mean(x, axis): return x.mean(axis)
    p = permutation_test((d,), mean, permutation_type="samples", vectorized=True).pvalue if len(d) > 1 else 1.
    assert sign_flip(d) == pytest.approx(p, abs=1e-9) or min(abs(v) for v in d) < 1e-9
    assert sign_flip([-v for v in d]) == pytest.approx(sign_flip(d))


def test_summary_table_and_figure():
    def told(*rows, **kw): return summary({"rows": rows} | kw)
    m = told(row(.8, 30), row(1.2, 34), {"diverged": "at step 1"}, planted=[row(.9, 31, "planted-2")])
    assert m["F"] == pytest.approx(.9) and m["psnr"] == pytest.approx(32) and m["gone"] == .9
    assert m["kid_change"] == pytest.approx(.01) and told({"diverged": ""}) is None
    attacks = {"A1 reconstruction": [.2, "holds"], "A13 deletion": [.025, "conspicuous"]}
    assert told(row(attacks=attacks))["attacks"] == .5 and m["attacks"] is None
    assert m["area"] == pytest.approx((.8 * 17 + 21) / 3)   # a run that diverged dominates nothing
    tried = [{"F": .7, "psnr_median": 33., "evaluations": 8, "setting": {"lr": lr}, "test": False}
             for lr in (1., 1., 2.)]
    n = told(search=tried + [tried[2] | {"F": .1}])   # searched and not tested
    assert (n["F"], n["tests"], n["passes"], n["psnr_p5"]) == (pytest.approx(.7), 0, None, None) and m["tests"] == 2
    name = "a name that is longer than its column"
    results = {name: {"setting": {"lr": 1.}, "rows": [row(psnr=20), row(psnr=21, seed=101)]},
               "ours": {"setting": {}, "rows": [row(), row(seed=101)]},
               "b": {"setting": {}, "rows": [{"diverged": "", "seed": 1}]}}
    table = board_table(results)
    head, *lines = repr(table).splitlines()
    assert [r[0] for r in table.rows] == ["ours", name, "b"] and table.rows[1][-2:] == [.5, "lr=1"]
    undirected = board_table({"ours without directions" if k == "ours" else k: v for k, v in results.items()})
    assert [[r[-2] for r in t.rows] for t in (table, undirected)] == [[None, .5, None]] * 2   # ours: beside itself none
    assert "diverged" in lines[2] and lines[0].index("0.80") == lines[1].index("0.80") == head.index(" F ") - 2
    assert board_figure({"everything": results, "our keeping": results}).size == (1040, 368)


@pytest.fixture
def small(monkeypatch):
    "A board of a tiny model in few evaluations a run."
    model = tiny()
    monkeypatch.setattr(L, "Config", lambda **kw: replace(TINY, **kw))
    L.Config.lr = TINY.lr
    monkeypatch.setattr(L, "propose", lambda d, x: request_of(d, 40).surrogate)
    monkeypatch.setattr(L, "fields", lambda _: [type("field", (), {"name": k}) for k in vars(TINY)])
    monkeypatch.setattr(L, "LEVELS", (100,))
    monkeypatch.setattr(L, "PANELS", {False: range(20, 24), True: range(10, 14)})
    some = {k: (METHODS[k][0], METHODS[k][1][:4]) for k in ("naive", "NegGrad", "ours")}
    monkeypatch.setattr(L, "METHODS", some)
    return model


@pytest.mark.slow
def test_a_board_is_computed_once(small, tmp_path, monkeypatch):
    "Killed in the middle, it goes on, elsewhere too; done, it computes nothing; another budget is another board."
    runs, said, real = [], [], L.run_row
    def counted(*what):
        runs.append(what)
        if len(runs) == 6: raise KeyboardInterrupt
        return real(*what)
    monkeypatch.setattr(L, "run_row", counted)
    what = dict(methods=("naive", "ours"), seeds=(5, 6), tuning=(7, 8), budget=1, echo=said.append)
    with pytest.raises(KeyboardInterrupt): leaderboard(small, tmp_path / "a", **what)
    assert len(list((tmp_path / "a/rows").iterdir())) == 5
    results = leaderboard(small, tmp_path / "a", **what)
    each = [len(r["search"]) + 2 for made in results.values() for r in made.values()]
    assert len(each) == 4 and all(3 + 1 + 2 <= n <= 6 + 2 + 2 + 2 for n in each)
    assert len(runs) == (done := sum(each)) + 1
    assert any("h left" in line for line in said)
    assert leaderboard(small, tmp_path / "a", **what) == results and len(runs) == done + 1
    names = {"leaderboard.json", "leaderboard.txt", "leaderboard.html", "leaderboard.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names | {"rows"}
    (tmp_path / "b").mkdir()
    (tmp_path / "a/leaderboard.json").rename(tmp_path / "b/leaderboard.json")
    assert leaderboard(small, tmp_path / "b", **what) == results and len(runs) == done + 1
    written = json.loads((tmp_path / "b/leaderboard.json").read_text())
    assert written["rule"] == RULE and written["budget"] == 1 and read_board(tmp_path / "b/leaderboard.json") == results
    assert [(r["seed"], r["test"]) for r in results["everything"]["ours"]["rows"]] == [(5, True), (6, True)]
    leaderboard(small, tmp_path / "b", **what | {"methods": ("naive",), "blocks": ("as published",)})
    assert read_board(tmp_path / "b/leaderboard.json") == results   # those of others stay
    leaderboard(small, tmp_path / "b", **what | {"budget": 2, "methods": ("naive",), "blocks": ("as published",)})
    assert done + 1 + 7 <= len(runs) <= done + 1 + 10


def test_other_code_is_another_row(small, tmp_path, monkeypatch):
    "Under one name; and the same code under one name is the same row."
    runs = []
    monkeypatch.setattr(L, "run_row", lambda *what: runs.append(what) or {"made": len(runs)})
    def mine(sign): return lambda problem: lambda step, g: ([sign * p for p in problem.parametrization.params], {})
    def row(sign):
        board = Board(small, tmp_path, 1, {"mine": (mine(sign), [{}])})
        return board.row(L.Run("mine", "everything", {}, 5, False))["made"]
    assert [row(1), row(-1), row(1), row(-1)] == [1, 2, 1, 2] and len(runs) == 2


def test_a_method_of_ones_own_on_the_board(small, tmp_path, monkeypatch):
    "With settings of its own, functions among them; names of the shipped ones still work, one alone, too."
    runs = []
    def fake(board, run, method, cfg):
        runs.append((method, cfg))
        return {k: v for k, v in row(psnr=20. + cfg.lr).items() if k not in ("setting", "seed", "test")}
    monkeypatch.setattr(L, "run_row", fake)
    def mine(problem, c=1.): return lambda step, g: ([c * p for p in problem.parametrization.params], {})
    def curve(snr): return snr / (1 + snr)
    own = {"mine": (mine, [{"lr": 1., "c": 2., "weight": curve}, {"lr": 2., "c": 2., "weight": "abar"}])}
    what = dict(seeds=(5,), tuning=(7,), budget=1, blocks=("as published",), **quiet)
    found = leaderboard(small, tmp_path, own, **what)["as published"]["mine"]
    method, cfg = runs[0]
    assert (method.func, method.keywords, cfg.lr, cfg.weight, cfg.steps) == (mine, {"c": 2.}, 1., curve, 1)
    assert found["setting"] == {"lr": 18., "c": 2., "weight": "abar"} and len(runs) == 5
    assert found["search"][-1]["setting"]["weight"] == "curve" and (tmp_path / "leaderboard.png").exists()
    assert [*leaderboard(small, tmp_path, "naive", **what)["as published"]] == ["naive"]


def test_other_defaults_are_other_rows(small, tmp_path, monkeypatch):
    "A row that was made before a default changed is not taken for one that was made after it."
    board, runs, run = Board(small, tmp_path, budget=1), [], L.Run("ours", "everything", {}, 5, False)
    monkeypatch.setattr(L, "run_row", lambda *what: runs.append(what) or {"made": len(runs)})
    assert [board.row(run)["made"] for _ in range(2)] == [1, 1]
    monkeypatch.setattr(L, "Config", lambda **kw: replace(TINY, lr=.123, **kw))
    assert board.row(run)["made"] == 2 and runs[1][3].lr == .123


def test_a_run_that_diverges_is_a_row(small, tmp_path, monkeypatch):
    def explode(*_, **__): raise FloatingPointError("the gradient is not finite at step 0")
    monkeypatch.setattr(L, "unlearn", explode)
    r = Board(small, tmp_path, budget=1).row(L.Run("NegGrad", "as published", METHODS["NegGrad"][1][0], 5, False))
    assert "step 0" in r["diverged"] and score([r]) == 0. and not small.net._forward_hooks


def test_evaluations_count_what_goes_forward_and_back(small):
    "Of eight pictures, forward alone; forward and back; forward once and back twice."
    x, t = torch.zeros(8, *small.shape), torch.zeros(8, dtype=torch.long)
    weights = [p for p in small.net.parameters() if p.requires_grad] or [*small.net.parameters()]
    with L.counting(small.net) as n:
        with torch.no_grad(): small(x, t)
        assert n == [8]
        for w in weights: w.requires_grad_()
        out = small(x, t)
        torch.autograd.grad(out.sum(), weights, retain_graph=True, allow_unused=True)
        assert n == [8 + 24]
        torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
    assert n == [8 + 40] and not small.net._forward_hooks


# --- the search ---

def searched(small, tmp_path, monkeypatch, gives, echo=quiet["echo"], planted=()):
    "The search of `naive` where gives(lr, seed) is a row: (result, learning rates in the order of their runs)."
    runs = []
    def fake(self, run):
        runs.append(run.setting["lr"])
        return gives(run.setting["lr"], run.seed) | {"seed": run.seed, "setting": run.setting}
    monkeypatch.setattr(Board, "row", fake)
    board = Board(small, tmp_path)
    tried = tune(board, "naive", "as published", None, (7, 8), echo)
    return judge(board, "naive", "as published", tried, (5,), planted, echo), runs


def test_a_setting_that_diverges_loses_and_the_search_goes_on(small, tmp_path, monkeypatch):
    said = []
    def gives(lr, seed): return {"diverged": "at step 3"} if lr >= RATES[2] else row(.5, 30.)
    result, _ = searched(small, tmp_path, monkeypatch, gives, said.append)
    assert result["setting"]["lr"] < RATES[2] and sum("diverged" in line for line in said) == 2
    assert any("F 0.50, 30.0 dB" in line for line in said)


def test_the_best_setting_is_chosen_by_the_rule(small, tmp_path, monkeypatch):
    "The second rate is best on the first tuning seed, and loses on the second."
    F, psnr = dict(zip(RATES, (.2, .95, .92, .92))), dict(zip(RATES, (50., 30., 28., 20.)))
    def gives(lr, seed): return row(F[lr], psnr[lr] - 25 * (lr == RATES[1] and seed == 8))
    result, runs = searched(small, tmp_path, monkeypatch, gives)
    assert result["setting"]["lr"] == RATES[2] and runs == [*RATES, RATES[1], RATES[2], RATES[2]]
    assert [r["setting"]["lr"] for r in result["rows"]] == [RATES[2]] and len(result["search"]) == 6


def test_pictures_learned_by_heart_choose_among_the_two_best(small, tmp_path, monkeypatch):
    "On the first of them; the others are the test."
    F, psnr = dict(zip(RATES, (.2, .95, .92, .92))), dict(zip(RATES, (50., 30., 28., 20.)))
    def gives(lr, seed): return row(F[lr], psnr[lr]) if isinstance(seed, int) else row(.95, 30 + lr, seed)
    result, runs = searched(small, tmp_path, monkeypatch, gives, planted=("planted-1", "planted-2", "planted-3"))
    assert runs[-4:] == [RATES[1], RATES[2], RATES[2], RATES[2]]
    assert [r["seed"] for r in result["planted"]] == ["planted-1"] * 2 + ["planted-2", "planted-3"]


@pytest.mark.parametrize("up, expected", [(1, (3, 9)), (-1, (1 / 3, 1 / 9))])
def test_a_search_whose_best_lies_at_the_edge_goes_on(small, tmp_path, monkeypatch, up, expected):
    "At most two further; and it stops where it gets worse."
    edge = (max if up > 0 else min)(RATES)
    result, runs = searched(small, tmp_path, monkeypatch, lambda lr, seed: row(.9, 30 + up * 100 * lr))
    assert runs[4:6] == pytest.approx([edge * k for k in expected]) and len(runs) == 4 + 2 + 2 + 1
    assert result["setting"]["lr"] == pytest.approx(edge * expected[1])
    _, runs = searched(small, tmp_path, monkeypatch, lambda lr, seed: row(.9, 30 - abs(lr / edge - 1)))
    assert len(runs) == 4 + 1 + 2 + 1


def test_every_coefficient_at_its_edge_is_taken_further():
    tried = [{"lr": lr, "c": c, "path_share": 1.} for lr in (1., 2., 4.) for c in (12., 24.)]
    def beyond(lr, c): return [(s["lr"], s["c"]) for s in beyond_edge(tried, {"lr": lr, "c": c, "path_share": 1.})]
    assert beyond(2., 24.) == [(2., 72.)] and beyond(1., 12.) == [(1 / 3, 12.), (1., 4.)]
    assert beyond_edge(tried + [{"lr": 1., "c": 5.}, {"lr": 1., "c": 40.}], {"lr": 2., "c": 24.}) == []


atoms = (st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False)
         | st.text(max_size=3))
def nested(v): return st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)


@given(st.recursive(atoms, nested))
@settings(max_examples=20)
def test_short_keeps_five_digits(v):
    assert short(short(v)) == short(v) and short([v, {"a": v}]) == [short(v), {"a": short(v)}]
    if isinstance(v, float): assert short(v) == pytest.approx(v, rel=1e-4)
    elif not isinstance(v, (list, dict)): assert short(v) is v


def test_what_cannot_be_compared_is_refused(small, tmp_path):
    for what, words in ((dict(methods=("nobody",)), "nobody.*naive"),
                        (dict(methods={"mine": print}), "'mine' is.*give a pair"),
                        (dict(methods={"a": (print, [])}), "give a pair"),
                        (dict(methods={"a": (print, [5])}), "give a pair"),
                        (dict(methods=("naive",), seeds=(200,)), "200.*tuning")):
        with pytest.raises(ValueError, match=words): leaderboard(small, tmp_path, **what)


def test_the_six_best_of_a_block_and_their_like_are_tested():
    def tuned(F): return [({"lr": 1.}, [row(F, 43.), row(F, 33.)]), ({"lr": 2.}, [row(1., 60.)])]
    rivals = {f"r{k}": tuned(k / 10) for k in range(1, 10)}
    also = {name: tuned(0.) for name in ("SISS", "ReTrack", "paper", "ours", "ours without edit")}
    assert set(invited(rivals | also)) == {f"r{k}" for k in range(4, 10)} | set(also)
    assert len(invited(rivals)) == L.TESTED and invited({"SISS": tuned(.9)}) == ["SISS"]
    assert [L.by_heart(block) for block in BLOCKS] == [True, False, True]


# --- the board that ships ---

def test_the_shipped_board_follows_its_rule():
    "Of each method in it all settings, and of those invited the test seeds; what was chosen is what the rule chooses."
    file = files("unlearn_nb") / "assets/leaderboard.json"
    board, results = json.loads(file.read_text()), read_board(file)
    assert board["rule"] == RULE
    of_all = {(block, name) for name in METHODS for block in L.blocks_of(name)}
    assert of_all == {(block, name) for block, made in results.items() for name in made}
    def key(setting): return json.dumps(short(setting), sort_keys=True)
    for block, made in results.items():
        for name, result in made.items():
            tried = {}
            for r in result["search"]: tried.setdefault(key(r["setting"]), {})[r["seed"]] = r
            first = block == "as published" or name.startswith("ours") or "lr" not in result["setting"]
            assert (6 if first else 3) <= len(tried) <= (8 if first else 5), (block, name)
            assert all(L.TUNING[0] in rows for rows in tried.values()), (block, name)
            whole = [list(rows.values()) for rows in tried.values() if tuple(rows) == L.TUNING]
            picked = tried[key(result["setting"])]
            assert len(whole) == 2 and score([*picked.values()]) == max(map(score, whole)), (block, name)
            tested = name in invited({n: [(r["setting"], L.shown(r | {"rows": ()}))] for n, r in made.items()})
            assert [r["seed"] for r in result["rows"]] == list(L.TESTS) * tested, (block, name)
            heart = tested and L.by_heart(block) and not name.startswith("ours without")
            planted = [L.PLANTED[0], *L.PLANTED] if heart else []
            assert [r["seed"] for r in result["planted"]] == planted, (block, name)
            assert all(key(r["setting"]) == key(result["setting"]) for r in result["rows"]), (block, name)


def test_settings_of_the_shipped_board_are_those_of_today():
    "Each goes to a field of `Config`, or to an argument of its method."
    known = set(vars(Config()))
    for made in read_board(files("unlearn_nb") / "assets/leaderboard.json").values():
        for name, result in made.items():
            f = METHODS[name][0]
            parts = [f.func, f.keywords.get("method", f.func)] if isinstance(f, partial) else [f]   # one in another
            takes = {k for part in parts for k in part.__code__.co_varnames[:part.__code__.co_argcount]}
            assert set(result["setting"]) <= known | takes, name
