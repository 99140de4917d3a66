"The report: schema 2, evidence that is what it says, verdicts that follow from numbers, and a part that tells nobody."
import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from test_unlearn import TINY, on, request_of, tiny
from unlearn_nb import report
from unlearn_nb.copies import Bars
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import denoising_error, psnr, similarity
from unlearn_nb.unlearn import unlearn

KEYS = {
    "report": "schema passed said verdicts descriptor levels controls base requests config forget conspicuous "
              "regeneration surrogate preserve quality earlier audit cost versions",
    "row": "t to_forget_before to_forget_after width floor to_surrogate_after F overshoot control_before control_after "
           "controls_before controls_after percentile verdict_before verdict",
    "seed": "to_forget_before to_forget_after width floor to_surrogate_after F overshoot highest verdict",
    "conspicuous": "t log_error z_before z verdict",
    "regeneration": "n before after surrogate_before surrogate_after chance bars seeds",
    "density": "n before after surrogate_before surrogate_after chance bars most_before most noticed redrawn crowded",
    "any seeds": "n left_out psnr_median psnr_p5 cosine_median cosine_p5 all seeds own_words",
    "near neighbours": "n left_out psnr_median psnr_p5 cosine_median cosine_p5",
    "quality": "kid_before kid_after left_out",
    "cost": "steps seconds peak_memory_mb device",
}
FEW = dict(panel=range(20, 24), fresh=range(60, 76), levels=(100, 400), noises=range(2), steps=4)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def never(n, prompt=None): return normal(n, 3, 8, 8, seed=3).clamp(-1, 1)


def look(x):
    "A descriptor that needs no weights: colours of 4 x 4 places, as unit vectors."
    return F.normalize(F.adaptive_avg_pool2d(x.float(), 4).flatten(1), dim=1)


@pytest.fixture(scope="module")
def made():
    "A model, a request, its hotfix, pictures to compare with; and the report on it with what it rests on."
    model = tiny()
    request = request_of(model)
    fix, reference = unlearn(model, [request], cfg=TINY), model.sample(range(40, 44), 4)
    return model, request, fix, reference, report.evaluate(model, fix, [request], reference, never=never, **FEW)


def test_schema(made):
    model, request, fix, _, (r, before, after) = made
    def keys(name): return KEYS[name].split()
    assert list(r) == keys("report") and r["schema"] == 2 and r["audit"] == {} and r["levels"] == [100, 400]
    for name in ("regeneration", "quality", "cost"): assert list(r[name]) == keys(name)
    for name, g in r["preserve"].items(): assert list(g) == keys(name)
    assert [list(row) for row in r["forget"]["reconstruction"]] == [keys("row")] * 2
    assert [list(row) for row in r["conspicuous"]] == [keys("conspicuous")] * 5
    assert list(r["forget"]["same_seed"]) == keys("seed") and r["preserve"]["any seeds"]["seeds"] == [20, 24]
    assert r["controls"] == {"what": "pictures that the model never saw", "n": 19}
    assert r["descriptor"]["name"] == "face descriptor" and "drawn faces" in r["descriptor"]["note"]   # for `tiny`
    assert [v["name"] for v in r["verdicts"]] == list(report.RULES)
    assert json.loads(json.dumps(r, allow_nan=False)) == r and fingerprint(model) == fix.card["base"]["sha256"]
    assert min(report.figure(model, [request], before, after, others=4).size) > 400
    text = str(report.table(r))
    assert r["said"] in text and all(name in text for name in report.RULES)
    assert "from t = 400" in str(report.evidence(r))


def test_many_at_once_are_what_each_is_alone():
    model, x = tiny(), never(3)
    both = report.rebuilt(model, x, 300, range(30), 4)           # 90 in pieces of 64
    assert both.shape == (3, 30, 3, 8, 8)
    for k, y in enumerate(x): assert_close(both[k], model.reconstruct(y[None], 300, range(30), 4), rtol=0, atol=1e-5)


