"Weights: the one loss and w(snr) against the published forms in output space, bounds, windows, choosing by name."
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from test_files import tiny_net
from unlearn_nb import weights
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import name_of
from unlearn_nb.schedule import stratified
from unlearn_nb.states import SAMPLING
from unlearn_nb.weights import (WEIGHTS, abar, aimed_loss, flow, get, min_snr, p2, unit_eps, unit_v, unit_x0,
                                window, x0_error, x0_loss)

T = torch.arange(1000)
LINEAR = DDPMScheduler(1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear')
COSINE = DDPMScheduler(1000, beta_schedule='squaredcos_cap_v2')
ZERO_SNR = DDIMScheduler(1000, rescale_betas_zero_snr=True, prediction_type='v_prediction')
PREDICTIONS = 'epsilon', 'v_prediction', 'sample'


def scales(scheduler):
    "snr, a, s of all levels; the SNR as diffusers computes it."
    abar = scheduler.alphas_cumprod
    return compute_snr(scheduler, T), abar.sqrt(), (1 - abar).sqrt()


# --- the curves, in the space where they were published ---

@pytest.mark.parametrize('scheduler', [LINEAR, COSINE], ids=['linear', 'cosine'])
def test_curves_are_the_published_factors(scheduler):
    "w g^2, which is a factor on the error of the output, for the gain g of each prediction type."
    snr, a, s = scales(scheduler)
    gain2 = dict(zip(PREDICTIONS, ((s / a)**2, s**2, torch.ones_like(s))))
    for prediction, unit in zip(PREDICTIONS, (unit_eps, unit_v, unit_x0)):
        assert_close(unit(snr) * gain2[prediction], torch.ones_like(snr), rtol=1e-4, atol=0)
    for gamma in (1., 5., 20.):   # as diffusers' train_unconditional and train_text_to_image do
        w, cut = min_snr(snr, gamma), torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values
        for prediction, factor in zip(PREDICTIONS, (cut/snr, cut/(snr + 1), cut)):
            assert_close(w * gain2[prediction], factor, rtol=1e-4, atol=0)
    for k, gamma in ((1., 1.), (1., .5), (.1, 2.)):
        assert_close(p2(snr, k, gamma) * gain2['epsilon'], 1 / (k + snr)**gamma, rtol=1e-4, atol=0)
    snr, alphas = snr.double(), scheduler.alphas_cumprod.double()
    assert_close(abar(snr), alphas, rtol=1e-3, atol=0)
    assert torch.equal(abar(snr), p2(snr))


def test_flow_is_loss_one_of_the_velocity():
    "x_q = (1 - q) x0 + q eps: an error of the velocity is q times as large in x0; diffusers call it sigma_sqrt."
    q = torch.linspace(.001, 1, 1000, dtype=torch.float64)
    snr = ((1 - q) / q)**2
    assert_close(flow(snr) * q**2, torch.ones_like(q))
    assert_close(flow(snr), compute_loss_weighting_for_sd3('sigma_sqrt', q).double(), rtol=1e-5, atol=0)


def test_push_is_bounded_and_comes_from_where_the_lesson_says():
    "The push is x_f - x_s at all levels, so only the weight differs: largest, share below 10, 100, 250, from 500."
    snr = scales(LINEAR)[0]
    for w, *expected in [(unit_eps, 1e4, .79, .98, .997, .000), (min_snr, 5, .05, .48, .90, .007),
                         (partial(min_snr, gamma=1.), 1, .03, .28, .70, .020), (unit_x0, 1, .01, .10, .25, .50),
                         (partial(p2, gamma=.5), 100, .32, .77, .94, .005), (abar, 1, .04, .35, .74, .024)]:
        push = w(snr)
        shares = [(part.sum() / push.sum()).item() for part in (push[:10], push[:100], push[:250], push[500:])]
        assert push.max().item() == pytest.approx(expected[0], rel=1e-3)
        assert shares == pytest.approx(expected[1:], abs=.006), w


def test_drawing_lower_levels_more_often_makes_the_effective_weight_steeper():
    "A mean over draws weighs with w q. Of unit_eps, 79 % of the push is below t = 10 if drawn evenly, 92 % with `low`."
    snr, u = scales(LINEAR)[0], stratified(200_000, torch.Generator().manual_seed(0))
    for sampling, share in (('uniform', .79), ('low', .92)):
        t = (SAMPLING[sampling](u) * 550).long()
        push = unit_eps(snr[t])
        assert (push[t < 10].sum() / push.sum()).item() == pytest.approx(share, abs=.005)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8), st.floats(.015625, 128, width=32))
