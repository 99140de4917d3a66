"Losses with a bottom: their values and gradients at the base, their limits, the bands, and the same work for all."
from dataclasses import replace
from functools import partial
from math import log

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from test_baselines import RAW, flat, gen, request_of, setting, tiny
from unlearn_nb.baselines import (between, doco, erasediff, forget_image, neggrad, neggrad_retain, retained, retrack,
                                  rgd, siss_no_is)
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.parametrization import Full, Lora
from unlearn_nb.preferences import (as_base, band_loss, duo, growth, key_steps, low_pass, npo, npo_loss, pair_loss,
                                    pair_states, prior_loss, prior_states, time_frequency)
from unlearn_nb.states import Request, generate, own_paths
from unlearn_nb.unlearn import Problem, unlearn
from unlearn_nb.weights import unit_eps
from unlearn_nb.zoo import load


def problem_on(model, request, retain, form, cfg=replace(RAW, path_share=.5)):
    x_f, x_s = model.encode([request.image]), model.encode([request.surrogate])
    own = own_paths(model, [request], x_s, cfg.sampling_steps)
    cond = model.prompt_ids([request.prompt], 1) if model.prompts else None
    return Problem(model, x_f, x_s, own, retain, form, cfg, PartialState(), cond)


@pytest.fixture
def problem():
    model, request, retain = setting()
    form = Full(model, {})
    yield problem_on(model, request, retain, form)
    form.restore()


def nudge(problem, size=.02, seed=0):
    "Move the weights somewhere."
    g = gen(seed)
    for p in problem.parametrization.params: p.add_(size * torch.randn(p.shape, generator=g))
    problem.parametrization.write_weights()


# --- the base beneath ---

@pytest.mark.parametrize("make", [lambda model: Full(model, {}), lambda model: Lora(model, 2, 0)])
def test_the_base_answers_and_the_weights_come_back(make):
    model, request, retain = tiny(), *setting()[1:]
    x_t, t = model.noise(retain.x0, torch.randn(retain.x0.shape, generator=gen()), torch.tensor([5, 500, 999])), \
        torch.tensor([5, 500, 999])
    with torch.no_grad(): base = model(x_t, t)
    problem = problem_on(model, request, retain, make(model))
    nudge(problem)
    with torch.no_grad():
        moved = model(x_t, t)
        with as_base(problem): beneath = model(x_t, t)
        assert torch.equal(model(x_t, t), moved) and not torch.allclose(moved, base)
    assert_close(beneath, base, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError), as_base(problem): raise RuntimeError
    with torch.no_grad(): assert torch.equal(model(x_t, t), moved)


# --- NPO ---

@pytest.mark.parametrize("beta", [.01, 1., 100.])
def test_npo_starts_at_two_log_two_over_beta_and_climbs(problem, beta):
    states = forget_image(problem, True)(gen())
    loss, g = problem.gradient(states, unit_eps, npo_loss(problem, beta))
    assert loss == pytest.approx(2 / beta * log(2))
    down = problem.gradient(states, unit_eps)[1]
    assert_close(flat(g), -flat(down), rtol=1e-4, atol=1e-6 * flat(down).abs().max().item())


@pytest.mark.parametrize("beta", [.1, 3., 30.])
def test_npo_has_a_bottom_and_its_weight_falls(problem, beta):
    "Away from the base: the loss is 0 or more, its gradient -2 sigmoid(-beta D) times that of the error; at last 0."
    for times in range(3):
        x_t, t, goal = (v[:1] for v in forget_image(problem, False)(gen(times)))
        D = growth(problem, x_t, t, goal, unit_eps).item()
        loss, g = problem.gradient((x_t, t, goal), unit_eps, npo_loss(problem, beta))
        down = flat(problem.gradient((x_t, t, goal), unit_eps)[1])
        weight = 2 / (1 + torch.tensor(beta * D, dtype=torch.float64).exp()).item()
        assert loss >= 0
        assert_close(flat(g), -weight * down, rtol=1e-3, atol=1e-5 * down.abs().max().item())
        nudge(problem, .05, times)
    nudge(problem, 3.)
    x_t, t, goal = forget_image(problem, False)(gen())
    assert growth(problem, x_t, t, goal, unit_eps).min() > 0
    loss, g = problem.gradient((x_t, t, goal), unit_eps, npo_loss(problem, 1e6))
    assert 0 <= loss < 1e-6 and flat(g).abs().max() < 1e-6