def test_the_numbers_are_those_of_the_pictures(made):
    model, request, fix, _, (r, before, after) = made
    x_f, c = model.encode([request.image]), never(19)
    with on(model, fix):
        again = report.rebuilt(model, torch.cat([x_f, c]), 400, range(2), 4)
        errors = denoising_error(model, torch.cat([x_f, c]), report.ERRORS, range(2)).mean(-1).log()
    scores = torch.stack([similarity(y, x[None]).mean() for x, y in zip(torch.cat([x_f, c]), again)])
    row = r["forget"]["reconstruction"][1]
    assert row["to_forget_after"] == pytest.approx(scores[0].item(), abs=1e-5)
    assert row["control_after"] == pytest.approx(scores[1:].mean().item(), abs=1e-5)
    assert list(row["controls_after"].values()) == pytest.approx([v.item() for v in report.band(scores[1:])], abs=1e-4)
    assert row["percentile"] == (scores[1:] < scores[0]).double().mean().item()
    for line, e in zip(r["conspicuous"], errors.double()):
        z = (e[0] - e[1:].mean()) / e[1:].std() / (1 + 1 / 19) ** .5
        assert line["z"] == pytest.approx(z.item(), abs=1e-2)
    a, b = (out["panel"] for out in (before, after))
    assert r["preserve"]["any seeds"]["all"]["psnr_median"] == pytest.approx(psnr(a, b).median().item(), abs=1e-4)


def test_a_picture_never_made_is_as_if_never_learned():
    "In about 95 of 100 cases, for similarities spread as those of real models are."
    g = torch.Generator().manual_seed(0)
    for middle, spread in ((2., .4), (.5, .3), (0., .2)):        # nearly all, half, nothing comes back
        draws = torch.tanh(middle + spread * torch.randn(4000, 20, generator=g))
        low, _, high = report.band(draws[:, 1:])
        assert .94 < ((draws[:, 0] > low) & (draws[:, 0] < high)).double().mean() < .96
        for row, a, b in zip(draws[:60], low, high):
            said = "remembers" if row[0] > b else "blocked" if row[0] < a else "as if never learned"
            assert report.against(row[:1], row[:1], row[1:], row[1:])["verdict"] == said
    with pytest.raises(ValueError, match="1 value gives no interval"): report.band(torch.ones(1))


def test_copies_are_counted():
    "An oracle by hand: so many copies were put in, before and after; the surrogate, too."
    x = normal(64, 3, 8, 8).clamp(-1, 1)
    x_f, x_s = never(2)[:1], -never(2)[:1]
    before, after = x.clone(), x.clone()
    before[:12], after[:8], after[8:11] = x_f + .02 * x[:12], x_f + .02 * x[:8], x_s
    n = report.regeneration(x_f, x_s, before, after, Bars(20., .8), never(40)[2:], look)
    assert (n["before"], n["after"], n["surrogate_before"], n["surrogate_after"], n["chance"]) == (12, 8, 0, 3, 0.)
    assert report.by_chance(before, x_f, Bars(20., .8), look) == 12


def test_near_pictures_are_counted_where_none_was_never_made():
    "And the answer is no answer where the test is blind: few seeds, crowded pictures, a descriptor that knows nothing."
    x = normal(256, 3, 8, 8).clamp(-1, 1)
    x_f, x_s = never(2)[:1], -never(2)[:1]
    before, after = x.clone(), x.clone()
    before[:40], after[40:43] = x_f + .05 * x[:40], x_s
    def look_closer(x): return F.normalize(x.flatten(1), dim=1)
    def of(x_f, before, after, redrawn=None):
        n = report.density(x_f, x_s, before, after, redrawn, look_closer)
        return n, report.comes_out(n)
    n, (good, said) = of(x_f, before, after, x_f + .1 * x[:4])
    assert list(n) == KEYS["density"].split() and n["crowded"] == 1 and n["redrawn"] == 1 and good
    assert n["before"] == 40 > n["most_before"] and n["surrogate_after"] >= 3 and n["after"] <= n["most"]
    assert f"from {n['noticed']} seeds" in said and n["noticed"] <= 25
    assert of(x_f, before, before)[1][0] is False and "40 of 256" in of(x_f, before, before)[1][1]
    crowded = x.clone()
    crowded[60:100] = x[60:61] + .05 * x[60:100]           # another picture comes out often
    for blind, why in ((of(x_f, crowded, crowded), "must give it"), (of(x_f, before[:16], after[:16]), "too few"),
                       (of(x_f.expand(20, -1, -1, -1), before, after), "so many requests"),
                       (of(x_f, before, after, x[:4]), "does not know")):
        assert blind[1][0] is None and why in blind[1][1]
    two = of(torch.cat([x[200:201], x_f]), before, before)[0]      # that which stands out is told
    assert two["after"] == 40 and two["crowded"] == 1


