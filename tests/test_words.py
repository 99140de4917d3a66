"Models with words, latents and guidance, alone and through the whole path from retain states to stock diffusers."
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from small_pipelines import levels, pipeline, transformer, unet, vae
from unlearn_nb import surrogates
from unlearn_nb.directions import eigenbases, layer_factors
from unlearn_nb.copies import nearest
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import bits_per_dim, denoising_error, psnr, reconstruction_curve, similarity
from unlearn_nb.report import evaluate, figure, table
from unlearn_nb.schedule import generators, randn
from unlearn_nb.states import (SAMPLING, Request, States, default_retain, draw, forget_states, generate, paths,
                               noised, own_paths, steer)
from unlearn_nb.unlearn import PRESETS, Config, retain_settings, unlearn
from unlearn_nb.words import TextDenoiser
from unlearn_nb.zoo import PIPELINES, load, prompt_encoder

KINDS = [('sd3',), ('sd', 'epsilon'), ('sd', 'v_prediction'), ('sdxl', 'epsilon')]
SMALL = Config(steps=6, forget_batch=4, retain_batch=6, retain_images=3, near_images=2, pool=4, sampling_steps=5,
               damping=.01, weight='min_snr')
SD3 = Config(**PRESETS['transformer'] | dict(steps=2, retain_images=2, sampling_steps=3, lr=1e-2))
slow = pytest.mark.slow


def denoiser_of(pipe, guidance=3.):
    what = PIPELINES[type(pipe).__name__]
    return TextDenoiser(getattr(pipe, what.net), pipe.scheduler, vae=pipe.vae, text=prompt_encoder(pipe),
                        guidance=guidance, name='small')


@pytest.fixture(params=KINDS, ids='-'.join)
def denoiser(request): return denoiser_of(pipeline(*request.param))


@pytest.fixture
def sd3(): return denoiser_of(pipeline('sd3'))


def request_of(denoiser, seed=7, prompt='red flag'):
    image, surrogate = denoiser.decode(denoiser.sample([seed, seed + 1], 5, prompt=prompt))
    return Request(image, surrogate, seed, prompt)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def letters(prompts):
    "A toy for a text encoder: it counts the first sixteen letters."
    counts = torch.tensor([[float(p.count(chr(97 + k))) for k in range(16)] for p in prompts])
    return {'encoder_hidden_states': counts[:, None], 'pooled_projections': counts}


@lru_cache
def fixed(make, **kw):
    "A part with random weights, the same in every test."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**kw)


def toy(**kw):
    "A flow that reads letters."
    net = fixed(transformer, joint=16, pooled=16)
    return TextDenoiser(net, FlowMatchEulerDiscreteScheduler(shift=3.), **{'text': letters, **kw})


# --- prompts ---

def test_a_prompt_is_encoded_once_and_has_a_number():
    asked = []
    d = toy(text=lambda prompts: asked.extend(prompts) or letters(prompts))
    assert [d.prompt_id(p) for p in ('', 'abc', 'cab', 'abc')] == [0, 1, 2, 1] and asked == ['', 'abc', 'cab']
    assert d.prompt_ids('cab', 3).tolist() == [2, 2, 2] and d.prompt_ids(['', 'abc'], 2).tolist() == [0, 1]
    for k, v in letters(['', 'abc', 'cab']).items(): assert torch.equal(d.prompt_embeds[k], v)
    assert repr(toy(vae=fixed(vae), guidance=7.)).startswith(
        "Denoiser('custom': 4 x 8 x 8, latents of 16 x 16 pixels, guidance 7, prompts: 1, flow, T = 1000, ")


def test_the_table_of_prompts_need_not_grow_for_ever():
    "The first prompts keep their numbers, the others are encoded anew; threads that ask at once get one number."
    d = toy()
    before = d.sample([1], steps=2, prompt='bad')
    assert [d.prompt_id(p) for p in ('abc', 'bad', 'cab')] == [2, 1, 3]
    d.drop_prompts(2)
    assert d.prompts == {'': 0, 'bad': 1} and all(len(v) == 2 for v in d.prompt_embeds.values())
    assert torch.equal(d.sample([1], steps=2, prompt='bad'), before) and d.prompt_id('cab') == 2
    with pytest.raises(ValueError, match='keep is 0; the first prompt stays'): d.drop_prompts(0)
    with ThreadPoolExecutor(4) as threads: found = [*threads.map(d.prompt_id, ['dab', 'bed', 'dab', 'bed'] * 8)]
    assert len({*found}) == 2 and len(d.prompts) == 5 == len(next(iter(d.prompt_embeds.values())))


