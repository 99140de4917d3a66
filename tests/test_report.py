"The report: schema 1, and evidence that is what it says."
import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from test_unlearn import TINY, on, request_of, tiny
from unlearn_nb import report
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import similarity
from unlearn_nb.unlearn import unlearn

KEYS = {
    "report": "schema passed rule base requests config forget earlier preserve quality cost audit versions",
    "base": "id revision sha256",
    "request": "forget_sha256 surrogate_sha256 seed prompt",
    "row": "t to_forget_before to_forget_after width floor to_surrogate_after F control_before control_after",
    "preserve": "seeds psnr_median psnr_p5 cosine_median cosine_p5",
    "quality": "kid_before kid_after",
    "cost": "steps seconds peak_memory_mb device",
}
FEW = dict(panel=range(20, 24), levels=(100, 400), noises=range(2), steps=4)


@pytest.fixture(scope="module")
def made():
    "A model, a request, its hotfix, pictures to compare with; and the report on it with what it rests on."
    model = tiny()
    request = request_of(model)
    fix, reference = unlearn(model, [request], cfg=TINY), model.sample(range(40, 44), 4)
    return model, request, fix, reference, report.evaluate(model, fix, [request], reference, **FEW)


def test_schema(made):
    model, request, fix, _, (r, before, after) = made
    def keys(name): return KEYS[name].split()
    assert list(r) == keys("report") and r["schema"] == 1 and r["audit"] == {}
    for name in ("base", "preserve", "quality", "cost"): assert list(r[name]) == keys(name)
    assert list(r["requests"][0]) == keys("request") and r["preserve"]["seeds"] == [20, 24]
    assert [list(row) for row in r["forget"]["reconstruction"]] == [keys("row")] * 2
    assert list(r["forget"]["same_seed"]) == keys("row")[1:-2]
    assert json.loads(json.dumps(r)) == r and fingerprint(model) == fix.card["base"]["sha256"]
    assert min(report.figure(model, [request], before, after, others=4).size) > 400


def test_the_table_says_what_the_report_says(made):
    r = made[4][0]
    text = str(report.table(r))
    for word in ("NOT passed", "from t = 400", "same seed", f"{r['preserve']['psnr_median']:.1f}"): assert word in text
    assert "<table" in report.table(r)._repr_html_()
    row = r["forget"]["reconstruction"][0]
    for width, shown in ((.3, .3), (1.7, None), (None, None)):   # an interval wider than a cosine says nothing
        again = r | {"forget": {"reconstruction": [row | {"width": width}], "same_seed": None}}
        table = report.table(again)
        assert table.rows[0][3] == shown and "same seed" not in str(table)
    later = report.table(r | {"earlier": [{"seed": 1, "to_forget_before": .1, "to_forget_after": .2}]})
    assert later.rows[-1][:3] == ["earlier request 1", .1, .2]


def test_same_request_same_report(made):
    model, request, fix, reference, (one, _, _) = made
    again = unlearn(model, [request], cfg=TINY)
    two = report.evaluate(model, again, [request], reference, **FEW)[0]
    def timeless(r): return r | {"cost": {k: r["cost"][k] for k in ("steps", "device")}}
    assert timeless(one) == timeless(two)


def test_nothing_changed_is_nothing_reported(made):
    model, request, fix, reference, _ = made
    idle = Hotfix({k: torch.zeros_like(v) for k, v in fix.delta.items()}, fix.card)
    r, before, after = report.evaluate(model, idle, [request], reference, **FEW)
    assert r["preserve"]["psnr_median"] == 100 and not r["passed"]
    assert r["quality"]["kid_before"] == r["quality"]["kid_after"]
    for row in r["forget"]["reconstruction"]:
        assert row["F"] in (0, None)
        for name in ("to_forget", "control"): assert row[f"{name}_before"] == row[f"{name}_after"]
    assert_close(before["panel"], after["panel"], rtol=0, atol=0)


def test_the_control_is_a_picture_of_the_base(made):
    "The edited model is asked for what the base gave, not for what it gives itself; the interval is the noises'."
    model, request, fix, _, (r, before, after) = made
    control, x_f = before["panel"][:1], model.encode([request.image])
    floor = similarity(model.encode([request.surrogate]), x_f).item()
    with on(model, fix): again = {t: model.reconstruct(control, t, range(2), 4) for t in (100, 400)}
    for row in r["forget"]["reconstruction"]:
        t, two = row["t"], similarity(after["reconstruction"][row["t"]], x_f).double()
        assert_close(after["control"][t], again[t])
        assert row["control_after"] == pytest.approx(similarity(again[t], control).mean().item(), abs=1e-5)
        assert row["width"] == pytest.approx(12.706 * two.std().item() / 2 ** .5, rel=1e-3)   # Student's t, 1 degree
        assert row["floor"] == pytest.approx(floor, abs=1e-6)


def test_several_requests_and_none_with_a_seed(made):
    "A row is the mean over requests and noises; without a seed there is no row for it."
    model, request, fix, reference, _ = made
    both = [replace(request, seed=None), replace(request, image=request.surrogate, surrogate=request.image, seed=None)]
    r, before, after = report.evaluate(model, fix, both, reference, **FEW)
    assert r["forget"]["same_seed"] is None
    x_f = model.encode([b.image for b in both]).repeat_interleave(2, 0)
    for row in r["forget"]["reconstruction"]:
        found = similarity(after["reconstruction"][row["t"]], x_f).mean().item()
        assert row["to_forget_after"] == pytest.approx(found, abs=1e-6)
    report.figure(model, both, before, after, others=2)


def test_the_rule():
    for F, seed, psnr, expected in (([.8, .9], .7, 26., True), ([.8, None], .7, 26., True),
                                    ([.8, .69], .9, 30., False), ([.8, .8], .6, 30., False),
                                    ([.8, .8], .9, 25.9, False), ([None], None, 30., False)):
        assert report.passes([{"F": f} for f in F], {"F": seed}, {"psnr_median": psnr}) is expected