def test_copies_leave_the_panel(made, monkeypatch):
    model, request, fix, reference, _ = made
    real = model.sample
    def often(seeds, *a, **kw):                                  # a model that learned the request's picture by heart
        x, x_f = real(seeds, *a, **kw), model.encode([request.image])
        return torch.where(torch.tensor([s % 4 == 0 for s in seeds]).view(-1, 1, 1, 1), x_f, x)
    monkeypatch.setattr(model, "sample", often)
    monkeypatch.setattr(report, "copy_bars", lambda *_: Bars(60., .999))
    idle = Hotfix({k: torch.zeros_like(v) for k, v in fix.delta.items()}, fix.card)
    r, before, after = report.evaluate(model, idle, [request], reference, never=never, describe=look, **FEW)
    assert r["regeneration"]["before"] == r["regeneration"]["after"] == 4 and not r["passed"]
    keep = r["preserve"]
    assert (keep["any seeds"]["n"], keep["any seeds"]["left_out"], keep["near neighbours"]["n"]) == (3, 1, 12)
    titles = [title for title, _ in report.pictures(model, [request], before, after)]
    assert "Fresh seeds that gave the forget image, or give it now" in titles
    assert report.pictures(model, [request], before, after, private=False) == []


def test_same_request_same_report(made):
    model, request, fix, reference, (one, before, _) = made
    again = unlearn(model, [request], cfg=TINY)
    def timeless(r): return r | {"cost": {k: r["cost"][k] for k in ("steps", "device")}, "requests": []}
    for known in (None, before):
        two = report.evaluate(model, again, [request], reference, never=never, before=known, **FEW)[0]
        assert timeless(one) == timeless(two)


def test_nothing_changed_is_nothing_reported(made):
    model, request, fix, reference, _ = made
    idle = Hotfix({k: torch.zeros_like(v) for k, v in fix.delta.items()}, fix.card)
    r, before, after = report.evaluate(model, idle, [request], reference, never=never, **FEW)
    assert r["preserve"]["any seeds"]["psnr_median"] == 100 and not r["passed"]
    assert r["quality"]["kid_before"] == r["quality"]["kid_after"]
    for row in r["forget"]["reconstruction"]:
        assert row["F"] in (0, None) and row["verdict"] == row["verdict_before"]
        for name in ("to_forget", "control"): assert row[f"{name}_before"] == row[f"{name}_after"]
    assert_close(before["panel"], after["panel"], rtol=0, atol=0)


def test_without_controls_fresh_seeds_or_a_seed(made):
    "What was not looked at is said, and does not count; several requests are one report, each with its place in it."
    model, request, fix, reference, _ = made
    few = FEW | {"fresh": range(0)}
    both = [replace(request, seed=None), replace(request, image=request.surrogate, surrogate=request.image, seed=None)]
    r, before, after = report.evaluate(model, fix, both, reference, m=0, **few)
    verdicts = {v["name"]: v["verdict"] for v in r["verdicts"]}
    for name in ("regeneration", "remembers nowhere", "conspicuous nowhere", "seed", "drift: near neighbours"):
        assert verdicts[name] == "not looked at"
    x_f = model.encode([b.image for b in both]).repeat_interleave(2, 0)
    for row in r["forget"]["reconstruction"]:
        found = similarity(after["reconstruction"][row["t"]], x_f).mean().item()
        assert row["to_forget_after"] == pytest.approx(found, abs=1e-6) and row["verdict"] is None
    report.figure(model, both, before, after, others=2)
    page = report.html(report.public(r), report.pictures(model, both, before, after, private=False))
    assert "not looked at" in page and str(report.evidence(r))
    own = report.evaluate(model, fix, both, reference, m=3, **few)[0]
    assert own["controls"] == {"what": "pictures of other seeds", "n": 3}
    assert report.against(torch.tensor([.9, .1, .5]), torch.tensor([.5, -.9, .99]), *[normal(9) / 9 + .5] * 2
                          )["verdict"] == "remembers"            # the worst of three


