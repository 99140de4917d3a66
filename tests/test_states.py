"States: the path is the sampler's own, a batch is what was asked for, and forget states lead to the surrogate."
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from itertools import count, product
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.testing import assert_close

from unlearn_nb import states
from unlearn_nb.copies import LEAST, copy_bars, is_copy, is_kin, nearest
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint
from unlearn_nb.parametrization import Lora
from unlearn_nb.states import (NEAR, SAMPLING, Pool, Request, States, default_retain, draw, forget_states, generate,
                               noised, noised_states, own_paths, still_forgotten)

CLOSE = dict(atol=1e-5, rtol=1e-5)
PREDICTIONS = ('epsilon', 'v_prediction', 'sample')
SMALL = dict(n=3, near=0, pool=6, steps=4)   # of `default_retain`


@lru_cache
def tiny_net(seed=0):
    "An untrained net whose output depends on its input and on the timestep."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                           down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2).eval()


def tiny(prediction='v_prediction', seed=0, **config):
    how = dict(prediction_type=prediction, timestep_spacing="trailing") | config
    return Denoiser(tiny_net(seed), DDPMScheduler(**how))


def gen(seed=0): return torch.Generator().manual_seed(seed)


def request_of(model, seed=5):
    forget, surrogate = model.decode(model.sample([seed, seed + 1], 4))
    return Request(forget, surrogate, seed)


def greys(*values): return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def refused(act, *words):
    "It is refused in one sentence that has the words in it."
    with pytest.raises(ValueError) as e: act()
    message = str(e.value)
    assert type(e.value) is ValueError and '\n' not in message and all(str(w) in message for w in words), message


# --- the model's own paths ---

def test_a_path_is_the_samplers_and_its_goals_are_the_models_answers():
    for prediction, clip in product(PREDICTIONS, (True, False)):
        d, seeds = tiny(prediction, clip_sample=clip), [3, 0, 77]
        p = generate(d, seeds, steps=6)
        assert torch.equal(p.x0, d.sample(seeds, steps=6)) and not p.x0.requires_grad
        assert_close(p.x_t[:, 0], torch.stack([torch.randn(d.shape, generator=gen(s)) for s in seeds]))
        *visited, (_, x0) = d.path(p.x_t[:, 0], d.T - 1, 6, None)
        assert torch.equal(p.x0, x0) and p.timesteps.tolist() == [t for t, _ in visited]
        for k, (t, x_t) in enumerate(visited):
            assert torch.equal(p.x_t[:, k], x_t) and torch.equal(p.goal[:, k], d.predict(x_t, t))
        for other, steps in (([4], 6), ([3], 7)):
            assert (generate(d, other, steps=steps).x0 - p.x0[:1]).abs().max() > 1e-3


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=8)
def test_a_row_depends_on_its_own_seed_alone(seeds, batch):
    d = tiny()
    p = generate(d, seeds, steps=3, batch=batch)
    for k, seed in enumerate(seeds):
        one = generate(d, [seed], steps=3)
        for field in ('x_t', 'goal', 'x0'): assert_close(getattr(p, field)[k:k + 1], getattr(one, field), **CLOSE)


def test_seeds_may_be_a_range_and_bad_input_is_refused():
    d, x0 = tiny(), torch.zeros(1, 3, 8, 8)
    assert torch.equal(generate(d, range(2, 4), steps=2).x0, generate(d, [2, 3], steps=2).x0)
    for bad in ([], [-1], [1.5]): refused(lambda: generate(d, bad, steps=2), 'seed')
    for bad in ('surrogate', '', None): refused(lambda: noised(d, x0, goal=bad), repr(bad), 'belief', 'picture')


