"Rivals that go by the prompt: each against the formula of its paper. Small pipelines with random weights."
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from small_pipelines import pipeline
from test_words import SMALL, denoiser_of, request_of
from unlearn_nb.erasers import (AS_TRAINED, PARTS, anchors, answers, brings_back, concept_ablation, edit_again,
                                erased_states, esd, fade, fuse, last_word, late, layers_of_words, mace, map_of_words,
                                rece, sees_words, spm, tokens, trained, uce)
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix, verify
from unlearn_nb.parametrization import Full
from unlearn_nb.schedule import GAIN
from unlearn_nb.states import Request, default_retain, draw, generate, noised
from unlearn_nb.unlearn import Problem, retain_settings, unlearn
from unlearn_nb.weights import get
from unlearn_nb.zoo import load

RAW = replace(SMALL, damping=0., steps=3, near_images=0, retain_images=2)
KINDS = {'sd3': ('sd3',), 'sd': ('sd', 'epsilon'), 'v': ('sd', 'v_prediction'), 'sdxl': ('sdxl', 'epsilon')}
seeds = st.integers(0, 2**31)


def denoiser(kind, guidance=3.): return denoiser_of(pipeline(*KINDS[kind]), guidance)


@pytest.fixture
def problem():
    d = denoiser('sd')
    whole, x = Full(d, {}), torch.zeros(1, *d.shape)
    yield Problem(d, x, x, None, None, whole, RAW, PartialState(), d.prompt_ids('red flag', 1))
    whole.restore()


def flat(g): return torch.cat([v.flatten() for v in g])
def features(seed, *sizes, D=12):
    "Tokens [n, D] of each size."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=g, dtype=torch.float64) for n in sizes]


# --- UCE: the map of words ---

@given(seeds, st.integers(1, 20), st.integers(0, 20), st.floats(1e-2, 10))
@settings(max_examples=25)
def test_uce_is_least_squares_and_the_formula_of_its_paper(seed, n, m, lam):
    (old, new, keep), (W,) = features(seed, n, n, m), features(seed + 1, 5)
    eye = torch.eye(12, dtype=torch.float64)
    ours, root = W + W @ map_of_words(old, new, keep, lam), lam**.5*eye
    goals = torch.cat([new @ W.T, keep @ W.T, root @ W.T])
    oracle = torch.linalg.lstsq(torch.cat([old, keep, root]), goals).solution.T
    A = old.T @ old + lam*eye + keep.T @ keep
    paper = (W @ new.T @ old + lam*W + W @ keep.T @ keep) @ A.inverse()
    assert_close(ours, oracle, rtol=1e-6, atol=1e-8)
    assert_close(ours, paper, rtol=1e-6, atol=1e-8)


@given(seeds)
@settings(max_examples=25)
def test_with_a_small_lam_old_words_become_new_ones_and_kept_words_stay(seed):
    old, new, keep = features(seed, 3, 3, 4)
    P = map_of_words(old, new, keep, 1e-6)
    assert_close(old + old @ P.T, new, rtol=0, atol=1e-3)
    assert_close(keep @ P.T, torch.zeros_like(keep), rtol=0, atol=1e-3)
    assert torch.linalg.matrix_rank(P, rtol=1e-5) == 3


def test_the_same_words_change_nothing():
    old, keep = features(0, 3, 4)
    assert not map_of_words(old, old, keep, .5).any()
    assert not any(v.any() for v in uce(denoiser('sd3'), 'red flag', 'red flag').delta.values())


# --- UCE: a model ---

@pytest.mark.parametrize('kind', ['sd3', 'sd'])
def test_the_old_prompt_is_answered_as_the_new_one_and_the_kept_one_as_before(kind, tmp_path):
    d, base = denoiser(kind), fingerprint(denoiser(kind))
    x_t, t = torch.randn(3, *d.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 500, 900])
    @torch.no_grad()
    def ask(p): return d(x_t, t, d.prompt_ids(p, 3))
    was = {p: ask(p) for p in ('red', 'flag', '')}
    fix = uce(d, 'red', 'flag', lam=1e-3)
    assert {f'{k}.weight' for k in layers_of_words(d)} == fix.delta.keys()
    assert fix.receipt.told == {'concept': ['red'], 'target': ['flag'], 'keep': ['']} and fix.card['method'] == 'uce'
    assert verify(fix, fix.receipt) == [True] and 'flag' not in json.dumps(fix.card)   # prompts are no one else's
    fix.save(tmp_path)
    (again := Hotfix.load(tmp_path)).apply(d)
    now = {p: ask(p) for p in was}
    again.remove(d)
    scale = (was['red'] - was['flag']).norm()
    assert (now['red'] - was['flag']).norm() < .1*scale and (now[''] - was['']).norm() < .1*scale
    assert fingerprint(d) == base


