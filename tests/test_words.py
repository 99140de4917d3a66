"Models with words, latents and guidance through the whole path: what must stay, forgetting, the hotfix, and stock diffusers. Small pipelines with random weights."
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from small_pipelines import pipeline
from unlearn_nb import surrogates
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.schedule import generators, randn
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import bits_per_dim, denoising_error, psnr, reconstruction_curve, similarity
from unlearn_nb.report import evaluate, figure, table
from unlearn_nb.directions import layer_factors, eigenbases
from unlearn_nb.states import States, draw, generate, nearest, noised
from unlearn_nb.states import SAMPLING, Request, default_retain, forget_states, own_paths, steer
from unlearn_nb.unlearn import Config, unlearn
from unlearn_nb.zoo import PIPELINES, load, words

KINDS = [('sd3',), ('sd', 'epsilon'), ('sd', 'v_prediction'), ('sdxl', 'epsilon')]
SMALL = Config(steps=6, forget_batch=4, retain_batch=6, retain_images=3, near_images=2, pool=4, sampling_steps=5, damping=.01, weight='min_snr')


def denoiser_of(pipe, guidance=3.):
    what = PIPELINES[type(pipe).__name__]
    return Denoiser(getattr(pipe, what.net), pipe.scheduler, vae=pipe.vae, text=words(pipe), guidance=guidance, name='small')


@pytest.fixture(params=KINDS, ids='-'.join)
def denoiser(request): return denoiser_of(pipeline(*request.param))


@pytest.fixture
def sd3(): return denoiser_of(pipeline('sd3'))


def request_of(denoiser, seed=7, prompt='red flag'):
    image, surrogate = denoiser.decode(denoiser.sample([seed, seed + 1], 5, prompt=prompt))
    return Request(image, surrogate, seed, prompt)


# --- what must stay ---

def test_a_path_ends_where_the_sampler_does_and_holds_both_answers(denoiser):
    prompts = ['red flag', 'flag', '']
    path = generate(denoiser, range(3), 5, prompt=prompts)
    assert_close(path.x0, denoiser.sample(range(3), 5, prompt=prompts), rtol=1e-4, atol=1e-4)
    assert path.c.tolist() == denoiser.prompt_ids(prompts, 3).tolist() and path.uncond.shape == path.goal.shape == path.x_t.shape
    for s, t in enumerate(path.levels.tolist()):
        assert_close(path.uncond[:, s] + denoiser.guidance * (path.goal[:, s] - path.uncond[:, s]), denoiser.predict(path.x_t[:, s], t, path.c), rtol=1e-3, atol=1e-3)
    assert_close(path.uncond[2], path.goal[2], rtol=1e-4, atol=1e-4)      # of no words both answers are one
    assert not torch.allclose(path.uncond[0], path.goal[0], rtol=1e-3)


def test_without_guidance_there_is_one_answer(sd3):
    plain = denoiser_of(pipeline('sd3'), guidance=1.)
    path = generate(plain, range(2), 4, prompt='flag')
    assert path.uncond is None and len(draw(path, 5, torch.Generator().manual_seed(0))) == 4
    assert noised(plain, path.x0, 3, prompt='flag').uncond is None and noised(sd3, path.x0, 3, prompt='flag').uncond is not None


def test_half_of_the_states_of_a_guided_model_are_without_words(sd3):
    path = generate(sd3, range(4), 5, prompt=['red', 'flag', 'red flag', 'a'])
    x_t, t, goal, c = draw(path, 400, torch.Generator().manual_seed(0))
    assert 150 < (c == 0).sum() < 250
    for x, level, y, row in zip(x_t[:40], t, goal, c):
        own = sd3.clean(x[None], sd3(x[None], level[None], row[None]), level[None])
        assert_close(y[None], own, rtol=1e-3, atol=1e-3)               # the base answers so, with words and without


def test_a_mixed_list_of_states_with_and_without_words_is_refused(sd3):
    path = generate(sd3, range(2), 3, prompt='flag')
    with pytest.raises(ValueError): draw([(1, path), (1, replace(path, c=None, free=None))], 8, torch.Generator())


