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
from unlearn_nb.erasers import (AS_TRAINED, PARTS, concept_ablation, erased_states, esd, layers_of_words,
                                map_of_words, sees_words, uce)
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix, verify
from unlearn_nb.parametrization import Full
from unlearn_nb.schedule import GAIN
from unlearn_nb.states import Request, default_retain, generate
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
    assert fix.receipt.told == {'old': ['red'], 'new': ['flag'], 'keep': ['']} and fix.card['method'] == 'uce'
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
    assert fix.receipt.told['old'] == ['red', 'flag'] and any(v.any() for v in fix.delta.values())


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
        gradient, log = concept_ablation(problem, anchor, keep=0.)(0, torch.Generator().manual_seed(0))
        return log['forget'], flat(gradient).norm().item()
    (loss, norm), (other_loss, other_norm) = first('red flag'), first('a')
    assert loss < 1e-9 < other_loss and norm < 1e-3*other_norm


# --- what moves ---

def test_a_part_moves_its_weights_and_no_others(problem):
    method = {p: esd(problem, p)(0, torch.Generator().manual_seed(0))[0] for p in PARTS}
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


@pytest.mark.parametrize('method', [esd, partial(concept_ablation, anchor='a')], ids=['esd', 'concept_ablation'])
def test_every_seed_of_a_prompt_gives_the_same_hotfix(method):
    d, cfg = denoiser('sd'), replace(RAW, steps=1)
    requests = [request_of(d), request_of(d, 20)]
    retain = default_retain(d, requests[:1], **retain_settings(RAW))
    a, b = (unlearn(d, [r], retain, cfg, method=method) for r in requests)
    assert a.id == b.id and any(v.any() for v in a.delta.values())


# --- bad input ---

def test_what_does_not_fit_is_refused(problem):
    d = problem.denoiser
    model = load('faces', device='cpu')
    request, retain = Request(*model.decode(model.sample([1, 2], 1))), generate(model, [3], 1)
    def forget(method): return unlearn(model, [request], retain, RAW, method=method)
    for act, words in (
            (lambda: forget(esd), 'makes pictures without words'),
            (lambda: forget(partial(concept_ablation, anchor='a')), 'makes pictures without words'),
            (lambda: uce(model, 'red', 'flag'), 'makes pictures without words'),
            (lambda: concept_ablation(problem), 'Concept Ablation needs an anchor'),
            (lambda: esd(problem, 'attn'), "part 'attn' is not known; expected one of words, rest, all"),
            (lambda: erased_states(denoiser('sd', 1.), ['red'], 1, 2, 1.), 'not guided'),
            (lambda: uce(d, 'red', ['flag', 'a']), '1 old prompts and 2 new ones'),
            (lambda: uce(d, 'red', 'flag', lam=0), 'lam is 0; it must be above 0')):
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value)