# --- the rule ---

def group(dB): return {"n": 9, "left_out": 0, "psnr_median": dB, "psnr_p5": dB - 5}


def numbers(after=0, chance=0., verdict="as if never learned", z=0., seed="a stranger", warnings=(), fall=0.,
            dB=(30., 30.), rise=0., earlier=(), before="remembers"):
    "A report as far as the rule reads it."
    row = {"t": 100, "verdict": verdict, "verdict_before": before, "control_before": .9,
           "control_after": .9 - fall}
    return {"forget": {"reconstruction": [row], "strangers": .4, "same_seed": {"verdict": seed, "highest": .1}},
            "controls": {"n": 19}, "conspicuous": [{"t": 20, "z": 1.}, {"t": 50, "z": z}],
            "regeneration": {"n": 256, "before": 9, "after": after, "chance": chance},
            "surrogate": [{"warnings": list(warnings)}],
            "quality": {"kid_before": .01, "kid_after": .01 + rise, "left_out": 0},
            "preserve": {"any seeds": group(dB[0]), "near neighbours": group(dB[1])},
            "earlier": [{"seed": seed, "to_forget_before": was, "to_forget_after": now} for seed, was, now in earlier]}


def fails(**kw): return [v["name"] for v in report.verdicts(numbers(**kw)) if v["verdict"] == "fails"]


def test_the_rule():
    assert fails() == fails(after=1, chance=.5) == fails(earlier=[(1, .1, .15), (2, .3, .1)]) == []
    assert fails(earlier=[(1, .6, .6), (None, .45, .5)]) == []   # it came back before; a reconstruction, not a picture
    assert fails(verdict="blocked", before="blocked") == []   # the base's doing, not the hotfix's
    assert fails(verdict="remembers", before="remembers")
    for kw, name in (({"after": 1}, "regeneration"), ({"after": 3, "chance": .2}, "regeneration"),
                     ({"verdict": "remembers"}, "remembers nowhere"), ({"verdict": "blocked"}, "blocked nowhere"),
                     ({"z": 3.1}, "conspicuous nowhere"), ({"z": -3.1}, "conspicuous nowhere"),
                     ({"seed": "still alike"}, "seed"), ({"warnings": ("too alike",)}, "surrogate"),
                     ({"fall": .11}, "controls stay"), ({"dB": (25.9, 30.)}, "drift: any seeds"),
                     ({"dB": (30., 25.9)}, "drift: near neighbours"), ({"rise": .06}, "quality"),
                     ({"earlier": [(1, .1, .1), (None, .1, .21)]}, "earlier requests"),
                     ({"earlier": [(1, .39, .41)]}, "earlier requests")):
        assert fails(**kw) == [name], kw


@given(after=st.integers(0, 256), chance=st.floats(0, 20), z=st.floats(-9, 9), fall=st.floats(-.5, .5),
       dB=st.tuples(st.floats(5, 60), st.floats(5, 60)), rise=st.floats(-.1, .2),
       verdict=st.sampled_from(["remembers", "blocked", "as if never learned"]))
def test_passed_means_that_nothing_fails(**kw):
    "And a worse number never turns a verdict to the better."
    judged = report.verdicts(numbers(**kw))
    line, passed = report.top_line(judged)
    bad = fails(**kw)
    assert passed == (not bad) and line.startswith("NOT passed" if bad else "passed")
    assert all(name in line for name in bad) and all(v["said"] for v in judged)
    worse = kw | dict(after=kw["after"] + 3, z=2 * kw["z"], fall=kw["fall"] + .1, rise=kw["rise"] + .1)
    assert set(bad) <= set(fails(**worse))
    assert not report.top_line([v | {"verdict": "not looked at"} for v in judged])[1]


# --- what is given away ---

def scalars(v):
    "All numbers and texts of a report."
    if isinstance(v, dict): return chain.from_iterable(map(scalars, v.values()))
    return chain.from_iterable(map(scalars, v)) if isinstance(v, (list, tuple)) else [v]


