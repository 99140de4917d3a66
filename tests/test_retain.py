"Retain: the path is the sampler's own, a batch is what was asked for, and the free directions are those that what must stay leaves free."
from copy import deepcopy
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from test_denoiser import every_prediction, tiny, tiny_net
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.directions import Factors, layer_factors, eigenbases
from unlearn_nb.states import States, draw, generate, nearest, noised

CLOSE = dict(atol=1e-5, rtol=1e-5)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def refused(act, *words):
    "It is refused in one sentence that has the words in it."
    with pytest.raises(ValueError) as e: act()
    assert type(e.value) is ValueError and '\n' not in str(e.value) and all(str(w) in str(e.value) for w in words), e.value


# --- the model's own paths ---

@every_prediction
@pytest.mark.parametrize('clip_sample', [True, False])
def test_the_path_ends_at_the_sample(prediction, clip_sample):
    d, seeds = tiny(prediction, clip_sample=clip_sample), [3, 0, 77]
    p = generate(d, seeds, steps=6)
    assert torch.equal(p.x0, d.sample(seeds, steps=6))
    assert p.x_t.shape == p.goal.shape == (3, 6, 3, 8, 8) and not p.x0.requires_grad
    assert p.levels.tolist() == d.timesteps(d.T - 1, 6).tolist()


def test_other_seeds_and_steps_end_elsewhere():
    d = tiny('v_prediction')
    end = generate(d, [3], steps=6).x0
    for seeds, steps in (([4], 6), ([3], 7)): assert (generate(d, seeds, steps=steps).x0 - end).abs().max() > 1e-3


@every_prediction
def test_states_are_the_path_and_goals_are_predictions(prediction):
    d, seeds = tiny(prediction), [5, 6]
    p = generate(d, seeds, steps=5)
    assert_close(p.x_t[:, 0], torch.stack([torch.randn(d.shape, generator=gen(s)) for s in seeds]))
    visited = list(d.path(p.x_t[:, 0], d.T - 1, 5, None))
    for k, (t, x_t) in enumerate(visited[:-1]):
        assert t == p.levels[k] and torch.equal(p.x_t[:, k], x_t) and torch.equal(p.goal[:, k], d.predict(x_t, t))
    assert torch.equal(p.x0, visited[-1][1])


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=8)
def test_a_row_depends_on_its_own_seed_alone(seeds, batch):
    d = tiny('v_prediction')
    p, alone = generate(d, seeds, steps=3, batch=batch), [generate(d, [s], steps=3) for s in seeds]
    for k, one in enumerate(alone):
        for field in ('x_t', 'goal', 'x0'): assert_close(getattr(p, field)[k:k + 1], getattr(one, field), **CLOSE)


def test_seeds_may_be_a_range_and_no_seeds_are_refused():
    d = tiny()
    assert torch.equal(generate(d, range(2, 4), steps=2).x0, generate(d, [2, 3], steps=2).x0)
    for bad in ([], [-1], [1.5]): refused(lambda: generate(d, bad, steps=2), 'seed')


@every_prediction
def test_the_first_retain_gradient_is_nothing(prediction):
    "Distillation: at the base model's own weights its answers are its beliefs, so neither loss nor gradient; at other weights there are both."
    net = deepcopy(tiny_net())
    d = Denoiser(net, DDPMScheduler(prediction_type=prediction))
    x_t, t, goal = draw(generate(d, range(4), steps=4), 16, gen())   # other batches than on the path
    def loss_and_gradient():
        error = (d(x_t, t) - d.target(x_t, goal, t)).square().mean()
        gradients = torch.autograd.grad(error, [q for q in net.parameters() if q.requires_grad], allow_unused=True)
        return error.item(), torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    loss, size = loss_and_gradient()
    with torch.no_grad():
        for q in net.parameters(): q.add_(torch.randn(q.shape, generator=gen(1)), alpha=.02)
    loss_else, size_else = loss_and_gradient()
    assert loss < 1e-8 and size < 1e-3 and loss_else > 1e4*loss + 1e-6 and size_else > 100*size + 1e-4


# --- a batch of states ---