def test_the_first_retain_gradient_is_nothing():
    "At the base model's own weights its answers are the goals: no loss, no gradient; at other weights there are both."
    for prediction in PREDICTIONS:
        net = deepcopy(tiny_net())
        d = Denoiser(net, DDPMScheduler(prediction_type=prediction))
        x_t, t, goal = draw(generate(d, range(4), steps=4), 16, gen())   # other batches than on the path

        def loss_and_gradient():
            error = (d(x_t, t) - d.target(x_t, goal, t)).square().mean()
            gradients = torch.autograd.grad(error, list(net.parameters()), allow_unused=True)
            return error.item(), torch.stack([g.norm() for g in gradients if g is not None]).norm().item()

        loss, size = loss_and_gradient()
        with torch.no_grad():
            for q in net.parameters(): q.add_(torch.randn(q.shape, generator=gen(1)), alpha=.02)
        loss_else, size_else = loss_and_gradient()
        assert loss < 1e-8 and size < 1e-3 and loss_else > 1e4 * loss + 1e-6 and size_else > 100 * size + 1e-4


# --- a batch of states ---

def table(k, N=3, S=4):
    "N pictures and S states whose every number says which table, picture and state it is of."
    code = 100 * k + 10 * torch.arange(N)[:, None] + torch.arange(S)
    code = code.float().view(N, S, 1, 1, 1).expand(N, S, 1, 2, 2)
    return States(100 * k + torch.arange(S), code, code + .5, code[:, 0])


