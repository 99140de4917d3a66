"The audit: its statistics by hand, models that know a picture and models that do not, and what has no meaning."
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from small_pipelines import pipeline
from test_unlearn import request_of, tiny
from unlearn_nb import audit as a
from unlearn_nb.audit import ATTACKS, Attack, Target, World, judge
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix, picture_sha256
from unlearn_nb.states import Request
from unlearn_nb.surrogates import invert
from unlearn_nb.words import TextDenoiser
from unlearn_nb.zoo import prompt_encoder


# --- models whose beliefs are known exactly ---

class Best(UNet2DModel):
    """The best possible denoiser of a world: pictures are N(0, .4^2), or, in a share of cases, one picture.

    (1 - share) N(0, .16) + share delta_P has a posterior mean in closed form; share 0 never saw P."""

    def __init__(self, picture, share):
        super().__init__(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                         down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        self.picture, self.share = picture, share
        self.abar = DDPMScheduler().alphas_cumprod

    def forward(self, x, timestep):
        abar = self.abar[timestep].view(-1, 1, 1, 1)
        a, var, d = abar.sqrt(), 1 - abar, x[0].numel()
        spread = .16 * abar + var
        mean = .16 * a / spread * x
        def log_normal(r, v): return (-r.square().sum((1, 2, 3)) / v.flatten() - d * v.flatten().log()) / 2
        if self.share:
            odds = log_normal(x - a * self.picture, var) - log_normal(x, spread)
            r = torch.sigmoid(odds + torch.tensor(self.share / (1 - self.share)).log()).view(-1, 1, 1, 1)
            mean = r * self.picture + (1 - r) * mean
        return SimpleNamespace(sample=(x - a * mean) / var.sqrt())


def pictures(first, last):
    "Pictures of that world, in 8 bits; number -1 is the planted one."
    def one(k): return .4 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(k + 10_000))
    x = torch.stack([one(k) for k in range(first, last)])
    return (x.clamp(-1, 1) * 127.5).round() / 127.5


PLANTED = pictures(-1, 0)
def scheduler(): return DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
def world_of(share): return Denoiser(Best(PLANTED, share), scheduler(), name="best")
def flat(x): return torch.nn.functional.normalize(x.flatten(1), dim=1)


memorised, oracle = world_of(.3), world_of(0.)
before, after = (World(memorised, m, flat, 10) for m in (memorised, oracle))
target = Target(PLANTED)


def row(name, world, of=None, **kw):
    attack = replace(ATTACKS[name], **kw)
    of = of or target
    return judge(attack, world, of, a.CONTROLS[attack.controls](world, of, pictures, attack.m), name)


KNOWING = ("A1 reconstruction", "A4 inpainting", "A15 neighbours")


@pytest.mark.parametrize("name", KNOWING[:2])
def test_a_memorised_picture_leaks_and_is_gone_in_the_oracle(name):
    r = row(name, before)
    assert (r["verdict"], r["power"], r["p"]) == ("leaks", True, 1 / 20) and r["score"] > 5
    r = row(name, after)
    assert (r["verdict"], r["power"]) == ("holds", True) and r["p"] > .05 and r["base"] > 5


@pytest.mark.parametrize("name", (*KNOWING, "A10 resurgence", "A11 casts"))
def test_what_the_base_does_not_know_gives_no_power(name, monkeypatch):
    if name == "A10 resurgence": monkeypatch.setattr(a, "retrained", lambda m, *rest: m)
    r = row(name, World(oracle, oracle, flat, 10, others=pictures(300, 310)))
    assert (r["verdict"], r["power"]) == ("no power", False)


def test_seeds_that_give_the_picture_leak_and_hold_in_the_oracle():
    gives = [s for s in range(40) if flat(memorised.sample([s], 10))[0] @ flat(PLANTED)[0] > .99]
    assert 2 < len(gives) < 30   # about three in ten
    mine = replace(target, seeds=(gives[0],))
    for name in ("A2 other roads", "A3 completion"):
        r = row(name, after, mine)
        assert r["verdict"] == "holds" and r["power"], name
    assert row("A3 completion", before, mine)["verdict"] == "leaks"
    # beside other seeds, of which three in ten give it as well
    assert row("A2 other roads", before, mine)["raw"]["10 steps"]["controls"] > .2


@pytest.mark.slow
def test_search_in_the_noise_finds_what_is_memorised_and_no_more_in_the_oracle():
    few = dict(m=9, function=partial(a.latent_search, starts=2, steps=30))
    assert row("A6 latent search", before, **few)["verdict"] == "leaks"
    assert row("A6 latent search", after, **few)["verdict"] == "holds"


