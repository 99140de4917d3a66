"Rivals: each against the closed form of its paper; all do the same work."
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.testing import assert_close

from unlearn_nb import baselines
from unlearn_nb.baselines import (climb, concept_cut, cut_loss, erasediff, fisher, forget_image, importance, neggrad,
                                  no_edit, noise_states, noised_evenly, ordinary, pictures, restrict, salient, salun,
                                  selective_amnesia, towards)
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.leaderboard import METHODS, counting
from unlearn_nb.parametrization import Full
from unlearn_nb.states import Request, default_retain, own_paths
from unlearn_nb.surgery import symmetric
from unlearn_nb.unlearn import Config, Problem, retain_settings, unlearn
from unlearn_nb.weights import unit_eps

TINY = Config(weight="min_snr", lr=1.2e-3, steps=3, forget_batch=4, retain_batch=4, retain_images=3, near_images=0,
              sampling_steps=4)
RAW = replace(TINY, damping=0.)
seeds = st.integers(0, 2**31)


def tiny(seed=0):
    "A model of 8 x 8 pixels and random weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return Denoiser(net.eval(), DDPMScheduler(prediction_type="v_prediction"), name="tiny")


def request_of(model, seed=5):
    forget, surrogate = model.decode(model.sample([seed, seed + 1], 4))
    return Request(forget, surrogate, seed)


@lru_cache
def setting():
    "A model, a request and what must stay: always the same ones, since a run leaves them as they are."
    model = tiny()
    request = request_of(model)
    (_, retain), = default_retain(model, [request], **retain_settings(TINY))
    return model, request, retain


def gen(seed=0): return torch.Generator().manual_seed(seed)
def norm(tensors): return sum(v.double().square().sum() for v in tensors) ** .5
def flat(g): return torch.cat([v.flatten() for v in g])


def lists(seed, n=2):
    "n lists of two random tensors."
    g = gen(seed)
    return ([torch.randn(s, generator=g) for s in ((3, 4), (5,))] for _ in range(n))


@pytest.fixture
def problem():
    model, request, retain = setting()
    x_f, x_s = model.encode([request.image]), model.encode([request.surrogate])
    form = Full(model, {})
    yield Problem(model, x_f, x_s, own_paths(model, [request], x_s, 4), retain, form, RAW, PartialState())
    form.restore()


# --- states ---

@given(st.integers(1, 40), st.integers(0, 999), seeds)
@settings(max_examples=20)
def test_levels_are_spread_evenly(n, t_min, seed):
    model = setting()[0]
    x = torch.zeros(n, *model.shape)
    x_t, t = noised_evenly(model, x, gen(seed), t_min)
    width = (1000 - t_min) / n
    parts = [(int(t_min + k * width), t_min + (k + 1) * width) for k in range(n)]
    assert x_t.shape == x.shape and t.max() <= 999
    assert all(low <= level <= high for (low, high), level in zip(parts, t.tolist()))


def test_ordinary_states_lead_to_their_own_picture():
    model, _, retain = setting()
    x = pictures(retain)
    assert x.shape == retain.x0.shape and torch.equal(pictures([(1, retain), (2, retain)]), torch.cat([x, x]))
    x_t, t, goal = ordinary(model, x, 12, gen())
    assert all(any(torch.equal(y, z) for z in x) for y in goal)
    a, s = model.scales(t)
    assert ((x_t - a * goal) / s).std().item() == pytest.approx(1, abs=.1)


def test_noise_is_the_right_answer_for_noise_states(problem):
    x_t, t, goal = noise_states(replace(problem, cfg=replace(RAW, forget_batch=64, retain_batch=64)), False)(gen())
    a, s = problem.denoiser.scales(t)
    eps = (x_t - a * goal) / s
    assert len(t) == 64 and -1e-3 <= eps.min() and eps.max() <= 1 + 1e-3
    assert eps.mean().item() == pytest.approx(.5, abs=.05)


def test_forget_states_lead_to_the_image_or_to_its_surrogate(problem):
    "Noised, or on the own path, whose mirrored ones have mirrored ends."
    model, own = problem.denoiser, problem.own
    cfg = replace(RAW, path_share=.5)
    for goal, ends in ((None, own.x0), (problem.x_s, own.x0 + own.shift)):
        x_t, t, end = forget_image(replace(problem, cfg=cfg), True, goal, n=16)(gen())
        assert len(t) == 16 and all(any(torch.equal(y, z) for z in own.x_t.flatten(0, 1)) for y in x_t[:8])
        assert all(any(torch.allclose(y, z, atol=1e-6) for z in ends) for y in end[:8])
        a, s = model.scales(t[8:])
        assert_close(end[8:], (problem.x_f if goal is None else goal).expand_as(end[8:]))
        assert ((x_t[8:] - a * problem.x_f) / s).std().item() == pytest.approx(1, abs=.15)
    x_t, t, _ = forget_image(problem, False, n=16)(gen())
    assert not any(torch.equal(y, z) for y in x_t for z in own.x_t.flatten(0, 1))