def origin(batch):
    "Which table each row is of; state, timestep and goal must be of one place."
    x_t, t, goal = batch
    code = x_t.flatten(1).long()
    assert (code == code[:, :1]).all() and torch.equal(goal, x_t + .5)
    assert torch.equal(t, code[:, 0] // 100 * 100 + code[:, 0] % 10)
    return code[:, 0] // 100


nested = st.deferred(lambda: st.lists(st.tuples(st.floats(.01, 10), st.none() | nested), min_size=1, max_size=4))


def fill(parts, numbers):
    "Tables in the places of None, each with the next of the numbers."
    return [(share, table(next(numbers)) if part is None else fill(part, numbers)) for share, part in parts]


def shares_of(parts, whole=1.):
    "{number of the table: its share of the batch}."
    out, total = {}, sum(share for share, _ in parts)
    for share, part in parts:
        if isinstance(part, States): out[int(part.timesteps[0]) // 100] = whole * share / total
        else: out |= shares_of(part, whole * share / total)
    return out


def depth(parts): return 0 if isinstance(parts, States) else 1 + max(depth(part) for _, part in parts)


@given(parts=nested, n=st.integers(1, 60), seed=st.integers(0, 2**40))
@example(parts=[(.1, None), (.1, None), (.1, None)], n=1, seed=0)
@example(parts=[(3, None), (1, [(1, None), (1, [(2, None)])])], n=8, seed=0)
@settings(max_examples=60)
def test_a_batch_has_the_shares_asked_for(parts, n, seed):
    parts, state = fill(parts, count(1)), torch.get_rng_state()
    where = origin(batch := draw(parts, n, gen(seed)))
    assert len(where) == n
    for k, share in shares_of(parts).items():   # one row of rounding a floor
        assert abs((where == k).sum().item() - n * share) <= depth(parts) + 1e-6
    again = draw(parts, n, gen(seed))
    assert all(map(torch.equal, batch, again)) and torch.equal(torch.get_rng_state(), state)


def test_every_state_comes_and_every_seed_draws_others():
    where = origin(draw([(3, table(1)), (1, [(1, table(2)), (1, table(3))])], 16, gen()))
    assert where.bincount().tolist() == [0, 12, 2, 2]   # whole shares are met exactly
    assert origin(draw([(0, table(1)), (1, table(2))], 5, gen())).tolist() == [2] * 5
    x_t, _, _ = draw(table(0, 3, 4), 2000, gen())
    counts = x_t[:, 0, 0, 0].long().bincount(minlength=24)
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert counts[counts > 0].float().div(2000 / 12).sub(1).abs().max() < .35   # 4.5 standard deviations
    g = gen()
    first, second = draw(table(0), 20, g)[0], draw(table(0), 20, g)[0]   # the generator moves on
    assert not torch.equal(first, second) and not torch.equal(first, draw(table(0), 20, gen(1))[0])


# --- pictures that are given ---

def test_noised_timesteps_are_spread_below_t_max():
    d = tiny()
    for n, t_max in ((12, None), (1, None), (25, 500), (5, 5), (3, 1)):
        p, top = noised(d, torch.zeros(2, 3, 8, 8), n, t_max), t_max or d.T
        assert p.timesteps.shape == (n,) and p.x_t.shape == p.goal.shape == (2, n, 3, 8, 8)
        assert 0 <= p.timesteps.min() and p.timesteps.max() < top
        middles = (torch.arange(n) + .5) / n   # of n equal parts
        assert ((p.timesteps + .5) / top - middles).abs().max() <= 1 / top + 1e-6


def test_noised_states_of_pictures_are_the_pictures_under_fresh_noise():
    for prediction in PREDICTIONS:
        d, x0 = tiny(prediction), torch.rand(4, 3, 8, 8, generator=gen()) * 2 - 1
        p, state = noised(d, x0, 9, goal='picture'), torch.get_rng_state()
        assert torch.equal(p.goal, x0[:, None].expand_as(p.goal)) and torch.equal(p.x0, x0)
        a, s = (v.view(1, 9, 1, 1, 1) for v in d.scales(p.timesteps))
        eps = (p.x_t - a * x0[:, None]) / s   # standard normal, and fresh for every picture and timestep
        assert abs(eps.mean()) < .05 and abs(eps.std() - 1) < .05
        flat = nn.functional.normalize(eps.flatten(0, 1).flatten(1), dim=1)
        assert (flat @ flat.T - torch.eye(36)).abs().max() < .4
        belief = noised(d, x0, 9)
        assert torch.equal(belief.x_t, p.x_t) and not belief.goal.requires_grad
        for k, t in enumerate(p.timesteps): assert_close(belief.goal[:, k], d.predict(p.x_t[:, k], t), **CLOSE)
        assert not torch.equal(noised(d, x0, 9, seed=8).x_t, p.x_t) and torch.equal(torch.get_rng_state(), state)


@given(n=st.integers(1, 12), k=st.integers(0, 12), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_nearest_are_the_nearest_in_order(n, k, seed):
    x0, x_f = torch.randn(n, 3, 4, 4, generator=gen(seed)), torch.randn(1, 3, 4, 4, generator=gen(seed + 1))
    found, distance = nearest(x0, x_f, k).tolist(), [(x - x_f[0]).norm().item() for x in x0]
    assert found == sorted(range(n), key=distance.__getitem__)[:k]
    assert nearest(x0, x0[n // 2:n // 2 + 1], 1).tolist() == [n // 2]


# --- what must stay, by default ---

def test_by_default_a_third_is_near_the_forget_image():
    model = tiny()
    request, how = request_of(model), SMALL | dict(near=2)
    (two, every), (one, near) = default_retain(model, [request], **how)
    assert (two, one) == (2, 1) and torch.equal(every.x0, model.sample(range(100_000, 100_003), 4))
    pool = model.sample(range(200_000, 200_006), 4)
    far = (pool - model.encode([request.image])).square().flatten(1).mean(1)
    found = [(pool - x).abs().flatten(1).amax(1).argmin().item() for x in near.x0]
    assert sorted(found) == sorted(far.argsort()[:2].tolist())
    both = default_retain(model, [request, replace(request, image=request.surrogate, seed=None)], **how)[1][1]
    assert 1 <= len(both.x0) <= 2


def test_retain_states_are_kept_in_a_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(states, 'generate', lambda *args, **kw: calls.append(1) or generate(*args, **kw))

    def kept(model=tiny(), **kw):
        calls.clear()
        (_, found), = default_retain(model, [], **SMALL | dict(cache=tmp_path / 'cache') | kw)
        return found, len(calls)

    def equal(a, b): return all(v is None or torch.equal(v, getattr(b, k)) for k, v in vars(a).items())
    fresh, again = kept(), kept()
    assert equal(fresh[0], again[0]) and (fresh[1], again[1]) == (1, 0)
    assert [kept(tiny(seed=1))[1], kept(n=2)[1], kept(steps=3)[1]] == [1, 1, 1]   # each under its own name
    files = list((tmp_path / 'cache').iterdir())
    assert len(files) == 4
    other = save({'timesteps': torch.zeros(1)})
    for damage in (lambda data: data[:-1], lambda data: b'', lambda data: b'x' * 100, lambda data: other):
        for file in files: file.write_bytes(damage(file.read_bytes()))
        found, made = kept()
        assert made == 1 and equal(found, fresh[0]) and kept()[1] == 0


def test_what_was_forgotten_before_must_stay_so():
    "From seeds and mirrored noise what is left of the way is asked for, above t_min; of others the image, noised."
    model = tiny()
    requests = [request_of(model, 5), replace(request_of(model, 7), seed=None)]
    (one, own), (other, again) = still_forgotten(model, requests, t_min=500, t_max=300, steps=4)
    now, x_s = generate(model, [5], 4), model.encode([requests[0].surrogate])
    assert one == other == 1 and len(own.x0) == 2 and torch.equal(own.x_t[1, 0], own.x_t[0, 0].flip(-1))
    high = (now.timesteps >= 500).view(1, -1, 1, 1, 1)
    assert 0 < high.sum() < 4
    assert_close(own.x_t[:1], now.x_t, **CLOSE)
    assert_close(own.goal[:1], now.goal + high * (x_s - now.x0)[:, None], **CLOSE)
    assert torch.equal(again.goal, noised(model, model.encode([requests[1].image]), 25, 300).goal)
    assert [share for share, _ in still_forgotten(model, requests[:1] * 3)] == [3]
    half = still_forgotten(model, requests, path_share=.5, steps=4)   # as the forget states were drawn
    assert [share for share, _ in half] == [.5, 1.5] and len(half[1][1].x0) == 2
    asked = [replace(request_of(model, k), steps=n) for k, n in ((5, 6), (7, 3), (9, None), (8, 6))]
    each = still_forgotten(model, asked, steps=4)   # in the steps that give its picture
    assert [(share, len(part.timesteps), len(part.x0)) for share, part in each] == [(1, 3, 2), (1, 4, 2), (2, 6, 4)]
    assert_close(each[2][1].x0[:1], model.sample([5], 6), **CLOSE)


def changed(model, by=.05):
    "What a hotfix for one request does: the base kept, its weights moved."
    for k, w in model.net.state_dict().items():
        if "conv" in k and w.dim() == 4: model.base[k] = w.clone()
    for k in model.base: model.net.state_dict()[k].add_(by * torch.randn(model.base[k].shape, generator=gen(9)))
    model.hotfixes.append(SimpleNamespace(card={"requests": ["a commitment"]}))


@pytest.mark.parametrize('wrapped', (False, True))
def test_what_must_stay_is_what_the_base_does(wrapped):
    "With known hotfixes on the model, and inside a run that has put a LoRA around its layers; the weights stay."
    model = tiny()
    model.net, first, request, how = deepcopy(model.net), request_of(model, 50), request_of(model), SMALL | dict(near=2)
    was, mark = [part for _, part in default_retain(model, [request], **how)], fingerprint(model)
    changed(model)
    now, known = fingerprint(model), Pool(model, [request], 6, 4, earlier=[first])
    unknown = default_retain(model, [request], **how)
    assert now != mark == fingerprint(model, base=True)
    def same(a, b): return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("x_t", "goal", "x0"))
    assert all(map(same, [part for _, part in default_retain(model, [request], **how, earlier=[first])], was))
    assert torch.equal(unknown[0][1].x0, model.sample(range(100_000, 100_003), 4)) and not same(unknown[0][1], was[0])
    if wrapped: form = Lora(model, 2, 0)
    assert same(known.paths(known.nearest(2)), was[1])
    if wrapped: form.restore()
    assert fingerprint(model) == now


def test_what_was_forgotten_before_is_not_brought_back():
    "The base's picture of an earlier request is no picture that must stay, nor one near by."
    model = tiny()
    first, second = request_of(model, NEAR + 2), request_of(model, 9)
    pool = Pool(model, [second], 6, 4, earlier=[first])
    assert pool.copies[2] and 2 not in pool.nearest(6)
    kept = default_retain(model, [second], **SMALL | dict(near=6), earlier=[first])[1][1]
    assert (kept.x0 - model.encode([first.image])).abs().flatten(1).amax(1).min() > .1


# --- what must be forgotten ---

@given(n=st.integers(1, 40), t_max=st.integers(1, 1000), seed=st.integers(0, 2**40))
@settings(max_examples=25)
def test_noised_states_lead_from_each_image_to_its_own_surrogate(n, t_max, seed):
    "Images of one grey each: without it noise is left, one timestep t_max u^1.5 for a u in each of n equal parts."
    model, x_f, x_s = tiny(), greys(-.8, 0., .8), greys(.1, .2, .3)
    x_t, t, goal = noised_states(model, x_f, x_s, n, gen(seed), t_max=t_max)
    assert len(x_t) == n and (t >= 0).all() and (t < t_max).all()
    low, high = (t_max * ((torch.arange(n) + k) / n)**1.5 for k in (0, 1))
    assert (low - 1.01 < t).all() and (t < high + .01).all()
    which = (goal[:, 0, 0, 0] * 10).round().long() - 1
    assert torch.equal(goal, x_s[which])
    a, s = model.scales(t)
    eps = ((x_t - a * x_f[which]) / s).flatten(1)   # 192 numbers each: 5.5 and 5.9 standard deviations
    assert (eps.mean(1).abs() < .4).all() and ((eps.std(1) - 1).abs() < .3).all()


def test_the_largest_random_number_stays_below_t_max(monkeypatch):
    x, model = torch.zeros(1, 3, 8, 8), tiny()
    monkeypatch.setattr(torch, 'rand', lambda n, **kw: torch.full((n,), 1 - 2**-24))
    for sampling in SAMPLING:
        t = noised_states(model, x, x, 8, gen(), t_max=1000, sampling=sampling)[1]
        assert t.max() < 1000


def test_own_paths_lead_to_their_own_surrogates():
    "From a seed and its mirror image; from the seeds of copies, not mirrored; without a seed by inversion."
    model, x_s = tiny(), torch.rand(3, 3, 8, 8, generator=gen(5))
    requests = [request_of(model, s) for s in (7, 9)]
    requests = [requests[0], replace(requests[1], copies=(11, 12)), replace(requests[0], seed=None)]
    own, path = own_paths(model, requests, x_s, 4), generate(model, [7, 9, 11, 12], 4)
    assert torch.equal(own.timesteps, path.timesteps) and len(own.x_t) == 2 + 3 + 2
    assert_close(own.x_t[[0, 2, 3, 4]], path.x_t, **CLOSE)
    assert torch.equal(own.x_t[1, 0], own.x_t[0, 0].flip(-1))
    goals = [x_s[0], x_s[0].flip(-1), x_s[1], x_s[1], x_s[1], x_s[2], x_s[2].flip(-1)]
    assert_close(own.x0 + own.shift, torch.stack(goals), **CLOSE)
    assert_close(own.goal[[0, 2, 3, 4]], path.goal + own.shift[[0, 2, 3, 4], None], **CLOSE)   # its beliefs, moved
    assert_close(own.x0[5], model.encode([requests[2].image])[0], atol=.15, rtol=0)   # found again


def test_the_pool_tells_what_a_change_moves_most():
    "Of the pictures made with these weights; copies never count; and the next run finds the pool of the base again."
    model = tiny()
    pool = Pool(model, [request_of(model)], 12, 4)
    pool.copies = torch.arange(12) == 3
    kept = [w.detach().clone() for w in model.net.parameters()]
    with torch.no_grad(): model.net.conv_out.bias.add_(.3)
    far = (model.sample(range(NEAR, NEAR + 12), 4) - pool.x0).square().mean((1, 2, 3))
    far[3] = -1.
    assert pool.moved_most(4) == sorted(far.topk(4).indices.tolist()) and 3 not in pool.moved_most(12)
    with torch.no_grad():
        for w, v in zip(model.net.parameters(), kept): w.copy_(v)
    assert Pool(model, [request_of(model)], 12, 4).x0 is pool.x0
    assert torch.equal(pool.paths([2]).x_t[:, 0], generate(model, [NEAR + 2], 4).x_t[:, 0])


def test_known_paths_are_drawn_three_of_four_times():
    "And the fourth from all: of four paths, one of them known, .8125 and .0625 each (three standard deviations)."
    model, x_s = tiny(), torch.zeros(1, 3, 8, 8)
    own = own_paths(model, [request_of(model, 5), request_of(model, 9)], x_s.expand(2, -1, -1, -1), 4)
    own = replace(own, goal=torch.arange(4.).view(4, 1, 1, 1, 1).expand_as(own.goal))
    def shares(known):
        goal = forget_states(model, x_s, x_s, own, 800, gen(), path_share=1., mix_share=0., known=known)[2]
        return [(goal[:, 0, 0, 0] == k).float().mean().item() for k in range(4)]
    assert shares(()) == pytest.approx([.25] * 4, abs=.05)
    assert shares([2]) == pytest.approx([.0625, .0625, .8125, .0625], abs=.045)
    assert shares([1, 3]) == pytest.approx([.0625, .4375, .0625, .4375], abs=.055)


def test_the_beliefs_moved_lead_to_the_surrogate():
    "A model that believes, in states moved by a share, what it believed there, moved by all, ends at the surrogate."
    model, x_s = tiny(), torch.rand(1, 3, 8, 8, generator=gen(5))
    model.clip = None
    own = own_paths(model, [request_of(model)], x_s, 6)
    way, x = own.timesteps.tolist(), own.x_t[:, 0]
    for s, (t, t_next) in enumerate(zip(way, way[1:] + [-1])):
        a = model.scales(own.timesteps[s])[0]
        assert_close(x, own.x_t[:, s] + (a - model.scales(own.timesteps[0])[0]) * own.shift, atol=.02, rtol=0.)
        x = model.step(x, own.goal[:, s], t, t_next)
    assert_close(x, own.x0 + own.shift, atol=1e-4, rtol=1e-4)


def test_share_of_the_own_path():
    model = tiny()
    request = request_of(model)
    x_f, x_s = model.encode([request.image]), model.encode([request.surrogate])
    own = own_paths(model, [request], x_s, 4)
    for share, n in ((0., 0), (.375, 3), (1., 8)):
        how = dict(path_share=share, mix_share=0.)
        x_t, t, goal, shift = forget_states(model, x_f, x_s, own, 8, gen(), **how)
        assert sum(any(torch.equal(x, y) for y in own.x_t.flatten(0, 1)) for x in x_t) == n
        assert len(x_t) == len(t) == 8
        assert all(torch.equal(y, x_s[0]) or any(torch.equal(y, z) for z in own.goal.flatten(0, 1)) for y in goal)
        assert forget_states(model, x_f, x_s, None, 8, gen(), **how)[0].shape == x_t.shape   # no seed: all are noised


@lru_cache
def two_of_one_grey():
    "A model, two forget images, their surrogates of one grey each, and their own paths."
    model, x_s = tiny(), greys(.1, .2)
    path = generate(model, [7, 9], 4)
    return model, path.x0, x_s, replace(path, goal=x_s[:, None].expand_as(path.goal), shift=x_s - path.x0)


@given(share=st.sampled_from([0., .5, 1.]), path_share=st.sampled_from([0., .375, 1.]), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_states_on_the_way_are_moved_in_the_clean_image(share, path_share, seed):
    "With and without moving a draw differs by a u (x_s - x_f) of its own request, for that share of the states."
    model, x_f, x_s, own = two_of_one_grey()
    still, moved = (forget_states(model, x_f, x_s, own, 64, gen(seed), path_share=path_share, mix_share=v)
                    for v in (0., share))
    assert torch.equal(still[1], moved[1]) and torch.equal(still[2], moved[2])
    which = (moved[2][:, 0, 0, 0] * 10).round().long() - 1
    assert_close(moved[3], (x_s - x_f)[which])
    step = model.scales(moved[1])[0] * moved[3]
    u = ((moved[0] - still[0]) * step).sum((1, 2, 3)) / step.square().sum((1, 2, 3))
    assert_close(moved[0] - still[0], u.view(-1, 1, 1, 1) * step, atol=1e-5, rtol=1e-4)
    assert (u > -1e-4).all() and (u < 1 + 1e-4).all() and abs((u.abs() > 1e-6).float().mean() - share) < .3


# --- copies ---

def test_copies_are_known_among_pictures_of_which_a_third_are_copies():
    "By pixels alone: a copy with a little noise is one, pictures of noise are none."
    x = torch.rand(60, 3, 8, 8, generator=gen()) * 2 - 1
    x[::3] = x[0] + .05 * torch.randn(20, 3, 8, 8, generator=gen(1))
    bars = copy_bars(x, x_f=x[:1])
    found = is_copy(x, x[:1], bars)
    assert found[::3].all() and found.sum() == 20
    others = torch.rand(60, 3, 8, 8, generator=gen(2)) * 2 - 1
    assert copy_bars(x, others).psnr == LEAST[0] and not is_copy(others, x[:1], bars).any()


def test_no_copy_of_the_forget_image_is_among_what_must_stay(monkeypatch):
    "A model that gives one picture for every second seed: none of its paths stays, and all of its seeds are found."
    model = tiny()
    image = model.decode(model.sample([5], 4))[0]
    z5 = states.randn(states.generators([5]), model.shape)
    def noise(gens, shape, device='cpu'):
        return torch.cat([z5 if g.initial_seed() % 2 else states.torch.randn(1, *shape, generator=g) for g in gens])
    monkeypatch.setattr(states, 'randn', noise)
    monkeypatch.setattr('unlearn_nb.denoiser.randn', noise)
    request = Request(image, image)
    table, near = default_retain(model, [request], n=20, near=4, pool=40, steps=4)
    x_f = model.encode([image])
    for _, part in (table, near): assert (part.x0 - x_f).abs().flatten(1).amax(1).min() > .1
    assert len(table[1].x0) == 10
    found = states.find_copies(model, request, pool=40, steps=4).copies
    assert len(found) == 20 and all(seed % 2 for seed in found)


def test_few_pictures_make_nobody_kin():
    "Bars of three pictures say little: strangers stay below, and so do those that a descriptor cannot tell apart."
    x = torch.rand(4, 3, 8, 8, generator=gen()) * 2 - 1
    def apart(x): return torch.nn.functional.normalize(x.flatten(1), dim=1)
    def alike(x): return torch.nn.functional.normalize(torch.ones(len(x), 3) + 1e-7 * x.flatten(1)[:, :3], dim=1)
    for describe in (None, apart, alike):
        bars = copy_bars(x[1:], describe=describe, x_f=x[:1])
        assert not is_kin(x[1:], x[:1], bars, describe).any()