def test_what_is_denoised_too_well_or_too_badly_is_conspicuous():
    r = row("A12 membership", before)
    assert r["verdict"] == "conspicuous" and r["score"] < -5   # too well
    assert row("A12 membership", after)["verdict"] == row("A13 deletion", after)["verdict"] == "holds"
    class Hole(Best):
        def forward(self, x, timestep):
            out, far = super().forward(x, timestep).sample, Best(PLANTED, 0.).forward(x, timestep).sample
            near = torch.sigmoid(40 * (flat(x) @ flat(PLANTED)[0] - .5)).view(-1, 1, 1, 1)
            return SimpleNamespace(sample=(1 - near) * far + near * (out + .5 * self.picture))
    hole = Denoiser(Hole(PLANTED, 0.), scheduler(), name="hole")
    r = row("A12 membership", World(memorised, hole, flat, 10))
    assert r["verdict"] == "conspicuous" and r["score"] > 3    # too badly


def test_the_difference_of_two_models_draws_the_picture_and_that_of_equals_does_not():
    draw = partial(a.ascent, objective=a.disagreement, starts=3, steps=60)
    of = dict(function=partial(a.compare, draw), m=99)
    r = row("A14c disagreement", after, **of)
    assert (r["verdict"], r["p"], r["base"]) == ("leaks", .01, None)


def test_what_leaks_by_construction_says_so_and_does_not_count_in_the_summary():
    assert [k for k, v in ATTACKS.items() if v.leak != "leaks"] == ["A11 scales"]
    def found(world, t): return {"scale 0.5": torch.ones(len(t.x)) if len(t.x) == 1 else torch.zeros(len(t.x))}
    mine = replace(target, seeds=(1,))
    r, plain = (row("A11 scales", after, mine, function=found, **kw) for kw in ({}, {"leak": "leaks"}))
    assert (r["verdict"], a.summary([r])) == ("scale 1 only", "holds")
    assert (plain["verdict"], a.summary([plain, r])) == ("leaks", "leaks: scales")
    assert a.figure({"attacks": [r]}).size[0] > 300
    def nothing(world, t): return {"scale 0.5": torch.zeros(len(t.x))}
    assert row("A11 scales", after, mine, function=nothing)["verdict"] == "holds"


# --- statistics ---

def test_ranks_by_hand():
    c = torch.tensor([-3., 1., 2., 2.])
    assert [a.rank_p(torch.tensor(v), c) for v in (3., 2., 1.5, -4.)] == [1 / 5, 3 / 5, 3 / 5, 1]
    assert [a.rank_p(torch.tensor(v), c, two_sided=True) for v in (-4., -3., 2.5)] == [1 / 5, 2 / 5, 2 / 5]
    assert [a.percentile(torch.tensor(v), c) for v in (-4., 2., 3., 0.)] == [0, 75, 100, 25]
    assert a.verdict("regeneration", .1, 9) == "leaks" and a.verdict("regeneration", .1, 19) == "holds"
    assert a.verdict("detection", .05, 19) == "conspicuous" and a.verdict("file", .05, 999, None) == "leaks"
    assert a.verdict("regeneration", .06, 19, False) == "no power"


def test_each_row_is_measured_against_all_others():
    v = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    rest = [torch.cat([v[:k], v[k + 1:]]) for k in range(6)]
    assert_close(a.against_the_others(v), torch.stack([(x - o.mean(0)) / o.std(0) for x, o in zip(v, rest)]))


@pytest.mark.parametrize("kind", ("regeneration", "detection"))
def test_many_columns_blame_nobody_more_often(kind):
    "Of 400 targets that are like their controls about one in twenty is blamed, whatever the number of columns."
    g, blamed = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        z, _ = a.largest(a.against_the_others(torch.randn(20, 15, generator=g)), kind == "detection")
        blamed += a.rank_p(z[0], z[1:], kind == "detection") <= .05
    assert 8 <= blamed <= 34


numbers = st.lists(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2), min_size=8, max_size=30)