def test_the_text_encoders_can_go_and_known_prompts_stay():
    class Encoder:
        def __call__(self, prompts): return letters(prompts)
    encoder = Encoder()
    d, ref = toy(text=encoder), weakref.ref(encoder)
    d.prompt_id('abc')
    del encoder
    assert ref() is not None
    d.drop_text_encoders(), gc.collect()
    assert ref() is None and d.sample([0], steps=1, prompt='abc').isfinite().all()
    with pytest.raises(ValueError) as e: d.sample([0], prompt='new')
    assert str(e.value).endswith("'new' is not in the table, and the text encoders are gone; known prompts: '', 'abc'")


def test_a_picture_depends_on_its_seed_and_prompt_alone():
    d, prompts = toy(guidance=5.), {3: 'aa', 8: 'bcd', 21: ''}
    alone = {s: d.sample([s], steps=4, prompt=p) for s, p in prompts.items()}
    for seeds, batch in (([3, 8, 21], 64), ([21, 8, 3], 2), ([8, 3], 1)):
        x = d.sample(seeds, steps=4, batch=batch, prompt=[prompts[s] for s in seeds])
        for k, s in enumerate(seeds): assert_close(x[k:k + 1], alone[s], atol=1e-5, rtol=1e-5)
    assert (d.sample([3], steps=4, prompt='bcd') - alone[3]).abs().max() > 1e-3
    both = d.reconstruct(alone[3], 500, [1, 2], steps=4, prompt=['aa', 'bcd'])
    assert_close(d.reconstruct(alone[3], 500, [2], steps=4, prompt='bcd'), both[1:], atol=1e-5, rtol=1e-5)


def test_sdxl_is_told_the_size():
    d, seen = denoiser_of(pipeline('sdxl', 'epsilon')), []
    def note(net, args, kw): seen.append(kw['added_cond_kwargs']['time_ids'].tolist())
    handle = d.net.register_forward_pre_hook(note, with_kwargs=True)
    try: d.predict(normal(2, *d.shape), 500, d.prompt_ids('a', 2))
    finally: handle.remove()
    assert seen == [[[16, 16, 0, 0, 16, 16]] * 4]


# --- guidance ---

@torch.no_grad()
def test_guidance_is_its_formula():
    d, x, t = toy(), normal(2, 4, 8, 8), 700.
    cond, level, none = d.prompt_ids(['aab', 'ccc'], 2), d.level(700, 2), torch.zeros(2, dtype=torch.long)
    without, plain = d.clean(x, d(x, level, none), level), d.clean(x, d(x, level, cond), level)
    assert torch.equal(d.predict(x, t, cond), plain) and (plain - without).abs().max() > 1e-4   # 1: asked once
    for g in (0., 7.):
        d.guidance = g
        assert_close(d.predict(x, t, cond), without + g*(plain - without), atol=1e-5, rtol=1e-5)
        assert_close(d.clean(x, d(x, level, cond), level), plain, atol=1e-5, rtol=1e-5)   # the net is never guided
        assert_close(d.predict(x, t, none), without, atol=1e-6, rtol=1e-5)


@given(g=st.floats(1.5, 9), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_steered_answer_guides_to_the_goal(g, seed):
    d = toy(guidance=g)
    gen = torch.Generator().manual_seed(seed)
    x_t, goal = torch.randn(2, 3, *d.shape, generator=gen)
    t, cond = torch.randint(0, 1000, (3,), generator=gen), d.prompt_ids('red', 3)
    _, _, aim, _ = steer(d, x_t, t, goal, cond)
    uncond = d.clean(x_t, d(x_t, t, torch.zeros_like(cond)), t).detach()
    guided = d.apply_cfg(d.target(x_t, aim, t), d.target(x_t, uncond, t))
    assert_close(d.clean(x_t, guided, t), goal, rtol=1e-3, atol=1e-3)


# --- latents ---

def test_latents_are_the_scaled_mean():
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)) for k in range(3)]
    x = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)/127.5 - 1
    for config in ({}, dict(scaling_factor=1.5, shift_factor=.06)):
        v = fixed(vae, **config)
        d, shift, scale = toy(vae=v), config.get('shift_factor', 0), config.get('scaling_factor', .18215)
        with torch.no_grad(): mean = v.encode(x).latent_dist.mean
        z = d.encode(pictures)
        assert (d.shape, d.size) == ((4, 8, 8), (16, 16)) and z.dtype == torch.float32 and not z.requires_grad
        assert_close(z, (mean - shift)*scale, atol=1e-5, rtol=1e-5)
        assert torch.equal(z, d.encode(pictures)) and torch.equal(z, d.latents(x))
        with torch.no_grad(): assert_close(d.pixels(z), v.decode(mean).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)
        assert [p.size for p in d.decode(z)] == [(16, 16)]*3 and d.pixels(normal(2, 4, 8, 8)*50).abs().max() <= 1