def table(k, N=3, S=4):
    "N pictures and S states whose every number says which table, picture and state it is of."
    code = (100*k + 10*torch.arange(N)[:, None] + torch.arange(S)).float().view(N, S, 1, 1, 1).expand(N, S, 1, 2, 2)
    return States(100*k + torch.arange(S), code, code + .5, code[:, 0])


def origin(batch):
    "Which table each row is of; state, level and goal must be of one place."
    x_t, t, goal = batch
    code = x_t.flatten(1).long()
    assert (code == code[:, :1]).all() and torch.equal(goal, x_t + .5)
    assert torch.equal(t, code[:, 0] // 100*100 + code[:, 0] % 10)
    return code[:, 0] // 100


nested = st.deferred(lambda: st.lists(st.tuples(st.floats(.01, 10), st.none() | nested), min_size=1, max_size=4))


def fill(parts, numbers):
    "Tables in the places of None, each with the next of the numbers."
    return [(share, table(next(numbers)) if part is None else fill(part, numbers)) for share, part in parts]


def shares_of(parts, whole=1.):
    "{number of the table: its share of the batch}."
    out, total = {}, sum(share for share, _ in parts)
    for share, part in parts:
        if isinstance(part, States): out[int(part.levels[0]) // 100] = whole*share/total
        else: out |= shares_of(part, whole*share/total)
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
    for k, share in shares_of(parts).items(): assert abs((where == k).sum().item() - n*share) <= depth(parts) + 1e-6   # one row of rounding a floor
    again = draw(parts, n, gen(seed))
    assert all(map(torch.equal, batch, again)) and torch.equal(torch.get_rng_state(), state)


def test_whole_shares_are_met_exactly():
    where = origin(draw([(3, table(1)), (1, [(1, table(2)), (1, table(3))])], 16, gen()))
    assert where.bincount().tolist() == [0, 12, 2, 2]
    assert origin(draw([(0, table(1)), (1, table(2))], 5, gen())).tolist() == [2]*5


def test_every_state_comes_and_every_seed_draws_others():
    x_t, _, _ = draw(table(0, 3, 4), 2000, gen())
    counts = x_t[:, 0, 0, 0].long().bincount(minlength=24)
    assert sorted(counts.nonzero().flatten().tolist()) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert counts[counts > 0].float().div(2000/12).sub(1).abs().max() < .35   # 4.5 standard deviations
    assert not torch.equal(x_t[:20], draw(table(0), 20, gen(1))[0])
    g = gen()
    assert not torch.equal(draw(table(0), 20, g)[0], draw(table(0), 20, g)[0])   # the generator moves on


# --- pictures that are given ---

@pytest.mark.parametrize('n, t_max', [(12, None), (1, None), (25, 500), (5, 5), (3, 1)])
def test_noised_levels_are_spread_below_t_max(n, t_max):
    d = tiny('v_prediction')
    p, top = noised(d, torch.zeros(2, 3, 8, 8), n, t_max), t_max or d.T
    assert p.levels.shape == (n,) and p.x_t.shape == p.goal.shape == (2, n, 3, 8, 8)
    assert 0 <= p.levels.min() and p.levels.max() < top
    assert ((p.levels + .5)/top - (torch.arange(n) + .5)/n).abs().max() <= 1/top + 1e-6   # the middle of each of n equal parts


@every_prediction
def test_noised_states_are_noised_pictures(prediction):
    d, x0 = tiny(prediction), torch.rand(4, 3, 8, 8, generator=gen())*2 - 1
    p = noised(d, x0, 9, goal='picture')
    assert torch.equal(p.goal, x0[:, None].expand_as(p.goal)) and torch.equal(p.x0, x0)
    a, s = (v.view(1, 9, 1, 1, 1) for v in d.scales(p.levels))
    eps = (p.x_t - a*x0[:, None])/s   # standard normal, and fresh for every picture and level
    assert abs(eps.mean()) < .05 and abs(eps.std() - 1) < .05
    flat = nn.functional.normalize(eps.flatten(0, 1).flatten(1), dim=1)
    assert (flat @ flat.T - torch.eye(36)).abs().max() < .4
    belief = noised(d, x0, 9)
    assert torch.equal(belief.x_t, p.x_t) and torch.equal(belief.x0, x0) and not belief.goal.requires_grad
    for k, t in enumerate(p.levels): assert_close(belief.goal[:, k], d.predict(p.x_t[:, k], t), **CLOSE)


def test_noised_depends_on_its_seed_alone():
    d, x0 = tiny('v_prediction'), torch.zeros(2, 3, 8, 8)
    torch.manual_seed(1)
    one = noised(d, x0, 3, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(noised(d, x0, 3, seed=7).x_t, one.x_t) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noised(d, x0, 3, seed=8).x_t, one.x_t)


@pytest.mark.parametrize('goal', ['surrogate', '', None])
def test_another_goal_is_refused(goal):
    refused(lambda: noised(tiny(), torch.zeros(1, 3, 8, 8), goal=goal), repr(goal), 'belief', 'picture')


@given(n=st.integers(1, 12), k=st.integers(0, 12), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_nearest_are_the_nearest_in_order(n, k, seed):
    x0, x_f = torch.randn(n, 3, 4, 4, generator=gen(seed)), torch.randn(1, 3, 4, 4, generator=gen(seed + 1))
    found, distance = nearest(x0, x_f, k).tolist(), [(x - x_f[0]).norm().item() for x in x0]
    assert found == sorted(range(n), key=distance.__getitem__)[:k]
    assert nearest(x0, x0[n // 2:n // 2 + 1], 1).tolist() == [n // 2]


# --- what enters a layer, and what it leaves free ---

class Toy(nn.Module):
    "Convolutions of all kinds and linear layers for pictures [B, 3, 6, 6]; keeps what each layer gives."
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.stride = nn.Conv2d(4, 5, (3, 2), stride=2, padding=(1, 0), bias=False)
            self.wide = nn.Conv2d(5, 6, 2, dilation=2, padding=1)
            self.groups = nn.Conv2d(6, 6, 1, groups=2)
            self.tokens = nn.Linear(6, 3)
            self.vector = nn.Linear(3, 3)
            self.idle = nn.Linear(3, 2)
        self.given = {}

    def forward(self, x):
        for name in ('conv', 'stride', 'wide', 'groups'): x = self.given[name] = getattr(self, name)(x)
        x = self.given['tokens'] = self.tokens(x.flatten(2).transpose(1, 2))
        self.given['vector'] = self.vector(x.mean(1))
        return self.given['vector'][..., None, None].expand(-1, -1, 6, 6)


class ToyDenoiser(SimpleNamespace):
    device = torch.device('cpu')
    def __call__(self, x_t, t): return self.net(x_t)
    def snr(self, t): return 1/(1. + t)
    def gain(self, t): return (2. + t).view(-1, 1, 1, 1)


def toy(n=10):
    "A denoiser of the toy net, and states of noise for it."
    return ToyDenoiser(net=Toy()), States(torch.arange(3), *torch.randn(2, n, 3, 3, 6, 6, generator=gen()), torch.zeros(n, 3, 6, 6))


def hooks(net): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


RAN = ('conv', 'stride', 'wide', 'tokens', 'vector')   # no groups, nothing that never ran


def passing(net, x):
    "What enters each layer when the net sees x, as [B, C, k, places] for convolutions (by a convolution with the identity as its kernel) and [N, C, 1, 1] for linear layers."
    net(x)
    entering = {'conv': x, 'stride': net.given['conv'], 'wide': net.given['stride'], 'tokens': net.given['groups'].flatten(2).transpose(1, 2), 'vector': net.given['tokens'].mean(1)}
    for name, v in entering.items():
        layer = getattr(net, name)
        if isinstance(layer, nn.Conv2d):
            K, C = layer.weight[0].numel(), layer.weight.shape[1]
            v = nn.functional.conv2d(v, torch.eye(K).view(K, *layer.weight.shape[1:]), None, layer.stride, layer.padding, layer.dilation)
            yield name, entering[name].double(), v.flatten(2).unflatten(1, (C, -1)).double()
        else: yield name, v.reshape(-1, v.shape[-1], 1, 1).double(), v.reshape(-1, v.shape[-1], 1, 1).double()


@pytest.mark.parametrize('n', [1, 8, 13])
def test_moments_are_those_of_what_passes(n):
    "Brute force: all that enters, all patches, and the gradient of random errors for all that leaves, one state after another."
    d, retain = toy()
    A, net, sums = layer_factors(d, retain, lambda snr: 4*snr**2, n, seed=3), d.net, {}
    assert set(A) == {f'{k}.weight' for k in RAN}
    def add(key, a): sums[key] = sums.get(key, 0) + a
    g = gen(3)
    x_t, t, _ = draw(retain, n, g)
    errors = torch.randn(n, 3, 6, 6, generator=g)
    for x, level, u in zip(x_t, t, errors):
        for name, whole, patches in passing(net, x[None]):
            v = whole.movedim(1, -1).flatten(0, -2)
            add((name, 'inputs'), v.T @ v)
            add((name, 'places'), torch.einsum('bcil,bcjl->ij', patches, patches))
        loss = (net(x[None])*u*2*d.snr(level)*d.gain(level)).sum()   # 2 snr is the root of the weight
        for name, back in zip(RAN, torch.autograd.grad(loss, [net.given[name] for name in RAN])):
            v = (back.movedim(1, -1) if back.dim() == 4 else back).flatten(0, -2).double()
            add((name, 'outputs'), v.T @ v)
    for (name, kind), total in sums.items():
        if kind == 'places' and len(A[f'{name}.weight'].places) == 1: total = torch.ones(1, 1, dtype=torch.float64)
        assert_close(getattr(A[f'{name}.weight'], kind), (total/total.trace()*len(total)).float(), atol=1e-5, rtol=1e-4)


def test_a_change_is_noticed_in_proportion_to_the_moments():
    "What they are for: in a linear layer, where nothing is taken apart, a change D moves the output by tr(D A D^T) in the mean square."
    d, retain = toy()
    n, net = 6, d.net
    A, (x_t, _, _) = layer_factors(d, retain, n=n), draw(retain, n, gen())
    for name in ('tokens', 'vector'):
        before, entered = net(x_t) is None or net.given[name], dict((k, v) for k, v, _ in passing(net, x_t))[name]
        weight = getattr(net, name).weight.data
        D = torch.randn(weight.shape, generator=gen(5))
        weight += D
        net(x_t)
        weight -= D
        moved, size = (net.given[name] - before).square().sum(-1).mean(), entered.square().mean().float()
        assert_close(moved, size*(D @ A[f'{name}.weight'].inputs @ D.T).trace(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_of_a_net(dtype):
    d = Denoiser(deepcopy(tiny_net()).to(dtype), DDPMScheduler())
    retain = generate(d, range(2), steps=3)
    asked = [p.requires_grad for p in d.net.parameters()]
    A, state = layer_factors(d, retain, n=12), torch.get_rng_state()
    layers = {f'{k}.weight': m.weight for k, m in d.net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {k: (len(v.outputs), len(v.inputs), len(v.places)) for k, v in A.items()} == {k: (*w.shape[:2], w[0, 0].numel()) for k, w in layers.items()}
    for a in (a for v in A.values() for a in vars(v).values()):
        assert a.dtype == torch.float32 and not a.requires_grad and torch.isfinite(a).all()
        assert_close(a, a.T, **CLOSE)
        values = torch.linalg.eigvalsh(a)
        assert abs(values.mean() - 1) < 1e-4 and values[0] >= -1e-5*values[-1]
    def equal(A, B): return all(torch.equal(x, y) for k in A for x, y in zip(vars(A[k]).values(), vars(B[k]).values()))
    assert equal(layer_factors(d, retain, n=12), A) and not equal(layer_factors(d, retain, n=12, seed=1), A)
    assert torch.equal(torch.get_rng_state(), state) and not hooks(d.net)
    assert [p.requires_grad for p in d.net.parameters()] == asked and all(p.grad is None for p in d.net.parameters())


def test_frozen_weights_stay_frozen():
    d, retain = toy()
    d.net.requires_grad_(False)
    with torch.no_grad(): A = layer_factors(d, retain, n=4)
    assert set(A) == {f'{k}.weight' for k in RAN} and not any(p.requires_grad for p in d.net.parameters())


def test_no_hook_is_left_after_an_exception():
    d, retain = toy()
    layer_factors(d, retain, n=3)
    assert not hooks(d.net)
    d.net.tokens.forward = None   # fails in the middle of the net
    with pytest.raises(TypeError): layer_factors(d, retain, n=3)
    assert not hooks(d.net)


@st.composite
def spectra(draw_from):
    "A symmetric A [K, K] >= 0 with eigenvalues from 0 to 1000 and mean 1, some of them equal."
    values = torch.tensor(draw_from(st.lists(st.sampled_from([0., 1e-4, .01, 1., 2., 1000.]), min_size=1, max_size=5).filter(any)))
    U = torch.linalg.qr(torch.randn(len(values), len(values), generator=gen(draw_from(st.integers(0, 99)))))[0]
    return (U*values/values.mean()) @ U.T


@given(spectra(), spectra(), spectra(), st.sampled_from([1e-3, .01, 1., 100.]), st.integers(0, 99))
@settings(max_examples=60)
def test_whitening_makes_the_dear_directions_short(inputs, places, outputs, damping, seed):
    B, weight = eigenbases({'a': Factors(inputs, places, outputs)}, damping)['a'], torch.zeros(len(outputs), len(inputs), len(places), 1)
    assert B.reach.shape == (len(outputs), len(places), len(inputs)) and 0 < B.reach.min() and abs(B.reach.max() - 1) < 1e-5
    v, g = torch.randn(B.reach.shape, generator=gen(seed)), torch.randn(weight.shape, generator=gen(seed + 1))
    delta = B.from_basis(v, weight)
    assert_close((delta*g).sum(), (v*B.to_basis(g)).sum(), atol=1e-3, rtol=1e-3)   # the chain rule
    assert_close(delta.norm(), (v*B.reach).norm(), atol=1e-3, rtol=1e-3)              # directions of length 1, at right angles
    def price(d): return torch.einsum('ock,cb,kj,op,pbj->', d, inputs, places, outputs, d)
    for o, k, c in zip(*(torch.randint(size, (3,), generator=gen(seed)) for size in v.shape)):
        one = torch.zeros_like(v)
        one[o, k, c] = 1
        d = B.from_basis(one, weight)[..., 0]
        used = price(d)/d.square().sum()   # the product of the three eigenvalues
        l = [B_.T[i] @ A @ B_.T[i] for B_, A, i in ((B.outputs, outputs, o), (B.places, places, k), (B.inputs, inputs, c))]
        assert_close(used, l[0]*l[1]*l[2], atol=1e-2, rtol=1e-2)
        exact = ((l[0].clamp(min=0) + damping)*(l[1]*l[2] + damping)).rsqrt()
        free = ((torch.linalg.eigvalsh(outputs).clamp(min=0).min() + damping)*(torch.linalg.eigvalsh(places).clamp(min=0).min()*torch.linalg.eigvalsh(inputs).clamp(min=0).min() + damping)).rsqrt()
        assert_close(B.reach[o, k, c], exact/free, atol=1e-2, rtol=2e-2)


def test_limits_of_the_damping():
    "Much: all directions alike. None: what nothing uses is all that is left."
    one, A = torch.ones(1, 1), torch.diag(torch.tensor([0., 1., 2.]))
    assert_close(eigenbases({'a': Factors(A, one, A)}, 1e8)['a'].reach, torch.ones(3, 1, 3), atol=1e-6, rtol=0)
    reach = eigenbases({'a': Factors(A, one, one)}, 1e-12)['a'].reach
    assert reach[0, 0, 0] == 1 and reach[0, 0, 1:].max() < 1e-5


def test_a_layer_that_nothing_passes_is_all_free():
    d, retain = toy()
    silent = layer_factors(d, retain, lambda snr: 0*snr, n=2)['conv.weight']
    assert_close(silent.outputs, torch.eye(4))


@pytest.mark.parametrize('kind', ['inputs', 'places', 'outputs'])
def test_what_is_not_finite_is_refused(kind):
    one = torch.ones(1, 1)
    refused(lambda: eigenbases({'some.weight': Factors(**dict(inputs=one, places=one, outputs=one) | {kind: one*float('nan')})}), 'some.weight', 'not finite')