@pytest.mark.parametrize("paths", [False, True])
def test_npo_first_step_is_that_of_neggrad_with_what_must_stay(problem, paths):
    ours, seen = npo(problem, 5., c=.5, paths=paths)(1, gen())
    g = gen()
    down = problem.gradient(forget_image(problem, paths, n=3)(g), unit_eps)[1]
    kept = retained(problem, 4, paths)(g)[1]
    assert_close(flat(ours), flat(kept) - .5 * flat(down), rtol=1e-4, atol=1e-6 * flat(down).abs().max().item())
    assert seen["forget"] == pytest.approx(2 / 5 * log(2))


# --- DUO ---

@pytest.mark.parametrize("paths", [False, True])
@pytest.mark.parametrize("own_t", [False, True])
def test_a_pair_is_one_noise_on_two_pictures(problem, paths, own_t):
    d = problem.denoiser
    x_t, t, x_f, y_t, u, x_s = pair_states(replace(problem, levels=(0, 750)), paths, 8, own_t)(gen())
    assert torch.equal(t, u) != own_t and max(t.max(), u.max()) < 750
    (a, s), (b, r) = d.scales(t), d.scales(u)
    assert_close((x_t - a * x_f) / s, (y_t - b * x_s) / r, rtol=1e-3, atol=1e-3)
    of_f, of_s = ([problem.x_f[0], problem.own.x0[1]], [problem.x_s[0], problem.x_s[0].flip(-1)])   # and mirrored
    for x, y in zip(x_f, x_s):
        fits = [torch.allclose(x, v, atol=1e-5) and torch.allclose(y, w, atol=1e-5) for v, w in zip(of_f, of_s)]
        assert any(fits) or (paths and torch.allclose(x, problem.own.x0[0], atol=1e-5))
    assert paths or torch.equal(x_t, forget_image(replace(problem, levels=(0, 750)), False, n=8)(gen())[0])


@pytest.mark.parametrize("beta", [1., 500.])
def test_duo_starts_at_log_two_with_no_prior_and_the_two_pull_alike(problem, beta):
    states = pair_states(problem, False, 4)(gen())
    loss, g = problem.gradient(states, unit_eps, pair_loss(problem, beta))
    assert loss == pytest.approx(log(2))
    x_t, t, x_f, y_t, u, x_s = states
    away, towards = (flat(problem.gradient(b, unit_eps)[1]) for b in ((x_t, t, x_f), (y_t, u, x_s)))
    assert_close(2 / beta * flat(g), towards - away, rtol=1e-3, atol=1e-5 * away.abs().max().item())
    loss, g = problem.gradient(prior_states(problem, 3)(gen()), unit_eps, prior_loss(problem))
    assert loss == 0 and flat(g).abs().max() == 0
    d, seen = duo(problem, beta)(1, gen(3))
    g = gen(3)
    pairs = pair_states(replace(problem, levels=(0, 750)), False, 2, own_t=True)(g)
    assert_close(flat(d), 2 / beta * flat(problem.gradient(pairs, unit_eps, pair_loss(problem, beta))[1]))
    assert seen == {"forget": pytest.approx(log(2)), "prior": 0}


def test_duo_is_its_formula_away_from_the_base(problem):
    beta, d = 3., problem.denoiser
    nudge(problem)
    x_t, t, x_f, y_t, u, x_s = states = pair_states(problem, True, 4, own_t=True)(gen())
    now = [(d(x, l), d.target(x, y, l)) for x, y, l in ((x_t, x_f, t), (y_t, x_s, u))]
    def mse(out, goal, l): return (out - goal).square().mean((1, 2, 3)) * d.scales(l)[0].flatten() ** 2   # of eps by v
    after = [mse(*pair, l) for pair, l in zip(now, (t, u))]
    with as_base(problem), torch.no_grad():
        before = [mse(d(x, l), d.target(x, y, l), l) for x, y, l in ((x_t, x_f, t), (y_t, x_s, u))]
    D_f, D_s = (a - b for a, b in zip(after, before))
    expected = (1 + (-beta * (D_f - D_s)).exp()).log().mean().item()
    assert problem.gradient(states, unit_eps, pair_loss(problem, beta))[0] == pytest.approx(expected, rel=1e-4)
    z, t, _ = prior_states(problem, 3)(gen())
    assert (t == 999).all() and abs(z.mean()) < .3 and abs(z.std() - 1) < .2
    with torch.no_grad(): out = d(z, t)
    with as_base(problem), torch.no_grad(): base = d(z, t)
    loss, g = problem.gradient((z, t, z), unit_eps, prior_loss(problem))
    assert loss == pytest.approx((out - base).square().mean().item(), rel=1e-4) and flat(g).abs().max() > 0