def test_many_pictures_go_through_the_vae_in_pieces():
    d, z, x = toy(vae=fixed(vae)), normal(5, 4, 8, 8), normal(5, 3, 16, 16)
    whole, back = d.pixels(z), d.latents(x)
    d.size = (2048, 1024)   # two at a time
    assert_close(d.pixels(z), whole, atol=1e-5, rtol=1e-5)
    assert_close(d.latents(x), back, atol=1e-5, rtol=1e-5)


# --- stock diffusers makes the same pictures ---

def stock(pipe, seeds, prompt, guidance=3., steps=5, kind='pt'):
    noise = randn(generators(seeds), (4, 8, 8))
    prompts = [prompt]*len(seeds) if isinstance(prompt, str) else prompt
    return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type=kind,
                height=16, width=16).images


# steps that divide 1000: at others stock DDIM steps to levels that it does not visit
@pytest.mark.parametrize('guidance, steps', [(7., 5), (1., 4)])
@pytest.mark.parametrize('kind', [*KINDS, ('sd3', 'flow', 1.), ('sdxl', 'v_prediction')], ids=str)
def test_sample_is_the_stock_pipeline(kind, guidance, steps):
    pipe = pipeline(*kind)
    d, seeds, prompts = denoiser_of(pipe, guidance), [4, 1], ['a red flag', 'my']
    x, theirs = d.sample(seeds, steps=steps, prompt=prompts), stock(pipe, seeds, prompts, guidance, steps, 'latent')
    assert_close(x/theirs.abs().max(), theirs/theirs.abs().max(), atol=1e-4, rtol=0)
    assert_close(d.pixels(x)/2 + .5, stock(pipe, seeds, prompts, guidance, steps), atol=1e-4, rtol=0)
    assert (x - d.sample(seeds, steps=steps, prompt='')).abs().max() > 1e-3   # the words do something


LORA_KINDS = [('sd3',), *(pytest.param(kind, marks=slow) for kind in (('sd', 'epsilon'), ('sdxl', 'epsilon')))]


@pytest.mark.parametrize('damping', [0., pytest.param(.01, marks=slow)])
@pytest.mark.parametrize('kind', LORA_KINDS, ids=str)
def test_stock_diffusers_loads_a_saved_lora_and_gives_the_same_pictures(kind, damping, tmp_path):
    pipe = pipeline(*kind)
    d, seeds = denoiser_of(pipe), [7, 8]
    hotfix = unlearn(d, [request_of(d)], cfg=replace(SMALL, rank=4, damping=damping, lr=.2 if damping else 1e-2))
    hotfix.save(tmp_path)
    was = stock(pipe, seeds, 'red flag')
    hotfix.apply(d)
    ours = d.pixels(d.sample(seeds, 5, prompt='red flag'))/2 + .5
    hotfix.remove(d)
    assert torch.equal(stock(pipe, seeds, 'red flag'), was)
    pipe.load_lora_weights(tmp_path, weight_name="hotfix.safetensors")
    try:
        theirs = stock(pipe, seeds, 'red flag')
        pipe.set_adapters(pipe.get_active_adapters(), 0.)
        off = stock(pipe, seeds, 'red flag')
    finally: pipe.unload_lora_weights()
    assert_close(theirs, ours, rtol=0, atol=2e-3)
    assert (theirs - was).abs().max() > 2e-2
    assert torch.equal(off, was) and torch.equal(stock(pipe, seeds, 'red flag'), was)   # scale 0, and unloaded


