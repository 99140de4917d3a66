"Forward only: int8 to half a step, estimates against their closed forms, and a hotfix for the float base."
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint
from unlearn_nb.forward_only import (by_row, differences, direction, errors, estimate, forward_only, forward_problem,
                                     int8, layer_edits, layers, least_squares, off, put, quantize, ridge,
                                     slopes, zeroth)
from unlearn_nb.schedule import step_generator
from unlearn_nb.states import Request, default_retain
from unlearn_nb.unlearn import Config, retain_settings
from unlearn_nb.weights import unit_eps, x0_loss

CFG = Config(steps=3, forget_batch=3, retain_batch=3, retain_images=3, near_images=0, pool=4, sampling_steps=4, lr=.1)
seeds = st.integers(0, 2**31)


@lru_cache
def setting():
    "A model of 8 x 8 pixels and random weights, a request and what must stay."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    model = Denoiser(net.eval(), DDPMScheduler(prediction_type="v_prediction"), name="tiny")
    forget, surrogate = model.decode(model.sample([5, 6], 4))
    request = Request(forget, surrogate, 5, copies=())
    return model, request, default_retain(model, [request], **retain_settings(CFG))


def problem():
    model, request, retain = setting()
    return forward_problem(int8(model), [request], retain, CFG)


def some(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.sampled_from([(3, 5), (4, 2, 3, 3), (1, 1)]))
def test_int8_is_off_by_half_a_step_at_most(seed, shape):
    w = some(*shape, seed=seed) * 10. ** (seed % 7 - 3)
    q, scale = quantize(w)
    assert q.dtype == torch.int8 and q.abs().max() <= 127
    assert ((q * by_row(scale, w) - w).abs() <= by_row(scale, w) * (.5 + 1e-4)).all()


def test_a_channel_of_zeros_stays_zero():
    q, scale = quantize(torch.zeros(2, 3))
    assert not (q * by_row(scale, q)).any()


def test_the_int8_model_holds_a_quarter_and_leaves_the_first_one_alone():
    model, _, _ = setting()
    before, light = fingerprint(model), int8(model)
    x, t = some(2, *model.shape), torch.tensor([10, 500])
    assert (light(x, t) - model(x, t)).square().mean() < 1e-2 * model(x, t).square().mean()
    for name, layer in layers(light.net).items():
        ours = layer.parametrizations.weight
        assert ours.original0.dtype == torch.int8 and len(ours.original1) == len(ours.original0)
    assert fingerprint(model) == before and all(w.requires_grad for w in model.net.parameters())
    assert light.net.conv_in.bias.data_ptr() == model.net.conv_in.bias.data_ptr()


def test_mean_slope_times_direction_is_the_gradient_and_its_second_moment_is_known():
    D, n, N = 6, 2, 40_000
    grad = some(D).double()
    z = some(N, n, D, seed=1).double()
    p = z @ grad                                              # slopes of a linear loss
    raw = (p[..., None] * z).mean(1)
    assert (raw.mean(0) - grad).norm() < .03 * grad.norm()
    second = raw.square().sum(1).mean() / grad.square().sum()
    assert abs(second - (D + n + 1) / n) < .05 * (D + n + 1) / n
    scaled = torch.stack([estimate(p[k], lambda j, k=k: z[k, j], D) for k in range(4000)])
    assert abs(scaled.square().sum(1).mean() / grad.square().sum() - 1) < .1


@given(seeds)
def test_slopes_of_a_linear_loss_are_exact(seed):
    grad, theta = some(5, seed=seed).double(), some(5, seed=seed + 1).double()
    def of(k): return direction(0, seed % 100, k, theta)
    here, found = slopes(lambda v: grad @ v, theta, 3, 1e-3, of)
    assert_close(here, grad @ theta)
    assert_close(torch.stack(found), torch.stack([grad @ of(k) for k in range(3)]), rtol=1e-6, atol=1e-8)


def test_directions_are_drawn_again_bit_for_bit_and_touch_no_global_generator():
    theta, state = torch.zeros(7), torch.get_rng_state()
    first = [direction(3, 5, k, theta) for k in range(3)]
    assert all(torch.equal(direction(3, 5, k, theta), z) for k, z in enumerate(first))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(first[0], z) for z in (first[1], direction(3, 6, 0, theta), direction(4, 5, 0, theta)))


@given(seeds)
def test_what_is_taken_off_is_gone(seed):
    H, D = 12, 20
    history = some(H, 3, seed=seed).double() @ some(3, D, seed=seed + 1).double() + 1e-4 * some(H, D, seed=seed + 2)
    x = (history - history.mean(0)) / history.std(0)
    _, s, V = torch.linalg.svd(x, full_matrices=False)
    g = off(some(D, seed=seed + 3).double(), history)
    assert (V[3:] @ g).abs().max() < 1e-9 and (V[:1] @ g).abs().max() > 1e-9
    assert_close(off(g, history), g)


def test_put_back_is_exact():
    p = problem()
    form, d = p.parametrization, p.denoiser
    x, t = some(2, *d.shape), torch.tensor([10, 500])
    theta = some(*form.params[0].shape)
    put(form, theta)
    before = d(x, t)
    put(form, theta + 1e-3 * some(*theta.shape, seed=1))
    assert not torch.equal(d(x, t), before)
    put(form, theta)
    assert torch.equal(d(x, t), before)
    put(form, 0 * theta)
    assert torch.equal(d(x, t), int8(setting()[0])(x, t))


@given(seeds)
@settings(max_examples=10)
def test_ridge_is_the_least_squares_change(seed):
    u, stay, wanted = (some(9, k, seed=seed + j).double() for j, k in enumerate((5, 5, 4)))
    little = .01 * (u.square().sum() + stay.square().sum()) / 5
    W = torch.linalg.solve(u.T @ u + stay.T @ stay + little * torch.eye(5, dtype=torch.float64), u.T @ wanted).T
    assert_close(ridge(u, wanted, stay, .01), W)


def test_layers_that_see_no_picture_are_left_out():
    p = problem()
    names = set(layer_edits(p))
    assert "conv_out" in names and not [name for name in names if "time" in name]


def test_differences_are_the_jacobian():
    A, theta = some(7, 4).double(), some(4, seed=1).double()
    here, J = differences(lambda v: A @ v, theta, 1e-2)
    assert_close(here, A @ theta)
    assert_close(J, A.T)


def test_squares_of_errors_sum_to_the_loss():
    p = problem()
    batch = p.forget_batch(step_generator(0, 0))
    assert_close(errors(p, batch, unit_eps).square().sum(), x0_loss(p.denoiser, *batch, unit_eps))


@pytest.mark.parametrize("method", [partial(least_squares, rounds=2), zeroth])
def test_the_hotfix_fits_the_float_base_and_comes_off_again(method):
    model, request, retain = setting()
    before = fingerprint(model)
    fix = forward_only(model, request, retain, CFG, method=method)
    assert fingerprint(model) == before and any(v.any() for k, v in fix.delta.items() if "lora_B" in k)
    x, t = some(2, *model.shape), torch.tensor([10, 500])
    was = model(x, t)
    fix.apply(model)
    assert not torch.equal(model(x, t), was)
    fix.remove(model)
    assert fingerprint(model) == before
    if method is zeroth:   # all that is random comes from seeds
        again = forward_only(model, request, retain, CFG, method=method)
        assert all(torch.equal(again.delta[k], v) for k, v in fix.delta.items())


def test_bad_input_is_refused():
    model, request, retain = setting()
    with pytest.raises(ValueError, match="steps"): forward_only(model, request, retain, replace(CFG, steps=0))
