"Weights: w(snr) against the published forms in output space, the bounds that hold, and choosing by name."
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from unlearn_nb import weights
from unlearn_nb.weights import get, min_snr, unit_eps, unit_v, unit_x0

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
], ids=['unit_eps', 'min_snr 5', 'min_snr 1', 'unit_x0'])
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


@pytest.mark.parametrize('name', ['min_snr', 'unit_eps', 'unit_v', 'unit_x0'])
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


def test_get_by_name_or_callable():
    for name in ('min_snr', 'unit_eps', 'unit_v', 'unit_x0'): assert get(name) is getattr(weights, name)
    own = lambda snr: snr / (1 + snr)
    assert get(own) is own


@pytest.mark.parametrize('wrong', ['min-snr', '', None, 5., ['min_snr'], {}])
def test_get_names_the_value_and_the_choices(wrong):
    with pytest.raises(ValueError) as error: get(wrong)
    message = str(error.value)
    assert repr(wrong) in message and '\n' not in message
    assert all(name in message for name in ('min_snr', 'unit_eps', 'unit_v', 'unit_x0'))
