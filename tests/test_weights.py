"Weights: w(snr) against the published forms in output space, the bounds that hold, windows, and choosing by name."
from copy import deepcopy
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from hypothesis import given
from hypothesis import strategies as st

from unlearn_nb import weights
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.weights import WEIGHTS, abar, flow, get, min_snr, p2, unit_eps, unit_v, unit_x0, window
from test_denoiser import tiny_net

T = torch.arange(1000)
LINEAR = DDPMScheduler(1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear')
COSINE = DDPMScheduler(1000, beta_schedule='squaredcos_cap_v2')


def scales(scheduler):
    "snr, a, s of all levels; the SNR as diffusers computes it."
    abar = scheduler.alphas_cumprod
    return compute_snr(scheduler, T), abar.sqrt(), (1 - abar).sqrt()


@pytest.mark.parametrize('scheduler', [LINEAR, COSINE], ids=['linear', 'cosine'])
@pytest.mark.parametrize('gamma', [1., 5., 20.])
def test_min_snr_is_the_published_weight_of_each_prediction_type(scheduler, gamma):
    snr, a, s = scales(scheduler)
    cut = torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values   # as diffusers' train_unconditional and train_text_to_image do
    w = min_snr(snr, gamma)
    torch.testing.assert_close(w * (s / a)**2, cut/snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(w * s**2, cut/(snr + 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(w, cut)


@pytest.mark.parametrize('scheduler', [LINEAR, COSINE], ids=['linear', 'cosine'])
@pytest.mark.parametrize('prediction, unit', [('epsilon', unit_eps), ('v_prediction', unit_v), ('sample', unit_x0)])
def test_unit_weight_is_loss_one_of_its_prediction_type(scheduler, prediction, unit):
    snr, a, s = scales(scheduler)
    gain = {'epsilon': s / a, 'v_prediction': s, 'sample': torch.ones_like(s)}[prediction]
    torch.testing.assert_close(unit(snr) * gain**2, torch.ones_like(snr), rtol=1e-4, atol=0)


@pytest.mark.parametrize('w, largest, below_100, below_250, from_500', [
    (unit_eps, 1e4, .98, .997, .000),
    (min_snr, 5, .48, .90, .007),
    (lambda snr: min_snr(snr, gamma=1.), 1, .28, .70, .020),
    (unit_x0, 1, .10, .25, .50),
    (partial(p2, gamma=.5), 100, .77, .94, .005),
    (abar, 1, .35, .74, .024),
], ids=['unit_eps', 'min_snr 5', 'min_snr 1', 'unit_x0', 'p2 .5', 'abar'])
def test_push_is_bounded_and_comes_from_where_the_table_says(w, largest, below_100, below_250, from_500):
    push = w(scales(LINEAR)[0])   # the push is x_f - x_s at all levels, so the weight is all that differs
    share = lambda some: (some.sum() / push.sum()).item()
    assert push.max().item() == pytest.approx(largest, rel=1e-3)
    assert share(push[:100]) == pytest.approx(below_100, abs=.006)
    assert share(push[:250]) == pytest.approx(below_250, abs=.006)
    assert share(push[500:]) == pytest.approx(from_500, abs=.0006)


def test_unit_eps_takes_most_of_its_push_from_ten_levels():
    push = unit_eps(scales(LINEAR)[0])
    assert (push[:10].sum() / push.sum()).item() == pytest.approx(.79, abs=.005)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8), st.floats(.015625, 128, width=32))
def test_min_snr_is_the_smaller_of_the_two(snr, gamma):
    assert min_snr(torch.tensor(snr), gamma).tolist() == [min(x, gamma) for x in snr]


@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_keep_shape_dtype_and_input(name):
    snr = torch.tensor([[0., 3.], [9., 1e4]], dtype=torch.float64)
    before = snr.clone()
    w = get(name)(snr)
    assert w.shape == snr.shape and w.dtype == snr.dtype and (w >= 0).all() and torch.equal(snr, before)


def test_noise_alone_costs_v_nothing_and_divides_nothing():
    "Zero terminal SNR: at the last level a = 0; the published form for epsilon is 0 / 0 there, ours for v is a plain number."
    abar = DDIMScheduler(1000, rescale_betas_zero_snr=True, prediction_type='v_prediction').alphas_cumprod
    w_g2 = min_snr(abar / (1 - abar)) * (1 - abar)
    assert w_g2.isfinite().all() and w_g2[-1] < 1e-6 and w_g2.max() <= 5 / 6 + 1e-5


@pytest.mark.parametrize('k, gamma', [(1., 1.), (1., .5), (.1, 2.)])
@pytest.mark.parametrize('scheduler', [LINEAR, COSINE], ids=['linear', 'cosine'])
def test_p2_is_the_published_factor_on_the_error_of_the_noise(scheduler, k, gamma):
    snr, a, s = scales(scheduler)
    torch.testing.assert_close(p2(snr, k, gamma) * (s / a)**2, 1 / (k + snr)**gamma, rtol=1e-4, atol=0)


def test_one_minus_abar_on_the_noise_is_abar_here_and_p2():
    snr, a, s = (x.double() for x in scales(LINEAR))
    torch.testing.assert_close(abar(snr), LINEAR.alphas_cumprod.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(abar(snr) * (s / a)**2, 1 - LINEAR.alphas_cumprod.double(), rtol=1e-4, atol=0)
    assert torch.equal(abar(snr), p2(snr))


def test_flow_is_loss_one_of_the_velocity():
    "x_q = (1 - q) x0 + q eps: an error of the velocity is q times as large in x0. diffusers' sigma_sqrt on the x0 loss is the same weight."
    q = torch.linspace(.001, 1, 1000, dtype=torch.float64)
    snr = ((1 - q) / q)**2
    torch.testing.assert_close(flow(snr) * q**2, torch.ones_like(q))
    torch.testing.assert_close(flow(snr), compute_loss_weighting_for_sd3('sigma_sqrt', q).double(), rtol=1e-5, atol=0)


# --- through a denoiser: the losses that others write ---

@pytest.mark.parametrize('beta_schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('prediction, factor', [('epsilon', lambda snr, cut: cut/snr), ('v_prediction', lambda snr, cut: cut/(snr + 1)), ('sample', lambda snr, cut: cut)])
def test_loss_of_a_denoiser_is_the_loss_of_the_published_training_script(prediction, factor, beta_schedule):
    "min-SNR-5 weighted mean square of output minus target, per sample, at levels of all sizes."
    d = Denoiser(tiny_net(), DDPMScheduler(1000, beta_schedule=beta_schedule, prediction_type=prediction))
    g = torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 8, 3, 8, 8, generator=g)
    t = torch.tensor([0, 10, 100, 250, 500, 700, 900, 990])
    snr = compute_snr(d.scheduler, t)
    goal = {'epsilon': eps, 'v_prediction': d.scheduler.get_velocity(x0, eps, t), 'sample': x0}[prediction]
    theirs = factor(snr, snr.clamp(max=5.)) * (out - goal).square().mean((1, 2, 3))
    x_t = d.noise(x0, eps, t)
    ours = min_snr(d.snr(t)) * d.gain(t).flatten()**2 * (out - d.target(x_t, x0, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


# --- windows ---

@pytest.mark.parametrize('t0, t1', [(0, 1000), (0, 1), (0, 300), (1, 2), (100, 300), (500, 1000), (998, 999), (999, 1000)])
@pytest.mark.parametrize('scheduler', [LINEAR, COSINE, DDIMScheduler(1000, rescale_betas_zero_snr=True, prediction_type='v_prediction')], ids=['linear', 'cosine', 'zero terminal snr'])
def test_window_has_exactly_its_levels(scheduler, t0, t1):
    d = Denoiser(tiny_net(), scheduler)
    inside = (T >= t0) & (T < t1)
    w = window('unit_x0', d, t0, t1)
    for snr in (d.snr(T), compute_snr(scheduler, T), d.snr(T).double(), 1/(1/scheduler.alphas_cumprod.double() - 1)):   # in any arithmetic
        assert torch.equal(w(snr) > 0, inside), (w(snr) > 0).nonzero().flatten()
    v = window(partial(min_snr, gamma=2.), d, t0, t1)(d.snr(T))
    assert torch.equal(v, torch.where(inside, min_snr(d.snr(T), 2.), 0.)) and v.dtype == torch.float32


def test_windows_side_by_side_are_the_whole():
    d = Denoiser(tiny_net(), LINEAR)
    parts = [window(unit_eps, d, *ends)(d.snr(T)) for ends in ((0, 1), (1, 250), (250, 999), (999, 1000))]
    assert torch.equal(sum(parts), unit_eps(d.snr(T)))


@pytest.mark.parametrize('t0, t1', [(-1, 10), (10, 10), (20, 10), (0, 1001), (1000, 1001)])
def test_empty_windows_are_refused(t0, t1):
    with pytest.raises(ValueError) as error: window('min_snr', Denoiser(tiny_net(), LINEAR), t0, t1)
    message = str(error.value)
    assert str(t0) in message and '999' in message and '\n' not in message


def test_names_for_the_card():
    "A curve with parameters says so by name, and still does when a run's settings are copied."
    d = Denoiser(tiny_net(), LINEAR)
    gentle = partial(min_snr, gamma=1.)
    assert get(gentle) is gentle and gentle.__name__ == 'min_snr(gamma=1.0)' == deepcopy(gentle).__name__
    assert get(partial(p2, k=.1, gamma=2.)).__name__ == 'p2(k=0.1, gamma=2.0)'
    assert window('abar', d, 0, 300).__name__ == 'window(abar, 0, 300)'
    assert window(gentle, d, 0, 300).__name__ == 'window(min_snr(gamma=1.0), 0, 300)' == get(window(gentle, d, 0, 300)).__name__
    assert gentle(torch.tensor([.5, 7.])).tolist() == [.5, 1.]


def test_get_by_name_or_callable():
    for name in ('min_snr', 'unit_eps', 'unit_v', 'unit_x0', 'flow', 'p2', 'abar'): assert get(name) is getattr(weights, name) and get(name).__name__ == name
    own = lambda snr: snr / (1 + snr)
    assert get(own) is own


@pytest.mark.parametrize('wrong', ['min-snr', '', None, 5., ['min_snr'], {}])
def test_get_names_the_value_and_the_choices(wrong):
    with pytest.raises(ValueError) as error: get(wrong)
    message = str(error.value)
    assert repr(wrong) in message and '\n' not in message
    assert all(name in message for name in WEIGHTS)