def test_min_snr_is_the_smaller_of_the_two(snr, gamma):
    assert min_snr(torch.tensor(snr), gamma).tolist() == [min(x, gamma) for x in snr]


def test_weights_keep_shape_dtype_and_input():
    for name in WEIGHTS:
        snr = torch.tensor([[0., 3.], [9., 1e4]], dtype=torch.float64)
        before, w = snr.clone(), get(name)(snr)
        assert w.shape == snr.shape and w.dtype == snr.dtype and (w >= 0).all() and torch.equal(snr, before), name


# --- the one loss, through a denoiser ---

@pytest.mark.parametrize('beta_schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('prediction, factor', list(zip(PREDICTIONS, (
    lambda snr, cut: cut/snr, lambda snr, cut: cut/(snr + 1), lambda snr, cut: cut))))
def test_the_loss_is_that_of_the_published_training_script(prediction, factor, beta_schedule):
    "min-SNR-5 weighted mean square of output minus target, at levels of all sizes; and in the space of clean images."
    d = Denoiser(tiny_net(), DDPMScheduler(1000, beta_schedule=beta_schedule, prediction_type=prediction))
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 8, 3, 8, 8, generator=g)
    t = torch.tensor([0, 10, 100, 250, 500, 700, 900, 990])
    x_t, snr = d.noise(x0, eps, t), compute_snr(d.scheduler, t)
    with torch.no_grad(): out = d(x_t, t)
    goal = {'epsilon': eps, 'v_prediction': d.scheduler.get_velocity(x0, eps, t), 'sample': x0}[prediction]
    theirs = factor(snr, snr.clamp(max=5.)) * (out - goal).square().mean((1, 2, 3))
    error = x0_error(d, out, x_t, t, x0, min_snr)
    assert error.shape == x0.shape
    assert_close(error.mean((1, 2, 3)), theirs, rtol=2e-3, atol=1e-5)
    with torch.no_grad(): assert_close(x0_loss(d, x_t, t, x0, min_snr), theirs.mean(), rtol=2e-3, atol=1e-5)
    openly = min_snr(snr[:6]) * (d.clean(x_t, out, t) - x0)[:6].square().mean((1, 2, 3))   # where a is not almost 0
    assert_close(error[:6].mean((1, 2, 3)), openly, rtol=1e-2, atol=1e-5)


@given(across=st.floats(0, 1), prediction=st.sampled_from(PREDICTIONS), seed=st.integers(0, 99))
def test_the_aimed_loss_is_the_part_along_the_edit_and_a_share_of_the_rest(across, prediction, seed):
    "Of the error of the clean image; all of it counts at 1, bit for bit, and an edit of nothing asks for nothing."
    d = Denoiser(tiny_net(), DDPMScheduler(1000, prediction_type=prediction))
    g = torch.Generator().manual_seed(seed)
    x_t, goal, shift = torch.randn(3, 4, 3, 8, 8, generator=g)
    t = torch.tensor([10, 200, 400, 600])
    with torch.no_grad():
        error = d.clean(x_t, d(x_t, t), t) - goal
        loss = aimed_loss(d, x_t, t, goal, min_snr, shift, across=across)
        assert torch.equal(aimed_loss(d, x_t, t, goal, min_snr, shift, across=1), x0_loss(d, x_t, t, goal, min_snr))
        assert aimed_loss(d, x_t, t, goal, min_snr, 0 * shift) < 1e-8
    along = (error * shift).sum((1, 2, 3)).square() / shift.square().sum((1, 2, 3)) / error[0].numel()
    rest = error.square().mean((1, 2, 3)) - along
    assert_close(loss, (min_snr(d.snr(t)) * (along + across * rest)).mean(), rtol=1e-3, atol=1e-6)