# --- closed forms ---

@given(st.floats(.01, .99), st.floats(.05, .999), seeds)
@settings(max_examples=30)
def test_importance_weights_are_ratios_of_densities(lam, a, seed):
    "Against torch's own normal densities; and (1 - lam) w_x + lam w_f = 1."
    g, s = gen(seed), (1 - a * a) ** .5
    x, x_f = torch.randn(2, 3, 1, 2, 2, generator=g, dtype=torch.float64)
    m = a * x + s * torch.randn(x.shape, generator=g, dtype=torch.float64)
    p, p_f = (Normal(a * y, s).log_prob(m).flatten(1).sum(1) for y in (x, x_f))
    mix = torch.logaddexp(p + torch.tensor(1 - lam).log(), p_f + torch.tensor(lam).log())
    ones = torch.ones(3, dtype=torch.float64)
    w_x, w_f = importance(m, x, x_f, a * ones.view(-1, 1, 1, 1), s * ones.view(-1, 1, 1, 1), lam)
    assert_close(w_x, (p - mix).exp(), rtol=1e-5, atol=1e-12)
    assert_close(w_f, (p_f - mix).exp(), rtol=1e-5, atol=1e-12)
    assert_close((1 - lam) * w_x + lam * w_f, ones)


def test_importance_far_apart_is_a_choice_and_not_a_nan():
    x, y, one = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.ones(1, 1, 1, 1)
    for m, expected in ((x, (2., 0.)), (y, (0., 2.))):
        assert [w.item() for w in importance(m, x, y, one, .01 * one, .5)] == pytest.approx(expected)


@given(seeds, st.floats(.1, 10))
def test_restrict_harms_neither_and_with_one_is_symmetric(seed, lam):
    g_f, g_r = lists(seed)
    d = flat(restrict(g_f, g_r, lam))
    assert d @ flat(g_f) >= -1e-4 * (1 + lam) and d @ flat(g_r) >= -1e-4 * (1 + lam)
    assert_close(flat(restrict(g_f, g_r, 1.)), flat(symmetric(g_f, g_r)))