def test_layers_into_which_words_go_alone():
    assert set(layers_of_words(denoiser('sd3'))) == {'context_embedder', 'time_text_embed.text_embedder.linear_1'}
    for kind in ('sd', 'sdxl'):
        d = denoiser(kind)
        layers = layers_of_words(d)
        assert layers and all('.attn2.' in k for k in layers)
        widths = {d.net.get_submodule(k).in_features for k in layers}
        assert widths == {d.prompt_embeds['encoder_hidden_states'].shape[-1]}


def test_two_prompts_at_once():
    d = denoiser('sd')
    fix = uce(d, ['red', 'flag'], ['a', 'a'], keep=())
    assert fix.receipt.told['concept'] == ['red', 'flag'] and any(v.any() for v in fix.delta.values())


# --- ESD ---

@pytest.mark.parametrize('kind', KINDS)
def test_the_goal_of_esd_is_its_formula_in_what_the_net_puts_out(kind):
    "eps_0 - eta (eps_c - eps_0), and the same for v and for a flow; with eta = 0 the answer to no words."
    d = denoiser(kind)
    for eta in (0., 1., 2.5):
        states = erased_states(d, ['red', 'flag'], 3, 4, eta)
        cond = d.prompt_ids(['red', 'flag', 'red'], 3)
        assert states.cond.tolist() == cond.tolist() and states.uncond is None
        for s, t in enumerate(states.timesteps):
            x_t, level = states.x_t[:, s], t.expand(3)
            with torch.no_grad(): out, uncond = d(x_t, level, cond), d(x_t, level, torch.zeros_like(cond))
            assert_close(d.target(x_t, states.goal[:, s], level), uncond - eta*(out - uncond), rtol=1e-3, atol=2e-3)


def test_the_weight_is_one_on_the_error_of_the_output():
    s = torch.linspace(.1, .9, 9)
    for prediction, w in AS_TRAINED.items():
        a = 1 - s if prediction == 'flow' else (1 - s*s).sqrt()
        assert_close(get(w)((a/s)**2)*GAIN[prediction](a, s)**2, torch.ones(9))


# --- Concept Ablation ---

def test_an_anchor_that_is_the_prompt_asks_for_nothing(problem):
    def first(anchor):
        gradient, log = concept_ablation(problem, anchor, hold=0.)(0, torch.Generator().manual_seed(0))
        return log['forget'], flat(gradient).norm().item()
    (loss, norm), (other_loss, other_norm) = first('red flag'), first('a')
    assert loss < 1e-9 < other_loss and norm < 1e-3*other_norm


# --- what moves ---

def test_a_part_moves_its_weights_and_no_others(problem):
    method = {p: esd(problem, part=p)(0, torch.Generator().manual_seed(0))[0] for p in PARTS}
    for name, words, rest, both in zip(problem.parametrization.names, *method.values()):
        moved, still = (words, rest) if '.attn2.' in name else (rest, words)
        assert not still.any() and torch.equal(moved, both)
    assert all(flat(g).any() for g in method.values())


def test_the_side_of_the_words_in_joint_attention():
    d = denoiser('sd3')
    sides = {k.split('.')[-2] for k, _ in d.net.named_parameters() if sees_words(d, k)}
    assert sides == {'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'}
    assert not sees_words(d, 'transformer_blocks.0.attn2.to_k.weight')     # of SD 3.5, where pictures look at pictures


@pytest.mark.parametrize('kind, settings', [('sd3', dict(lr=1e-2)), ('sd', dict(rank=2, lr=3e-2))])
def test_esd_runs_in_the_loop_and_the_base_comes_back(kind, settings):
    d, cfg = denoiser(kind), replace(RAW, steps=12, forget_batch=8, retain_batch=8, **settings)
    request, base = request_of(d), fingerprint(d)
    fix = unlearn(d, [request], default_retain(d, [request], **retain_settings(RAW)), cfg, method=esd)
    losses = [line['forget'] for line in fix.receipt.log]
    assert fingerprint(d) == base and sum(losses[-4:]) < sum(losses[:4])
    moved = {k for k, v in fix.delta.items() if v.any() and 'lora_A' not in k}
    assert moved and all(sees_words(d, k) for k in moved)


