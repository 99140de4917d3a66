"Guards, which forget while a picture is made: each against the formula of its paper. Small pipelines, random weights."
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from small_pipelines import pipeline
from test_erasers import RAW, denoiser, features, seeds
from test_words import denoiser_of
from unlearn_nb.erasers import uce
from unlearn_nb.files import fingerprint
from unlearn_nb.guards import (ERASERS, adavd, counted, gate, membrane, permeability, project_values, run_erasers, safe,
                               sld, transport)
from unlearn_nb.zoo import load


# --- AdaVD ---

@given(seeds, st.integers(1, 4))
@settings(max_examples=25)
def test_a_projection_is_at_right_angles_and_once_is_enough(seed, n):
    v, c = features(seed, 6, n)
    left = project_values(v, c)
    zero = torch.zeros(6, n, dtype=torch.float64)
    assert_close(left @ c.T, zero, rtol=0, atol=1e-8)
    assert_close(project_values(left, c), left)
    assert_close(v.square().sum(1), left.square().sum(1) + (v - left).square().sum(1))


@given(seeds)
@settings(max_examples=25)
def test_one_concept_is_the_formula_of_its_paper(seed):
    v, c = features(seed, 6, 1)
    d = 2/(1 + (-100*(torch.cosine_similarity(v, c) - .93)).exp())
    paper = v - d[:, None]*(v @ c.T)/c.square().sum()*c
    assert_close(project_values(v, c, gate), paper)
    assert [round(gate(torch.tensor(z)).item(), 2) for z in (.88, .93, 1.)] == [.01, 1., 2.]
    assert_close(project_values(c, c, gate), -c, rtol=1e-2, atol=0)          # reflected, not just removed


@pytest.mark.parametrize('kind, layer', [('sd', 'mid_block.attentions.0.transformer_blocks.0.attn2.to_v'),
                                         ('sd3', 'context_embedder')])
def test_adavd_changes_values_and_never_the_first_token(kind, layer):
    d, seen = denoiser(kind), []
    x_t, t = torch.randn(1, *d.shape), torch.tensor([500])
    def ask(p):
        note = d.net.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))
        with torch.no_grad(): out = d(x_t, t, d.prompt_ids(p, 1))
        note.remove()
        return out
    was, base = ask('red'), fingerprint(d)
    with adavd(d, 'red').on(d): now = ask('red')
    before, after = seen
    m = d.net.get_submodule(layer)
    bias = 0 if m.bias is None else m.bias
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(was, now)
    assert_close(after[:, 1] - bias, bias - before[:, 1], rtol=.02, atol=1e-3)   # the word itself: reflected
    assert torch.equal(ask('red'), was) and fingerprint(d) == base


# --- SPM: facilitated transport ---

@pytest.mark.parametrize('kind', ['sd', 'sd3'])
def test_what_a_prompt_lets_through(kind):
    d = denoiser(kind)
    fix, x_t, t = uce(d, 'red flag', 'a'), torch.randn(2, *d.shape), torch.tensor([100, 900])
    def ask(p, on=None):
        with torch.no_grad():
            if on is None: return d(x_t, t, d.prompt_ids(p, 2))
            with on.on(d): return d(x_t, t, d.prompt_ids(p, 2))
    assert permeability(d, 'red flag')[d.prompt_id('red flag')] == pytest.approx(1)
    assert_close(ask('red flag', transport(fix, 'red flag')), ask('red flag', fix), rtol=1e-3, atol=1e-4)
    assert torch.equal(ask('xyz', transport(fix, 'red flag', power=1e9)), ask('xyz'))      # gamma 0: bit for bit
    both = ['red flag', 'xyz']                                                             # each by its own gamma
    mixed = ask(both, transport(fix, 'red flag', power=1e9))
    assert_close(mixed[1], ask(both)[1]) and assert_close(mixed[0], ask(both, fix)[0], rtol=1e-3, atol=1e-4)


def test_gamma_is_the_larger_of_two_likenesses():
    d = denoiser('sd')
    prompts = ['red flag', 'red', 'a flag', 'xyz']
    ids = d.prompt_ids(prompts, 4)
    words = d.prompt_embeds['encoder_hidden_states'][ids].flatten(1)
    cos = torch.cosine_similarity(words, words[:1])
    assert_close(permeability(d, 'red flag')[ids], torch.maximum(cos, torch.tensor([1., .5, .5, 0.])).clamp(0, 1))
    alone = permeability(d, 'red flag', keep=['a flag'])[ids]              # 'flag' is everybody's word
    assert_close(alone, torch.maximum(cos, torch.tensor([1., 1., 0., 0.])).clamp(0, 1))


# --- SLD ---

def test_before_its_warm_up_and_for_empty_words_sld_is_plain_guidance():
    d = denoiser('sd3')
    was = d.sample([1, 2], 4, prompt='red')
    with sld(d, 'flag', warmup=4).on(d): assert torch.equal(d.sample([1, 2], 4, prompt='red'), was)
    for unsafe in ('', 'red'):                                              # gamma 0: no words, or eps_c = eps_S
        with sld(d, unsafe, warmup=0).on(d): assert_close(d.sample([1, 2], 4, prompt='red'), was, rtol=0, atol=1e-3)
    with sld(d, 'flag', warmup=0).on(d):
        first = d.sample([1, 2], 4, prompt='red')
        assert torch.equal(d.sample([1, 2], 4, prompt='red'), first)        # a new path begins anew
    assert (first - was).abs().max() > .01 and torch.equal(d.sample([1, 2], 4, prompt='red'), was)


@pytest.mark.parametrize('at_least', [False, True])
def test_sld_is_the_formula_of_its_code(at_least):
    p, u, s, nu = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = 5*(p - s).abs()
    scale = scale.maximum(torch.tensor(1.)) if at_least else scale.minimum(torch.tensor(1.))
    scale[p - s >= .2] = 0
    gamma = scale*(s - u) + .3*nu
    assert_close(safe(p, u, s, nu, 5., .2, .3, .4, at_least), (gamma, .4*nu + .6*gamma))


# --- the loop ---

def test_one_loop_for_all():
    d = denoiser('sd')
    base = fingerprint(d)
    small = dict(cfg=replace(RAW, steps=1), images=2)
    some = {'a': (uce, {}), 'b': (adavd, {}), 'c': (sld, dict(warmup=1)), 'd': (membrane, small)}
    def look(): return d.sample([1], 2, prompt='red flag')
    rows = run_erasers(d, ['red flag'], ['flag'], ['', 'a'], look, some)
    assert list(rows) == list(some) and fingerprint(d) == base
    assert [row['evaluations'] for row in rows.values()][:3] == [0, 0, 0] and rows['d']['evaluations'] > 0
    assert [row['look'] for row in rows.values()] == [4, 4, 6, 4] == [counted(d, look)[1]]*2 + [6, 4]
    assert not torch.equal(rows['c']['seen'], look()) and 'UCE' in ERASERS


def test_what_does_not_fit_is_refused():
    faces = load('faces', device='cpu')
    for act, words in ((lambda: adavd(faces, 'red'), 'makes pictures without words'),
                       (lambda: adavd(denoiser('sd'), []), '0 concepts'),
                       (lambda: sld(denoiser_of(pipeline('sd', 'epsilon'), 1.), 'red'), 'not guided (guidance 1)')):
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value)