def test_noise_alone_costs_v_nothing_and_divides_nothing():
    "Zero terminal SNR: a = 0 at the last level; the published form for epsilon is 0 / 0 there, ours for v is a number."
    d, g = Denoiser(tiny_net(), ZERO_SNR), torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 2, 3, 8, 8, generator=g)
    t = torch.tensor([999, 500])
    error = x0_error(d, out, d.noise(x0, eps, t), t, x0, min_snr)
    assert error.isfinite().all() and error[0].max() < 1e-5 < error[1].max()


# --- windows ---

@pytest.mark.parametrize('scheduler', [LINEAR, COSINE, ZERO_SNR], ids=['linear', 'cosine', 'zero terminal snr'])
def test_window_has_exactly_its_levels(scheduler):
    d = Denoiser(tiny_net(), scheduler)
    in_float64 = 1 / (1/scheduler.alphas_cumprod.double() - 1)
    for t0, t1 in ((0, 1000), (0, 1), (0, 300), (1, 2), (100, 300), (500, 1000), (998, 999), (999, 1000)):
        inside = (T >= t0) & (T < t1)
        for snr in (d.snr(T), compute_snr(scheduler, T), d.snr(T).double(), in_float64):   # in any arithmetic
            assert torch.equal(window('unit_x0', d, t0, t1)(snr) > 0, inside), (t0, t1)
        v = window(partial(min_snr, gamma=2.), d, t0, t1)(d.snr(T))
        assert torch.equal(v, torch.where(inside, min_snr(d.snr(T), 2.), 0.)) and v.dtype == torch.float32


def test_windows_side_by_side_are_the_whole():
    d = Denoiser(tiny_net(), LINEAR)
    parts = [window(unit_eps, d, *ends)(d.snr(T)) for ends in ((0, 1), (1, 250), (250, 999), (999, 1000))]
    assert torch.equal(sum(parts), unit_eps(d.snr(T)))


# --- choosing ---

def test_names_for_the_card():
    "A curve with parameters says so by name; nothing is written into what the user gave."
    d, gentle = Denoiser(tiny_net(), LINEAR), partial(min_snr, gamma=1.)
    assert get(gentle) is gentle and not vars(gentle) and name_of(gentle) == 'min_snr(gamma=1.0)'
    assert name_of(partial(p2, k=.1, gamma=2.)) == 'p2(k=0.1, gamma=2.0)'
    assert window('abar', d, 0, 300).__name__ == 'window(abar, 0, 300)'
    assert window(gentle, d, 0, 300).__name__ == 'window(min_snr(gamma=1.0), 0, 300)'
    assert gentle(torch.tensor([.5, 7.])).tolist() == [.5, 1.]


def test_get_by_name_or_callable():
    for name in ('min_snr', 'unit_eps', 'unit_v', 'unit_x0', 'flow', 'p2', 'abar'):
        assert get(name) is getattr(weights, name) and get(name).__name__ == name
    own = lambda snr: snr / (1 + snr)
    assert get(own) is own


def test_what_cannot_be_is_refused_in_one_sentence():
    d = Denoiser(tiny_net(), LINEAR)
    table = [(partial(window, 'min_snr', d, *ends), (str(ends[0]), str(ends[1] - 1), '999'))
             for ends in ((-1, 10), (10, 10), (20, 10), (0, 1001), (1000, 1001))]
    table += [(partial(get, lambda snr: -snr), ('-1e-08',)), (partial(get, lambda snr: snr[:, None]), ('[4001, 1]',)),
              (partial(get, lambda snr: snr.sum()), ('shape []',)),
              (partial(get, lambda snr: 1 / (snr - snr)), ('inf',))]
    table += [(partial(get, wrong), (repr(wrong), *WEIGHTS)) for wrong in ('min-snr', '', None, 5., ['min_snr'], {})]
    for act, words in table:
        with pytest.raises(ValueError) as error: act()
        assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)