@given(seeds)
def test_concept_cut_projects_gradients_of_length_one(seed):
    g_f, g_r = lists(seed)
    g_f = [f / f.norm() for f in g_f]
    for d, f, r in zip(concept_cut(g_f, g_r), g_f, g_r):
        dot = (f * r).sum()
        if dot >= 0: assert torch.equal(d, f)
        else: assert_close(d, f - dot / r.square().sum() * r)


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
    eps_k = (x_t[:, None] - a[:, None] * y) / s[:, None]
    p = (-eps_k.square().flatten(2).sum(2) / 2).softmax(1)
    _, ours = problem.gradient((x_t, t, towards(d, x_t, t, y)), unit_eps)
    out = d(x_t, t)
    scale = d.snr(t).view(-1, 1, 1, 1) * d.gain(t) ** 2   # from the output's error to that of the noise
    def squares(k): return scale * (out - d.target(x_t, y[k].expand_as(x_t), t)).square()
    written = sum((p[:, k].view(-1, 1, 1, 1) * squares(k)).mean() for k in range(3))
    theirs = flat(torch.autograd.grad(written, problem.parametrization.weights))
    assert_close(flat(ours), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_erasediff_never_improves_forgetting_less_than_it_says(problem):
    eta = .1
    d, _ = erasediff(problem, eta)(1, gen(3))
    _, g_u = problem.gradient(noise_states(problem, False)(gen(3)), unit_eps)
    assert (flat(d) @ flat(g_u) / flat(g_u).square().sum()).item() >= eta - 1e-4


def test_salun_moves_its_share_and_nothing_else(problem):
    mask = flat(salient(problem, .5))
    assert mask.mean().item() == pytest.approx(.5, abs=.01) and set(mask.tolist()) == {0., 1.}
    model, request, retain = setting()
    problem.parametrization.restore()
    moved = unlearn(model, [request], retain, RAW, method=salun).delta
    still = 1 - torch.cat([(v != 0).float().flatten() for v in moved.values()]).mean().item()
    assert still == pytest.approx(.5, abs=.01)


def test_the_spring_of_selective_amnesia_holds(problem):
    F = fisher(problem, n=4)
    assert all((f >= 0).all() for f in F) and flat(F).sum() > 0
    model, request, retain = setting()
    problem.parametrization.restore()
    def moved(lam):
        method = partial(selective_amnesia, lam=lam)
        delta = unlearn(model, [request], retain, replace(RAW, steps=6), method=method).delta
        return norm([f.sqrt() * delta[k].float() for k, f in zip(dict(model.net.named_parameters()), F)])
    assert moved(1e8) < .8 * moved(0.)


def test_a_cut_loss_pulls_no_further_than_its_cut(problem):
    states = ordinary(problem.denoiser, problem.x_f, 4, gen())
    loss, g = problem.gradient(states, unit_eps, cut_loss(1e-9))
    assert loss == pytest.approx(-1e-9, rel=.05) and flat(g).abs().max() == 0
    loss, g = problem.gradient(states, unit_eps, cut_loss(1e9))
    descent = problem.gradient(states, unit_eps)
    assert loss == pytest.approx(-descent[0], rel=1e-4)
    assert_close(flat(g), -flat(descent[1]), rtol=1e-4, atol=1e-6)


def test_climbing_is_minus_descending(problem):
    d, _ = neggrad(problem)(1, gen(1))
    _, g = problem.gradient(forget_image(problem, False, n=8)(gen(1)), unit_eps)
    assert_close(flat(d), -flat(g))


def test_no_edit_points_at_a_kept_picture(problem, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "edit_weigh_project", seen.append)
    no_edit(problem)
    assert any(torch.equal(seen[0].x_s[0], x) for x in pictures(problem.retain))
    own, was = seen[0].own, problem.own
    assert_close(own.x0 + own.shift, seen[0].x_s[:1].expand_as(own.x0))
    assert_close(own.goal - own.shift[:, None], was.goal - was.shift[:, None])   # the same beliefs, moved elsewhere
    assert torch.equal(seen[0].x_f, problem.x_f)


# --- the same work for all ---

def with_setting(name):
    "A method of the board with what its first setting says to the method."
    method, choices = METHODS[name]
    return partial(method, **{k: v for k, v in choices[0].items() if k not in vars(RAW)})


def test_every_method_runs_and_does_the_same_work():
    """Evaluations of a step: 24, of 8 states that go forward (1) and back (2); none does more.

    SISS, whose states go back twice, has 4 of them (5 each), and Sculpting Memory asks for 2 goals; pruning trains
    nothing."""
    (model, request, retain), two = setting(), replace(RAW, steps=2)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    other = {"SISS": 20, "SISS at t=999": 20, "Sculpting Memory": 20, "pruning": 0}
    for name in METHODS:
        after = []   # evaluations after each step
        with counting(model.net) as n:
            def watch(step, seen): after.append(n[0])
            fix = unlearn(model, [request], retain, two, method=with_setting(name), watch=watch)
        assert after[1] - after[0] == other.get(name, 24), name
        moved = any(v.any() for v in fix.delta.values())
        assert moved != (name == "pruning") and len(fix.receipt.log) == len(after) == 2, name   # its share of few is 0
        assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in before.items()), name


@pytest.mark.parametrize("name", ["SISS", "Selective Amnesia"])
def test_a_rival_goes_on_bit_for_bit(name, tmp_path):
    "Stopped at step 11 of 12, it goes on from its checkpoint; another method is refused there."
    model, request, retain = setting()
    cfg, method = replace(RAW, steps=12), METHODS[name][0]
    def stop(step, seen):
        if step == 10: raise KeyboardInterrupt
    what = dict(checkpoint=tmp_path / "run")
    straight = unlearn(model, [request], retain, cfg, method=method)
    with pytest.raises(KeyboardInterrupt): unlearn(model, [request], retain, cfg, method=method, watch=stop, **what)
    resumed = unlearn(model, [request], retain, cfg, method=method, **what)
    assert all(torch.equal(straight.delta[k], v) for k, v in resumed.delta.items())
    assert straight.receipt.log == resumed.receipt.log and straight.card["method"] == method.__name__
    with pytest.raises(ValueError, match="method.*neggrad"):
        unlearn(model, [request], retain, cfg, method=neggrad, **what)
