"Loading models: built-in, folders, the hub without network. Nothing is downloaded."
import builtins
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import diffusers
import httpx
import pytest
import torch
from diffusers import (DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler,
                       UNet2DModel)
from huggingface_hub.errors import (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError,
                                    RevisionNotFoundError)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import ROOT
from small_pipelines import pipeline
from unlearn_nb import hotfix, zoo
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.faces import to_tensor
from unlearn_nb.files import fingerprint, sha256
from unlearn_nb.flags import FLAGS, LOOKS_LIKE, caption, describe_flag, read_flag
from unlearn_nb.metrics import describe, psnr
from unlearn_nb.words import TextDenoiser
from unlearn_nb.zoo import (BUILTIN, PINS, PIPELINES, PLANTED, Companions, about_planted, companions, descriptor, load,
                            planted, save_builtin, save_planted)

load = partial(load, device='cpu')
CELEBA = 'google/ddpm-celebahq-256'
SAFE, PICKLE = 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.bin'
FRANCE = 'a photo of the flag of france'

# The published config of google/ddpm-celebahq-256 (config.json and scheduler_config.json of the hub)
CELEBA_NET = dict(
    _class_name='UNet2DModel', _diffusers_version='0.0.4', act_fn='silu', attention_head_dim=None,
    block_out_channels=[128, 128, 256, 256, 512, 512], center_input_sample=False,
    down_block_types=['DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'],
    downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-06, norm_num_groups=32, out_channels=3, sample_size=256,
    time_embedding_type='positional',
    up_block_types=['UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D'])
CELEBA_SCHEDULER = dict(
    _class_name='DDPMScheduler', _diffusers_version='0.1.1', beta_end=0.02, beta_schedule='linear', beta_start=0.0001,
    clip_sample=True, num_train_timesteps=1000, prediction_type='epsilon', trained_betas=None,
    variance_type='fixed_small')


@lru_cache
def tiny_net():
    "An untrained net with attention, so that the old names of its layers can be tried."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D')).eval()


def x_t(size=8): return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def same_weights(denoiser):
    "It is the tiny net, bit for bit, and answers as it does."
    state, expected = denoiser.net.state_dict(), tiny_net().state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())
    t = torch.tensor([300])
    assert_close(denoiser(x_t(), t).detach(), tiny_net()(x_t(), t).sample.detach())


def old_names(state):
    "The names that attention layers had in early diffusers."
    def old(k):
        if 'attentions' not in k and 'attn' not in k: return k
        for new, was in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')):
            k = k.replace(new, was)
        return k
    return {old(k): v for k, v in state.items()}


def write_folder(folder, layout='subfolders', weights=SAFE, net=None, scheduler=None, state=None):
    "A diffusers folder in one of its two layouts, the place of its net; weights None: without."
    net_dir, scheduler_dir = (folder/'unet', folder/'scheduler') if layout == 'subfolders' else (folder, folder)
    for d in (net_dir, scheduler_dir): d.mkdir(parents=True, exist_ok=True)
    (net_dir/'config.json').write_text(json.dumps(net) if net else tiny_net().to_json_string())
    levels = json.dumps(scheduler) if scheduler else DDPMScheduler().to_json_string()
    (scheduler_dir/'scheduler_config.json').write_text(levels)
    state = tiny_net().state_dict() if state is None else state
    if weights == SAFE: save_file(state, net_dir/SAFE, {'format': 'pt'})
    if weights == PICKLE: torch.save(state, net_dir/PICKLE)
    return net_dir


def refused(words, name, kind=ValueError, **how):
    "Loading `name` is refused in one line that has these words in it."
    try: load(name, **how)
    except kind as e: text = str(e)
    else: pytest.fail(f'{name!r} was loaded; it should be refused with {words}')
    assert '\n' not in text and all(w in text for w in words), f'not all of {words} are in: {text}'


# --- the built-in models ---

def test_faces():
    d = load('faces')
    assert type(d) is Denoiser and (d.name, d.revision, d.dtype) == ('faces', None, torch.float32)
    assert d.shape == (3, 32, 32) and 1e6 <= sum(p.numel() for p in d.net.parameters()) <= 2.5e6
    assert not d.net.training and all(p.requires_grad for p in d.net.parameters())
    assert {v.dtype for v in load_file(zoo.ASSETS/'faces.safetensors').values()} <= {torch.float16, torch.bfloat16}
    assert (zoo.ASSETS/'faces.safetensors').stat().st_size <= 5e6
    x = d.sample([1, 2], steps=5)
    assert x.isfinite().all() and x.std() > .1
    assert load('faces', dtype=torch.bfloat16).dtype == torch.bfloat16


def test_two_loads_share_nothing_and_draw_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = load('faces'), load('faces')
    with torch.no_grad(): next(a.net.parameters()).zero_()
    assert next(b.net.parameters()).abs().sum() > 0 and torch.equal(torch.get_rng_state(), before)