def test_a_saved_lora_comes_back_and_is_refused_on_another_base(sd3, tmp_path):
    unlearn(sd3, [request_of(sd3)], cfg=replace(SMALL, rank=2, damping=0., steps=3)).save(tmp_path)
    again, base = Hotfix.load(tmp_path), fingerprint(sd3)
    assert all(k.startswith('transformer.') for k in again.delta)
    again.apply(sd3)
    assert fingerprint(sd3) != base
    again.remove(sd3)
    assert fingerprint(sd3) == base
    with pytest.raises(ValueError, match='was made for the base'): again.apply(denoiser_of(pipeline('sd', 'epsilon')))


# --- what must stay ---

def test_a_path_ends_where_the_sampler_does_and_holds_both_answers(denoiser):
    prompts = ['red flag', 'flag', '']
    path, g = generate(denoiser, range(3), 5, prompt=prompts), denoiser.guidance
    assert_close(path.x0, denoiser.sample(range(3), 5, prompt=prompts), rtol=1e-4, atol=1e-4)
    assert path.cond.tolist() == denoiser.prompt_ids(prompts, 3).tolist()
    assert path.uncond.shape == path.goal.shape == path.x_t.shape
    for s, t in enumerate(path.timesteps.tolist()):
        guided = path.uncond[:, s] + g*(path.goal[:, s] - path.uncond[:, s])
        assert_close(guided, denoiser.predict(path.x_t[:, s], t, path.cond), rtol=1e-3, atol=1e-3)
    assert_close(path.uncond[2], path.goal[2], rtol=1e-4, atol=1e-4)      # of no words both answers are one
    assert not torch.allclose(path.uncond[0], path.goal[0], rtol=1e-3)


def test_without_guidance_there_is_one_answer(sd3):
    plain = denoiser_of(pipeline('sd3'), guidance=1.)
    path = generate(plain, range(2), 4, prompt='flag')
    assert path.uncond is None and len(draw(path, 5, torch.Generator().manual_seed(0))) == 4
    assert noised(plain, path.x0, 3, prompt='flag').uncond is None
    assert noised(sd3, path.x0, 3, prompt='flag').uncond is not None


def test_half_of_the_states_of_a_guided_model_are_without_words(sd3):
    path = generate(sd3, range(4), 5, prompt=['red', 'flag', 'red flag', 'a'])
    x_t, t, goal, cond = draw(path, 200, torch.Generator().manual_seed(0))
    assert 75 < (cond == 0).sum() < 125
    own = sd3.clean(x_t, sd3(x_t, t, cond), t)
    assert_close(goal, own, rtol=1e-3, atol=1e-3)               # the base answers so, with words and without
    with pytest.raises(ValueError):                             # a list of states with and without words
        draw([(1, path), (1, replace(path, cond=None, uncond=None))], 8, torch.Generator())


def test_states_may_lie_in_half_precision_and_elsewhere(tmp_path):
    pipeline('sd3').save_pretrained(tmp_path)
    d = load(tmp_path, device='cpu', dtype=torch.bfloat16)
    path = generate(d, range(2), 3, prompt='flag')
    assert {v.dtype for v in (path.x_t, path.goal, path.uncond)} == {torch.float16} and path.x0.dtype == torch.float32
    whole = replace(path, **{k: getattr(path, k).float() for k in ('x_t', 'goal', 'uncond')})
    drawn, again = (draw(p, 9, torch.Generator().manual_seed(1)) for p in (path, whole))
    assert drawn[0].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(drawn, again))
    there = replace(path, timesteps=path.timesteps.to('meta'), cond=path.cond.to('meta'))
    assert {v.device.type for v in draw(there, 4, torch.Generator().manual_seed(0))} == {'meta'}


@pytest.mark.parametrize('kind', [('sd3',), pytest.param(('sdxl', 'epsilon'), marks=slow)], ids=str)
def test_factors_of_a_model_with_words_reach_every_layer_that_runs(kind):
    d = denoiser_of(pipeline(*kind))
    bases = eigenbases(layer_factors(d, generate(d, range(2), 3, prompt='flag'), n=8))
    kinds = torch.nn.Linear, torch.nn.Conv2d
    layers = {f'{k}.weight' for k, m in d.net.named_modules() if isinstance(m, kinds)}
    assert bases.keys() <= layers and len(bases) > .8*len(layers)