# --- bands and key steps ---

@given(st.integers(0, 2**31), st.floats(0, .8), st.sampled_from([(8, 8), (7, 10)]))
@settings(max_examples=30)
def test_low_pass_is_a_projection(seed, cutoff, size):
    x, y = torch.randn(2, 2, 3, *size, generator=gen(seed))
    low = low_pass(x, cutoff)
    assert_close(low_pass(low, cutoff), low, rtol=1e-4, atol=1e-5)
    assert_close((low * y).sum(), (x * low_pass(y, cutoff)).sum(), rtol=1e-3, atol=1e-3)
    assert_close(low.square().sum() + (x - low).square().sum(), x.square().sum(), rtol=1e-4, atol=1e-4)   # low + high
    assert_close(low_pass(x, .71), x, rtol=1e-4, atol=1e-5)
    assert_close(low_pass(x, 0.), x.mean((2, 3), keepdim=True).expand_as(x), rtol=1e-4, atol=1e-5)


def test_a_band_of_all_is_the_plain_loss_and_low_and_high_are_all(problem):
    states = forget_image(problem, True)(gen())
    plain, g = problem.gradient(states, unit_eps)
    loss, h = problem.gradient(states, unit_eps, band_loss(.71))
    assert loss == pytest.approx(plain, rel=1e-5)
    assert_close(flat(h), flat(g), rtol=1e-3, atol=1e-5 * flat(g).abs().max().item())
    low, g_low = problem.gradient(states, unit_eps, band_loss(.25))
    d = problem.denoiser
    def high_loss(d, x_t, t, goal, w):
        error = d(x_t, t) - d.target(x_t, goal, t)
        error = error - low_pass(error, .25)
        return (w(d.snr(t)).view(-1, 1, 1, 1) * d.gain(t) ** 2 * error.square()).mean()
    high, g_high = problem.gradient(states, unit_eps, high_loss)
    assert low + high == pytest.approx(plain, rel=1e-5) and 0 < low < plain
    assert_close(flat(g_low) + flat(g_high), flat(g), rtol=1e-3, atol=1e-5 * flat(g).abs().max().item())


@pytest.mark.parametrize("paths", [False, True])
def test_all_times_and_frequencies_are_siss_without_is(problem, paths):
    ours, _ = time_frequency(problem, t_min=0, t_max=1000, cutoff=.71, paths=paths)(1, gen())
    theirs, _ = siss_no_is(problem, paths=paths)(1, gen())
    assert_close(flat(ours), flat(theirs), rtol=1e-3, atol=1e-5 * flat(theirs).abs().max().item())


@pytest.mark.parametrize("method", [neggrad, neggrad_retain, erasediff, siss_no_is, rgd, doco,
                                    partial(retrack, K=2), npo], ids=str)
@pytest.mark.parametrize("paths", [False, True])
def test_key_steps_from_the_first_on_change_nothing(problem, method, paths):
    ours, seen = key_steps(problem, method, skip=0., paths=paths)(1, gen())
    theirs, logged = method(problem, paths=paths)(1, gen())
    assert torch.equal(flat(ours), flat(theirs)) and seen == logged


def test_levels_hold_what_is_noised_and_what_lies_on_paths(problem):
    model, own = problem.denoiser, problem.own
    for levels in ((0, 680), (250, 750), (900, 1000)):
        part = replace(problem, levels=levels)
        for paths in (False, True):
            t = forget_image(part, paths, n=64)(gen())[1]
            assert levels[0] <= t.min() and t.max() < levels[1] and len(t) == 64
            assert t.max() - t.min() > .9 * (levels[1] - levels[0])   # of noised ones the whole range
    assert own.timesteps.tolist() == [750, 500, 250, 0]
    cut = between(own, 100, 750)
    assert cut.timesteps.tolist() == [500, 250] and torch.equal(cut.x_t, own.x_t[:, 1:3])
    assert torch.equal(cut.goal, own.goal[:, 1:3]) and torch.equal(cut.x0, own.x0) and between(own, 900, 1000) is None