@pytest.mark.parametrize('method', [esd, partial(concept_ablation, target='a')], ids=['esd', 'concept_ablation'])
def test_every_seed_of_a_prompt_gives_the_same_hotfix(method):
    d, cfg = denoiser('sd'), replace(RAW, steps=1)
    requests = [request_of(d), request_of(d, 20)]
    retain = default_retain(d, requests[:1], **retain_settings(RAW))
    a, b = (unlearn(d, [r], retain, cfg, method=method) for r in requests)
    assert a.id == b.id and any(v.any() for v in a.delta.values())


# --- KSCU: key steps ---

def test_the_full_range_of_key_steps_is_esd_and_a_part_has_the_late_ones(problem):
    d = problem.denoiser
    states = generate(d, [1, 2], 10, prompt='red flag')
    assert late(states, 0.) is states
    part = late(states, .3)
    assert torch.equal(part.timesteps, states.timesteps[3:]) and torch.equal(part.uncond, states.uncond[:, 3:])
    assert torch.equal(part.x_t, states.x_t[:, 3:]) and torch.equal(part.x0, states.x0)
    upwards = noised(d, states.x0, 10, prompt='red flag')           # levels from below
    assert late(upwards, .3).timesteps.tolist() == sorted(upwards.timesteps.tolist())[::-1][3:]
    def first(**kw): return flat(esd(problem, **kw)(0, torch.Generator().manual_seed(0))[0])
    assert torch.equal(first(), first(first=0.)) and not torch.equal(first(), first(first=.4))


# --- SPM ---

@pytest.fixture
def with_others(problem):
    d = problem.denoiser
    return replace(problem, retain=[(1, generate(d, [3, 4], 3, prompt=['flag', 'a']))])


@pytest.mark.parametrize('eta, target', [(1., ''), (.5, 'flag')])
def test_at_the_first_step_spm_loses_its_push_alone(with_others, eta, target):
    "The anchors' loss is 0, that of the prompt (1 + eta)^2 (q - n)^2."
    d, cfg = with_others.denoiser, with_others.cfg
    gradient, log = spm(with_others, target, eta)(0, torch.Generator().manual_seed(0))
    x_t, t, _, cond = draw(erased_states(d, ['red flag'], cfg.retain_images, cfg.sampling_steps, eta, target),
                           with_others.size//2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, n = d(x_t, t, cond), d(x_t, t, d.prompt_ids(target, len(x_t)))
    assert log['retain'] < 1e-9
    assert log['forget'] == pytest.approx((1 + eta)**2*(q - n).square().mean().item(), rel=1e-3)


def test_far_anchors_are_likelier_than_near_ones():
    d = denoiser('sd')
    ids = d.prompt_ids(['red flag', 'red red', 'xyz'], 3)
    words = d.prompt_embeds['encoder_hidden_states'].flatten(1)
    p = 1 - torch.cosine_similarity(words[ids[:1]], words[ids[1:]])
    drawn = anchors(d, ids[:1].repeat(4000), ids[1:], torch.Generator().manual_seed(0))
    assert (drawn == ids[1]).float().mean().item() == pytest.approx((p[0]/p.sum()).item(), abs=.03)


# --- FADE ---

def test_at_the_first_step_fade_sees_the_picture_under_other_words_and_all_else_as_before(with_others):
    d, n = with_others.denoiser, with_others.size//2
    method, moved = fade(with_others, 'flag', levels=6), {}
    _, log = method(0, torch.Generator().manual_seed(0))
    seen = noised(d, with_others.x_f, 6, seed=with_others.cfg.seed, prompt='red flag')
    x_t, t, _, cond = draw(replace(seen, uncond=None), n, torch.Generator().manual_seed(0))
    with torch.no_grad(): apart = d(x_t, t, cond) - d(x_t, t, d.prompt_ids('flag', n))
    assert log['retain'] < 1e-9 and log['forget'] == pytest.approx(apart.square().mean().item(), rel=1e-3)
    for hold in (0., 1.):   # what must stay pulls at nothing
        moved[hold] = flat(fade(with_others, 'flag', hold, levels=6)(0, torch.Generator().manual_seed(0))[0])
    assert (moved[1.] - moved[0.]).norm() < 1e-3*moved[0.].norm()
    same = fade(with_others, 'red flag', levels=6)(0, torch.Generator().manual_seed(0))[1]
    assert same['forget'] < 1e-9


def test_fade_is_about_the_picture(with_others):
    def first(p): return flat(fade(p, 'flag', levels=6)(0, torch.Generator().manual_seed(0))[0])
    other = replace(with_others, x_f=torch.ones_like(with_others.x_f))
    assert not torch.equal(first(with_others), first(other))


# --- RECE ---

@given(seeds, st.floats(1e-2, 10))
@settings(max_examples=25)
def test_the_tokens_that_bring_a_concept_back_are_the_least_squares_of_its_paper(seed, lam):
    (e,), (M,) = features(seed, 3), features(seed + 1, 12)
    V = features(seed + 2, 5, 7)                                            # two layers
    W = [v @ M for v in V]
    back = brings_back(M, sum(v.T @ v for v in V), e, lam)
    eye = torch.eye(12, dtype=torch.float64)
    paper = (lam*eye + sum(w.T @ w for w in W)).inverse() @ sum(w.T @ v for w, v in zip(W, V)) @ e.T
    assert_close(back.T, paper)
    rest = sum(w.T @ (w @ back.T - v @ e.T) for w, v in zip(W, V)) + lam*back.T
    assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)