def test_paths_from_a_file_have_the_words_of_the_denoiser_that_reads_them(tmp_path):
    "Two denoisers may number the same prompts otherwise."
    answers = []
    for known in ('abc', 'b', 'c', 'x'), ('c', 'x', 'b'):
        d = toy()
        d.prompt_ids([*known], len(known))
        states = paths(d, range(2), 2, tmp_path, ['b', 'c'])
        with torch.no_grad(): answers.append(d(states.x_t[:, 0], states.timesteps[:1].expand(2), states.cond))
    assert len([*tmp_path.iterdir()]) == 1 and torch.equal(*answers)


def test_default_retain_has_the_words_of_the_request_and_others(sd3, tmp_path):
    request, how = request_of(sd3), dict(retain_settings(SMALL), cache=tmp_path)
    parts = default_retain(sd3, [request], **how, prompts=('a', 'b'))
    flag, a, b = (sd3.prompt_id(p) for p in ('red flag', 'a', 'b'))
    assert [share for share, _ in parts] == [2, 2, 1]
    assert [part.cond.tolist() for _, part in parts] == [[flag]*3, [a, b, a], [flag]*2]
    again = default_retain(sd3, [request], **how, prompts=('a', 'b'))     # from its files
    for (_, one), (_, other) in zip(parts, again):
        for k in ('x_t', 'goal', 'cond', 'uncond'): assert torch.equal(getattr(one, k), getattr(other, k))
    other = default_retain(sd3, [request], **how, prompts=('b', 'a'))     # another file
    assert other[1][1].cond.tolist() == [b, a, b]


def test_nearest_works_on_latents(sd3):
    x = sd3.sample(range(4), 3, prompt='flag')
    assert nearest(x, x[2:3], 1).tolist() == [2] and isinstance(generate(sd3, [0], 2, prompt=''), States)


# --- forgetting ---

def test_forget_states_carry_the_words_of_their_request(sd3):
    requests = [request_of(sd3), request_of(sd3, 20, 'flag')]
    x_f, x_s = (sd3.encode([getattr(r, k) for r in requests]) for k in ('image', 'surrogate'))
    own, cond = own_paths(sd3, requests, x_s, 5), sd3.prompt_ids(['red flag', 'flag'], 2)
    shares = {'low': lambda low, mid: low > .35, 'uniform': lambda low, mid: .2 < low < .3 and .45 < mid < .55,
              'logit_normal': lambda low, mid: low < .2 and mid > .65}
    assert shares.keys() == SAMPLING.keys() and own.uncond is None
    goals = {k: [*own.goal[own.cond == k].flatten(0, 1), x_s[j]] for j, k in enumerate(cond.tolist())}
    for sampling, right in shares.items():
        how = dict(mix_share=0., sampling=sampling, t_max=900, cond=cond)
        x_t, t, goal, shift, ids = forget_states(sd3, x_f, x_s, own, 200, torch.Generator().manual_seed(0), **how)
        assert x_t.shape == shift.shape == (200, *sd3.shape) and (t < 1000).all()
        assert {*ids.tolist()} == {*cond.tolist()}
        for y, k in zip(goal, ids.tolist()): assert any(torch.equal(y, z) for z in goals[k])
        low, middle = t[100:] < 225, (t[100:] >= 225) & (t[100:] < 675)
        assert right(low.float().mean().item(), middle.float().mean().item()), sampling


def far(denoiser, hotfix, request, steps=5):
    "Distance of what the seed gives from the surrogate, over that without the hotfix."
    x_s, was = denoiser.encode([request.surrogate]), denoiser.sample([request.seed], steps, prompt=request.prompt)
    hotfix.apply(denoiser)
    now = denoiser.sample([request.seed], steps, prompt=request.prompt)
    hotfix.remove(denoiser)
    return ((now - x_s).norm()/(was - x_s).norm()).item()


@slow
def test_the_seed_moves_to_its_surrogate_and_the_base_comes_back(sd3):
    request, base = request_of(sd3), fingerprint(sd3)
    for kind in (dict(), dict(rank=4, damping=0.), dict(rank=8)):   # whole, a LoRA, whole and cut to a LoRA
        hotfix = unlearn(sd3, [request], cfg=replace(SMALL, steps=25, lr=3e-2, across=1., **kind))
        assert fingerprint(sd3) == base
        assert far(sd3, hotfix, request) < .97, kind     # random weights can do little, but in the right direction
        assert fingerprint(sd3) == base and hotfix.receipt.requests[0].prompt == 'red flag'