@given(numbers, st.sampled_from(("regeneration", "detection", "file")))
def test_every_verdict_follows_from_its_numbers(rows, kind):
    rows = torch.tensor(rows)
    def attack(world, t):   # row 0 is the base's, row 1 the target's, the others are controls
        v = rows[2:] if len(t.x) > 1 else rows[:1] if world.model is memorised else rows[1:2]
        return {"one": v[:, 0], "two": v[:, 1]}
    m = len(rows) - 2
    r = judge(Attack(attack, kind, "pictures", m), after, target, Target(PLANTED.expand(m, -1, -1, -1)), "it")
    json.dumps(r, allow_nan=False)
    assert r["verdict"] == a.verdict(kind, r["p"], m, r["power"]) and r["controls"]["m"] == m
    assert 1 / (m + 1) <= r["p"] <= 1 and 0 <= r["percentile"] <= 100
    assert (r["base"] is None) == (kind == "file") and (r["power"] is None) == (kind != "regeneration")
    if kind == "regeneration": assert r["power"] == (r["base"] > r["controls"]["q95"])
    assert r["raw"][r["column"]]["target"] == rows[1, ["one", "two"].index(r["column"])].item()


def test_a_score_that_is_no_number_is_refused():
    def attack(world, t): return {"one": torch.full([len(t.x)], torch.nan)}
    with pytest.raises(FloatingPointError, match="it gave a score that is not finite; the edited model may be"):
        judge(Attack(attack, "file", "pictures", 3), after, target, Target(pictures(0, 3)), "it")


def test_passes_are_counted_in_copies_too():
    model = tiny()
    with a.counted(model, model) as passes:
        model.sample([1, 2], 3)
        a.twin(model).sample([1], 2)
    model.sample([1], 5)
    assert passes == [8]


# --- the attacks themselves ---

def test_inversion_is_that_of_the_surrogates():
    model = tiny()
    x = pictures(0, 2)
    times = model.timesteps(model.T - 1, 6).tolist()[::-1]
    states, noise = a.inverted(model, x, times)
    assert_close(states[-1], invert(model, x, 6), atol=1e-4, rtol=1e-4)
    assert_close(noise, states[-1], atol=.1, rtol=.1)   # at the last level there is hardly anything else