def test_moments_of_a_model_with_words_whiten_every_layer_that_runs(denoiser):
    path = generate(denoiser, range(2), 3, prompt='flag')
    bases = eigenbases(layer_factors(denoiser, path, n=8))
    layers = {f'{k}.weight' for k, m in denoiser.net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert bases.keys() <= layers and len(bases) > .8 * len(layers)


def test_default_retain_has_the_words_of_the_request_and_others(sd3, tmp_path):
    request = request_of(sd3)
    parts = default_retain(sd3, [request], SMALL, tmp_path, prompts=('a', 'b'))
    assert [share for share, _ in parts] == [2, 2, 1]
    row = {p: sd3.prompt_id(p) for p in ('red flag', 'a', 'b')}
    assert parts[0][1].c.tolist() == [row['red flag']] * 3 and parts[1][1].c.tolist() == [row['a'], row['b'], row['a']] and set(parts[2][1].c.tolist()) == {row['red flag']}
    again = default_retain(sd3, [request], SMALL, tmp_path, prompts=('a', 'b'))     # from its files
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for (_, a), (_, b) in zip(parts, again) for k in ('x_t', 'goal', 'c', 'free'))
    other = default_retain(sd3, [request], SMALL, tmp_path, prompts=('b', 'a'))
    assert other[1][1].c.tolist() == [row['b'], row['a'], row['b']]                 # another file


# --- forgetting ---