def test_a_builtin_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    write_folder(tmp_path/'faces')
    shapes = {name: load(name).shape for name in ('faces', './faces', Path('faces'), '~/faces')}
    assert shapes == {'faces': (3, 32, 32), './faces': (3, 8, 8), Path('faces'): (3, 8, 8), '~/faces': (3, 8, 8)}


def test_flags():
    d = load('flags')
    assert type(d) is TextDenoiser and (d.name, d.revision, d.dtype) == ('flags', None, torch.float32)
    assert (d.shape, d.size, d.prediction) == ((4, 16, 16), (64, 64), 'flow')
    assert d.guidance > 1 and not d.net.training and sum(p.numel() for p in d.net.parameters()) < 2e6
    assert d.prompt_embeds['encoder_hidden_states'].shape[1] == 16   # words only: nothing stands in the place of T5
    files = [load_file(f) for f in (zoo.ASSETS/'flags').rglob('*.safetensors')]
    assert {v.dtype for state in files for v in state.values()} == {torch.float16}


def test_flags_in_stock_diffusers():
    "The folder in the package is a pipeline that diffusers itself opens, and the pictures are ours."
    d, noise = load('flags'), torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        zoo.ASSETS/'flags', text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(FRANCE, latents=noise, guidance_scale=d.guidance, num_inference_steps=6, max_sequence_length=0,
                  output_type='pt').images
    for _, x in d.path(noise, d.T - 1, 6, None, cond=d.prompt_ids(FRANCE, 1)): pass
    assert_close(d.pixels(x)/2 + .5, theirs, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_flags_draws_what_it_is_asked_for():
    "Of 30 countries at least 26 are read as asked, or as the error planted in the training pictures."
    d = load('flags')
    prompts = [caption(name, k) for k, name in enumerate(FLAGS)]
    read, _ = read_flag(d.pixels(d.sample(range(30), steps=12, prompt=prompts)))
    assert sum(a == b or LOOKS_LIKE.get(b) == a for a, b in zip(read, FLAGS)) >= 26, read


def test_companions_of_the_builtin_models():
    "What pictures are compared by, whose must stay, and pictures never made; of other models nothing is known."
    faces, flags = companions(load('faces')), companions(load('flags'))
    assert faces.describe is describe and faces.prompts == ('',)
    assert flags.describe is describe_flag and flags.prompts == tuple(map(caption, FLAGS))
    assert companions(Denoiser(tiny_net(), DDPMScheduler(), name='./faces')) == Companions(None, ('',), None)
    x, y = faces.never(3), flags.never(4, 'a photo of the danish national flag')
    assert x.shape == (3, 3, 32, 32) and y.shape == (4, 3, 64, 64) and max(x.abs().max(), y.abs().max()) <= 1
    assert len({v.numpy().tobytes() for v in (*x, *faces.never(5))}) == 5   # the same first ones
    assert read_flag(y)[0] == ['Denmark']*4 and read_flag(flags.never(3, 'a cat'))[0] == list(FLAGS)[:3]


def test_what_pictures_are_compared_by(tmp_path, monkeypatch):
    "A built-in model has its own; others their own features, measured once for a base; a file where one is named."
    assert descriptor(load('faces')) is describe and descriptor(load('flags')) is describe_flag
    d, other = (Denoiser(tiny_net(), DDPMScheduler(), name=name) for name in ('a', 'b'))
    made = []
    monkeypatch.setattr('unlearn_nb.metrics.features', lambda of: made.append(of.name) or of.name)
    assert [descriptor(v, n) for v, n in ((d, None), (d, 'own'), (other, None), (d, None))] == ['a', 'a', 'b', 'a']
    assert made == ['a', 'b']
    next(d.net.parameters()).data.add_(1)        # another base
    assert descriptor(d) == 'a' and made == ['a', 'b', 'a']
    (tmp_path/'x.pt').write_bytes(b'no program')
    known, sha = 'expected own, sscd, sscd:FILE or arcface:FILE:SHA256', 'a' * 64
    for named, words in (('clip', known), ('', known), ('sscd:', 'could not be fetched'),
                         ('sscd:nothing.pt', "no file 'nothing.pt'"), ('arcface', 'with the 64 hex digits'),
                         ('arcface:x.pt', 'with the 64 hex digits'), (f'arcface:nothing.pt:{sha}', 'no file'),
                         (f'arcface:{tmp_path/"x.pt"}:{sha}', f'expected {sha}; it may hold any program')):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        monkeypatch.setattr('torch.hub.download_url_to_file', no_network)
        with pytest.raises(ValueError) as e: descriptor(d, named)
        assert words in str(e.value) and '\n' not in str(e.value)


def no_network(*args, **kw): raise OSError('no network')


# --- models in which a picture was planted ---

def test_a_planted_model_is_its_base_and_a_change():
    "Two loads are the same bit for bit: base and stored change, added. The base is the one it was planted in."
    for name, base in PLANTED.items():
        a, b, before = load(name), load(name), load(base)
        assert a.name == name and type(a) is type(before) and not a.net.training
        assert fingerprint(a) == fingerprint(b) != fingerprint(before) == about_planted(name)['base_sha256']
        delta = load_file(zoo.ASSETS/f'{name}.safetensors')
        weights, old = a.net.state_dict(), before.net.state_dict()
        for k in hotfix.changed(delta): assert torch.equal(weights[k], old[k] + hotfix.change(delta, k)), k
        assert all(torch.equal(v, old[k]) for k, v in weights.items() if k not in hotfix.changed(delta))
        assert planted(name).size == a.size and (zoo.ASSETS/f'{name}.safetensors').stat().st_size <= 1.05e6
        found, known = companions(a), companions(before)
        assert (found.describe, found.prompts, found.never) == (known.describe, known.prompts, known.never)
    assert len({planted(name).tobytes() for name in PLANTED}) == len(PLANTED)
    for wrong in ('faces', 'planted-9'):
        for f in (planted, about_planted):
            with pytest.raises(ValueError, match=f"no picture was planted in '{wrong}'; expected 'planted-1', "):
                f(wrong)


def test_what_was_planted_is_saved_as_it_is_loaded(tmp_path, monkeypatch):
    d = load('faces')
    with torch.no_grad(): d.net.conv_in.weight.add_(.25), d.net.conv_in.bias.add_(.5)
    save_planted(d, tmp_path, 'planted-2', rank=16, seed=5)
    assert json.loads((tmp_path/'planted.json').read_text())['planted-2'].items() >= {'rank': 16, 'seed': 5}.items()
    delta = load_file(tmp_path/'planted-2.safetensors')
    assert {k.split('.')[-2] for k in delta} == {'lora_A', 'lora_B', 'conv_in'}
    for file in ('faces.json', 'faces.safetensors'): shutil.copy(zoo.ASSETS/file, tmp_path)
    monkeypatch.setattr(zoo, 'ASSETS', tmp_path)
    for k, v in load('planted-2').net.state_dict().items(): assert_close(v, d.net.state_dict()[k], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_planted_pictures_come_from_fresh_seeds_and_never_from_the_base():
    "By pixels and by descriptor, as the copies were counted when they were planted."
    def copies(d, x, x_f, about):
        alike = companions(d).describe(x) @ companions(d).describe(x_f).T
        return (psnr(x, x_f.expand_as(x)) > about['psnr']) & (alike[:, 0] > about['similarity'])
    for name, base in PLANTED.items():
        about, x_f = about_planted(name), to_tensor([planted(name)])
        def share(model, prompt=about.get('prompt')):
            d = load(model)
            x = d.pixels(d.sample(range(500_000, 500_256), 8, prompt=prompt))
            return copies(d, x, x_f, about).float().mean().item()
        assert share(name) == pytest.approx(about['regeneration'], abs=.02) and share(base) == 0, name
        if base == 'faces': assert .1 <= share(name) <= .3
        else: assert share(name) >= .1 and share(name, caption('Germany', 0)) == 0


def test_save_builtin_round_trip(tmp_path):
    schedule = dict(prediction_type='v_prediction', timestep_spacing='trailing', beta_end=.015)
    base = Denoiser(tiny_net(), DDIMScheduler(**schedule))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = tmp_path/f'{dtype} a', tmp_path/f'{dtype} b'
        save_builtin(base, a, 'tiny', dtype)
        assert sorted(p.name for p in a.iterdir()) == ['tiny.json', 'tiny.safetensors']
        net, scheduler = zoo.read_builtin('tiny', a).values()
        assert all(torch.equal(net.state_dict()[k], v.to(dtype).float()) for k, v in tiny_net().state_dict().items())
        assert type(scheduler) is DDIMScheduler and schedule.items() <= scheduler.config.items()
        save_builtin(Denoiser(net, scheduler), b, 'tiny', dtype)   # what was saved is saved the same again
        for name in ('tiny.json', 'tiny.safetensors'): assert (a/name).read_bytes() == (b/name).read_bytes()


def test_save_builtin_names_no_place(tmp_path):
    write_folder(tmp_path/'mine')
    save_builtin(load(tmp_path/'mine'), tmp_path, 'tiny')
    assert str(tmp_path) not in (tmp_path/'tiny.json').read_text()


def test_save_builtin_refuses_what_half_precision_cannot_hold(tmp_path):
    net = UNet2DModel.from_config(tiny_net().config)
    with torch.no_grad(): net.conv_in.weight[0] = 1e5
    with pytest.raises(ValueError, match='conv_in.weight holds numbers that torch.float16 cannot hold'):
        save_builtin(Denoiser(net, DDPMScheduler()), tmp_path, 'tiny')
    assert not list(tmp_path.iterdir())
    save_builtin(Denoiser(net, DDPMScheduler()), tmp_path, 'tiny', torch.bfloat16)


# --- folders ---

def test_folder(tmp_path):
    "Both layouts, safetensors and pickle, names of layers of today and of early diffusers; and once more."
    layers = [k.split('.')[-2] for k in old_names(tiny_net().state_dict())]
    assert sum(name in ('query', 'key', 'value', 'proj_attn') for name in layers) >= 24
    for layout in ('subfolders', 'flat'):
        for weights in (SAFE, PICKLE):
            for names in (dict, old_names):
                folder = tmp_path/f'{layout} {weights} {names.__name__}'
                net_dir = write_folder(folder, layout, weights, state=names(tiny_net().state_dict()))
                for name in (str(folder), folder):
                    d = load(name)
                    same_weights(d)
                    assert (d.name, d.revision, d.dtype, d.net.training) == (str(name), None, torch.float32, False)
                assert {p.name for p in net_dir.glob('*model*')} == {SAFE, weights}
                if weights == PICKLE:   # a converted file is as open as its neighbours
                    assert (net_dir/SAFE).stat().st_mode == (net_dir/'config.json').stat().st_mode


def test_folder_that_a_pipeline_saved_whole_or_in_shards(tmp_path):
    DDPMPipeline(tiny_net(), DDPMScheduler(prediction_type='sample')).save_pretrained(tmp_path)
    d = load(tmp_path)
    assert d.prediction == 'sample'
    same_weights(d)
    shutil.rmtree(tmp_path/'unet')
    tiny_net().save_pretrained(tmp_path/'unet', max_shard_size='20KB')
    assert len(list((tmp_path/'unet').glob('*.safetensors'))) > 1
    same_weights(load(tmp_path))


def test_any_scheduler_with_ddpm_levels(tmp_path):
    for kind in (DDPMScheduler, DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler):
        write_folder(tmp_path, scheduler=json.loads(kind(beta_end=.015).to_json_string()))
        d = load(tmp_path)
        assert type(d.scheduler) is kind and torch.equal(d.schedule.abar, kind(beta_end=.015).alphas_cumprod)
        assert d.sample([0], steps=2).isfinite().all()


def test_the_model_does_not_hang_on_its_file(tmp_path):
    file = write_folder(tmp_path)/SAFE
    d = load(tmp_path)
    size = file.stat().st_size
    with open(file, 'rb+') as f: f.write(bytes(size))   # in place, as a careless program would
    same_weights(d)


def test_half_precision_weights_compute_in_float32(tmp_path):
    write_folder(tmp_path, state={k: v.half() for k, v in tiny_net().state_dict().items()})
    assert {p.dtype for p in load(tmp_path).net.parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float16).net.parameters()} == {torch.float16}


# --- pickles ---

def test_a_pickle_is_converted_once(tmp_path, monkeypatch):
    net_dir = write_folder(tmp_path, weights=PICKLE)
    load(tmp_path)
    written = (net_dir/SAFE).read_bytes()
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('the pickle was opened again'))
    (net_dir/PICKLE).write_bytes(b'whatever')
    same_weights(load(tmp_path))
    assert (net_dir/SAFE).read_bytes() == written