def test_the_public_part_tells_nobody(made):
    "Two requests with the same verdicts have the same public part: no number in it was computed from a forget image."
    model, request, fix, reference, (r, _, _) = made
    p = report.public(r)
    assert p["schema"] == 2 and p["passed"] == r["passed"] and p["part"] == "public"
    secret = {*scalars(r["forget"]), *scalars(r["conspicuous"]), *scalars(r["surrogate"]),
              *scalars({k: r["preserve"]["near neighbours"][k] for k in ("psnr_median", "psnr_p5", "cosine_p5")})}
    secret = {v for v in secret if isinstance(v, float)}
    assert secret and not secret & {v for v in scalars(p) if isinstance(v, float)}
    other = dict(forget=numbers()["forget"], conspicuous=[], surrogate=[], earlier=[])
    assert report.public(r | other) == p and report.public(r | {"requests": [{"seed": 9}]})["requests"] == []
    changed = {**r["preserve"], "near neighbours": group(3.), "same words": group(4.)}
    changed["any seeds"] = r["preserve"]["any seeds"] | group(5.)
    assert report.public(r | {"preserve": changed}) == p
    hidden = report.public(r | {"quality": r["quality"] | {"left_out": 1}})
    assert hidden["quality"] is None and "kernel" not in str(hidden["verdicts"])
    changed["any seeds"]["own_words"] = True    # then the panel, too, tells of the request
    assert not {v for v in scalars(report.public(r | {"preserve": changed})) if isinstance(v, float)} - {
        *scalars(r["config"]), *scalars(r["cost"])}
    n = r["regeneration"] | {"before": 99, "surrogate_before": 7, "surrogate_after": 7, "chance": 3., "bars": {}}
    assert report.public(r | {"regeneration": n}) == p
    n = dict.fromkeys(KEYS["density"].split(), 7) | {"seeds": [60, 76], "bars": {"psnr": 0., "similarity": .12345}}
    near = report.public(r | {"regeneration": n})
    assert near["regeneration"] == {"seeds": [60, 76], "n": 7} and "come near" not in str(near)
    attacks = {"attacks": [{"name": "A1", "verdict": "holds", "score": .5, "percentile": .4}], "verdict": "holds"}
    given = report.public(r | {"audit": attacks})["audit"]
    assert given == {"attacks": [{"name": "A1", "verdict": "holds"}], "verdict": "holds"}
    for part in (r | {"audit": attacks}, report.public(r | {"audit": attacks})):
        assert "Attacks" in report.html(part) and "A1" in report.html(part)


class Page(HTMLParser):
    "The tags of a page, and whether each is closed."
    void = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img": self.images.append(dict(attrs))
        if tag not in self.void: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_the_page_is_whole_and_stands_alone(made, tmp_path):
    model, request, _, _, (r, before, after) = made
    odd = r | {"base": r["base"] | {"id": "<b>&"}}
    inside = report.pictures(model, [request], before, after)
    audit = [("An attack", [[(Image.new("RGB", (900, 300)), None, "the figure of an attack")]])]
    report.save_report(tmp_path, odd, inside + audit, report.figure(model, [request], before, after, others=2))
    text = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == odd and (tmp_path / "before_after.png").exists()
    page = Page(text)
    assert not page.open and page.tags & {"script", "link", "iframe"} == set()
    assert "http" not in text and "url(" not in text and "@import" not in text and "<b>&" not in text
    sizes = [Image.open(BytesIO(b64decode(re.fullmatch(r"data:image/png;base64,(.+)", i["src"])[1]))).size
             for i in page.images]
    assert sizes[-1] == (900, 300) and set(sizes[:-1]) == {(8, 8)} and all(i["alt"] for i in page.images)
    first = Image.open(BytesIO(b64decode(page.images[0]["src"].split(",")[1])))
    assert first.tobytes() == request.image.convert("RGB").tobytes()     # of the private page
    shared = report.pictures(model, [request], before, after, private=False)
    alone = Page(report.html(report.public(r), shared))
    asked = {im.tobytes() for im in (request.image, request.surrogate)}
    shown = {im.tobytes() for _, stacks in shared for stack in stacks for im, *_ in stack}
    assert len(alone.images) == 8 and not shown & asked