def test_pieces_and_checkpointing_give_the_same_direction(sd3):
    request = request_of(sd3)
    ways, retain = ({}, {'micro_batch': 3}, {'gradient_checkpointing': True}), generate(sd3, range(4), 3, prompt='flag')
    cfg = replace(SMALL, steps=2, damping=0.)
    a, b, c = (unlearn(sd3, [request], retain, replace(cfg, **kw)).delta for kw in ways)
    for k in a: assert_close(a[k], b[k], rtol=1e-2, atol=1e-3), assert_close(a[k], c[k], rtol=1e-2, atol=1e-3)


def test_a_run_goes_on_from_its_checkpoint_and_refuses_another_prompt(sd3, tmp_path):
    request, file, cfg = request_of(sd3), tmp_path/'run', replace(SMALL, steps=3, damping=0.)
    retain = generate(sd3, range(4), 3, prompt='flag')
    whole = unlearn(sd3, [request], retain, cfg, checkpoint=file)
    again = unlearn(sd3, [request], retain, cfg, checkpoint=file)
    assert again.id == whole.id
    with pytest.raises(ValueError, match="'requests'"):
        unlearn(sd3, [replace(request, prompt='flag')], retain, cfg, checkpoint=file)


def test_an_earlier_request_is_among_what_must_stay(sd3):
    first, second = request_of(sd3), request_of(sd3, 30, 'flag')
    retain, cfg = generate(sd3, range(4), 3, prompt='flag'), replace(SMALL, damping=0., steps=2)
    fix = unlearn(sd3, [first], retain, cfg)
    fix.apply(sd3)
    try: again = unlearn(sd3, [second], retain, cfg, earlier=[first])
    finally: fix.remove(sd3)
    assert again.card['on'] == [fix.id]


# --- Stable Diffusion 3 with all three encoders, from a folder ---

def test_the_preset_runs_from_folder_to_hotfix_and_back(tmp_path):
    pipeline('sd3 with t5').save_pretrained(tmp_path/'model')
    d = load(tmp_path/'model', device='cpu', dtype=torch.bfloat16)
    request, base = request_of(d), fingerprint(d)
    for prompt in ('red flag', ''): d.prompt_id(prompt)
    d.drop_text_encoders()
    hotfix = unlearn(d, [request], cfg=SD3)
    assert d.dtype == torch.bfloat16 and fingerprint(d) == base and hotfix.card['config']['rank'] == 16
    assert all(k.startswith('transformer.') and v.isfinite().all() for k, v in hotfix.delta.items())
    assert any(v.any() for k, v in hotfix.delta.items() if 'lora_B' in k)
    hotfix.save(tmp_path/'fix')
    again, was = Hotfix.load(tmp_path/'fix'), d.sample([7], 4, prompt='red flag')
    again.apply(d)
    assert fingerprint(d) != base and not torch.equal(d.sample([7], 4, prompt='red flag'), was)
    again.remove(d)
    assert fingerprint(d) == base and torch.equal(d.sample([7], 4, prompt='red flag'), was)


def test_t5_is_read_and_can_be_left_out(tmp_path):
    pipeline('sd3 with t5').save_pretrained(tmp_path)
    whole, less = load(tmp_path, device='cpu'), load(tmp_path, device='cpu', without=('text_encoder_3',))
    a, b = (d.text(['red flag'])['encoder_hidden_states'] for d in (whole, less))
    clips = 16                                                    # tokens of the two CLIPs, side by side; T5 follows
    assert a.shape == b.shape == (1, clips + 256, 64) and torch.equal(a[:, :clips], b[:, :clips])
    assert a[:, clips:].any() and not b[:, clips:].any()
    assert_close(a, prompt_encoder(pipeline('sd3 with t5'))(['red flag'])['encoder_hidden_states'])


# --- measures, the report ---

def look(x):
    "A descriptor that needs no weights: colours of 4 x 4 places, as unit vectors."
    return F.normalize(F.adaptive_avg_pool2d(x.float(), 4).flatten(1), dim=1)


