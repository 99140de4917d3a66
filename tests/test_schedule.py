"Noise levels against diffusers' own schedulers and the published formulas."
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from unlearn_nb.schedule import CLEAN, DDPM, GAIN, TARGET, Flow, generators, randn, step_generator, stratified

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SHIFTS = (1., 3., 6.)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ddpm(prediction="epsilon", betas="linear", dtype=torch.float32):
    return DDPM(DDPMScheduler(beta_schedule=betas).alphas_cumprod.to(dtype), prediction)


def flow(shift=3.):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    return Flow(1000, theirs.shift, theirs.sigma_min)


# --- randomness ---

def test_a_seed_gives_its_own_numbers_whatever_stands_beside_it():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = randn(generators([8]), (3, 2))
    for seeds in ([3, 8], [8, 3], torch.tensor([5, 8, 8]), range(7, 10)):
        rows = randn(generators(seeds), (3, 2))
        for k, seed in enumerate(seeds):
            if seed == 8: assert torch.equal(rows[k], alone[0])
    assert torch.equal(alone[0], torch.randn(3, 2, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(torch.get_rng_state(), before)   # and the global generator is left alone


def test_a_step_has_its_own_generator():
    draws = {(seed, step): torch.rand(1, generator=step_generator(seed, step)).item()
             for seed in range(4) for step in range(50)}
    assert len(set(draws.values())) == 200
    assert torch.rand(1, generator=step_generator(3, 7)).item() == draws[3, 7]


@given(n=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_stratified_draws_one_number_from_each_part(n, seed):
    u = stratified(n, torch.Generator().manual_seed(seed))
    parts = torch.arange(n + 1) / n
    assert (u >= parts[:-1]).all() and (u <= parts[1:]).all()


# --- noise, snr, target, clean, gain ---

def test_ddpm_is_what_diffusers_adds_and_asks_for():
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    x0, eps = normal(6, 3, 8, 8), normal(6, 3, 8, 8, seed=1)
    for betas in BETAS:
        ours, theirs = ddpm("v_prediction", betas), DDPMScheduler(beta_schedule=betas)
        assert_close(ours.noise(x0, eps, t), theirs.add_noise(x0, eps, t))
        target = ours.target(ours.noise(x0, eps, t), x0, t)[2:]   # below, 1/s carries float32 rounding along
        assert_close(target, theirs.get_velocity(x0, eps, t)[2:], atol=1e-4, rtol=1e-4)


def test_snr_has_its_published_values():
    d, f, every = ddpm(), flow(), torch.arange(1000)
    t = torch.tensor([0, 10, 100, 250, 500, 900])
    assert_close(d.snr(t).sqrt(), torch.tensor([100, 21, 2.9, 1.04, .29, .016]), rtol=.03, atol=0)
    assert_close(f.snr(torch.tensor([499, 249, 999])), torch.tensor([1., 9., 0.]))   # ((1 - s) / s)^2
    for one in (d, f): assert (one.snr(every).diff() < 0).all()
    assert (f.snr(torch.linspace(-.9, 999, 5000)).diff() < 0).all() and f.snr(torch.tensor([-1])).isinf()


@given(t=st.integers(0, 999), betas=st.sampled_from(BETAS), seed=st.integers(0, 99))
@example(t=0, betas="linear", seed=0)
@example(t=999, betas="squaredcos_cap_v2", seed=0)
@settings(max_examples=60)
def test_clean_inverts_target_for_any_pair(t, betas, seed):
    "Any pair, not only a noised image and its own clean image."
    x0, x_t, t = normal(1, 3, 8, 8, seed=seed), normal(1, 3, 8, 8, seed=seed + 100), torch.tensor([t])
    for one in (*(ddpm(p, betas) for p in PREDICTIONS), flow()):
        out = one.target(x_t, x0, t)
        scale = (one.gain(t) * out.abs().max()).clamp(min=1)   # float32 rounding, seen through the gain
        assert_close((one.clean(x_t, out, t) - x0) / scale, torch.zeros_like(x0), atol=2e-5, rtol=0)


@given(t=st.integers(0, 999), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_another_picture_shifts_the_target_by_d_over_the_gain(t, seed):
    "sqrt(SNR) D, D/s or -D; of a flow D/s; times the gain the size of D at every level."
    x_f, x_s, eps = (normal(1, 3, 8, 8, seed=3 * seed + k, dtype=torch.double) for k in range(3))
    t = torch.tensor([t])
    for one in (*(ddpm(p, dtype=torch.double) for p in PREDICTIONS), flow()):
        level = t.double() if one.prediction == "flow" else t
        x_t, (_, s), D = one.noise(x_f, eps, level), one.scales(level), x_f - x_s
        shift = one.target(x_t, x_s, level) - one.target(x_t, x_f, level)
        expected = {"epsilon": one.snr(level).sqrt().view(-1, 1, 1, 1) * D, "sample": -D}.get(one.prediction, D / s)
        assert_close(shift, expected, atol=1e-6, rtol=1e-6)
        assert_close((one.gain(level) * shift).abs(), D.abs(), atol=1e-6, rtol=1e-6)


def test_targets_of_a_noised_image():
    x0, eps = normal(2, 3, 8, 8, dtype=torch.double), normal(2, 3, 8, 8, seed=1, dtype=torch.double)
    t = torch.tensor([3, 700])
    for one in (*(ddpm(p, dtype=torch.double) for p in PREDICTIONS), flow()):
        level = t.double() if one.prediction == "flow" else t
        a, s = one.scales(level)
        expected = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[one.prediction]
        assert_close(one.target(one.noise(x0, eps, level), x0, level), expected, atol=1e-6, rtol=1e-6)
    assert TARGET.keys() == CLEAN.keys() == GAIN.keys()


# --- timesteps ---

@given(start=st.integers(0, 999), steps=st.integers(1, 1200))
@example(start=999, steps=3)
def test_timesteps_go_down_evenly(start, steps):
    t = ddpm().timesteps(start, steps)
    assert t[0] == start and t.dtype == torch.int64 and len(t) == min(steps, start + 1) and t[-1] >= 0
    gaps = -t.diff(append=torch.tensor([-1]))
    assert (gaps >= 1).all() and gaps.max() - gaps.min() <= 1


@given(start=st.floats(-.999, 999), steps=st.integers(1, 200), shift=st.sampled_from(SHIFTS))
@example(start=0, steps=50, shift=3.)
@settings(max_examples=100)
def test_timesteps_of_a_flow_go_down(start, steps, shift):
    t = flow(shift).timesteps(start, steps)
    assert abs(t[0] - start) < 1e-4 and 1 <= len(t) <= steps and (t.diff() < 0).all() and t[-1] > -1
    if start > 50: assert len(t) == steps   # the last level lies below, for every shift


def test_timesteps_are_the_schedulers():
    theirs = DDIMScheduler(timestep_spacing="trailing")
    for n in (1, 2, 3, 5, 7, 10, 16, 30, 50, 64, 99, 128, 250, 333, 500, 999, 1000):
        theirs.set_timesteps(n)
        assert ddpm().timesteps(999, n).tolist() == theirs.timesteps.tolist()[:n], n
    for shift in SHIFTS:
        for n in (1, 2, 3, 10, 28, 50, 1000):
            one, theirs = flow(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
            theirs.set_timesteps(n)
            t = one.timesteps(999, n)
            assert len(t) == n and t[0] == 999, (shift, n)
            assert_close(one.told(t), theirs.timesteps, atol=1e-3, rtol=1e-6)
            assert_close(one.scales(t)[1].flatten(), theirs.sigmas[:-1], atol=1e-6, rtol=1e-6)
    assert Flow(1000).timesteps(999, 50)[-1] > -1   # a flow of one's own never visits the clean image


# --- step ---

def test_step_is_ddim_step():
    x_t, out, z = (normal(4, 3, 8, 8, seed=k) for k in range(3))
    for prediction in PREDICTIONS:
        one, theirs = ddpm(prediction), DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing",
                                                      clip_sample=False)
        for steps in (1000, 50, 4):
            theirs.set_timesteps(steps)
            for t in (999, 999 - 1000 // steps, 1000 // steps - 1):   # the first, the second, the last step
                for eta in (0., .3, 1.):
                    expected = theirs.step(out, t, x_t, eta=eta, variance_noise=z)
                    x0 = one.clean(x_t, out, one.level(t, 4))
                    x = one.step(x_t, x0, t, t - 1000 // steps, eta, z)
                    tolerance = 2e-5 * max(1., x0.abs().max().item())   # rounding, seen through the gain
                    assert_close(x0, expected.pred_original_sample, atol=tolerance, rtol=1e-5)
                    assert_close(x, expected.prev_sample, atol=tolerance, rtol=1e-5)


def test_eta_one_over_all_levels_is_ddpm():
    x_t, out = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    for prediction in ("v_prediction", "sample"):   # epsilon's rounding at t = 999 is that of its gain, 157
        one = ddpm(prediction)
        theirs = DDPMScheduler(prediction_type=prediction, variance_type="fixed_small", clip_sample=False)
        for t in (999, 998, 500, 250, 20, 1, 0):
            expected = theirs.step(out, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
            x = one.step(x_t, one.clean(x_t, out, one.level(t, 2)), t, t - 1, 1., normal(2, 3, 8, 8, seed=5))
            assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_noise_and_step_of_a_flow_are_the_schedulers():
    x0, eps, out = (normal(3, 4, 8, 8, seed=k) for k in range(3))
    for shift in SHIFTS:
        one, theirs = flow(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(7)
        t = one.timesteps(999, 7)
        assert_close(one.noise(x0, eps, t[[0, 3, 6]]), theirs.scale_noise(x0, theirs.timesteps[[0, 3, 6]], eps))
        x = theirs_x = normal(3, 4, 8, 8, seed=3)
        for k, now in enumerate(t.tolist()):
            theirs_x = theirs.step(out, theirs.timesteps[k], theirs_x).prev_sample
            x = one.step(x, one.clean(x, out, one.level(now, 3)), now, (t.tolist() + [-1])[k + 1])
            assert_close(x, theirs_x, atol=1e-4, rtol=1e-4)


def test_a_step_asks_for_the_clean_image_alone():
    "Led by one picture all the way, the path ends there from any noise."
    x0 = normal(1, 3, 8, 8)
    for one in (ddpm(), flow()):
        x = normal(1, 3, 8, 8, seed=1)
        for t, t_next in ((999, 600), (600, 200), (200, 0), (0, -1)): x = one.step(x, x0, t, t_next)
        assert torch.equal(x, x0)


# --- errors: one sentence that names the value ---

def test_what_does_not_exist_is_refused_in_one_sentence():
    x = normal(1, 3, 8, 8)
    cases = (
        (lambda: generators([-1]), "seed -1 is no seed"),
        (lambda: generators([1.5]), "seed 1.5 is no seed"),
        (lambda: generators(["a"]), "seed 'a' is no seed"),
        (lambda: generators([2 ** 63]), "is no seed"),
        (lambda: generators([]), "no seeds were given"),
        (lambda: generators(0), "seeds is 0; give a list of whole numbers, such as [0]"),
        (lambda: generators(None), "seeds is None"),
        (lambda: ddpm().timesteps(999, 0), "steps = 0 makes no picture"),
        (lambda: ddpm().timesteps(1000, 5), "level t = 1000 does not exist; this model has levels 0 ... 999"),
        (lambda: ddpm().timesteps(-1, 5), "level t = -1 does not exist"),
        (lambda: flow().timesteps(999, 0), "steps = 0 makes no picture"),
        (lambda: flow().timesteps(-1, 5), "level t = -1 does not exist"),
        (lambda: flow().timesteps(999.5, 5), "t = 999.5 does not exist; this model has levels above -1 up to 999"),
        (lambda: flow().step(x, x, 9, 5, eta=.5), "eta = 0.5, but a flow draws no noise on its way"),
    )
    for act, sentence in cases:
        with pytest.raises(ValueError) as e: act()
        assert sentence in str(e.value) and "\n" not in str(e.value), sentence