@pytest.mark.parametrize('fresh', [False, True])
@given(seed=seeds, lam=st.floats(1e-2, 10), mu=st.floats(0, 10))
@settings(max_examples=25)
def test_an_edit_is_where_the_gradient_of_its_paper_vanishes(fresh, seed, lam, mu):
    "lam (W2 - W) + (W2 C - v) C' + mu (W2 K - r) K' = 0; v, r from the layer of now, or from the base."
    (C, n, K), (M,), (V,) = features(seed, 3, 3, 4), features(seed + 1, 12), features(seed + 2, 5)
    eye = torch.eye(12, dtype=torch.float64)
    base = eye if fresh else M
    W, W2 = V @ M, V @ edit_again(M, base, C, n, K, lam, mu)
    v, r = V @ base @ n.T, V @ base @ K.T
    rest = lam*(W2 - W) + (W2 @ C.T - v) @ C + mu*(W2 @ K.T - r) @ K
    assert rest.abs().max() < 1e-6*(1 + W2.abs().max())*(1 + K.square().sum() + C.square().sum())
    if not fresh: assert_close(edit_again(M, M, C, C, K, lam, mu), M)          # v = W e': nothing to edit


@pytest.mark.parametrize('kind', ['sd3', 'sd'])
def test_rece_removes_what_would_bring_the_prompt_back(kind):
    "No round is UCE; after one the tokens that undo it lead elsewhere."
    d = denoiser(kind)
    assert all(torch.equal(a, b) for a, b in zip(
        rece(d, 'red', 'flag', rounds=0, lam=.5, mu=1.).delta.values(), uce(d, 'red', 'flag', lam=.5).delta.values()))
    name, kind = next(iter(layers_of_words(d).items()))
    W0 = d.net.get_submodule(name).weight.detach().double()
    layers = [d.net.get_submodule(k).weight.detach().double() for k, v in layers_of_words(d).items() if v == kind]
    G, eye = sum(w.T @ w for w in layers), torch.eye(W0.shape[1]).double()
    old, new, keep = (v.double() for v in tokens(d, ['red'], ['flag'], [''])[kind])
    first = edit_again(eye, eye, old, new, keep, .1, .1)
    again = brings_back(first, G, old, 1e-4)
    delta = rece(d, 'red', 'flag', derive=1e-4).delta[f'{name}.weight'].double()
    def apart(W, e): return (W @ e.T - W0 @ old.T).norm().item()
    assert apart(W0 @ first, again) < .5*apart(W0 @ first, old)              # they do bring it back
    assert apart(W0 + delta, again) > 2*apart(W0 @ first, again)             # and do so no more


# --- MACE ---