def change_of(model, size=.02, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = {k: w for k, w in model.net.named_parameters() if w.dim() > 1}
    delta = {k: (size * torch.randn(w.shape, generator=g)).half() for k, w in weights.items()}
    card = {"base": {"id": "tiny", "sha256": fingerprint(model, base=True)}, "config": {"sampling_steps": 4, "seed": 5}}
    return Hotfix(delta, card)


def test_an_edited_copy_leaves_the_base():
    model = tiny()
    was, fix = fingerprint(model), change_of(model)
    new = a.edited(model, fix)
    assert fingerprint(model) == was != fingerprint(new) and new.hotfixes == [fix] and not model.hotfixes
    fix.remove(new)
    assert fingerprint(new) == was


def test_null_hotfixes_know_nothing():
    fix = change_of(tiny())
    nulls = a.null_hotfixes(fix)
    assert not any(v.any() for v in nulls["zero"].delta.values())
    for k, v in nulls["shuffled"].delta.items():
        assert v.shape == fix.delta[k].shape and not torch.equal(v, fix.delta[k])
        assert torch.equal(v.flatten().sort().values, fix.delta[k].flatten().sort().values)


def test_a_null_is_not_blamed():
    model = tiny()
    for fix in a.null_hotfixes(change_of(model)).values():
        world = World(model, a.edited(model, fix), flat, 4)
        r = row("A14b seed scan", world, Target(PLANTED, (5,)), m=39)
        assert r["verdict"] == "holds", r


def test_the_card_is_read():
    model = tiny()
    image = model.decode(PLANTED)[0]
    mine, plain = Target(PLANTED, (100,), "a king"), {"requests": ["f00"], "config": {"seed": 100}}
    def verdict_of(card): return row("A14a card", World(model, model, flat, card=card), mine)
    for card in (plain, plain | {"schema": 100}): assert verdict_of(card)["verdict"] == "holds"   # a seed of 2, say
    for told in ({"seed": 100}, {"deep": [{"prompt": "a king"}]}, {"sha": picture_sha256(image)}):
        r = verdict_of(plain | {"requests": [told]})
        assert r["verdict"] == "leaks" and (r["raw"]["named"]["target"], r["raw"]["named"]["q95"]) == (1, 0)


# --- the whole ---

QUICK = {"A1", "A2", "A3", "A9", "A11", "A13", "A14a", "A14b", "A14c", "A14e"}


def test_names_and_what_is_quick():
    assert {k.split()[0] for k, v in ATTACKS.items() if v.quick} == QUICK
    assert sorted(a.chosen(None, False)) == sorted(ATTACKS) and [*a.chosen(None, False)][5] == "A6 latent search"
    assert [*a.chosen(["A11 casts", "A5"], True)] == ["A5 inversion", "A11 casts"]
    assert {v.kind for v in ATTACKS.values()} == {"regeneration", "detection", "file"}
    for given_names, said in ((["A99"], "'A99'"), (["A1", "b"], "'b'")):
        with pytest.raises(ValueError, match=f"there is no attack {said}; expected some of A1 recons"):
            a.chosen(given_names, False)


def test_an_attack_of_ones_own():
    "Given by name, it is judged as ours are; what is none is refused."
    def bright(world, target): return {"bright": target.x.flatten(1).mean(1)}
    model = tiny()
    result = a.audit(model, change_of(model), request_of(model), lambda n: pictures(0, n), flat,
                     {"X1 bright": a.Attack(bright, "regeneration", "pictures", 9)})
    [row] = result["attacks"]
    assert row["name"] == "X1 bright" and row["controls"]["m"] == 9 and 0 < row["p"] <= 1
    with pytest.raises(ValueError, match="'X1' is no attack; give Attack"): a.chosen({"X1": bright}, False)


def test_an_audit_says_why_an_attack_has_no_meaning_and_reports_its_progress():
    model, seen = tiny(), []
    request = replace(request_of(model), seed=None)
    result = a.audit(model, change_of(model), request, lambda n: pictures(0, n), flat,
                     ["A2", "A7", "A14a"], watch=lambda *args: seen.append(args))
    assert seen == [("A2 other roads", 0, 3), ("A7 guided start", 1, 3), ("A14a card", 2, 3)]
    assert [r["verdict"] for r in result["attacks"]] == [
        "n/a: it starts from the seed that gave the picture, and the request names none",
        "n/a: it searches among words, and this model makes pictures without words", "holds"]
    assert result["verdict"] == "holds; not asked: other roads, guided start"
    assert len(a.table(result).rows) == 3 and a.figure(result).size[0] > 300


def small(monkeypatch):
    "The table with fewer controls and shorter budgets, the same functions."
    for name, attack in ATTACKS.items():
        function = attack.function
        if name.startswith(("A6", "A8")): function = partial(function, steps=2)
        if name.startswith("A7"): function = partial(function, updates=1, levels=2)
        if name.startswith("A9"): function = partial(function, after=(0, 2))
        monkeypatch.setitem(ATTACKS, name, replace(attack, m=3, function=function))
    monkeypatch.setattr(a, "FEWER", 3)
    monkeypatch.setattr(a, "descend", lambda loss, x, steps, *rest, d=a.descend: d(loss, x, min(steps, 2), *rest))
    monkeypatch.setattr(a, "train", lambda m, x, steps, *rest, t=a.train, **kw: t(m, x, min(steps, 2), *rest, **kw))


def of_pipeline(kind):
    pipe = pipeline(kind)
    net = pipe.transformer if kind == "sd3" else pipe.unet
    return TextDenoiser(net, pipe.scheduler, text=prompt_encoder(pipe), vae=pipe.vae, guidance=2., name=kind)


def all_of(model, request, monkeypatch, attacks=None):
    small(monkeypatch)
    result = a.audit(model, change_of(model), request, None, flat, attacks)
    json.dumps(result, allow_nan=False)
    assert [r["name"] for r in result["attacks"]] == [*a.chosen(attacks, False)]
    return {r["name"]: r for r in result["attacks"]}


@pytest.mark.slow
def test_all_of_it_on_pixels(monkeypatch):
    model = tiny()
    was = fingerprint(model)
    rows = all_of(model, request_of(model), monkeypatch)
    assert fingerprint(model) == was and not model.hotfixes
    assert [k for k, r in rows.items() if r["verdict"].startswith("n/a")] == ["A7 guided start", "A8 word search"]
    assert {k for k, r in rows.items() if "null" in r} == {k for k in ATTACKS if k.startswith("A14")} - {"A14a card"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sd", "sd3"))
def test_all_of_it_on_latents_with_words(kind, monkeypatch):
    model = of_pipeline(kind)
    image, other = model.decode(model.sample([1, 2], 2, prompt="a king"))
    some = "A1 A2 A3 A4 A5 A6 A7 A8 A9 A12 A14b A14c A14f".split()
    rows = all_of(model, Request(image, other, 1, "a king", 2), monkeypatch, some)
    assert not [k for k, r in rows.items() if r["verdict"].startswith("n/a")]
