"The report: schema 1, and evidence that is what it says."
import json

import pytest
import torch
from test_unlearn import TINY, request_of, tiny
from torch.testing import assert_close

from unlearn_nb import report
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import similarity
from unlearn_nb.states import Request
from unlearn_nb.unlearn import unlearn

KEYS = dict(report=["schema", "passed", "rule", "base", "requests", "config", "forget", "earlier", "preserve", "quality", "cost", "audit", "versions"],
            base=["id", "revision", "sha256"], request=["forget_sha256", "surrogate_sha256", "seed", "prompt"],
            row=["t", "to_forget_before", "to_forget_after", "width", "floor", "to_surrogate_after", "F", "control_before", "control_after"], preserve=["seeds", "psnr_median", "psnr_p5", "cosine_median", "cosine_p5"],
            quality=["kid_before", "kid_after"], cost=["steps", "seconds", "peak_memory_mb", "device"])
FEW = dict(panel=range(20, 24), levels=(100, 400), noises=range(2), steps=4)


@pytest.fixture(scope="module")
def run():
    model = tiny()
    request = request_of(model)
    fix = unlearn(model, [request], cfg=TINY)
    return model, request, fix, model.sample(range(40, 44), 4)


def test_schema(run):
    model, request, fix, reference = run
    r, before, after = report.evaluate(model, fix, [request], reference, **FEW)
    assert list(r) == KEYS["report"] and r["schema"] == 1 and r["audit"] == {}
    for name in ("base", "preserve", "quality", "cost"): assert list(r[name]) == KEYS[name]
    assert list(r["requests"][0]) == KEYS["request"]
    assert [list(row) for row in r["forget"]["reconstruction"]] == [KEYS["row"]]*2 and list(r["forget"]["same_seed"]) == KEYS["row"][1:-2]
    assert json.loads(json.dumps(r)) == r and r["preserve"]["seeds"] == [20, 24]
    assert fingerprint(model) == fix.card["base"]["sha256"]
    assert "NOT passed" in report.table(r) and "from t = 400" in report.table(r)
    assert min(report.figure(model, [request], before, after, others=4).size) > 400


def test_same_request_same_report(run):
    model, request, fix, reference = run
    again = unlearn(model, [request], cfg=TINY)
    one, two = (report.evaluate(model, f, [request], reference, **FEW)[0] for f in (fix, again))
    for r in (one, two): r["cost"] = {k: v for k, v in r["cost"].items() if k not in ("seconds", "peak_memory_mb")}
    assert one == two


def test_nothing_changed_is_nothing_reported(run):
    model, request, fix, reference = run
    idle = Hotfix({k: torch.zeros_like(v) for k, v in fix.delta.items()}, fix.card)
    r, before, after = report.evaluate(model, idle, [request], reference, **FEW)
    assert r["preserve"]["psnr_median"] == 100 and not r["passed"]
    assert r["quality"]["kid_before"] == r["quality"]["kid_after"]
    for row in r["forget"]["reconstruction"]: assert row["F"] in (0, None) and row["to_forget_before"] == row["to_forget_after"] and row["control_before"] == row["control_after"]
    assert_close(before["panel"], after["panel"], rtol=0, atol=0)


def test_the_control_is_a_picture_of_the_base(run):
    "The edited model is asked to bring back what the base gave, not what it gives itself; the interval is that of the noises."
    model, request, fix, reference = run
    r, before, after = report.evaluate(model, fix, [request], reference, **FEW)
    control = before["panel"][:1]
    fix.apply(model)
    again = {t: model.reconstruct(control, t, range(2), 4) for t in (100, 400)}
    fix.remove(model)
    for row in r["forget"]["reconstruction"]:
        assert_close(after["control"][row["t"]], again[row["t"]])
        assert row["control_after"] == pytest.approx(similarity(again[row["t"]], control).mean().item(), abs=1e-5)
        two = similarity(after["reconstruction"][row["t"]], model.encode([request.image])).double()
        assert row["width"] == pytest.approx(12.706*two.std().item()/2**.5, rel=1e-3) and row["floor"] == pytest.approx(similarity(*model.encode([request.surrogate, request.image]).split(1)).item(), abs=1e-6)


def test_without_a_seed_there_is_no_same_seed_row(run):
    model, request, fix, reference = run
    r, before, after = report.evaluate(model, fix, [Request(request.image, request.surrogate)], reference, **FEW)
    assert r["forget"]["same_seed"] is None and "same seed" not in report.table(r)
    report.figure(model, [Request(request.image, request.surrogate)], before, after, others=2)


@pytest.mark.parametrize("F, seed, psnr, expected", [([.8, .9], .7, 26., True), ([.8, None], .7, 26., True), ([.8, .69], .9, 30., False), ([.8, .8], .6, 30., False),
                                                     ([.8, .8], .9, 25.9, False), ([None, None], None, 30., False)])
def test_the_rule(F, seed, psnr, expected):
    assert report.passes([{"F": f} for f in F], {"F": seed}, {"psnr_median": psnr}) is expected
