"What moves: the chain rule, a hotfix that is what was trained, and a net that comes back bit for bit."
from functools import lru_cache, partial

import pytest
import torch
from torch.testing import assert_close

from test_states import gen, tiny
from unlearn_nb.directions import eigenbases, layer_factors
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import change, changed
from unlearn_nb.parametrization import Full, Lora, halves, parametrize
from unlearn_nb.states import generate
from unlearn_nb.weights import unit_v

KINDS = {'free': dict(damping=.01), 'free, as a lora': dict(damping=.01, rank=2), 'whole': dict(damping=0.),
         'lora': dict(damping=0., rank=2)}
kinds = pytest.mark.parametrize('kind', KINDS)


@lru_cache
def bases_of(model_id):
    model = tiny()
    return eigenbases(layer_factors(model, generate(model, range(3), 4), n=8))


def made(kind, model):
    "What `parametrize` makes of a kind; the bases are the same each time."
    return parametrize(model, generate(model, range(3), 4), unit_v, **KINDS[kind])


def layers_of(net):
    return sorted(f'{k}.weight' for k, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))


def shake(moving, size=.02):
    "Random numbers for all params, brought into the weights."
    with torch.no_grad():
        for k, v in enumerate(moving.params): v.add_(torch.randn(v.shape, generator=gen(k)), alpha=size)
    moving.write_weights()


def outputs(model):
    x_t, t = torch.randn(4, 3, 8, 8, generator=gen()), torch.tensor([5, 200, 600, 990])
    with torch.no_grad(): return model(x_t, t)


def test_gradients_are_projected_by_the_transpose_of_what_writes():
    "<change(V), G> = <V, projected G> whatever V and G: the chain rule."
    model, every = tiny(), set(dict(tiny().net.named_parameters()))
    for make, bases in ((Full, bases_of(0)), (Full, {}), (partial(Lora, rank=2, seed=0), bases_of(0))):
        moving = make(model, bases=bases)
        if make is Full: assert set(moving.names) == (set(bases) or every)
        G = [torch.randn(w.shape, generator=gen(k)) for k, w in enumerate(moving.weights)]
        shake(moving, 1.)
        moved = [w.detach() - w0 for w, w0 in zip(moving.weights, moving.base)]
        moving.restore()
        a, b = (sum((x.double() * y.double()).sum() for x, y in zip(*pair))
                for pair in ((moved, G), (moving.params, moving.project_gradients(G))))
        assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-3)


@kinds
def test_nothing_has_moved_before_the_first_step(kind):
    model = tiny()
    base, moving = outputs(model), made(kind, model)
    try: assert_close(outputs(model), base, atol=1e-6, rtol=1e-6)
    finally: moving.restore()
    assert not any(change(moving.delta(), k).any() for k in changed(moving.delta()))


@kinds
def test_the_net_comes_back_bit_for_bit(kind):
    model, net = tiny(), tiny().net
    def state(): return (fingerprint(model), [(k, id(p), p.requires_grad, p.grad) for k, p in net.named_parameters()],
                         [(k, id(m)) for k, m in net.named_modules()], sorted(vars(net)))
    net.requires_grad_(False).conv_in.requires_grad_(True)   # frozen weights are frozen again
    try:
        before, moving = state(), made(kind, model)
        assert all(w.requires_grad for w in moving.weights)
        shake(moving)
        assert fingerprint(model) != before[0]
        moving.restore()
        assert state() == before
    finally: net.requires_grad_(True)


@pytest.mark.parametrize('rank', [1, 4])
def test_a_lora_is_what_its_adapter_gave(rank):
    model, state = tiny(), torch.get_rng_state()
    base, moving = outputs(model), Lora(model, rank, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    shake(moving, .1)
    trained, delta = outputs(model), moving.delta()
    moving.restore()
    assert changed(delta) == layers_of(model.net) and all(v.dtype == torch.float16 for v in delta.values())
    moved, now = (trained - base).norm(), with_change(model, delta)
    assert moved > .02 * base.norm() and (now - trained).norm() < 2e-3 * moved   # fp16: 2^-11 a number


def with_change(model, delta):
    "The outputs with a change added to the weights, which are then as before."
    with torch.no_grad():
        kept = {k: model.net.get_parameter(k).clone() for k in changed(delta)}
        for k in kept: model.net.get_parameter(k).add_(change(delta, k).view_as(kept[k]))
        try: return outputs(model)
        finally:
            for k, w in kept.items(): model.net.get_parameter(k).copy_(w)


@pytest.mark.parametrize('kind', ['free', 'whole'])
def test_a_whole_change_is_the_weights_that_were_trained(kind):
    model = tiny()
    moving = made(kind, model)
    shake(moving)
    trained, delta = {k: w.detach().clone() for k, w in zip(moving.names, moving.weights)}, moving.delta()
    moving.restore()
    assert set(delta) == set(trained)
    for k, w in trained.items():
        base = model.net.get_parameter(k).detach()
        bound = 2**-10 * (w - base).abs() + 2**-22 * w.abs() + 2**-24   # the change in fp16, sums in fp32
        assert not ((base + delta[k].float() - w).abs() > bound).any(), k


def test_the_halves_of_a_basis_are_the_basis():
    "U_G (g g' o (B A)) U_P' is (U_G g B) (A g' U_P'): a LoRA along free directions is one of those directions."
    model, rank = tiny(), 3
    for k, (name, basis) in enumerate(bases_of(0).items()):
        w = model.net.get_parameter(name).detach()
        (O, n, C), (left, right) = basis.reach.shape, halves(basis, rank)
        b, a = torch.randn(O, 1, rank, generator=gen(k)), torch.randn(rank, n, C, generator=gen(k))
        B = left.from_basis(b, torch.empty(O, rank))
        A = right.from_basis(a, torch.empty(rank, *w.shape[1:]))
        whole = basis.from_basis((b[:, 0] @ a.flatten(1)).view(O, n, C), w)
        parts = [v.data_ptr() for half in (left, right) for v in vars(half).values()]
        assert len({*parts}) == len(parts)   # else a checkpoint could not be written
        assert_close((B @ A.flatten(1)).view_as(w), whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())