@given(g=st.floats(1.5, 9), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_steered_answer_guides_to_the_goal(g, seed):
    d = denoiser_of(pipeline('sd3'), guidance=g)
    gen = torch.Generator().manual_seed(seed)
    x_t, goal = torch.randn(2, 3, *d.shape, generator=gen)
    t, c = torch.randint(0, 1000, (3,), generator=gen), d.prompt_ids('red', 3)
    _, _, aim, _ = steer(d, x_t, t, goal, c)
    free = d.clean(x_t, d(x_t, t, torch.zeros_like(c)), t).detach()
    assert_close(d.clean(x_t, d.apply_cfg(d.target(x_t, aim, t), d.target(x_t, free, t)), t), goal, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('levels', SAMPLING)
def test_forget_states_carry_the_words_of_their_request(sd3, levels):
    requests = [request_of(sd3), request_of(sd3, 20, 'flag')]
    x_f, x_s = (sd3.encode([getattr(r, k) for r in requests]) for k in ('image', 'surrogate'))
    own, c = own_paths(sd3, requests, x_s, 5), sd3.prompt_ids(['red flag', 'flag'], 2)
    cfg = replace(SMALL, forget_batch=200, mix_share=0., levels=levels, t_max=900)
    x_t, t, goal, rows = forget_states(sd3, x_f, x_s, own, cfg, torch.Generator().manual_seed(0), c)
    assert own.uncond is None and x_t.shape == (200, *sd3.shape) and {*rows.tolist()} == {*c.tolist()}
    for y, row in zip(goal, rows): assert torch.equal(y, x_s[c.tolist().index(row)])
    low, middle = (t[100:] < 225).float().mean().item(), ((t[100:] >= 225) & (t[100:] < 675)).float().mean().item()
    assert (t < 1000).all() and {'low': low > .35, 'uniform': .2 < low < .3 and .45 < middle < .55, 'logit_normal': low < .2 and middle > .65}[levels]


def far(denoiser, hotfix, request, steps=5):
    "Distance of what the seed gives from the surrogate, over that without the hotfix."
    x_s, was = denoiser.encode([request.surrogate]), denoiser.sample([request.seed], steps, prompt=request.prompt)
    hotfix.apply(denoiser)
    now = denoiser.sample([request.seed], steps, prompt=request.prompt)
    hotfix.remove(denoiser)
    return ((now - x_s).norm() / (was - x_s).norm()).item()


@pytest.mark.parametrize('form', [dict(lr=3e-2), dict(rank=4, damping=0., lr=3e-2), dict(rank=8, lr=3e-2)], ids=['full', 'lora', 'cut to a lora'])
def test_the_seed_moves_to_its_surrogate_and_the_base_comes_back(denoiser, form):
    request, base = request_of(denoiser), fingerprint(denoiser)
    hotfix = unlearn(denoiser, [request], cfg=replace(SMALL, steps=25, **form))
    assert fingerprint(denoiser) == base
    assert far(denoiser, hotfix, request) < .97      # random weights can do little, but in the right direction
    assert fingerprint(denoiser) == base and hotfix.card['requests'][0]['prompt'] == 'red flag'


def test_precisions_and_pieces_give_the_same_direction(sd3):
    request = request_of(sd3)
    a, b, c = (unlearn(sd3, [request], cfg=replace(SMALL, steps=2, **kw)).delta for kw in ({}, {'micro_batch': 3}, {'gradient_checkpointing': True}))
    for k in a: assert_close(a[k], b[k], rtol=1e-2, atol=1e-3), assert_close(a[k], c[k], rtol=1e-2, atol=1e-3)


def test_a_run_goes_on_from_its_checkpoint_and_refuses_another_prompt(sd3, tmp_path):
    request, file, cfg = request_of(sd3), tmp_path/'run', replace(SMALL, steps=4)
    retain = default_retain(sd3, [request], **retain_settings(cfg))
    whole = unlearn(sd3, [request], retain, cfg, checkpoint=file)
    again = unlearn(sd3, [request], retain, cfg, checkpoint=file)
    assert again.delta.keys() == whole.delta.keys() and all(torch.equal(again.delta[k], whole.delta[k]) for k in whole.delta)
    with pytest.raises(ValueError, match="'requests'"): unlearn(sd3, [replace(request, prompt='flag')], retain, cfg, checkpoint=file)


def test_an_earlier_request_is_among_what_must_stay(sd3):
    first, second = request_of(sd3), request_of(sd3, 30, 'flag')
    fix = unlearn(sd3, [first], cfg=SMALL)
    fix.apply(sd3)
    try: again = unlearn(sd3, [second], cfg=SMALL, earlier=[first])
    finally: fix.remove(sd3)
    assert again.card['on'] == [fix.id]


# --- the hotfix in stock diffusers ---

def stock(pipe, seeds, prompt, guidance=3.):
    shape = (4, 8, 8)
    kw = {} if type(pipe).__name__ == 'StableDiffusion3Pipeline' else {'eta': 0.}
    return pipe(prompt, num_inference_steps=5, guidance_scale=guidance, latents=randn(generators(seeds), shape), num_images_per_prompt=len(seeds), output_type='pt', **kw).images


@pytest.mark.parametrize('damping', [0., .01], ids=['lora', 'cut to a lora'])
@pytest.mark.parametrize('kind', [('sd3',), ('sd', 'epsilon'), ('sdxl', 'epsilon')], ids='-'.join)
def test_stock_diffusers_loads_a_saved_lora_and_gives_the_same_pictures(kind, whiten, tmp_path):
    pipe = pipeline(*kind)
    d, seeds = denoiser_of(pipe), [7, 8]
    hotfix = unlearn(d, [request_of(d)], cfg=replace(SMALL, rank=4, damping=whiten, lr=3e-2 if whiten else 1e-2))
    hotfix.save(tmp_path)
    was = stock(pipe, seeds, 'red flag')
    hotfix.apply(d)
    ours = d.pixels(d.sample(seeds, 5, prompt='red flag')) / 2 + .5
    hotfix.remove(d)
    assert torch.equal(stock(pipe, seeds, 'red flag'), was)
    pipe.load_lora_weights(tmp_path)
    try:
        theirs = stock(pipe, seeds, 'red flag')
        pipe.set_adapters(pipe.get_active_adapters(), 0.)
        off = stock(pipe, seeds, 'red flag')
    finally: pipe.unload_lora_weights()
    assert_close(theirs, ours, rtol=0, atol=2e-3)
    assert (theirs - was).abs().max() > 2e-2 and torch.equal(off, was) and torch.equal(stock(pipe, seeds, 'red flag'), was)


def test_a_saved_lora_comes_back_and_is_refused_on_another_base(sd3, tmp_path):
    hotfix = unlearn(sd3, [request_of(sd3)], cfg=replace(SMALL, rank=2))
    hotfix.save(tmp_path)
    again, base = Hotfix.load(tmp_path), fingerprint(sd3)
    assert all(k.startswith('transformer.') for k in again.delta)
    again.apply(sd3)
    assert fingerprint(sd3) != base
    again.remove(sd3)
    assert fingerprint(sd3) == base
    with pytest.raises(ValueError, match='was made for the base'): again.apply(denoiser_of(pipeline('sd', 'epsilon')))


# --- Stable Diffusion 3 with all three encoders, from a folder ---

SD3 = Config.sd3(steps=3, retain_images=2, sampling_steps=4, lr=1e-2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    pipeline('sd3 with t5').save_pretrained(path := tmp_path_factory.mktemp('sd3'))
    return path


def test_the_preset_runs_from_folder_to_hotfix_and_back(folder, tmp_path):
    d = load(folder, device='cpu')
    request, base = request_of(d), fingerprint(d)
    for prompt in ('red flag', ''): d.prompt_id(prompt)
    d.drop_text_encoders()
    hotfix = unlearn(d, [request], cfg=SD3)
    assert fingerprint(d) == base and all(k.startswith('transformer.') for k in hotfix.delta) and any(v.any() for v in hotfix.delta.values())
    hotfix.save(tmp_path/'fix')
    again, was = Hotfix.load(tmp_path/'fix'), d.sample([7], 4, prompt='red flag')
    again.apply(d)
    assert fingerprint(d) != base and not torch.equal(d.sample([7], 4, prompt='red flag'), was)
    again.remove(d)
    assert fingerprint(d) == base and torch.equal(d.sample([7], 4, prompt='red flag'), was)


def test_t5_is_read_and_can_be_left_out(folder):
    whole, less = load(folder, device='cpu'), load(folder, device='cpu', without=('text_encoder_3',))
    a, b = (d.text(['red flag'])['encoder_hidden_states'] for d in (whole, less))
    clips = 16                                                    # tokens of the two CLIPs, side by side; T5 follows
    assert a.shape == b.shape == (1, clips + 256, 64) and torch.equal(a[:, :clips], b[:, :clips]) and a[:, clips:].any() and not b[:, clips:].any()
    assert_close(a, words(pipeline('sd3 with t5'))(['red flag'])['encoder_hidden_states'])
    hotfix = unlearn(less, [request_of(less)], cfg=replace(SD3, steps=1))
    assert hotfix.delta


def test_states_of_a_net_in_half_precision_are_kept_in_half(folder):
    d = load(folder, device='cpu', dtype=torch.bfloat16)
    path = generate(d, range(2), 3, prompt='flag')
    assert {v.dtype for v in (path.x_t, path.goal, path.uncond)} == {torch.float16} and path.x0.dtype == torch.float32
    x_t, t, goal, c = draw(path, 5, torch.Generator().manual_seed(0))
    assert x_t.dtype == goal.dtype == torch.float32
    whole = replace(path, x_t=path.x_t.float(), goal=path.goal.float(), free=path.uncond.float())
    for a, b in zip(draw(path, 9, torch.Generator().manual_seed(1)), draw(whole, 9, torch.Generator().manual_seed(1))): assert torch.equal(a, b)
    assert unlearn(d, [request_of(d)], cfg=replace(SD3, steps=2)).delta


def test_what_is_drawn_comes_to_the_levels(sd3):
    "States on one device, levels on another: here the other is meta."
    path = generate(sd3, range(2), 3, prompt='flag')
    there = replace(path, levels=path.levels.to('meta'), c=path.c.to('meta'))
    assert {v.device.type for v in draw(there, 4, torch.Generator().manual_seed(0))} == {'meta'}


# --- bad input ---

@pytest.mark.parametrize('change, message', [(dict(prompt=None), 'this model makes pictures of words'), (dict(seed=-1), 'below 0')])
def test_a_request_that_cannot_work_is_refused(sd3, change, message):
    with pytest.raises(ValueError, match=message): unlearn(sd3, [replace(request_of(sd3), **change)], cfg=SMALL)


def test_a_picture_of_another_size_and_unknown_levels_are_refused(sd3):
    request = request_of(sd3)
    with pytest.raises(ValueError, match='32 x 32 pixels, but this model makes 16 x 16'): unlearn(sd3, [replace(request, image=request.image.resize((32, 32)))], cfg=SMALL)
    with pytest.raises(ValueError, match="levels 'high' is not known; expected one of low, uniform, logit_normal"): unlearn(sd3, [request], cfg=replace(SMALL, levels='high'))


def test_nearest_works_on_latents(sd3):
    x = sd3.sample(range(4), 3, prompt='flag')
    assert nearest(x, x[2:3], 1).tolist() == [2] and isinstance(generate(sd3, [0], 2, prompt=''), States)


# --- measures, the report, edits ---

def look(x):
    "A descriptor that needs no weights: colours of 4 x 4 places, as unit vectors."
    return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(x.float(), 4).flatten(1), dim=1)


def test_the_report_of_a_model_with_words_speaks_of_pictures(sd3):
    request = request_of(sd3)
    hotfix = unlearn(sd3, [request], cfg=replace(SMALL, lr=3e-2))
    reference = sd3.sample(range(50, 54), 5, prompt='flag')
    kw = dict(panel=range(60, 64), levels=(200, 600), noises=range(2), steps=5, prompts=['flag', 'a'], describe=look)
    r, before, after = evaluate(sd3, hotfix, [request], reference, **kw)
    assert torch.equal(before['panel'], sd3.sample(range(60, 64), 5, prompt=['flag', 'a', 'flag', 'a']))
    x, y = (sd3.pixels(out['panel']) for out in (before, after))
    assert x.shape == (4, 3, 16, 16) and r['preserve']['psnr_median'] == pytest.approx(psnr(x, y).median().item()) and r['requests'][0]['prompt'] == 'red flag'
    x_f, seed = (sd3.pixels(v) for v in (sd3.encode([request.image]), before['seed']))
    assert r['forget']['same_seed']['to_forget_before'] == pytest.approx(similarity(seed, x_f, look).item())
    assert min(figure(sd3, [request], before, after, others=2).size) > 300 and 'drift of seeds 60 to 63' in table(r)
    again = evaluate(sd3, hotfix, [request], reference, earlier=[request], before=before, **kw)[0]
    assert again['forget'] == r['forget'] and len(again['earlier']) == 1


def test_reconstruction_and_denoising_error_take_a_prompt(sd3):
    x = sd3.sample([1], 4, prompt='flag')
    assert reconstruction_curve(sd3, x, [100, 900], range(2), 4, look, 'flag').shape == (2, 2)
    a, b = (denoising_error(sd3, x, [300], [0], prompt=p).item() for p in ('flag', 'red red'))
    t = torch.tensor([300])
    x_t = sd3.noise(x, randn(generators([0]), sd3.shape), t)
    assert a != b and a == pytest.approx((sd3.predict(x_t, 300, sd3.prompt_ids('flag', 1)) - x).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize('edit', [lambda d, i: surrogates.inpaint(d, i), lambda d, i: surrogates.sdedit(d, i), lambda d, i: surrogates.propose(d, i),
    lambda d, i: surrogates.invert(d, d.encode([i])), lambda d, i: surrogates.direction(d, [i], [i])], ids=['inpaint', 'sdedit', 'propose', 'invert', 'direction'])
def test_edits_by_the_model_itself_are_refused_where_it_has_words(sd3, edit):
    with pytest.raises(ValueError, match='this edit needs a model that makes pixels without words'): edit(sd3, request_of(sd3).image)


def test_bits_of_a_model_with_words_are_refused(sd3):
    with pytest.raises(ValueError, match='this model makes latents'): bits_per_dim(sd3, torch.zeros(1, 4, 8, 8))


def test_the_preset_for_stable_diffusion_3_runs_in_bfloat16_and_is_that_of_a_large_flow(tmp_path):
    pipe = pipeline('sd3')
    pipe.save_pretrained(tmp_path/'model')
    d = load(tmp_path/'model', dtype=torch.bfloat16)
    request, base = request_of(d), fingerprint(d)
    hotfix = unlearn(d, [request], cfg=Config.sd3(steps=2, retain_images=2, sampling_steps=3))
    assert d.dtype == torch.bfloat16 and fingerprint(d) == base and all(v.isfinite().all() for v in hotfix.delta.values())
    assert hotfix.card['config']['rank'] == 16 and any(v.abs().max() > 0 for k, v in hotfix.delta.items() if 'lora_B' in k)
    assert Config.of(d) == Config.flags()


@pytest.mark.parametrize('prediction, preset', [('flow', Config.sd3()), ('epsilon', Config.t4())])
def test_a_large_model_has_the_preset_of_its_kind(prediction, preset):
    class Net:
        def parameters(self): return [torch.empty(25_000_000, device='meta')]
    class Large: net = Net()
    Large.prediction = prediction
    assert Config.of(Large()) == preset
