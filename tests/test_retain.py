"Retain: the path is the sampler's own, and the base model's loss against its own beliefs is nothing."
from copy import deepcopy

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from test_denoiser import every_prediction, tiny, tiny_net
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.retain import generate

CLOSE = dict(atol=1e-5, rtol=1e-5)


@every_prediction
@pytest.mark.parametrize('clip_sample', [True, False])
def test_the_path_ends_at_the_sample(prediction, clip_sample):
    d, seeds = tiny(prediction, clip_sample=clip_sample), [3, 0, 77]
    p = generate(d, seeds, steps=6)
    assert torch.equal(p.x0, d.sample(seeds, steps=6))
    assert p.states.shape == p.beliefs.shape == (3, 6, 3, 8, 8) and not p.x0.requires_grad
    assert p.levels.tolist() == d.times(d.T - 1, 6).tolist()


def test_other_seeds_and_steps_end_elsewhere():
    d = tiny('v_prediction')
    end = generate(d, [3], steps=6).x0
    for seeds, steps in (([4], 6), ([3], 7)): assert (generate(d, seeds, steps=steps).x0 - end).abs().max() > 1e-3


@every_prediction
def test_states_are_the_path_and_beliefs_are_predictions(prediction):
    d, seeds = tiny(prediction), [5, 6]
    p = generate(d, seeds, steps=5)
    assert_close(p.states[:, 0], torch.stack([torch.randn(d.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]))
    visited = list(d.path(p.states[:, 0], d.T - 1, 5, None))
    for k, (t, x_t) in enumerate(visited[:-1]):
        assert t == p.levels[k] and torch.equal(p.states[:, k], x_t) and torch.equal(p.beliefs[:, k], d.predict(x_t, t))
    assert torch.equal(p.x0, visited[-1][1])


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=8)
def test_a_row_depends_on_its_own_seed_alone(seeds, batch):
    d = tiny('v_prediction')
    p, alone = generate(d, seeds, steps=3, batch=batch), [generate(d, [s], steps=3) for s in seeds]
    for k, one in enumerate(alone):
        for field in ('states', 'beliefs', 'x0'): assert_close(getattr(p, field)[k:k + 1], getattr(one, field), **CLOSE)


def test_seeds_may_be_a_range_and_no_seeds_are_refused():
    d = tiny()
    assert torch.equal(generate(d, range(2, 4), steps=2).x0, generate(d, [2, 3], steps=2).x0)
    for bad in ([], [-1], [1.5]):
        with pytest.raises(ValueError) as e: generate(d, bad, steps=2)
        assert '\n' not in str(e.value)


@every_prediction
def test_the_first_retain_gradient_is_nothing(prediction):
    "Distillation: at the base model's own weights its answers are its beliefs, so neither loss nor gradient; at other weights there are both."
    net = deepcopy(tiny_net())
    d = Denoiser(net, DDPMScheduler(prediction_type=prediction))
    p = generate(d, range(4), steps=4)
    x_t, goal, t = p.states.flatten(0, 1), p.beliefs.flatten(0, 1), p.levels.repeat(4)   # other batches than on the path
    def loss_and_gradient():
        error = (d(x_t, t) - d.target(x_t, goal, t)).square().mean()
        gradients = torch.autograd.grad(error, [q for q in net.parameters() if q.requires_grad], allow_unused=True)
        return error.item(), torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    loss, size = loss_and_gradient()
    with torch.no_grad():
        for q in net.parameters(): q.add_(torch.randn(q.shape, generator=torch.Generator().manual_seed(1)), alpha=.02)
    loss_else, size_else = loss_and_gradient()
    assert loss < 1e-8 and size < 1e-3 and loss_else > 1e4*loss + 1e-6 and size_else > 100*size + 1e-4