def test_key_steps_are_the_last_seven_tenths_of_sampling(problem):
    seen = []
    def look(problem, paths): seen.append(problem.levels)
    scheduler = DDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    trailing = Denoiser(problem.denoiser.net, scheduler)
    for n, skip, top in ((25, .3, 719), (10, .3, 799), (4, .3, 749), (25, .99, 79), (9, 0., 1000)):
        part = replace(problem, denoiser=trailing, cfg=replace(problem.cfg, sampling_steps=n))
        key_steps(part, look, skip)
        assert seen[-1] == (0, pytest.approx(top))
    for skip in (-.1, 1.):
        with pytest.raises(ValueError, match=f"skip is {skip}"): key_steps(problem, look, skip)


# --- the same work for all ---

RIVALS = {"NPO": npo, "DUO": duo, "DUO, same t": partial(duo, own_t=False), "time and frequency": time_frequency,
          "key steps": key_steps, "key steps of NPO": partial(key_steps, method=npo)}


@pytest.mark.parametrize("paths", [False, True])
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_runs_and_does_the_same_work(name, paths):
    "Forward 1, back 2, of states of a step, those of the base counted: 24 units."
    (model, request, retain), two = setting(), replace(RAW, steps=2, path_share=.5)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    units, after = [], []
    def see(net, inputs, out): units.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
    hook = model.net.register_forward_hook(see)
    method = partial(RIVALS[name], paths=paths)
    try: fix = unlearn(model, [request], retain, two, method=method, watch=lambda *_: after.append(sum(units)))
    finally: hook.remove()
    assert after[1] - after[0] == 24
    assert any(v.any() for v in fix.delta.values()) and len(fix.receipt.log) == 2
    assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("method", [npo, duo])
@pytest.mark.parametrize("damping, rank", [(.01, 0), (0., 2)])
def test_free_directions_and_small_pieces_change_no_start(method, damping, rank):
    "In pieces of one state, along free directions or as a LoRA, the first step is what it is in one piece."
    model, request, retain = setting()
    logs = [unlearn(model, [request], retain, replace(RAW, steps=2, damping=damping, rank=rank, micro_batch=n),
                    method=method).receipt.log for n in (1, 32)]
    for name in logs[0][0].keys() - {"lr"}:
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-3), name
    assert logs[0][0]["forget"] == pytest.approx(2 / 30 * log(2) if method is npo else log(2))


def test_a_run_stopped_goes_on_bit_for_bit(tmp_path):
    "What is on at the start of a run is the base, also of one that goes on."
    model, request, retain = setting()
    cfg, what = replace(RAW, steps=12), dict(checkpoint=tmp_path / "run")
    def stop(step, seen):
        if step == 10: raise KeyboardInterrupt
    straight = unlearn(model, [request], retain, cfg, method=npo)
    with pytest.raises(KeyboardInterrupt): unlearn(model, [request], retain, cfg, method=npo, watch=stop, **what)
    resumed = unlearn(model, [request], retain, cfg, method=npo, **what)
    assert all(torch.equal(straight.delta[k], v) for k, v in resumed.delta.items())


@pytest.mark.parametrize("method", [npo, duo, key_steps])
def test_with_words_on_a_flow(method):
    "On the built-in model with words: what must stay is our states, DUO's prompts are none."
    model = load("flags")
    forget, surrogate = model.decode(model.sample([7, 8], 4, prompt="flag of France"))
    request = Request(forget, surrogate, 7, "flag of France", copies=())
    retain = generate(model, [1, 2], 4, prompt="flag of Italy")
    cfg = replace(RAW, steps=2, rank=2, path_share=.5)
    asked = []
    def see(net, inputs, kw, out): asked.append(kw["encoder_hidden_states"].detach())
    hook = model.net.register_forward_hook(see, with_kwargs=True)
    run = partial(method, paths=method is not duo)
    try: fix = unlearn(model, [request], retain, cfg, method=run)
    finally: hook.remove()
    assert all(torch.tensor(list(seen[k] for k in seen if k != "known" and seen[k] is not None)).isfinite().all()
               for seen in fix.receipt.log)
    assert any(v.any() for v in fix.delta.values())
    if method is duo:
        none = model.prompt_embeds["encoder_hidden_states"][0]
        assert all(torch.equal(v, none.expand_as(v)) for v in asked[-2:])
