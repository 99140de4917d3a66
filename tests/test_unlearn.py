"The loop: what it promises whatever the model."
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.testing import assert_close

from unlearn_nb.denoiser import Denoiser
from unlearn_nb.hotfix import fingerprint
from unlearn_nb.retain import generate
from unlearn_nb.unlearn import Config, Request, default_retain, goals, noised_states, path_states, unlearn, x0_loss
from unlearn_nb.weights import WEIGHTS
from unlearn_nb.zoo import load

TINY = Config(steps=3, forget_batch=4, retain_batch=4, retain_images=3, sampling_steps=4)


def tiny(prediction="v_prediction", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",)*2, up_block_types=("UpBlock2D",)*2)
    return Denoiser(net.eval(), DDPMScheduler(prediction_type=prediction), name="tiny")


def request_of(model, seed=5):
    forget, surrogate = model.decode(model.sample([seed, seed + 1], 4))
    return Request(forget, surrogate, seed)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_base_comes_back_bit_for_bit_and_the_hotfix_moves_it(prediction):
    model = tiny(prediction)
    before = fingerprint(model)
    fix = unlearn(model, [request_of(model)], cfg=TINY)
    assert fingerprint(model) == before == fix.card["base"]["sha256"]
    assert all(p.grad is None for p in model.net.parameters())
    fix.apply(model)
    assert fingerprint(model) != before
    fix.remove(model)
    assert fingerprint(model) == before


def test_same_seed_same_hotfix_other_seed_another():
    model = tiny()
    one, two, three = (unlearn(model, [request_of(model)], cfg=replace(TINY, seed=s)) for s in (0, 0, 1))
    assert same(one.delta, two.delta) and not same(one.delta, three.delta)


def test_global_random_state_plays_no_part():
    model = tiny()
    torch.manual_seed(1)
    one = unlearn(model, [request_of(model)], cfg=TINY)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = unlearn(model, [request_of(model)], cfg=TINY)
    assert same(one.delta, two.delta) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_is_the_weighted_x0_error(prediction, weight):
    model, g = tiny(prediction), torch.Generator().manual_seed(0)
    x_t, goal = torch.randn(6, 3, 8, 8, generator=g), torch.randn(6, 3, 8, 8, generator=g).clamp(-1, 1)
    t = torch.tensor([20, 100, 250, 400, 600, 800])
    with torch.no_grad():
        error = (torch.cat([model.predict(x[None], s) for x, s in zip(x_t, t)]) - goal).square()
        expected = (WEIGHTS[weight](model.snr(t)).view(-1, 1, 1, 1)*error).mean()
        assert_close(x0_loss(model, x_t, t, goal, WEIGHTS[weight]), expected, rtol=2e-3, atol=1e-6)


def test_states_lead_from_the_image_and_the_path():
    model, g = tiny(), torch.Generator().manual_seed(0)
    x_f, x_s = torch.zeros(2, 3, 8, 8), torch.stack([torch.full((3, 8, 8), .1), torch.full((3, 8, 8), .2)])
    x_t, t, goal = noised_states(model, x_f, x_s, 64, 500, g)
    assert t.min() >= 0 and t.max() < 500 and set(goal.unique().tolist()) == set(x_s.unique().tolist())
    assert_close(x_t.flatten(1).std(1), (1 - model.abar[t]).sqrt(), rtol=.3, atol=.02)   # x_f is zero: what is left is the noise of that level
    path = generate(model, [1, 2, 3], 4)
    x_t, t, goal = path_states(path, 16, g)
    for x, level, belief in zip(x_t, t, goal):
        s = path.levels.tolist().index(level)
        i = next(i for i in range(3) if torch.equal(path.states[i, s], x))
        assert torch.equal(path.beliefs[i, s], belief)


def test_own_path_leads_to_the_surrogate():
    model = tiny()
    r = request_of(model)
    unseeded = replace(r, seed=None)
    x_f, x_s, own = goals(model, [unseeded, r], TINY)
    assert len(own.states) == 1 and torch.equal(own.beliefs, x_s[1:, None].expand_as(own.beliefs))
    assert goals(model, [unseeded], TINY)[2] is None
    assert len(unlearn(model, [unseeded, r], cfg=TINY).card["requests"]) == 2


def test_first_retain_gradient_is_nothing():
    assert unlearn(m := tiny(), [request_of(m)], cfg=TINY).card["log"][0]["retain"] < 1e-9


def test_it_forgets():
    "On the built-in model, twelve steps towards the surrogate bring reconstructions nearer to it, and the loss down."
    model = load("faces", device="cpu")
    x_f, x_s = model.sample([100, 7], 10)
    a, b = model.decode(torch.stack([x_f, x_s]))
    fix = unlearn(model, [Request(a, b, 100)], cfg=replace(TINY, steps=12, forget_batch=8, retain_batch=8, sampling_steps=10))
    def far(): return (model.reconstruct(x_f[None], 250, range(2), 10) - x_s).square().mean().item()
    before = far()
    fix.apply(model)
    assert far() < .8*before


def test_not_finite_stops_with_the_step_named_and_the_base_back():
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(FloatingPointError, match="step 0"):
        unlearn(model, [request_of(model)], cfg=replace(TINY, weight=lambda snr: snr*float("nan")))
    assert fingerprint(model) == before


@pytest.mark.parametrize("change, says", [
    (dict(steps=0), "steps is 0"), (dict(lr=-1.), "lr is -1"), (dict(weight="heavy"), "heavy"), (dict(surgery="brain"), "brain"), (dict(forget_batch=0), "forget_batch")])
def test_bad_settings_are_one_sentence(change, says):
    model = tiny()
    with pytest.raises(ValueError, match=says) as e: unlearn(model, [request_of(model)], cfg=replace(TINY, **change))
    assert "\n" not in str(e.value)


def test_bad_requests():
    model = tiny()
    r = request_of(model)
    with pytest.raises(ValueError, match="no request"): unlearn(model, [], cfg=TINY)
    with pytest.raises(ValueError, match="seed -1"): unlearn(model, [replace(r, seed=-1)], cfg=TINY)
    with pytest.raises(ValueError, match="16 x 16"): unlearn(model, [replace(r, surrogate=r.surrogate.resize((16, 16)))], cfg=TINY)


def test_given_retain_is_what_is_used():
    model = tiny()
    r = request_of(model)
    assert same(unlearn(model, [r], cfg=TINY).delta, unlearn(model, [r], default_retain(model, TINY), TINY).delta)
    assert not same(unlearn(model, [r], cfg=TINY).delta, unlearn(model, [r], generate(model, [1], 4), TINY).delta)
