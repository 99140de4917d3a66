"Free directions: the factors are those of what passes through a layer, and a basis makes what is noticed short."
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from test_states import CLOSE, gen, refused, tiny_net
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.directions import Factors, eigenbases, layer_factors
from unlearn_nb.states import States, draw, generate


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
    device, prompts = torch.device('cpu'), {}
    def __call__(self, x_t, t): return self.net(x_t)
    def snr(self, t): return 1 / (1. + t)
    def gain(self, t): return (2. + t).view(-1, 1, 1, 1)


def toy(n=10):
    "A denoiser of the toy net, and states of noise for it."
    x_t, goal = torch.randn(2, n, 3, 3, 6, 6, generator=gen())
    return ToyDenoiser(net=Toy()), States(torch.arange(3), x_t, goal, torch.zeros(n, 3, 6, 6))


def hooks(net): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


RAN = ('conv', 'stride', 'wide', 'tokens', 'vector')   # no groups, nothing that never ran


def passing(net, x):
    """What enters each layer when the net sees x, and its patches [B, C, k, places]; of linear layers [N, C, 1, 1].

    Patches are made by a convolution with the identity as its kernel."""
    net(x)
    entering = {'conv': x, 'stride': net.given['conv'], 'wide': net.given['stride'],
                'tokens': net.given['groups'].flatten(2).transpose(1, 2), 'vector': net.given['tokens'].mean(1)}
    for name, v in entering.items():
        layer = getattr(net, name)
        if not isinstance(layer, nn.Conv2d):
            v = v.reshape(-1, v.shape[-1], 1, 1).double()
            yield name, v, v
            continue
        K, C = layer.weight[0].numel(), layer.weight.shape[1]
        eye = torch.eye(K).view(K, *layer.weight.shape[1:])
        u = nn.functional.conv2d(v, eye, None, layer.stride, layer.padding, layer.dilation)
        yield name, v.double(), u.flatten(2).unflatten(1, (C, -1)).double()


def brute_force(d, retain, n, seed):
    "All that enters, all patches, and the gradient of random errors for all that leaves, one state after another."
    sums, net, g = {}, d.net, gen(seed)
    def add(key, a): sums[key] = sums.get(key, 0) + a
    x_t, t, _ = draw(retain, n, g)
    errors = torch.randn(n, 3, 6, 6, generator=g)
    for x, level, u in zip(x_t, t, errors):
        for name, whole, patches in passing(net, x[None]):
            v = whole.movedim(1, -1).flatten(0, -2)
            add((name, 'A'), v.T @ v)
            add((name, 'kernel'), torch.einsum('bcil,bcjl->ij', patches, patches))
        loss = (net(x[None]) * u * 2 * d.snr(level) * d.gain(level)).sum()   # 2 snr is the root of the weight
        for name, back in zip(RAN, torch.autograd.grad(loss, [net.given[name] for name in RAN])):
            v = (back.movedim(1, -1) if back.dim() == 4 else back).flatten(0, -2).double()
            add((name, 'G'), v.T @ v)
    return sums


def test_factors_are_those_of_what_passes():
    for n in (1, 13):
        d, retain = toy()
        factors = layer_factors(d, retain, lambda snr: 4 * snr**2, n, seed=3)
        assert set(factors) == {f'{k}.weight' for k in RAN}
        for (name, kind), total in brute_force(d, retain, n, 3).items():
            found = getattr(factors[f'{name}.weight'], kind)
            if len(found) == 1: total = torch.ones(1, 1, dtype=torch.float64)
            assert_close(found, (total / total.trace() * len(total)).float(), atol=1e-5, rtol=1e-4)
        total = brute_force(d, retain, n, 3)
        for name in RAN:
            means = [total[name, kind].trace().item() / len(total[name, kind]) for kind in 'AG']
            assert_close(factors[f'{name}.weight'].strength, means[0] * means[1], atol=0., rtol=1e-3)


