"""Every family of models, each by a small one of the real class with random weights: from the folder that stock
diffusers wrote to a hotfix that stock diffusers loads."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file
from small_pipelines import FAMILIES, family, make, unet
from torch.nn import functional as F

from unlearn_nb import audit as attacks
from unlearn_nb import report
from unlearn_nb.audit import ATTACKS, audit
from unlearn_nb.families import class_encoder
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.schedule import generators, randn
from unlearn_nb.states import Request, default_retain
from unlearn_nb.surrogates import propose
from unlearn_nb.unlearn import Config, retain_settings, unlearn
from unlearn_nb.zoo import load

QUICK = dict(retain_images=8, near_images=4, pool=16, sampling_steps=4, forget_batch=4, retain_batch=6)


def loaded(name, folder, **kw):
    "(denoiser of the folder that the pipeline of a family wrote, the pipeline, its prompt)."
    pipe, prompt = family(name)
    pipe.save_pretrained(folder)
    size = (16, 16) if 'Flux' in name or 'alpha' in name else None   # their own is large
    return load(folder, size=size, **kw), pipe, prompt


def stock(pipe, d, prompt, seed=5, steps=4):
    "What the stock pipeline makes of a seed: uint8 [H, W, 3]; None of families that have none."
    kind, g, z = type(pipe).__name__, torch.Generator().manual_seed(seed), randn(generators([seed]), d.shape)
    how = dict(num_inference_steps=steps)
    if kind == 'DDPMPipeline':
        if d.classes or pipe.unet.config.out_channels != d.shape[0]: return None
        pipe = DDIMPipeline(pipe.unet, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        made = pipe(generator=g, use_clipped_model_output=True, **how)
    elif kind == 'LDMPipeline': made = pipe(generator=g, **how)
    elif kind == 'DiTPipeline': made = pipe([int(prompt)], generator=g, **how)
    else:
        if kind == 'FluxPipeline': z = pipe._pack_latents(z, 1, *d.shape)
        if kind.startswith('PixArt'): how |= dict(use_resolution_binning=False, clean_caption=False)
        made = pipe(prompt, latents=z, height=d.size[1], width=d.size[0], **how)
    return np.asarray(made.images[0].convert('RGB')).astype(int)


def pixels(d, prompt, seed=5, steps=4):
    return np.asarray(d.decode(d.sample([seed], steps, prompt=prompt))[0].convert('RGB')).astype(int)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_seed_gives_what_the_stock_pipeline_gives(name, tmp_path):
    "With each scheduler's own grid of steps and its own end."
    d, pipe, prompt = loaded(name, tmp_path/'model')
    theirs = stock(pipe, d, prompt)
    if theirs is not None: assert abs(pixels(d, prompt) - theirs).max() <= 1
    x = d.sample([5, 6], 3, prompt=prompt)
    assert x.isfinite().all() and d.pixels(x).shape == (2, 3, *d.size[::-1])
    alone = d.sample([6], 3, prompt=prompt)
    torch.testing.assert_close(x[1:], alone, atol=1e-4, rtol=1e-4)   # whoever is beside it
    assert d.decode(x)[0].mode == ('L' if 'grey' in name else 'RGB')


def grid(x):
    return F.normalize(F.adaptive_avg_pool2d(x.float().cpu(), 4).flatten(1))


def drawn(objective):
    return partial(attacks.compare, partial(attacks.ascent, objective=objective, starts=2, steps=2))


SHORT = {'A9 relearning': partial(attacks.relearning, after=(0, 1)), 'A14c disagreement': drawn(attacks.disagreement),
         'A14e rise of the error': drawn(attacks.rise)}   # what takes long otherwise
SOON = {k: replace(a, m=2, function=SHORT.get(k, a.function)) for k, a in ATTACKS.items() if a.quick}


def noise(n, d):
    "n pictures that nobody made, as `audit` wants them, of a grey model, too."
    return torch.rand(n, 3, *d.size[::-1], generator=torch.Generator().manual_seed(0))*2 - 1


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_the_whole_path(name, tmp_path):
    "Load, sample, propose, forget, report, audit, save, load; in stock diffusers, too; remove, bit for bit."
    d, pipe, prompt = loaded(name, tmp_path/'model')
    before, base = fingerprint(d), pixels(d, prompt, 1)
    [x_f] = d.decode(d.sample([1], 4, prompt=prompt))
    x_s = propose(d, x_f, seeds=range(2), steps=4, prompt=prompt, describe=grid)
    request = Request(x_f, x_s, 1, prompt, 4)
    cfg = Config.of(d, steps=3, **QUICK)
    assert (cfg.rank == 0) == (name.startswith('DDPM') and name != 'DDPM, classes')   # else a LoRA
    retain = default_retain(d, [request], **retain_settings(cfg), describe=grid)
    fix = unlearn(d, [request], retain, cfg, describe=grid)
    assert ('strength' in fix.receipt.log[-1]) != d.worded   # of classes, too
    few = dict(panel=range(1000, 1008), fresh=range(500, 516), levels=(250, 550), noises=range(2), m=4, steps=4)
    found, was, now = report.evaluate(d, fix, [request], retain[bool(d.prompts)][1].x0, describe=grid, **few)
    assert fingerprint(d) == before and {'passed', 'verdicts'} <= found.keys()
    assert report.html(found, report.pictures(d, [request], was, now)) and report.figure(d, [request], was, now)
    fix.save(tmp_path/'fix')
    again = Hotfix.load(tmp_path/'fix')
    again.apply(d)
    changed = pixels(d, prompt, 1)
    again.remove(d)
    assert fingerprint(d) == before and np.array_equal(pixels(d, prompt, 1), base)
    assert not np.array_equal(changed, base)
    if hasattr(pipe, 'load_lora_weights'):
        pipe.load_lora_weights(tmp_path/'fix', weight_name='hotfix.safetensors')
        assert abs(stock(pipe, d, prompt, 1) - changed).max() <= 2
    tried = audit(d, fix, request, partial(noise, d=d), grid, SOON)['attacks']
    assert len(tried) == len(SOON) == 11 and all('score' in row for row in tried) and fingerprint(d) == before


@pytest.mark.slow
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
@pytest.mark.parametrize('name', ('DDPM', 'LDM, VQ', 'DiT', 'SD 1', 'SDXL', 'SD 3.5', 'Flux dev', 'PixArt sigma'))
def test_half_precision_stays_finite(name, dtype, tmp_path):
    "Through 100 steps; the net is of that type, what is summed up is not."
    d, _, prompt = loaded(name, tmp_path/'model', dtype=dtype)
    x_f, x_s = d.decode(d.sample([1, 2], 4, prompt=prompt))
    cfg = Config.of(d, steps=100, **QUICK)
    assert cfg.precision == {torch.float16: 'fp16', torch.bfloat16: 'bf16'}[dtype]
    retain = default_retain(d, [Request(x_f, x_s, 1, prompt)], n=4, near=0, pool=8, steps=4)
    fix = unlearn(d, [Request(x_f, x_s, 1, prompt, 4, copies=())], retain, cfg)
    assert all(v.isfinite().all() for v in fix.delta.values()) and any(v.any() for v in fix.delta.values())
    whole = load(tmp_path/'model', size=d.size)
    with pytest.raises(ValueError, match=f'load it with dtype={dtype}'): fix.apply(whole)


def test_the_variance_half_is_not_trained(tmp_path):
    "Six output channels: the three that are a variance get no gradient, so their layer's rows stay."
    d, _, _ = loaded('DDPM, learned variance', tmp_path/'model')
    x_f, x_s = d.decode(d.sample([1, 2], 4))
    fix = unlearn(d, [Request(x_f, x_s, 1, copies=())], cfg=Config.of(d, steps=3, **QUICK))
    change = fix.delta['conv_out.weight'].float()
    assert change[:3].abs().max() > 1e-5 > 100*change[3:].abs().max()


def test_other_solvers_get_no_variance(tmp_path):
    "Those of diffusers would take it off once more, and with it one of four channels."
    d, _, prompt = loaded('DiT', tmp_path/'model')
    d.scheduler.register_to_config(variance_type='learned_range')
    z = randn(generators([1]), d.shape)
    with torch.no_grad():
        for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
            x = attacks.stock(d, kind, z, 3, prompt)
            assert x.shape == z.shape and x.isfinite().all()


def test_words_are_searched_only_where_there_are_some(tmp_path):
    "A class is a whole number, and so is what says which tokens count: neither has a gradient."
    quick = partial(attacks.word_search, steps=1, batch=4)
    tried = {'A8 word search': replace(ATTACKS['A8 word search'], m=2, function=quick)}
    for name, worded in (('DDPM, classes', False), ('DiT', False), ('PixArt sigma', True)):
        d, _, prompt = loaded(name, tmp_path/name)
        [x_f] = d.decode(d.sample([1], 2, prompt=prompt))
        fix = Hotfix({k: torch.zeros_like(w).half() for k, w in d.net.named_parameters() if 'proj_out' in k}, {
            'base': {'id': d.name, 'sha256': fingerprint(d, base=True)}})
        [row] = audit(d, fix, Request(x_f, x_f, 1, prompt, 2), partial(noise, d=d), grid, tried)['attacks']
        assert d.worded == worded == ('score' in row)


def test_a_class_is_a_prompt(tmp_path):
    d, _, _ = loaded('DDPM, classes', tmp_path/'model')
    one, other = (d.sample([1], 2, prompt=k) for k in '03')
    assert d.others == ('0', '1', '2', '3') and not torch.equal(one, other)
    none = "class {} does not exist; this model has classes 0 ... 3"
    for prompt, said in ((None, 'give prompt="0" ... "3"'), ('4', none.format("'4'")), ('', none.format("''")),
                         ('red', none.format("'red'"))):
        with pytest.raises(ValueError) as e: d.sample([1], 2, prompt=prompt)
        assert said in str(e.value) and '\n' not in str(e.value)
    assert class_encoder(3, 3)(['', '2'])['class_labels'].tolist() == [3, 2]


def test_what_does_not_fit_is_refused_by_its_name(tmp_path):
    inpainting = make('sd')
    inpainting.register_modules(unet=unet(channels=9))
    inpainting.save_pretrained(tmp_path/'inpainting')
    guided = make('sd')
    guided.register_modules(unet=unet(time_cond_proj_dim=8))
    guided.save_pretrained(tmp_path/'lcm')
    cases = (('inpainting', {}, '4 output channels for 9 input channels: it sees more than x_t'),
             ('lcm', {}, 'time_cond_proj_dim'))
    for name, how, said in cases:
        with pytest.raises(ValueError) as e: load(tmp_path/name, **how)
        assert said in str(e.value) and '\n' not in str(e.value), str(e.value)


def test_sizes(tmp_path):
    d, pipe, prompt = loaded('SD 1', tmp_path/'model')
    wide = load(tmp_path/'model', size=(32, 16))
    assert wide.shape == (4, 8, 16) and wide.size == (32, 16)
    assert abs(pixels(wide, prompt) - stock(pipe, wide, prompt)).max() <= 1
    for size in ((15, 16), (0, 16), (16.5, 16)):
        with pytest.raises(ValueError, match='multiples of 2'): load(tmp_path/'model', size=size)


def test_one_file(tmp_path):
    "What needs the hub is one sentence with the command that makes a folder; what is no checkpoint is refused before."
    first = 'model.diffusion_model.input_blocks.0.0.weight'
    save_file({first: torch.zeros(8, 4, 3, 3)}, tmp_path/'sd.safetensors')
    save_file({first: torch.zeros(8, 9, 3, 3)}, tmp_path/'inpainting.safetensors')
    save_file({'x': torch.zeros(1)}, tmp_path/'lora.safetensors')
    (tmp_path/'broken.safetensors').write_bytes(b'no table')
    cases = {'sd.safetensors': "from_single_file('sd.safetensors').save_pretrained('folder')",
             'inpainting.safetensors': 'sees 9 channels', 'lora.safetensors': 'no checkpoint of a whole',
             'broken.safetensors': 'no whole safetensors file', 'none.safetensors': 'is not there', 'sd.ckpt': 'pickle'}
    for name, said in cases.items():
        with pytest.raises(ValueError) as e: load(tmp_path/name)
        assert said in str(e.value) and '\n' not in str(e.value), str(e.value)