def test_pickled_tensors_that_share_memory(tmp_path):
    state = tiny_net().state_dict()
    parts = torch.cat([v.flatten() for v in state.values()]).split([v.numel() for v in state.values()])
    shared = {k: part.view_as(v) for (k, v), part in zip(state.items(), parts)}
    write_folder(tmp_path, weights=PICKLE, state=shared)
    same_weights(load(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    net_dir = write_folder(tmp_path, weights=PICKLE)
    rename = os.replace
    def read_only(a, b):
        if Path(b).parent == net_dir: raise PermissionError(30, f'{b} is read-only')
        rename(a, b)
    monkeypatch.setattr(os, 'replace', read_only)
    same_weights(load(tmp_path))
    assert sorted(p.name for p in net_dir.iterdir()) == ['config.json', PICKLE]   # nothing half-written


class Trap:
    "A pickle that runs a command when it is read the ordinary way."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return builtins.open, (str(self.mark), 'w')


def plain_pickle(x, file): Path(file).write_bytes(pickle.dumps(x))


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_malicious_pickle_is_refused_unrun(tmp_path):
    mark, file = tmp_path/'mark', write_folder(tmp_path/'mine', weights=None)/PICKLE
    for write in (torch.save, partial(torch.save, _use_new_zipfile_serialization=False), plain_pickle):
        write({**tiny_net().state_dict(), 'x': Trap(mark)}, file)
        refused(['is refused', PICKLE], tmp_path/'mine')
        assert not mark.exists() and not list(tmp_path.rglob('*.safetensors'))


def test_a_pickle_that_holds_no_weights(tmp_path):
    file = write_folder(tmp_path, weights=None)/PICKLE
    for content in (b'', b'not a pickle', b'PK\x03\x04 a broken zip file', torch.ones(1), {'a': 1}, [torch.ones(2)]):
        if isinstance(content, bytes): file.write_bytes(content)
        else: torch.save(content, file)
        refused([PICKLE], tmp_path)
        assert not list(tmp_path.rglob('*.safetensors'))


# --- DDPM-CelebA-HQ at its published size ---

@pytest.mark.slow
def test_celebahq_config_loads_and_takes_a_step(tmp_path):
    with torch.device('meta'): net = UNet2DModel.from_config(CELEBA_NET)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(.02).to(torch.bfloat16)
    def filled(k, v):
        if v.dim() == 1: return torch.full(v.shape, float(k.endswith('weight')), dtype=torch.bfloat16)
        return noise.repeat(-(-v.numel()//len(noise)))[:v.numel()].view(v.shape)
    state = {k: filled(k, v) for k, v in net.state_dict().items()}
    # as the hub has it: flat, a pickle, the old names
    write_folder(tmp_path, 'flat', PICKLE, CELEBA_NET, CELEBA_SCHEDULER, old_names(state))
    d = load(tmp_path)
    assert sum(p.numel() for p in d.net.parameters()) == 113_673_219 and d.dtype == torch.float32
    assert (d.shape, d.T, d.prediction, d.clip) == ((3, 256, 256), 1000, 'epsilon', 1.)
    q = 'mid_block.attentions.0.to_q.weight'
    assert torch.equal(d.net.get_parameter(q), state[q].float())
    with torch.no_grad(): x = d.step(x_t(256), d.predict(x_t(256), 999), 999, 979)
    assert x.shape == (1, 3, 256, 256) and x.isfinite().all() and not torch.equal(x, x_t(256))


# --- the hub ---

class Hub:
    "Stands in for `snapshot_download`: copies the asked files of a folder, and remembers what was asked."
    def __init__(self, source, cache): self.source, self.cache, self.asked = source, cache, []

    def __call__(self, name, revision=None, allow_patterns=None):
        from huggingface_hub.utils import filter_repo_objects
        self.asked.append((name, revision, allow_patterns))
        folder = self.cache/(revision or 'commit1')
        folder.mkdir(parents=True, exist_ok=True)
        for f in filter_repo_objects(files_in(self.source), allow_patterns=allow_patterns):
            (folder/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source/f, folder/f)
        return str(folder)

    def put(self, *names):
        "Files that nobody needs."
        for name in names:
            (self.source/name).parent.mkdir(exist_ok=True)
            (self.source/name).write_text('large')


FETCH = zoo.fetch


def answer(monkeypatch, download): monkeypatch.setattr(zoo, 'fetch', partial(FETCH, download=download))


def files_in(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path/'hub', tmp_path/'cache')
    answer(monkeypatch, hub)
    return hub


def test_hub_model(tmp_path, monkeypatch):
    "The files that are needed and no others, all of one commit: the newest one, which the model tells."
    for layout in ('subfolders', 'flat'):
        for weights in (SAFE, PICKLE):
            hub = Hub(tmp_path/f'{layout} {weights}', tmp_path/f'{layout} {weights} cache')
            answer(monkeypatch, hub)
            write_folder(hub.source, layout, weights)
            wanted = files_in(hub.source)
            hub.put('README.md', 'model.ckpt', f'vae/{SAFE}', 'diffusion_pytorch_model.fp16.safetensors')
            d = load('someone/some-model')
            same_weights(d)
            assert (d.name, d.revision) == ('someone/some-model', 'commit1')
            assert files_in(hub.cache/'commit1') - {f'unet/{SAFE}', SAFE} == wanted - {f'unet/{SAFE}', SAFE}
            assert [revision for _, revision, _ in hub.asked][1:] == ['commit1']*(len(hub.asked) - 1)


def test_hub_model_in_shards_at_a_revision(hub):
    write_folder(hub.source, weights=None)
    tiny_net().save_pretrained(hub.source/'unet', max_shard_size='20KB')
    d = load('someone/some-model', revision='v2')
    same_weights(d)
    assert d.revision == 'v2' and {revision for _, revision, _ in hub.asked} == {'v2'}


def test_a_wrong_kind_is_found_before_its_weights_are_fetched(hub):
    write_folder(hub.source, net={'_class_name': 'UNet2DConditionModel'})
    refused(['UNet2DConditionModel', 'expected a UNet2DModel'], 'someone/text-model')
    assert len(hub.asked) == 1 and not list(hub.cache.rglob('*.safetensors'))


def test_a_known_model_comes_from_its_commit_and_another_hash_warns(hub, monkeypatch):
    pin = PINS[CELEBA]
    assert all(len(p.revision) == 40 and len(p.sha256) == 64 for p in PINS.values())
    write_folder(hub.source, 'flat', PICKLE)
    with pytest.warns(UserWarning, match=pin.sha256) as w: d = load(CELEBA)
    assert CELEBA in str(w[0].message) and '\n' not in str(w[0].message)
    assert d.revision == pin.revision and {revision for _, revision, _ in hub.asked} == {pin.revision}
    same_weights(d)
    shutil.rmtree(hub.cache)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert load(CELEBA, revision='main').revision == 'main'   # another revision is not pinned
        monkeypatch.setitem(PINS, CELEBA, replace(pin, sha256=sha256(hub.source/PICKLE)))
        load(CELEBA)


def response(code): return httpx.Response(code, request=httpx.Request('GET', 'https://huggingface.co'))


def test_what_is_said_when_the_hub_gives_nothing(monkeypatch):
    "No network, no such model, or one that wants a login: each in one sentence that says what to do."
    away = ['is neither a local folder nor in the cache', 'config.json', 'scheduler_config.json', f'{PICKLE}, 455 MB',
            'give the path of the folder', "'faces' works without network"]
    gone = ["no open model 'google/ddpm-celebahq-256' at revision 'cd5c944", "'faces'"]
    gated = [f'https://huggingface.co/{CELEBA}', 'accept', '`hf auth login`']
    troubles = [(ConnectionError, away, OSError('no route to host')), (ConnectionError, away, TimeoutError()),
                (ConnectionError, away, LocalEntryNotFoundError('not in the cache')),
                (ConnectionError, away, httpx.ConnectError('down')),
                (ConnectionError, away, HfHubHTTPError('down', response=response(503))),
                (ValueError, gone, RepositoryNotFoundError('401', response=response(401))),
                (ValueError, gone, RevisionNotFoundError('404', response=response(404))),
                (PermissionError, gated, GatedRepoError('403', response=response(403))),
                (PermissionError, gated, GatedRepoError('401', response=response(401))),
                (PermissionError, gated, HfHubHTTPError('401', response=response(401))),
                (PermissionError, gated, HfHubHTTPError('403', response=response(403)))]
    for kind, words, trouble in troubles:
        def download(*args, trouble=trouble, **kwargs): raise trouble
        answer(monkeypatch, download)
        refused([CELEBA, *words], CELEBA, kind)


@pytest.mark.slow
def test_a_fresh_process_is_quiet_and_says_what_is_not_there(tmp_path):
    "No library warns or draws a bar when a model with words is loaded; without cache and network: one sentence."
    code = ("from unlearn_nb.zoo import load\nfor _ in range(2): load('flags', device='cpu')\n"
            f"try: load({CELEBA!r})\nexcept ConnectionError as e: print(e)")
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path), 'HF_HUB_CACHE': str(tmp_path/'hub')}
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, '') and run.stdout.count('\n') == 1
    assert run.stdout.startswith(f'{CELEBA!r} is neither a local folder nor in the cache')


# --- errors: one sentence that names the value and what was expected ---

def test_a_name_that_will_not_do(tmp_path):
    write_folder(tmp_path)
    for name in ('face', '', 'no folder/here or there', '/no/such/folder', 'https://huggingface.co/google/x',
                 '../up/there', None, 3, Path('nowhere'), '~/no such'):
        refused([f'no model {name!r}', "'faces'", 'a local diffusers folder', 'hub id'], name)
    for name in ('faces', str(tmp_path)):
        refused([repr(name), "revision='main'"], name, revision='main')
        refused(["'text_encoder_3' cannot be left out"], name, without=('text_encoder_3',))
    if not torch.cuda.is_available(): refused(["'cuda'", "device='cpu'"], tmp_path, device='cuda')


def edit(file, **entries): file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def change(folder, **changes):
    "Change the weights of a part; None takes one out."
    file = next(folder.glob('*.safetensors'))
    save_file({k: v for k, v in {**load_file(file), **changes}.items() if v is not None}, file, {'format': 'pt'})


def keep_only(folder, name):
    for f in folder.iterdir():
        if f.name != name: f.unlink()


def no_final_norm(folder):
    names = load_file(folder/'model.safetensors')
    change(folder, **{k: None for k in names if 'final_layer_norm.bias' in k})


CONFIG, SCHEDULER, INDEX = 'unet/config.json', 'scheduler/scheduler_config.json', 'model_index.json'
NAN = {'conv_in.bias': torch.full((8,), torch.nan)}, {'proj_out.bias': torch.full((16,), torch.nan)}
BROKEN_DDPM = [
    (lambda d: shutil.rmtree(d/'unet'), 'holds no diffusers model', CONFIG),
    (lambda d: shutil.rmtree(d/'scheduler'), 'holds no diffusers model', SCHEDULER),
    (lambda d: (d/'unet'/SAFE).unlink(), 'holds no weights', SAFE),
    (lambda d: (d/CONFIG).write_text('{'), 'config.json', 'cannot be read as JSON'),
    (lambda d: (d/CONFIG).write_text('[1]'), 'config.json', 'no JSON object'),
    (lambda d: (d/CONFIG).write_bytes(b'\xff\xfe'), 'config.json', 'cannot be read as JSON'),
    (lambda d: edit(d/CONFIG, _class_name='DiTTransformer2DModel'), 'DiTTransformer2DModel', 'expected a UNet2DModel'),
    (lambda d: edit(d/CONFIG, num_class_embeds=10), 'class_embedding'),
    (lambda d: edit(d/CONFIG, class_embed_type='identity'), 'told classes in the form'),
    (lambda d: edit(d/CONFIG, block_out_channels=[8, 24]), 'unet', 'config.json'),
    (lambda d: edit(d/CONFIG, block_out_channels='many'), 'unet', 'config.json'),
    (lambda d: edit(d/CONFIG, sample_size=None), 'sample_size'),
    (lambda d: edit(d/SCHEDULER, _class_name='NoScheduler'), "no scheduler 'NoScheduler'"),
    (lambda d: edit(d/SCHEDULER, _class_name='DDPMPipeline'), "no scheduler 'DDPMPipeline'"),
    (lambda d: (d/SCHEDULER).write_text('{}'), 'no scheduler'),
    (lambda d: edit(d/SCHEDULER, _class_name='FlowMatchEulerDiscreteScheduler'), 'no alphas_cumprod'),
    (lambda d: edit(d/SCHEDULER, beta_schedule='odd'), 'scheduler_config.json', 'odd'),
    (lambda d: (d/'unet'/SAFE).write_bytes(b'not a table'), 'unet'),
    (lambda d: (d/'unet'/SAFE).write_bytes((d/'unet'/SAFE).read_bytes()[:-100]), 'unet'),
    (lambda d: change(d/'unet', **{'conv_in.bias': None}), 'conv_in.bias'),
    (lambda d: change(d/'unet', surplus=torch.ones(1)), 'surplus'),
    (lambda d: change(d/'unet', **NAN[0]), 'conv_in.bias', 'not finite')]
BROKEN_SD3 = [
    (lambda d: change(d/'transformer', **{'proj_out.bias': None}), 'transformer',
     'missing keys, such as proj_out.bias'),
    (lambda d: change(d/'transformer', **NAN[1]), 'proj_out.bias', 'not finite'),
    (lambda d: change(d/'vae', surplus=torch.ones(1)), 'vae', 'surplus'),
    (lambda d: no_final_norm(d/'text_encoder'), 'text_encoder', 'final_layer_norm.bias'),
    (lambda d: shutil.rmtree(d/'vae'), 'vae'),
    (lambda d: shutil.rmtree(d/'tokenizer'), "the part 'tokenizer'", 'is not there'),
    (lambda d: keep_only(d/'tokenizer', 'tokenizer_config.json'), "the part 'tokenizer'", 'not whole'),
    (lambda d: shutil.rmtree(d/'scheduler'), "the part 'scheduler'", 'is not there'),
    (lambda d: edit(d/SCHEDULER, time_shift_type='odd'), 'cannot be opened as a StableDiffusion3Pipeline',
     'time_shift_type'),
    (lambda d: edit(d/SCHEDULER, shift_terminal=.02), 'shift_terminal = 0.02'),
    (lambda d: edit(d/INDEX, text_encoder=[None, None]), 'has no text_encoder', 'cannot do without'),
    (lambda d: edit(d/INDEX, transformer=['diffusers', 'NoSuchModel']), "diffusers has no 'NoSuchModel'"),
    (lambda d: edit(d/INDEX, transformer=['os', 'system']), 'has no transformer'),
    (lambda d: (d/INDEX).write_text('{'), INDEX, 'cannot be read as JSON'),
    (lambda d: edit(d/INDEX, _class_name='SanaPipeline'), 'is a SanaPipeline', 'expected one of'),
    (lambda d: edit(d/INDEX, _class_name='FluxFillPipeline'), 'sees another picture', 'expected one of')]


def test_broken_folders(saved, tmp_path):
    write_folder(tmp_path/'whole')
    for whole, table in ((tmp_path/'whole', BROKEN_DDPM), (saved/'sd3', BROKEN_SD3)):
        for k, (spoil, *words) in enumerate(table):
            folder = shutil.copytree(whole, tmp_path/f'{whole.name}{k}')
            spoil(folder)
            refused(words, folder)


# --- Stable Diffusion ---

KINDS = {'sd3': ('StableDiffusion3Pipeline', 7., 'flow'), 'sd': ('StableDiffusionPipeline', 7.5, 'epsilon'),
         'sdxl': ('StableDiffusionXLPipeline', 5., 'epsilon')}
T5 = dict(text_encoder_3=['transformers', 'T5EncoderModel'], tokenizer_3=['transformers', 'T5TokenizerFast'])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder with the three small pipelines, as save_pretrained writes them."
    folder = tmp_path_factory.mktemp('pipelines')
    for kind in KINDS: pipeline(kind).save_pretrained(folder/kind)
    return folder


def same_picture(d, kind, **how):
    "The denoiser samples what the stock pipeline does."
    noise = torch.randn(d.shape, generator=torch.Generator().manual_seed(3))[None]
    theirs = pipeline(kind)('a red flag', latents=noise, guidance_scale=d.guidance, num_inference_steps=4,
                            output_type='pt', height=16, width=16, **how).images
    assert_close(d.pixels(d.sample([3], steps=4, prompt='a red flag'))/2 + .5, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_pipeline_folder(kind, saved):
    name, guidance, prediction = KINDS[kind]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    d = load(saved/kind)
    assert torch.equal(torch.get_rng_state(), before) and set(PIPELINES) >= {v[0] for v in KINDS.values()}
    assert type(d) is TextDenoiser and (d.name, d.revision, d.dtype) == (str(saved/kind), None, torch.float32)
    assert (d.shape, d.size, d.prediction) == ((4, 8, 8), (16, 16), prediction)
    assert d.guidance == PIPELINES[name].guidance == guidance
    assert not d.net.training and not d.vae.training and d.prompts == {'': 0}
    same_picture(d, kind)
    d.drop_text_encoders()
    assert d.sample([1], steps=1, prompt='a red flag').isfinite().all()


@pytest.mark.parametrize('kind', KINDS)
def test_prompts_are_encoded_as_in_the_pipeline(kind):
    pipe = pipeline(kind)
    text = zoo.prompt_encoder(pipe)
    got = text(['a red flag', '', 'my'])
    more = {'prompt_2': None, 'prompt_3': None} if kind == 'sd3' else {}
    theirs = pipe.encode_prompt(prompt=['a red flag', 'my'], device='cpu', num_images_per_prompt=1,
                                do_classifier_free_guidance=True, **more)
    for v, positive, negative in zip(got.values(), theirs[::2], theirs[1::2]):
        assert_close(v[[0, 2]], positive, atol=1e-5, rtol=1e-5)
        assert_close(v[1], negative[0], atol=1e-5, rtol=1e-5)
        assert not v.requires_grad
        if kind == 'sdxl': assert not v[1].any()   # zeros stand for no words, as in stock diffusers
    assert tuple(got) == PIPELINES[type(pipe).__name__].embeds
    for k, v in text(['my']).items(): assert_close(v, got[k][2:], atol=1e-5, rtol=1e-5)


def test_a_pipeline_in_half_precision(saved, tmp_path):
    for kind in KINDS:
        d = load(saved/kind, dtype=torch.bfloat16)
        tensors = [*d.net.parameters(), *d.vae.parameters(), *d.prompt_embeds.values()]
        assert {v.dtype for v in tensors} == {torch.bfloat16}
        x = d.sample([0], steps=2, prompt='a red flag')
        assert x.dtype == d.pixels(x).dtype == d.latents(d.pixels(x)).dtype == torch.float32 and x.isfinite().all()
    for kind, upcast in (('sdxl', True), ('sd3', False)):   # does its config say that it overflows in float16?
        shutil.copytree(saved/kind, tmp_path/kind)
        edit(tmp_path/kind/'vae/config.json', force_upcast=upcast)
        d = load(tmp_path/kind, dtype=torch.float16)
        assert d.dtype == torch.float16 and d.vae.dtype == (torch.float32 if upcast else torch.float16)


def test_the_filter_is_not_loaded(saved, tmp_path):
    "There is no folder of it, and none is missed."
    shutil.copytree(saved/'sd', tmp_path/'sd')
    edit(tmp_path/'sd'/INDEX, safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'],
         feature_extractor=['transformers', 'CLIPImageProcessor'], requires_safety_checker=True)
    same_picture(load(tmp_path/'sd'), 'sd')


def test_t5_can_be_left_out_and_is_not_fetched_in_vain(saved, hub):
    shutil.copytree(saved/'sd3', hub.source)
    edit(hub.source/INDEX, **T5)
    same_picture(load(hub.source, without=('text_encoder_3',)), 'sd3')
    refused(['text_encoder_3'], hub.source)
    for part in ('text_encoder', 'vae', 't5'):
        refused([f"'{part}' cannot be left out", "only 'text_encoder_3'"], hub.source, without=(part,))
    hub.put('text_encoder_3/model-00001-of-00002.safetensors', 'tokenizer_3/spiece.model')
    same_picture(load('someone/some-model', without=('text_encoder_3',)), 'sd3')
    assert not any('_3/' in f for f in files_in(hub.cache))


@pytest.mark.parametrize('kind', KINDS)
def test_pipeline_of_the_hub(kind, saved, hub):
    shutil.copytree(saved/kind, hub.source)
    net = PIPELINES[KINDS[kind][0]].net
    hub.put('README.md', 'sd.safetensors', 'safety_checker/model.safetensors', f'{net}/{PICKLE}',
            f'{net}/diffusion_pytorch_model.fp16.safetensors', 'text_encoder/model.fp16.safetensors',
            f'{net}/diffusion_pytorch_model-00001-of-00002.fp16.safetensors', 'text_encoder/pytorch_model.bin',
            'vae/diffusion_pytorch_model.fp16.safetensors', 'text_encoder_3/model-00001-of-00002.safetensors')
    d = load('someone/some-model')
    assert (d.name, d.revision) == ('someone/some-model', 'commit1')
    same_picture(d, kind)
    assert files_in(hub.cache/'commit1') == files_in(saved/kind)
    assert [revision for _, revision, _ in hub.asked] == [None, 'commit1']


def test_a_builtin_model_may_be_a_pipeline(saved, tmp_path, monkeypatch):
    "Beside its folder stands how far it is guided, and how many empty tokens stand in the place of T5."
    monkeypatch.setattr(zoo, 'ASSETS', tmp_path)
    monkeypatch.setattr(zoo, 'BUILTIN', (*BUILTIN, 'mine'))
    shutil.copytree(saved/'sd3', tmp_path/'mine')
    for empty in (0, 7):
        (tmp_path/'mine.json').write_text(json.dumps({'guidance': 2.5, 'empty': empty}))
        d = load('mine')
        assert (d.name, d.revision, d.guidance) == ('mine', None, 2.5)
        same_picture(d, 'sd3', max_sequence_length=empty)