def test_a_change_is_noticed_in_proportion_to_the_factors():
    "In a linear layer, where nothing is taken apart, a change D moves the output by tr(D A D^T) in the mean square."
    d, retain = toy()
    n, net = 6, d.net
    factors, (x_t, _, _) = layer_factors(d, retain, n=n), draw(retain, n, gen())
    for name in ('tokens', 'vector'):
        entered = {k: v for k, v, _ in passing(net, x_t)}[name]
        before, weight = net.given[name], getattr(net, name).weight.data
        D = torch.randn(weight.shape, generator=gen(5))
        weight += D
        net(x_t)
        weight -= D
        moved, size = (net.given[name] - before).square().sum(-1).mean(), entered.square().mean().float()
        assert_close(moved, size * (D @ factors[f'{name}.weight'].A @ D.T).trace(), atol=1e-4, rtol=1e-4)


def test_factors_of_a_net():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        d = Denoiser(deepcopy(tiny_net()).to(dtype), DDPMScheduler())
        retain, asked = generate(d, range(2), steps=3), [p.requires_grad for p in d.net.parameters()]
        state, factors = torch.get_rng_state(), layer_factors(d, retain, n=12)
        layers = {f'{k}.weight': m.weight for k, m in d.net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        assert {k: (len(f.G), len(f.A), len(f.kernel)) for k, f in factors.items()} \
            == {k: (*w.shape[:2], w[0, 0].numel()) for k, w in layers.items()}
        assert all(f.strength > 0 for f in factors.values())
        for a in (a for f in factors.values() for a in (f.A, f.kernel, f.G)):
            assert a.dtype == torch.float32 and not a.requires_grad and torch.isfinite(a).all()
            assert_close(a, a.T, **CLOSE)
            values = torch.linalg.eigvalsh(a)
            assert abs(values.mean() - 1) < 1e-4 and values[0] >= -1e-5 * values[-1]
        def same_as(other): return all(torch.equal(getattr(f, name), getattr(other[k], name))
                                       for k, f in factors.items() for name in ('A', 'kernel', 'G'))
        assert same_as(layer_factors(d, retain, n=12)) and not same_as(layer_factors(d, retain, n=12, seed=1))
        assert torch.equal(torch.get_rng_state(), state) and not hooks(d.net)
        assert [p.requires_grad for p in d.net.parameters()] == asked
        assert all(p.grad is None for p in d.net.parameters())


def test_the_net_is_left_as_it_was():
    "Frozen weights stay frozen; no hook is left, not even after an exception."
    d, retain = toy()
    d.net.requires_grad_(False)
    with torch.no_grad(): factors = layer_factors(d, retain, n=4)
    assert set(factors) == {f'{k}.weight' for k in RAN} and not any(p.requires_grad for p in d.net.parameters())
    assert not hooks(d.net)
    d.net.tokens.forward = None   # fails in the middle of the net
    with pytest.raises(TypeError): layer_factors(d, retain, n=3)
    assert not hooks(d.net) and not any(p.requires_grad for p in d.net.parameters())


def test_a_layer_that_nothing_passes_is_all_free():
    d, retain = toy()
    assert_close(layer_factors(d, retain, lambda snr: 0 * snr, n=2)['conv.weight'].G, torch.eye(4))


@st.composite
def spectra(draw_from):
    "A symmetric A [K, K] >= 0 with eigenvalues from 0 to 1000 and mean 1, some of them equal."
    few = st.lists(st.sampled_from([0., 1e-4, .01, 1., 2., 1000.]), min_size=1, max_size=5)
    values = torch.tensor(draw_from(few.filter(any)))
    U = torch.linalg.qr(torch.randn(len(values), len(values), generator=gen(draw_from(st.integers(0, 99)))))[0]
    return (U * values / values.mean()) @ U.T


@given(spectra(), spectra(), spectra(), st.sampled_from([1e-3, .01, 1., 100.]), st.integers(0, 99))
@settings(max_examples=60)
def test_damping_makes_the_dear_directions_short(A, kernel, G, damping, seed):
    B = eigenbases({'a': Factors(A, kernel, G)}, damping)['a']
    weight = torch.zeros(len(G), len(A), len(kernel), 1)
    assert B.reach.shape == (len(G), len(kernel), len(A)) and 0 < B.reach.min() and abs(B.reach.max() - 1) < 1e-5
    v, g = torch.randn(B.reach.shape, generator=gen(seed)), torch.randn(weight.shape, generator=gen(seed + 1))
    delta = B.from_basis(v, weight)
    assert_close((delta * g).sum(), (v * B.to_basis(g)).sum(), atol=1e-3, rtol=1e-3)   # the chain rule
    assert_close(delta.norm(), (v * B.reach).norm(), atol=1e-3, rtol=1e-3)   # of length 1, at right angles
    flat = delta.flatten(2).transpose(1, 2).flatten(1)   # [O, k C], places first: the printed formula
    printed = B.G @ (B.reach * v).flatten(1) @ torch.kron(B.kernel, B.A).T
    assert_close(flat, printed, atol=1e-4, rtol=1e-4)
    def price(d): return torch.einsum('ock,cb,kj,op,pbj->', d, A, kernel, G, d)
    def least(M): return torch.linalg.eigvalsh(M).clamp(min=0).min()
    for o, k, c in zip(*(torch.randint(size, (3,), generator=gen(seed)) for size in v.shape)):
        one = torch.zeros_like(v)
        one[o, k, c] = 1
        d = B.from_basis(one, weight)[..., 0]
        l_G, l_k, l_A = (U[:, i] @ M @ U[:, i] for U, M, i in ((B.G, G, o), (B.kernel, kernel, k), (B.A, A, c)))
        assert_close(price(d) / d.square().sum(), l_G * l_k * l_A, atol=1e-2, rtol=1e-2)
        exact = ((l_G.clamp(min=0) + damping) * (l_k * l_A + damping)).rsqrt()
        free = ((least(G) + damping) * (least(kernel) * least(A) + damping)).rsqrt()
        assert_close(B.reach[o, k, c], exact / free, atol=1e-2, rtol=2e-2)


def test_a_layer_that_is_noticed_more_moves_less():
    "The middle layer as it would alone; another one by the root of how much less, or more, it is noticed."
    one = torch.eye(2)
    strengths = {'a': .5, 'b': 2., 'c': 8., 'nothing passes': 0.}
    bases = eigenbases({name: Factors(one, one, one, s) for name, s in strengths.items()}, .01)
    for name, times in (('a', .25), ('b', 1.), ('c', 4.), ('nothing passes', 1.)):
        assert_close(bases[name].reach, torch.full((2, 2, 2), ((times + .01) / 1.01) ** -.5))


def test_without_damping_all_coordinates_cost_the_same():
    "tr(G delta (A_k x A) delta') is |v|^2 times the strength of the freest triple."
    def some(n): return (x := torch.randn(n, 2 * n, generator=gen(n), dtype=torch.float64)) @ x.T / n
    f = Factors(A=some(3), kernel=some(4), G=some(5))
    B, v = eigenbases({'a': f}, 0.)['a'], torch.randn(5, 4, 3, generator=gen(), dtype=torch.float64)
    delta = B.from_basis(v, torch.zeros(5, 3, 2, 2)).flatten(2).transpose(1, 2).flatten(1)
    freest = torch.stack([torch.linalg.eigvalsh(M)[0] for M in (f.A, f.kernel, f.G)]).prod()
    assert_close((f.G @ delta @ torch.kron(f.kernel, f.A) @ delta.T).trace(), freest * v.square().sum())


def test_limits_of_the_damping():
    "Much: all directions alike. None: what nothing uses is all that is left."
    one, A = torch.ones(1, 1), torch.diag(torch.tensor([0., 1., 2.]))
    assert_close(eigenbases({'a': Factors(A, one, A)}, 1e8)['a'].reach, torch.ones(3, 1, 3), atol=1e-6, rtol=0)
    reach = eigenbases({'a': Factors(A, one, one)}, 1e-12)['a'].reach
    assert reach[0, 0, 0] == 1 and reach[0, 0, 1:].max() < 1e-5


def test_what_is_not_finite_is_refused():
    good = dict.fromkeys(('A', 'kernel', 'G'), torch.ones(1, 1))
    for name in good:
        bad = Factors(**good | {name: torch.full((1, 1), float('nan'))})
        refused(lambda: eigenbases({'some.weight': bad}), 'some.weight', 'not finite')