@given(seeds, st.floats(1e-2, 10), st.floats(1e-3, 10))
@settings(max_examples=25)
def test_fusion_is_the_formula_of_its_paper_and_exact_for_one(seed, lam, mu):
    (a, b, K), (W0, d1, d2) = features(seed, 3, 4, 5), features(seed + 1, 6, 6, 6)
    eye = torch.eye(12, dtype=torch.float64)
    A = lam*eye + a.T @ a + b.T @ b + mu*K.T @ K
    paper = (lam*W0 + (W0 + d1) @ a.T @ a + (W0 + d2) @ b.T @ b + mu*W0 @ K.T @ K) @ A.inverse()
    assert_close(W0 + fuse([d1, d2], [a, b], K, lam, mu), paper)
    (e,) = features(seed + 2, 16)                                            # of full rank
    assert_close((W0 + fuse([d1], [e], K[:0], 0., 0.)) @ e.T, (W0 + d1) @ e.T)


def test_the_last_word_is_where_the_prompt_begins_to_differ():
    d = denoiser('sd')                                                       # <start> first
    assert [last_word(d, p) for p in ('red', 'red flag', 'flag red flag')] == [1, 2, 3]


def test_mace_moves_what_stands_around_the_word():
    d = denoiser('sd')
    fix, own = mace(d, 'red', 'flag', keep=(), lam=1e-3, join=1e-3), 1
    old, new = (v.double() for v in tokens(d, ['red'], ['flag'])['encoder_hidden_states'])
    rest = [k for k in range(len(old)) if k != own]
    P = map_of_words(old[rest], new[rest], old[:0], 1e-3)
    for name in layers_of_words(d):
        W0, D = d.net.get_submodule(name).weight.detach().double(), fix.delta[f'{name}.weight'].double()
        assert_close(D @ old.T, W0 @ P @ old.T, rtol=0, atol=.02)              # one concept: its own change
        assert ((W0 + D) @ old[rest].T - W0 @ new[rest].T).norm() < .1*(W0 @ (old - new)[rest].T).norm()


# --- one signature ---

SMALLER = dict(cfg=replace(RAW, steps=1), images=2)


@pytest.mark.parametrize('eraser, more', [
    (uce, {}), (rece, {}), (mace, {}), (trained, SMALLER), (trained, SMALLER | dict(first=.4, lr=1e-2)),
    (trained, SMALLER | dict(method=concept_ablation)), (trained, SMALLER | dict(method=spm, rank=1)),
    (trained, SMALLER | dict(method=fade, levels=4))])
def test_an_eraser_takes_a_concept_a_target_and_what_to_keep(eraser, more):
    d = denoiser('sd')
    base = fingerprint(d)
    fix = eraser(d, ['red flag', 'red'], ['flag', 'a'], ['', 'b'], **more)
    assert fingerprint(d) == base and any(v.any() for v in fix.delta.values())
    assert 'flag' not in json.dumps(fix.card)
    with fix.on(d): assert fingerprint(d) != base
    assert fingerprint(d) == base


def test_answers_are_those_of_the_model_to_other_words():
    d = denoiser('sd')
    states = generate(d, [1, 2], 3, prompt='red')
    again, other = (answers(d, states, d.prompt_ids(p, 2)) for p in ('red', 'flag'))
    assert_close(again, states.goal, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other, states.goal, atol=1e-2)


# --- bad input ---

def test_what_does_not_fit_is_refused(problem):
    d = problem.denoiser
    model = load('faces', device='cpu')
    request, retain = Request(*model.decode(model.sample([1, 2], 1))), generate(model, [3], 1)
    def forget(method): return unlearn(model, [request], retain, RAW, method=method)
    for act, words in (
            (lambda: forget(esd), 'makes pictures without words'),
            (lambda: forget(partial(concept_ablation, target='a')), 'makes pictures without words'),
            (lambda: uce(model, 'red', 'flag'), 'makes pictures without words'),
            (lambda: concept_ablation(problem), 'Concept Ablation needs an anchor'),
            (lambda: esd(problem, part='attn'), "part 'attn' is not known; expected one of words, rest, all"),
            (lambda: erased_states(denoiser('sd', 1.), ['red'], 1, 2, 1.), 'not guided'),
            (lambda: uce(d, 'red', ['flag', 'a']), '1 concepts and 2 targets'),
            (lambda: uce(d, 'red', 'flag', lam=0), 'lam is 0; it must be above 0'),
            (lambda: rece(d, 'red', 'flag', derive=-1), 'lam is -1; it must be above 0'),
            (lambda: mace(d, [], 'flag'), '0 concepts and 0 targets'),
            (lambda: esd(problem, first=1.), 'first is 1.0; it is a share'),
            (lambda: spm(replace(problem, retain=generate(d, [1], 2, prompt='red flag'))), 'SPM holds on to other')):
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value)
