"The loop: what it promises whatever the model, the form of the change, the pieces a batch comes in, and whatever stops it."
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.testing import assert_close

from conftest import ROOT
from unlearn_nb import surgery
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix, change, changed
from unlearn_nb.directions import layer_factors, eigenbases
from unlearn_nb.states import generate, noised
from unlearn_nb.parametrization import Full, Lora
from unlearn_nb.states import Request, default_retain, forget_states, noised_states, own_paths, still_forgotten
from unlearn_nb.unlearn import Config, gradient, unlearn
from unlearn_nb.weights import x0_loss
from unlearn_nb.weights import WEIGHTS, min_snr
from unlearn_nb.zoo import load

TINY = Config(weight="min_snr", lr=1.2e-3, steps=3, forget_batch=4, retain_batch=4, retain_images=3, near_images=0, sampling_steps=4)
FORMS = {"whitened": {}, "full": dict(damping=0.), "lora": dict(rank=2, damping=0.), "whitened, as a lora": dict(rank=2)}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
predictions = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])


def tiny(prediction="v_prediction", seed=0, size=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet2DModel(sample_size=size, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",)*2, up_block_types=("UpBlock2D",)*2)
    return Denoiser(net.eval(), DDPMScheduler(prediction_type=prediction), name="tiny")


def request_of(model, seed=5):
    forget, surrogate = model.decode(model.sample([seed, seed + 1], 4))
    return Request(forget, surrogate, seed)


@lru_cache
def settings_of(prediction, threads):
    model = tiny(prediction)
    (_, retain), = default_retain(model, [request := request_of(model)], **retain_settings(TINY))
    return model, request, retain


def setting(prediction="v_prediction"):
    "A model, a request and what must stay: always the same ones, since a run leaves them as they are."
    return settings_of(prediction, torch.get_num_threads())   # with other threads sums are rounded otherwise


def run(cfg=TINY, prediction="v_prediction", **kw):
    model, request, retain = setting(prediction)
    return unlearn(model, [request], retain, cfg, **kw)


@lru_cache
def straight_with(cfg, threads): return run(cfg)


def straight(cfg=TINY):
    "What a run gives that nothing stops and nobody shares; it is kept, since it is always the same."
    return straight_with(cfg, torch.get_num_threads())


def gen(seed=0): return torch.Generator().manual_seed(seed)
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def norm(tensors): return sum(v.double().square().sum() for v in tensors)**.5


def apart(a, b):
    "How far two changes are from one another: in norms of the weights, and in norms of the change."
    assert changed(a) == changed(b)
    a, b = ({k: change(delta, k) for k in changed(delta)} for delta in (a, b))   # whole, if it is stored as factors
    difference = norm([a[k] - b[k] for k in a])
    return (difference/norm(setting()[0].net.state_dict().values())).item(), (difference/norm(a.values())).item()


def refused(act, *words, error=ValueError):
    "It is refused in one sentence that has the words in it."
    with pytest.raises(error) as e: act()
    assert type(e.value) is error and "\n" not in str(e.value) and all(str(w) in str(e.value) for w in words), e.value
    return str(e.value)


@contextmanager
def on(model, fix):
    "With this hotfix on."
    fix.apply(model)
    try: yield
    finally: fix.remove(model)


class Stop(Exception): pass


def stopping_at(call, rule="symmetric", how=Stop):
    "The named rule of surgery, which stops the run when it is called for that time; by its name the same rule."
    calls, project = [], surgery.get(rule)
    def stops(g_f, g_r):
        calls.append(1)
        if len(calls) == call: raise how
        return project(g_f, g_r)
    stops.__name__, stops.memory = rule, getattr(project, "memory", {})
    return stops


# --- the base comes back ---

def state_of(model):
    "All of a model that a run must leave as it was: bits, identities, flags, hooks."
    net = model.net
    return {"bits": fingerprint(model), "parameters": [(k, id(p), p.requires_grad, p.grad, p.dtype) for k, p in net.named_parameters()],
            "modules": [(k, id(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for k, m in net.named_modules()],
            "attributes": sorted(vars(net)), "checkpointing": net.is_gradient_checkpointing, "hotfixes": list(model.hotfixes)}


@forms
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_base_comes_back_bit_for_bit_and_the_hotfix_moves_it(form, precision):
    model, request, retain = setting()
    before, mark = state_of(model), fingerprint(model)
    fix = unlearn(model, [request], retain, replace(TINY, precision=precision, **form))
    assert state_of(model) == before and fix.card["base"]["sha256"] == mark
    with on(model, fix): assert fingerprint(model) != mark
    assert state_of(model) == before


@predictions
def test_every_prediction_comes_back(prediction):
    model = setting(prediction)[0]
    before = state_of(model)
    assert any(v.any() for v in run(replace(TINY, damping=0.), prediction).delta.values()) and state_of(model) == before


@forms
@pytest.mark.parametrize("how", [Stop, KeyboardInterrupt])
def test_base_comes_back_after_whatever_happens(form, how):
    model = setting()[0]
    before = state_of(model)
    with pytest.raises(how): run(replace(TINY, surgery=stopping_at(2, how=how), gradient_checkpointing=how is Stop, **form))
    assert state_of(model) == before


@forms
def test_the_watcher_sees_every_step_and_its_weights(form):
    model, request, retain = setting()
    before, seen = state_of(model), []
    def watch(step, what): seen.append((step, what, fingerprint(model)))
    fix = unlearn(model, [request], retain, replace(TINY, **form), watch=watch)
    assert [step for step, _, _ in seen] == list(range(TINY.steps)) and [what for _, what, _ in seen] == fix.card["log"]
    assert len({mark for _, _, mark in seen} | {before["bits"]}) == TINY.steps + 1 and state_of(model) == before
    def stop(step, what):
        if step == 1: raise Stop
    with pytest.raises(Stop): unlearn(model, [request], retain, replace(TINY, **form), watch=stop)
    assert state_of(model) == before


@forms
def test_frozen_weights_are_frozen_again(form):
    model, request, retain = tiny(), *setting()[1:]
    model.net.requires_grad_(False).conv_in.requires_grad_(True)
    before = state_of(model)
    unlearn(model, [request], retain, replace(TINY, **form))
    assert state_of(model) == before


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_of_half_precision(form, dtype):
    model = tiny()
    model.net.to(dtype)
    before, request = state_of(model), request_of(model)
    fix = unlearn(model, [request], cfg=replace(TINY, lr=.01, **form))
    assert state_of(model) == before and fix.card["log"][-1]["forget"] < fix.card["log"][0]["forget"]
    with on(model, fix): assert fingerprint(model) != before["bits"]
    assert state_of(model) == before




@forms
def test_another_layout_of_the_weights(form, tmp_path):
    model, request, retain = tiny(), *setting()[1:]
    model.net.to(memory_format=torch.channels_last)
    fix = unlearn(model, [request], retain, replace(TINY, **form))
    fix.save(tmp_path)
    Hotfix.load(tmp_path).apply(model)


def test_gradient_checkpointing_is_on_and_off_again():
    "It really goes through the net once more, and changes nothing else."
    model, calls = setting()[0], []
    handle = model.net.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        plain, count = run(replace(TINY, damping=0.)), calls.count(True)
        calls.clear()
        again = run(replace(TINY, damping=0., gradient_checkpointing=True))
        assert calls.count(True) == 2*count and not model.net.is_gradient_checkpointing
    finally: handle.remove()
    assert same(plain.delta, again.delta)


def test_gradient_checkpointing_of_ones_own_stays():
    model, request, retain = tiny(), *setting()[1:]
    model.net.enable_gradient_checkpointing()
    unlearn(model, [request], retain, replace(TINY, gradient_checkpointing=True))
    assert model.net.is_gradient_checkpointing


# --- chance ---

@pytest.mark.parametrize("form", [FORMS["whitened"], FORMS["lora"]], ids=["whitened", "lora"])
def test_chance_is_the_seed_alone(form):
    "Same seed, same hotfix; another seed, another one; the global random state plays no part and is left alone."
    cfg = replace(TINY, **form)
    torch.manual_seed(1)
    one = run(cfg)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = run(cfg)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one.delta, two.delta) and one.card["log"] == two.card["log"] and not same(one.delta, run(replace(cfg, seed=1)).delta)


# --- losses and states ---

@predictions
@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_is_the_weighted_x0_error(prediction, weight):
    model, g = setting(prediction)[0], gen()
    x_t, goal = torch.randn(6, 3, 8, 8, generator=g), torch.randn(6, 3, 8, 8, generator=g).clamp(-1, 1)
    t = torch.tensor([20, 100, 250, 400, 600, 800])
    with torch.no_grad():
        error = (torch.cat([model.predict(x[None], s) for x, s in zip(x_t, t)]) - goal).square()
        expected = (WEIGHTS[weight](model.snr(t)).view(-1, 1, 1, 1)*error).mean()
        assert_close(x0_loss(model, x_t, t, goal, WEIGHTS[weight]), expected, rtol=2e-3, atol=1e-6)


@given(n=st.integers(1, 40), t_max=st.integers(1, 1000), seed=st.integers(0, 2**40))
@settings(max_examples=25)
def test_noised_states_lead_from_each_image_to_its_own_surrogate(n, t_max, seed):
    "Images of one grey each: what is left when the image is taken away is noise of that level, one level t_max u^1.5 for a u in each of n equal parts of [0, 1)."
    model = setting()[0]
    x_f, x_s = (torch.tensor(v).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) for v in ([-.8, 0., .8], [.1, .2, .3]))
    x_t, t, goal = noised_states(model, x_f, x_s, n, t_max, gen(seed))
    assert len(x_t) == n and (t >= 0).all() and (t < t_max).all()
    low, high = (t_max*((torch.arange(n) + k)/n)**1.5 for k in (0, 1))
    assert (low - 1.01 < t).all() and (t < high + .01).all()
    which = (goal[:, 0, 0, 0]*10).round().long() - 1
    assert torch.equal(goal, x_s[which])
    a, s = model.scales(t)
    eps = (x_t - a*x_f[which])/s
    assert (eps.flatten(1).mean(1).abs() < .4).all() and ((eps.flatten(1).std(1) - 1).abs() < .3).all()   # 192 numbers each: 5.5 and 5.9 standard deviations


def test_the_largest_random_number_stays_below_t_max(monkeypatch):
    model = setting()[0]
    with monkeypatch.context() as m:
        m.setattr(torch, "rand", lambda n, **kw: torch.full((n,), 1 - 2**-24))
        t = noised_states(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 8, 1000, gen())[1]
    assert t.max() < 1000


def test_own_paths_lead_to_their_own_surrogates():
    model, request, _ = setting()
    requests = [replace(request, seed=s) for s in (None, 7, 9)]
    x_s = torch.stack([torch.full((3, 8, 8), v) for v in (.1, .2, .3)])
    own, path = own_paths(model, requests, x_s, 4), generate(model, [7, 9], 4)
    assert torch.equal(own.x_t, path.x_t) and torch.equal(own.levels, path.levels)
    for k in range(2): assert torch.equal(own.goal[k], x_s[k + 1].expand(4, 3, 8, 8))
    assert own_paths(model, requests[:1], x_s[:1], 4) is None


@pytest.mark.parametrize("share, count", [(0., 0), (.375, 3), (1., 8)])
def test_share_of_the_own_path(share, count):
    model, request, _ = setting()
    x_f, x_s = model.encode([request.image]), model.encode([request.surrogate])
    own, cfg = own_paths(model, [request], x_s, 4), replace(TINY, forget_batch=8, path_share=share, mix_share=0.)
    x_t, t, goal = forget_states(model, x_f, x_s, own, cfg, gen())
    assert sum(any(torch.equal(x, y) for y in own.x_t[0]) for x in x_t) == count and len(x_t) == len(t) == 8
    assert torch.equal(goal, x_s.expand_as(goal))
    assert forget_states(model, x_f, x_s, None, cfg, gen())[0].shape == x_t.shape   # no seed: all of them noised


@given(share=st.sampled_from([0., .5, 1.]), path_share=st.sampled_from([0., .375, 1.]), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_states_on_the_way_are_moved_in_the_clean_image(share, path_share, seed):
    "Two requests of one grey each: the same draw with and without moving differs by a u (x_s - x_f) of its own request, u between 0 and 1, for that share of the states."
    model, request, _ = setting()
    requests = [replace(request, seed=s) for s in (7, 9)]
    x_f, x_s = model.sample([7, 9], 4), torch.stack([torch.full((3, 8, 8), v) for v in (.1, .2)])
    own, cfg = own_paths(model, requests, x_s, 4), replace(TINY, forget_batch=64, path_share=path_share)
    still, moved = (forget_states(model, x_f, x_s, own, replace(cfg, mix_share=v), gen(seed)) for v in (0., share))
    assert torch.equal(still[1], moved[1]) and torch.equal(still[2], moved[2])
    which = (moved[2][:, 0, 0, 0]*10).round().long() - 1
    step = model.scales(moved[1])[0]*(x_s - x_f)[which]
    u = ((moved[0] - still[0])*step).sum((1, 2, 3))/step.square().sum((1, 2, 3))
    assert_close(moved[0] - still[0], u.view(-1, 1, 1, 1)*step, atol=1e-5, rtol=1e-4)
    assert (u > -1e-4).all() and (u < 1 + 1e-4).all() and abs((u.abs() > 1e-6).float().mean() - share) < .3


def test_first_retain_gradient_is_nothing():
    assert straight().card["log"][0]["retain"] < 1e-9


# --- several requests, and one after another ---

@pytest.mark.parametrize("seeds", [(None,), (None, 7), (7, 9, None)])
def test_several_requests_in_one(seeds):
    model, _, retain = setting()
    requests = [replace(request_of(model, 7 + 2*k), seed=s) for k, s in enumerate(seeds)]
    fix, mark = unlearn(model, requests, retain, TINY), fingerprint(model)
    rows = fix.card["requests"]
    assert [r["seed"] for r in rows] == list(seeds) and len({r[k] for r in rows for k in ("forget_sha256", "surrogate_sha256")}) == 2*len(seeds)
    assert not same(fix.delta, unlearn(model, requests[:1], retain, replace(TINY, seed=1)).delta) and fingerprint(model) == mark


def test_requests_one_after_another(monkeypatch):
    model, _, retain = setting()
    requests, fixes, drawn, base = [request_of(model, s) for s in (5, 7, 9)], [], [], state_of(model)
    from unlearn_nb.states import draw
    monkeypatch.setattr("unlearn_nb.unlearn.draw", lambda retain, n, g: drawn.append(retain) or draw(retain, n, g))
    for k, request in enumerate(requests):
        drawn.clear()
        before = state_of(model)
        fix = unlearn(model, [request], [(2, retain), (1, retain)] if k == 2 else retain, TINY, earlier=requests[:k])
        assert state_of(model) == before
        assert fix.card["on"] == [f.id for f in fixes] and fix.card["base"]["sha256"] == base["bits"] == fingerprint(model, base=True)
        if k:   # among what must stay is what the edited model now makes of the images before
            (three, given), (one, [(_, again), (_, own)]) = drawn[-1]
            assert (three, one) == (3, 1) and (given is retain if k == 1 else [part for _, part in given] == [retain]*2)
            assert torch.equal(again.x0, model.encode([r.image for r in requests[:k]])) and again.levels.max() < TINY.t_max
            for s, t in enumerate(again.levels): assert_close(again.goal[:, s], model.predict(again.x_t[:, s], t), atol=1e-5, rtol=1e-5)
            assert torch.equal(own.x0, model.sample([r.seed for r in requests[:k]], TINY.sampling_steps))
        fix.apply(model)
        fixes.append(fix)
    for k in (1, 0, 2): fixes[k].remove(model)
    assert state_of(model) == base


def test_earlier_images_without_seeds():
    model, request, _ = setting()
    (share, again), = still_forgotten(model, [replace(request, seed=None)], TINY)
    assert share == 1 and torch.equal(again.goal, noised(model, model.encode([request.image]), 25, TINY.t_max).goal)


def test_it_forgets_and_stays_forgotten():
    "On the built-in model: ten steps bring reconstructions and the seed nearer to the surrogate; ten more for another picture leave that so."
    model = load("faces", device="cpu")
    mark, x = fingerprint(model), model.sample([100, 7, 1003, 8], 10)
    images = model.decode(x)
    first, second = Request(images[0], images[1], 100), Request(images[2], images[3], 1003)
    cfg = replace(TINY, steps=10, forget_batch=6, retain_batch=6, retain_images=4, sampling_steps=10, damping=0.)
    def away(k): return (model.reconstruct(x[k:k + 1], 250, range(2), 5) - x[k + 1]).square().mean().item()   # from the surrogate of image k
    before = away(0), away(2)
    one = unlearn(model, [first], cfg=cfg)
    one.apply(model)
    assert away(0) < .6*before[0]
    seed = model.sample([100], 10)
    assert (seed - x[1]).norm() < (seed - x[0]).norm()
    two = unlearn(model, [second], cfg=cfg, earlier=[first])
    two.apply(model)
    assert away(0) < .6*before[0] and away(2) < .6*before[1]
    one.remove(model)
    assert away(0) > .6*before[0] and away(2) < .7*before[1]   # each takes its own with it
    two.remove(model)
    assert fingerprint(model) == mark


# --- what must stay ---

def test_by_default_a_third_is_near_the_forget_image():
    model, request, _ = setting()
    (two, every), (one, near) = default_retain(model, [request], **retain_settings(replace(TINY, near_images=2, pool=6)))
    pool = model.sample(range(200_000, 200_006), 4)
    far = (pool - model.encode([request.image])).square().flatten(1).mean(1)
    assert (two, one) == (2, 1) and near.x0.shape[0] == 2
    for x in near.x0: assert (pool - x).abs().flatten(1).amax(1).argmin().item() in far.argsort()[:2].tolist()
    twice = default_retain(model, [request, replace(request, image=request.surrogate, seed=None)], **retain_settings(replace(TINY, near_images=2, pool=6)))[1][1]
    assert 1 <= len(twice.x0) <= 2


def test_given_retain_is_what_is_used():
    model, request, retain = setting()
    other = generate(model, [1], 4)
    def given(mix): return unlearn(model, [request], mix, TINY).delta
    default, one, two, nested = map(given, (None, other, [(1, retain), (1, other)], [(1, [(1, retain), (1, other)]), (1, other)]))
    assert same(default, straight().delta)
    for a, b in combinations((default, one, two, nested), 2): assert not same(a, b)


def test_retain_states_are_kept_in_a_folder(tmp_path, monkeypatch):
    model, _, retain = setting()
    calls = []
    monkeypatch.setattr("unlearn_nb.unlearn.generate", lambda *args, **kw: calls.append(1) or generate(*args, **kw))
    def kept(d=model, cfg=TINY):
        calls.clear()
        (_, states), = default_retain(d, [request_of(model)], cfg, tmp_path/"cache")
        return states, len(calls)
    def equal(a, b): return same(*({k: v for k, v in vars(x).items() if v is not None} for x in (a, b)))   # no words here
    fresh, again = kept(), kept()
    assert equal(fresh[0], retain) and equal(again[0], retain) and (fresh[1], again[1]) == (1, 0)
    assert kept(tiny(seed=1))[1] == kept(cfg=replace(TINY, retain_images=2))[1] == kept(cfg=replace(TINY, sampling_steps=3))[1] == 1   # each under its own name
    files = list((tmp_path/"cache").iterdir())
    assert len(files) == 4
    other = save({"levels": torch.zeros(1)})
    for damage in (lambda data: data[:-1], lambda data: b"", lambda data: b"x"*100, lambda data: other):
        for file in files: file.write_bytes(damage(file.read_bytes()))
        states, made = kept()
        assert made == 1 and equal(states, retain) and kept()[1] == 0


# --- the two forms ---

def test_pull_is_the_transpose_of_push():
    "<push(V), G> = <V, pull(G)> whatever V and G: the chain rule."
    model, _, retain = setting()
    for bases in (eigenbases(layer_factors(model, retain, n=8)), {}):
        form = Full(model, bases)
        assert set(form.names) == (set(bases) or set(dict(model.net.named_parameters())))
        V, G = ([torch.randn(x.shape, generator=gen(k)) for x in tensors] for k, tensors in enumerate((form.params, form.weights)))
        with torch.no_grad():
            for v, value in zip(form.params, V): v.copy_(value)
        form.write_weights()
        moved = [(w.detach() - w0).double() for w, w0 in zip(form.weights, form.base)]
        form.restore()
        a, b = (sum((x.double()*y.double()).sum() for x, y in zip(*pair)) for pair in ((moved, G), (V, form.project_gradients(G))))
        assert_close(a, b, rtol=1e-4, atol=1e-3)


def caught(monkeypatch, form, look):
    "What `look(model)` gives just before a run takes its change off again."
    seen, model, restore = [], setting()[0], form.restore
    def restore_and_look(self):
        with torch.no_grad(): seen.append(look(model))
        restore(self)
    monkeypatch.setattr(form, "restore", restore_and_look)
    return seen


@pytest.mark.parametrize("rank", [1, 4])
def test_a_lora_hotfix_gives_what_its_adapter_gave(monkeypatch, rank):
    model, x_t, t = setting()[0], torch.randn(4, 3, 8, 8, generator=gen()), torch.tensor([5, 200, 600, 990])
    with torch.no_grad(): base = model(x_t, t)
    seen = caught(monkeypatch, Lora, lambda m: m(x_t, t))
    fix = run(replace(TINY, steps=8, lr=1e-2, rank=rank, damping=0.))
    layers = [f"{k}.weight" for k, m in model.net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert changed(fix.delta) == sorted(layers) and all(v.dtype == torch.float16 for v in fix.delta.values())
    with on(model, fix), torch.no_grad(): now = model(x_t, t)
    moved = (seen[0] - base).norm()
    assert moved > .02*base.norm() and (now - seen[0]).norm() < 1e-3*moved   # fp16: 2^-11 a number


@pytest.mark.parametrize("form", [FORMS["whitened"], FORMS["full"]], ids=["whitened", "full"])
def test_a_full_hotfix_gives_the_weights_that_were_trained(monkeypatch, form):
    model = setting()[0]
    seen = caught(monkeypatch, Full, lambda m: {k: v.clone() for k, v in m.net.state_dict().items()})
    fix = run(replace(TINY, **form))
    base = {k: v.clone() for k, v in model.net.state_dict().items()}
    with on(model, fix): now = {k: v.clone() for k, v in model.net.state_dict().items()}
    for k, v in now.items():
        bound = 2**-10*(seen[0][k] - base[k]).abs() + 2**-22*v.abs() + 2**-24   # of the change in fp16, and of the sums in fp32
        assert not ((v - seen[0][k]).abs() > bound).sum(), k


# --- batches in pieces ---

def a_batch(model, n=6):
    _, request, _ = setting(model.prediction)
    return noised_states(model, model.encode([request.image]), model.encode([request.surrogate]), n, 500, gen())


def whole_gradient(model, batch, w):
    loss = x0_loss(model, *batch, w)
    return loss.item(), torch.autograd.grad(loss, list(model.net.parameters()))


def a_process(k=0, of=1): return SimpleNamespace(process_index=k, num_processes=of)


@predictions
@pytest.mark.parametrize("precision, bound", [("fp32", 2e-6), ("bf16", .05), ("fp16", .01)])
def test_gradient_is_that_of_the_loss(prediction, precision, bound):
    model = setting(prediction)[0]
    batch, form = a_batch(model), Full(model, {})
    loss, expected = whole_gradient(model, batch, min_snr)
    for micro_batch in (1, 4, 100):
        found, g = gradient(model, batch, min_snr, form, replace(TINY, precision=precision, micro_batch=micro_batch), a_process())
        assert abs(found - loss) < bound*loss and all(v.dtype == torch.float32 for v in g)
        assert norm([a - b for a, b in zip(g, expected)]) < bound*norm(expected)


@given(n=st.integers(1, 9), processes=st.integers(1, 4), micro_batch=st.integers(1, 10))
@settings(max_examples=15)
def test_the_pieces_add_up(n, processes, micro_batch):
    "The parts of all processes together are the gradient of the whole batch."
    if n < processes: n = processes   # fewer rows than processes: see below
    model = setting()[0]
    batch, form = a_batch(model, n), Full(model, {})
    loss, expected = whole_gradient(model, batch, min_snr)
    parts = [gradient(model, batch, min_snr, form, replace(TINY, micro_batch=micro_batch), a_process(k, processes)) for k in range(processes)]
    assert abs(sum(part for part, _ in parts) - loss) < 1e-5*loss
    assert norm([sum(column) - e for *column, e in zip(*(g for _, g in parts), expected)]) < 1e-5*norm(expected)


def test_fewer_rows_than_processes():
    model = setting()[0]
    loss, g = gradient(model, a_batch(model, 1), min_snr, Full(model, {}), TINY, a_process(1, 2))
    assert loss == 0 and not any(v.any() for v in g)


def test_half_precision_of_a_large_loss():
    model = tiny("epsilon", size=32)
    x = torch.full((1, 3, 32, 32), .9)
    batch, form = noised_states(model, x, -4*x, 8, 500, gen()), Full(model, {})
    _, expected = whole_gradient(model, batch, min_snr)
    g = gradient(model, batch, min_snr, form, replace(TINY, precision="fp16"), a_process())[1]
    assert norm([a - b for a, b in zip(g, expected)]) < .01*norm(expected)


RULES = pytest.mark.parametrize("rule", ["plain", "symmetric"])


@forms
@RULES
def test_a_micro_batch_changes_nothing(form, rule):
    cfg = replace(TINY, surgery=rule, **form)
    for size in (1, 3):
        of_weights, of_change = apart(straight(cfg).delta, run(replace(cfg, micro_batch=size)).delta)
        assert of_weights < 1e-5 and of_change < 2e-3


SHARED = {name: replace(TINY, **kw) for name, kw in {
    "whitened plain": dict(surgery="plain"), "lora plain": dict(rank=2, damping=0., surgery="plain", micro_batch=1), "full symmetric": dict(damping=0.),
    "whitened symmetric": dict(forget_batch=5, retain_batch=7), "full plain": dict(damping=0., surgery="plain", forget_batch=5, retain_batch=3)}.items()}


def shared_runs(folder):
    "Every run of SHARED, by however many processes there are; each writes what it got."
    folder, state = Path(folder), PartialState(cpu=True)
    got = {name: run(cfg, checkpoint=folder/"run.safetensors" if name == "whitened plain" else None).delta for name, cfg in SHARED.items()}
    torch.save(got, folder/f"{state.num_processes}.{state.process_index}.pt")


def child(*args, launcher=()):
    "This file as a program, with one thread."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *launcher, __file__, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    child("shared_runs", folder, launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])   # as `accelerate launch` does for several GPUs
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(two_processes, name, one_thread):
    first, second = (torch.load(two_processes/f"2.{k}.pt")[name] for k in range(2))
    assert same(first, second)
    of_weights, of_change = apart(straight(SHARED[name]).delta, first)
    assert of_weights < 1e-5 and of_change < 2e-3


def test_one_process_goes_on_where_two_were(two_processes, one_thread):
    assert sorted(p.name for p in two_processes.iterdir()) == ["2.0.pt", "2.1.pt", "run.safetensors"]
    assert same(run(SHARED["whitened plain"], checkpoint=two_processes/"run.safetensors").delta, torch.load(two_processes/"2.0.pt")["whitened plain"])


# --- the log, and what surgery sees ---

@forms
def test_the_log_says_what_happened(form):
    seen, cfg = [], replace(TINY, clip=1e-3, **form)
    def spy(g_f, g_r):
        seen.append(([g.clone() for g in g_f], [g.clone() for g in g_r]))
        return surgery.symmetric(g_f, g_r)
    card = run(replace(cfg, surgery=spy)).card
    assert json.loads(json.dumps(card, allow_nan=False)) == card and card["config"]["surgery"] == "spy"
    assert len(card["log"]) == card["cost"]["steps"] == cfg.steps
    for k, row in enumerate(card["log"]):
        assert list(row) == ["forget", "retain", "cosine", "ratio"] and row["forget"] > 0 <= row["retain"] and abs(row["cosine"]) <= 1 + 1e-6
        if len(seen) < len(card["log"]) and not k: continue   # a first step without surgery
        g_f, g_r = seen[k - len(card["log"])]
        assert norm(g_f) > 10*cfg.clip   # surgery comes before the clipping
        assert_close(row["cosine"], surgery.cosine(g_f, g_r).item(), rtol=1e-4, atol=1e-5)
        assert_close(row["ratio"], (norm(g_f)/norm(g_r)).item(), rtol=1e-4, atol=0.)


def test_a_retain_gradient_of_zero_has_no_ratio():
    row = run(replace(TINY, retain_weight=lambda snr: 0*snr)).card["log"][0]
    assert row["ratio"] is None and row["cosine"] == row["retain"] == 0


def test_the_preset_fits_the_size_of_the_model():
    def sized(n, prediction="epsilon"): return SimpleNamespace(prediction=prediction, net=SimpleNamespace(parameters=lambda: [torch.empty(n, device="meta")]))
    assert Config.of(sized(2_165_891), steps=7) == Config(steps=7) and Config.of(sized(113_673_219), rank=2) == Config.t4(rank=2) != Config(rank=2)
    assert Config.of(sized(2_028_328_000, "flow"), steps=7) == Config.sd3(steps=7) != Config.t4(steps=7) and Config.of(sized(9_000, "flow"), lr=1.) == Config.flags(lr=1.)


# --- refused ---

@pytest.mark.parametrize("change, says", [
    (dict(steps=0), "steps is 0"), (dict(lr=-1.), "lr is -1"), (dict(weight="heavy"), "heavy"), (dict(retain_weight="light"), "light"), (dict(surgery="brain"), "brain"),
    (dict(forget_batch=0), "forget_batch"), (dict(retain_batch=-1), "retain_batch"), (dict(micro_batch=0), "micro_batch"), (dict(retain_images=0), "retain_images"), (dict(sampling_steps=0), "sampling_steps"),
    (dict(rank=-1), "rank is -1"), (dict(damping=-.5), "whiten is -0.5"), (dict(path_share=-.1), "path_share is -0.1"), (dict(path_share=1.5), "path_share is 1.5"), (dict(path_share=float("nan")), "path_share is nan"), (dict(mix_share=2.), "mix_share is 2"),
    (dict(precision="fp8"), "fp8"), (dict(precision=None), "None"), (dict(t_max=0), "t_max is 0"), (dict(t_max=1001), "1000 levels"),
    (dict(clip=0.), "clip is 0"), (dict(clip=-1.), "clip is -1"), (dict(clip=float("nan")), "clip is nan"), (dict(lr=float("nan")), "lr is nan"),
    (dict(damping=float("nan")), "whiten is nan")])
def test_bad_settings_are_one_sentence(change, says, monkeypatch):
    "And before anything is computed."
    monkeypatch.setattr("unlearn_nb.unlearn.generate", lambda *_, **kw: pytest.fail("the model ran"))
    refused(lambda: run(replace(TINY, **change)), says)


@pytest.mark.parametrize("change", [dict(t_max=1000), dict(t_max=1), dict(path_share=0.), dict(path_share=1.), dict(rank=100), dict(forget_batch=1, retain_batch=1)], ids=str)
def test_settings_at_the_edge_work(change):
    fix = run(replace(TINY, **change))
    assert all(v.isfinite().all() for v in fix.delta.values()) and any(v.any() for v in fix.delta.values())


def test_the_preset_is_a_preset():
    cfg = Config.t4(steps=2, sampling_steps=4, rank=2)
    assert (cfg.steps, cfg.rank, cfg.forget_batch, cfg.damping) == (2, 2, 4, 0) and len(run(cfg).card["log"]) == 2


def test_bad_requests():
    model, r, _ = setting()
    refused(lambda: unlearn(model, [], cfg=TINY), "no request")
    for bad, says in ((replace(r, seed=-1), "seed -1"), (replace(r, surrogate=r.surrogate.resize((16, 16))), "16 x 16"), (replace(r, image=r.image.resize((4, 8))), "4 x 8")):
        refused(lambda: unlearn(model, [r, bad], cfg=TINY), says)
        refused(lambda: unlearn(model, [r], cfg=TINY, earlier=[bad]), says)


# --- numbers that are none ---

def nan_at(call, calls):
    "The weight min_snr, and no number at that call, which is once a step."
    def weight(snr):
        calls.append(1)
        return snr*float("nan") if len(calls) == call else min_snr(snr)
    weight.__name__ = "min_snr"
    return weight


@forms
def test_not_finite_stops_with_the_step_named_and_the_base_back(form):
    model = setting()[0]
    before = state_of(model)
    message = refused(lambda: run(replace(TINY, weight=nan_at(3, []), **form)), "step 2", "0.001", error=FloatingPointError)
    assert "kept" not in message and state_of(model) == before
    refused(lambda: run(replace(TINY, weight=lambda snr: snr*float("nan"), **form)), "step 0", error=FloatingPointError)
    refused(lambda: run(replace(TINY, lr=1e30, **form)), "step 1", "1e+30", error=FloatingPointError)
    assert state_of(model) == before


@forms
def test_a_model_that_is_no_number(form):
    model, request, retain = tiny(), *setting()[1:]
    model.net.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises((ValueError, FloatingPointError)) as e: unlearn(model, [request], retain, replace(TINY, **form))
    assert type(e.value) in (ValueError, FloatingPointError) and "\n" not in str(e.value)


LONG = replace(TINY, steps=12)


def step_of(file):
    with safe_open(file, "pt") as f: return int(f.metadata()["step"])


def test_the_checkpoint_from_before_is_still_good(tmp_path):
    file, model = tmp_path/"run.safetensors", setting()[0]
    before = state_of(model)
    refused(lambda: run(replace(LONG, weight=nan_at(12, [])), checkpoint=file), "step 11", file, error=FloatingPointError)
    assert state_of(model) == before and step_of(file) >= 10
    resumed = run(LONG, checkpoint=file)
    assert same(straight(LONG).delta, resumed.delta) and straight(LONG).card["log"] == resumed.card["log"] and step_of(file) == 12


def test_what_fails_at_once_leaves_nothing_to_go_on_from(tmp_path):
    message = refused(lambda: run(replace(LONG, weight=nan_at(1, [])), checkpoint=tmp_path/"x"), "step 0", error=FloatingPointError)
    assert "kept" not in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [5, 12])
def test_what_is_said_to_be_kept_is_kept(tmp_path, call):
    file = tmp_path/"run.safetensors"
    message = refused(lambda: run(replace(LONG, damping=0., weight=nan_at(call, [])), checkpoint=file), f"step {call - 1}", error=FloatingPointError)
    assert "the steps before it are kept" in message and "another checkpoint" in message and step_of(file) == call - 1


# --- stopped, and gone on ---

@pytest.mark.parametrize("form, rule", [(FORMS["whitened"], "symmetric"), (FORMS["lora"], "symmetric"), (FORMS["full"], "vaccine"), (FORMS["whitened"], "subspace")], ids=["whitened", "lora", "vaccine", "subspace"])
def test_gone_on_bit_for_bit(tmp_path, form, rule):
    file, cfg = tmp_path/"run.safetensors", replace(LONG, surgery=rule, **form)
    model = setting()[0]
    before = state_of(model)
    with pytest.raises(Stop): run(replace(cfg, surgery=stopping_at(11, rule)), checkpoint=file)
    assert step_of(file) == 10 and state_of(model) == before and len(list(tmp_path.iterdir())) == 1
    resumed, again = run(cfg, checkpoint=file), run(cfg, checkpoint=file)   # and one that has nothing left to do
    for other in (resumed, again): assert same(straight(cfg).delta, other.delta) and straight(cfg).card["log"] == other.card["log"]
    assert step_of(file) == 12 and state_of(model) == before


OTHER = dict(steps=4, forget_batch=5, retain_batch=5, micro_batch=5, lr=2e-3, weight="unit_eps", retain_weight="unit_x0", surgery="plain", damping=.5, rank=1, t_max=300, levels="uniform", path_share=.75, mix_share=.25,
    retain_images=4, near_images=1, pool=5, sampling_steps=5, clip=2., precision="bf16", gradient_checkpointing=True, seed=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    file = tmp_path_factory.mktemp("finished")/"run.safetensors"
    run(replace(TINY, damping=0.), checkpoint=file)
    return file


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_a_run_with_another_setting_is_refused(finished, name):
    data, before = finished.read_bytes(), state_of(setting()[0])
    refused(lambda: run(replace(TINY, **dict(damping=0.) | {name: OTHER[name]}), checkpoint=finished), repr(name), finished)
    assert finished.read_bytes() == data and state_of(setting()[0]) == before


def test_a_run_about_something_else_is_refused(finished):
    model, request, retain = setting()
    cfg, data = replace(TINY, damping=0.), finished.read_bytes()
    def refuses(word, model=model, requests=(request,), retain=retain, **kw): refused(lambda: unlearn(model, list(requests), retain, cfg, checkpoint=finished, **kw), word, finished)
    refuses("'weights of the model'", model=tiny(seed=1))
    for other in (replace(request, seed=6), replace(request, image=request.surrogate), replace(request, surrogate=request.image)): refuses("'requests'", requests=[other])
    refuses("'requests'", requests=[request, request])
    refuses("'what must stay'", retain=generate(model, [1], 4))
    refuses("'what must stay'", retain=replace(retain, goal=retain.goal + .01))
    refuses("'earlier requests'", earlier=[request])
    assert finished.read_bytes() == data and same(unlearn(model, [request], retain, cfg, checkpoint=finished).delta, straight(cfg).delta)


def test_a_run_goes_on_with_other_threads(tmp_path, one_thread):
    "What must stay is then computed anew, and rounded otherwise."
    file, whole = tmp_path/"run.safetensors", straight(LONG)
    with pytest.raises(Stop): run(replace(LONG, surgery=stopping_at(11)), checkpoint=file)
    torch.set_num_threads(2)
    resumed = run(LONG, checkpoint=file)
    assert step_of(file) == LONG.steps and apart(whole.delta, resumed.delta)[0] < 1e-3


@pytest.mark.parametrize("other", ["shares", "levels", "nested"])
def test_a_run_with_another_mix_of_what_must_stay_is_refused(tmp_path, other):
    model, request, retain = setting()
    more = generate(model, [1], 4)
    def go(mix): return unlearn(model, [request], mix, replace(TINY, damping=0.), checkpoint=tmp_path/"run.safetensors")
    mixes = {"shares": [(2, retain), (1, more)], "levels": [(1, replace(retain, levels=retain.levels - 1)), (1, more)], "nested": [(1, [(1, retain), (1, more)]), (1, more)]}
    if other == "nested": assert same(go(mixes[other]).delta, unlearn(model, [request], mixes[other], replace(TINY, damping=0.)).delta)
    else: go([(1, retain), (1, more)])
    mixes["nested"] = [(1, [(1, retain), (3, more)]), (1, more)]
    refused(lambda: go(mixes[other]), "'what must stay'")


@pytest.mark.parametrize("size", [0, 7, 8, 300, .5, -1])
def test_a_truncated_checkpoint_is_refused(finished, tmp_path, size):
    file, data = tmp_path/"cut", finished.read_bytes()
    file.write_bytes(data[:int(size*len(data)) if size == .5 else size])
    before = state_of(setting()[0])
    refused(lambda: run(replace(TINY, damping=0.), checkpoint=file), file)
    assert state_of(setting()[0]) == before




@pytest.mark.parametrize("metadata", [None, {}, {"x": "1"}, {"format": "pt"}, {"about": "{}", "step": "3", "log": "[]"},
    {"about": "[]", "step": "3", "log": "[]"}], ids=str)
def test_a_foreign_file_is_refused(tmp_path, metadata):
    file = tmp_path/"foreign"
    save_file({"a": torch.zeros(3)}, file, metadata)
    data = file.read_bytes()
    refused(lambda: run(replace(TINY, damping=0.), checkpoint=file), file)
    assert file.read_bytes() == data


def test_something_else_than_a_checkpoint_is_refused(tmp_path):
    (tmp_path/"text").write_text("dear diary")
    for file in (tmp_path/"text", tmp_path): refused(lambda: run(replace(TINY, damping=0.), checkpoint=file), file)
    assert (tmp_path/"text").read_text() == "dear diary"


@pytest.mark.parametrize("form, where", [(FORMS["whitened"], "fsync"), (FORMS["lora"], "fsync"), (FORMS["whitened"], "replace")], ids=["whitened", "lora", "replace"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, form, where):
    file, cfg, calls, real = tmp_path/"run.safetensors", replace(LONG, **form), [], getattr(os, where)
    def full(*args):
        calls.append(1)
        if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)
    before = state_of(setting()[0])
    with monkeypatch.context() as m:
        m.setattr(f"unlearn_nb.hotfix.os.{where}", full)
        with pytest.raises(OSError) as e: run(cfg, checkpoint=file)
        assert e.value.errno == errno.ENOSPC and repr(str(file)) in str(e.value) and "as it was" in str(e.value)
    assert state_of(setting()[0]) == before and step_of(file) == 10 and [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    assert same(run(cfg, checkpoint=file).delta, straight(cfg).delta)


# --- killed, and gone on ---

def die(*_): os.kill(os.getpid(), signal.SIGKILL)


class Kill(Stop):
    "No exception, but the end."
    __init__ = die


def killed_in(how, cfg, file, rng):
    "A run that kills itself in some step, or in its second save: with part of the new file written, or all of it, under the other name."
    if how == "step": cfg = replace(cfg, surgery=stopping_at(rng.randint(1, 14), how=Kill))
    if how in ("fsync", "replace"):
        real, calls = getattr(os, how), []
        def second(*args):
            calls.append(1)
            if len(calls) < 2: return real(*args)
            if how == "fsync": os.ftruncate(args[0], rng.randint(0, os.fstat(args[0]).st_size))
            die()
        setattr(os, how, second)
    run(cfg, checkpoint=file)


def killed_runs(folder, kills, form, seed):
    "Fork a run, kill it, go on from what is on the disk, so many times; print how each ended, and whether the last result is that of a run that nobody stopped."
    torch.set_num_threads(1)
    kills, file = int(kills), Path(folder)/"run.safetensors"
    cfg, steps = replace(TINY, steps=20 + 12*kills, **FORMS[form]), [0]
    for k in range(kills):
        how, was = ("fsync", "step", "time", "replace")[k % 4], file.stat().st_ino if file.exists() else None
        rng = random.Random(f"{seed} {k}")
        if not (pid := os.fork()):
            try: killed_in(how, cfg, file, rng)
            finally: os._exit(1)
        if how == "time":   # from outside, soon after a save
            while (file.stat().st_ino if file.exists() else None) == was and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): time.sleep(.005)
            time.sleep(rng.uniform(0, .2))
            os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)[1]
        steps.append(step_of(file) if file.exists() else 0)
        print(how, "killed" if ended == signal.SIGKILL else f"ended {ended}", steps[-1])
    resumed = run(cfg, checkpoint=file)
    whole = steps == sorted(steps) and 0 < steps[-1] < cfg.steps and [p.name for p in Path(folder).iterdir()] == ["run.safetensors"]
    print("result", "same" if whole and same(straight(cfg).delta, resumed.delta) and straight(cfg).card["log"] == resumed.card["log"] else "OTHER")


def check_kills(tmp_path, kills, form, seed=0):
    *rows, last = child("killed_runs", tmp_path, kills, form, seed).splitlines()
    assert last == "result same" and len(rows) == kills and all(" killed " in row for row in rows), (rows, last)


def test_killed_three_times(tmp_path): check_kills(tmp_path, 3, "whitened")


@pytest.mark.slow
@forms
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_twenty_times(tmp_path, form, seed): check_kills(tmp_path, 20, next(k for k in FORMS if FORMS[k] == form), seed)


if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])