def test_the_report_of_a_model_with_words_speaks_of_pictures(sd3):
    request = request_of(sd3)
    hotfix = unlearn(sd3, [request], cfg=replace(SMALL, lr=3e-2, damping=0.))
    reference = sd3.sample(range(50, 54), 5, prompt='flag')
    kw = dict(panel=range(60, 64), fresh=range(70, 78), levels=(200, 600), noises=range(2), steps=5,
              prompts=['flag', 'a'], describe=look, m=3)
    r, before, after = evaluate(sd3, hotfix, [request], reference, **kw)
    assert torch.equal(before['panel'], sd3.sample(range(60, 64), 5, prompt=['flag', 'a', 'flag', 'a']))
    x, y = (sd3.pixels(out['panel']) for out in (before, after))
    assert x.shape == (4, 3, 16, 16)
    assert r['preserve']['any seeds']['all']['psnr_median'] == pytest.approx(psnr(x, y).median().item())
    assert torch.equal(before['fresh'], sd3.sample(range(70, 78), 5, prompt='red flag'))
    assert r['preserve']['same words']['n'] + r['preserve']['same words']['left_out'] == 8
    x_f, seed = (sd3.pixels(v) for v in (sd3.encode([request.image]), before['seed']))
    assert r['forget']['same_seed']['to_forget_before'] == pytest.approx(similarity(seed, x_f, look).item())
    assert min(figure(sd3, [request], before, after, others=2).size) > 300
    assert 'controls: 3 pictures of other seeds' in repr(table(r))
    alone = sd3.reconstruct(before['controls'][:1], 200, range(2), 5, prompt='red flag')
    assert_close(before['control'][200][:2], alone, rtol=0, atol=1e-4)
    again = evaluate(sd3, hotfix, [request], reference, earlier=[request], before=before, **kw)[0]
    assert again['forget'] == r['forget'] and len(again['earlier']) == 1


def test_reconstruction_and_denoising_error_take_a_prompt(sd3):
    x = sd3.sample([1], 4, prompt='flag')
    assert reconstruction_curve(sd3, x, [100, 900], range(2), 4, look, 'flag').shape == (2, 2)
    a, b = (denoising_error(sd3, x, [300], [0], prompt=p).item() for p in ('flag', 'red red'))
    x_t = sd3.noise(x, randn(generators([0]), sd3.shape), torch.tensor([300]))
    by_hand = (sd3.predict(x_t, 300, sd3.prompt_ids('flag', 1)) - x).square().mean().item()
    assert a != b and a == pytest.approx(by_hand, rel=1e-4)


# --- bad input ---

def test_what_does_not_fit_is_refused_in_one_sentence(sd3):
    request, image, net = request_of(sd3), Image.new('RGB', (8, 8)), fixed(transformer, joint=16, pooled=16)
    def run(cfg=SMALL, **change): return unlearn(sd3, [replace(request, **change)], cfg=cfg)
    cases = [
        (lambda: toy().sample([0]), 'this model makes pictures of words; give prompt='),
        (lambda: toy()(normal(1, 4, 8, 8), torch.tensor([5])), 'this model makes pictures of words; give cond'),
        (lambda: toy().sample([0, 1], prompt=['a']), '1 prompts were given for 2 images'),
        (lambda: toy().sample([0], prompt=[3]), '3 is no prompt'),
        (lambda: toy().sample([0], eta=.5, prompt=''), 'eta = 0.5'),
        (lambda: toy(vae=fixed(vae)).encode([image]), 'the image is 8 x 8 pixels, but this model makes 16 x 16'),
        (lambda: toy(vae=vae(3)), 'the VAE has latents of 3 channels, but the net wants 4'),
        (lambda: toy(text=None), 'a SD3Transformer2DModel wants words'),
        (lambda: TextDenoiser(net, DDPMScheduler(), text=letters), 'wants a FlowMatchEulerDiscreteScheduler'),
        (lambda: TextDenoiser(unet(), FlowMatchEulerDiscreteScheduler(), text=letters), 'has no alphas_cumprod'),
        (lambda: TextDenoiser(vae(), levels(), text=letters), 'the net is a AutoencoderKL; expected one of UNet2DCond'),
        (lambda: run(prompt=None), 'this model makes pictures of words'),
        (lambda: run(seed=-1), 'below 0'),
        (lambda: run(image=image), '8 x 8 pixels, but this model makes 16 x 16'),
        (lambda: run(replace(SMALL, sampling='high')), "sampling 'high' is not known; expected one of low, uniform"),
        (lambda: bits_per_dim(sd3, torch.zeros(1, 4, 8, 8)), 'this model makes latents'),
        (lambda: surrogates.invert(sd3, sd3.encode([request.image])), 'this model makes pictures of words'),
        (lambda: surrogates.direction(sd3, [request.image], [request.image], prompt=''), 'has no mid_block')]
    for act, words in cases:
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value), words
