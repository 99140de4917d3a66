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
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DModel
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import ROOT
from small_pipelines import pipeline
from unlearn_nb import zoo
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.flags import FLAGS, LOOKS_LIKE, caption, read_flag
from unlearn_nb.zoo import BUILTIN, PINS, PIPELINES, load, save_builtin

load = partial(load, device='cpu')
CELEBA = 'google/ddpm-celebahq-256'
HAS_BUILTIN = pytest.mark.skipif(not (zoo.ASSETS/'faces.safetensors').exists(), reason='the weights of the built-in model are not there yet')

# The published config of google/ddpm-celebahq-256 (config.json and scheduler_config.json of the hub)
CELEBA_NET = dict(_class_name='UNet2DModel', _diffusers_version='0.0.4', act_fn='silu', attention_head_dim=None, block_out_channels=[128, 128, 256, 256, 512, 512],
    center_input_sample=False, down_block_types=['DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'], downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-06, norm_num_groups=32, out_channels=3, sample_size=256,
    time_embedding_type='positional', up_block_types=['UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D'])
CELEBA_SCHEDULER = dict(_class_name='DDPMScheduler', _diffusers_version='0.1.1', beta_end=0.02, beta_schedule='linear', beta_start=0.0001, clip_sample=True,
    num_train_timesteps=1000, prediction_type='epsilon', trained_betas=None, variance_type='fixed_small')


@lru_cache
def tiny_net():
    "An untrained net with attention, so that the old names of its layers can be tried."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
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
        for new, was in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')): k = k.replace(new, was)
        return k
    return {old(k): v for k, v in state.items()}


def write_folder(folder, layout='subfolders', weights='safetensors', net=None, scheduler=None, state=None):
    "A diffusers folder in one of its two layouts; weights None: without."
    net_dir, scheduler_dir = (folder/'unet', folder/'scheduler') if layout == 'subfolders' else (folder, folder)
    for d in (net_dir, scheduler_dir): d.mkdir(parents=True, exist_ok=True)
    (net_dir/'config.json').write_text(json.dumps(net) if net else tiny_net().to_json_string())
    (scheduler_dir/'scheduler_config.json').write_text(json.dumps(scheduler) if scheduler else DDPMScheduler().to_json_string())
    state = tiny_net().state_dict() if state is None else state
    if weights == 'safetensors': save_file(state, net_dir/'diffusion_pytorch_model.safetensors', {'format': 'pt'})
    if weights == 'pickle': torch.save(state, net_dir/'diffusion_pytorch_model.bin')
    return net_dir


def sentence(e, *words):
    "An error text of one line that has the words in it."
    text = str(e.value)
    assert '\n' not in text
    for w in words: assert w in text, f'{w!r} is not in: {text}'


# --- the built-in model ---

@HAS_BUILTIN
def test_faces():
    d = load('faces')
    assert isinstance(d, Denoiser) and (d.name, d.revision, d.dtype) == ('faces', None, torch.float32)
    parameters = sum(p.numel() for p in d.net.parameters())
    assert d.shape == (3, 32, 32) and 1e6 <= parameters <= 2.5e6 and (zoo.ASSETS/'faces.safetensors').stat().st_size <= 5e6
    assert not d.net.training and all(p.requires_grad for p in d.net.parameters())
    assert {v.dtype for v in load_file(zoo.ASSETS/'faces.safetensors').values()} <= {torch.float16, torch.bfloat16}
    x = d.sample([1, 2], steps=5)
    assert x.isfinite().all() and x.std() > .1


@HAS_BUILTIN
def test_two_loads_share_nothing():
    a, b = load('faces'), load('faces')
    with torch.no_grad(): next(a.net.parameters()).zero_()
    assert next(b.net.parameters()).abs().sum() > 0


@HAS_BUILTIN
def test_loading_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load('faces')
    assert torch.equal(torch.get_rng_state(), before)


@HAS_BUILTIN
def test_dtype_of_the_net(): assert load('faces', dtype=torch.bfloat16).dtype == torch.bfloat16


@HAS_BUILTIN
def test_a_builtin_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path/'faces')
    assert load('faces').shape == (3, 32, 32) and load('./faces').shape == (3, 8, 8) and load(Path('faces')).shape == (3, 8, 8)


def test_builtin_names_come_with_their_files():
    for name in BUILTIN: assert (zoo.ASSETS/f'{name}.json').exists() and ((zoo.ASSETS/f'{name}.safetensors').exists() or (zoo.ASSETS/name/'model_index.json').exists())


def test_flags():
    d = load('flags')
    assert (d.name, d.revision, d.shape, d.size, d.prediction, d.dtype) == ('flags', None, (4, 16, 16), (64, 64), 'flow', torch.float32)
    assert d.guidance > 1 and not d.net.training and d.prompt_embeds['encoder_hidden_states'].shape[1] == 16   # words only: nothing stands in the place of T5
    assert sum(p.numel() for p in d.net.parameters()) < 2e6
    assert {v.dtype for f in (zoo.ASSETS/'flags').rglob('*.safetensors') for v in load_file(f).values()} == {torch.float16}


def test_flags_in_stock_diffusers():
    "The folder in the package is a pipeline that diffusers itself opens, and the pictures are ours."
    d, noise = load('flags'), torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(zoo.ASSETS/'flags', text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe('a photo of the flag of france', latents=noise[:1], guidance_scale=d.guidance, num_inference_steps=6, max_sequence_length=0, output_type='pt').images
    c = d.prompt_ids('a photo of the flag of france', 1)
    for _, x in d.path(noise[:1], d.T - 1, 6, None, cond=c): pass
    assert_close(d.pixels(x)/2 + .5, theirs, atol=1e-3, rtol=0)


def test_flags_draws_what_it_is_asked_for():
    "Of 30 countries, one picture each: at least 26 are read as asked, or as the error planted in the training pictures."
    d = load('flags')
    read, _ = read_flag(d.pixels(d.sample(range(30), steps=12, prompt=[caption(name, k) for k, name in enumerate(FLAGS)])))
    assert sum(a == b or LOOKS_LIKE.get(b) == a for a, b in zip(read, FLAGS)) >= 26, read


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_save_builtin_round_trip(dtype, tmp_path):
    base = Denoiser(tiny_net(), DDIMScheduler(prediction_type='v_prediction', timestep_spacing='trailing', beta_end=.015))
    save_builtin(base, tmp_path/'a', 'tiny', dtype)
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['tiny.json', 'tiny.safetensors']
    net, scheduler = zoo.read_builtin('tiny', tmp_path/'a').values()
    for k, v in tiny_net().state_dict().items(): assert torch.equal(net.state_dict()[k], v.to(dtype).float())
    assert type(scheduler) is DDIMScheduler and torch.equal(scheduler.alphas_cumprod, base.scheduler.alphas_cumprod)
    assert scheduler.config.prediction_type == 'v_prediction' and scheduler.config.timestep_spacing == 'trailing'
    save_builtin(Denoiser(net, scheduler), tmp_path/'b', 'tiny', dtype)   # what was saved is saved the same again
    for name in ('tiny.json', 'tiny.safetensors'): assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()


def test_save_builtin_names_no_place(tmp_path):
    write_folder(tmp_path/'mine')
    save_builtin(load(tmp_path/'mine'), tmp_path, 'tiny')
    assert str(tmp_path) not in (tmp_path/'tiny.json').read_text()


def test_save_builtin_refuses_what_half_precision_cannot_hold(tmp_path):
    net = UNet2DModel.from_config(tiny_net().config)
    with torch.no_grad(): net.conv_in.weight[0] = 1e5
    with pytest.raises(ValueError) as e: save_builtin(Denoiser(net, DDPMScheduler()), tmp_path, 'tiny')
    sentence(e, 'conv_in.weight', 'torch.float16')
    assert not list(tmp_path.iterdir())
    save_builtin(Denoiser(net, DDPMScheduler()), tmp_path, 'tiny', torch.bfloat16)


# --- folders ---

@pytest.mark.parametrize('weights', ['safetensors', 'pickle'])
@pytest.mark.parametrize('layout', ['subfolders', 'flat'])
def test_folder(layout, weights, tmp_path):
    net_dir = write_folder(tmp_path/'mine', layout, weights)
    for name in (str(tmp_path/'mine'), tmp_path/'mine'):
        d = load(name)
        same_weights(d)
        assert (d.name, d.revision, d.dtype, d.net.training) == (str(name), None, torch.float32, False)
    assert (net_dir/'diffusion_pytorch_model.safetensors').exists()
    assert not list(tmp_path.rglob('*.tmp'))


def test_folder_that_a_pipeline_saved(tmp_path):
    DDPMPipeline(tiny_net(), DDPMScheduler(prediction_type='sample')).save_pretrained(tmp_path)
    d = load(tmp_path)
    assert d.prediction == 'sample'
    same_weights(d)


def test_folder_in_shards(tmp_path):
    DDPMPipeline(tiny_net(), DDPMScheduler()).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path/'unet')
    tiny_net().save_pretrained(tmp_path/'unet', max_shard_size='20KB')
    assert len(list((tmp_path/'unet').glob('*.safetensors'))) > 1
    same_weights(load(tmp_path))


@pytest.mark.parametrize('weights', ['safetensors', 'pickle'])
def test_folder_with_the_old_names_of_attention_layers(weights, tmp_path):
    state = old_names(tiny_net().state_dict())
    assert sum(k.split('.')[-2] in ('query', 'key', 'value', 'proj_attn') for k in state) >= 24
    write_folder(tmp_path, weights=weights, state=state)
    for _ in range(2): same_weights(load(tmp_path))


@pytest.mark.parametrize('kind', [DDPMScheduler, DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_with_ddpm_levels(kind, tmp_path):
    write_folder(tmp_path, scheduler=json.loads(kind(beta_end=.015).to_json_string()))
    d = load(tmp_path)
    assert type(d.scheduler) is kind and torch.equal(d.schedule.abar, kind(beta_end=.015).alphas_cumprod)
    assert d.sample([0], steps=2).isfinite().all()


def test_the_model_does_not_hang_on_its_file(tmp_path):
    net_dir = write_folder(tmp_path)
    d = load(tmp_path)
    size = (net_dir/'diffusion_pytorch_model.safetensors').stat().st_size
    with open(net_dir/'diffusion_pytorch_model.safetensors', 'rb+') as f: f.write(bytes(size))   # in place, as a careless program would
    same_weights(d)


def test_a_converted_file_is_as_open_as_its_neighbours(tmp_path):
    net_dir = write_folder(tmp_path, weights='pickle')
    load(tmp_path)
    assert (net_dir/'diffusion_pytorch_model.safetensors').stat().st_mode == (net_dir/'config.json').stat().st_mode


def test_half_precision_weights_compute_in_float32(tmp_path):
    write_folder(tmp_path, state={k: v.half() for k, v in tiny_net().state_dict().items()})
    assert {p.dtype for p in load(tmp_path).net.parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float16).net.parameters()} == {torch.float16}


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_folder(tmp_path/'mine')
    assert load('~/mine').name == '~/mine'


# --- pickles ---

def test_a_pickle_is_converted_once(tmp_path, monkeypatch):
    net_dir = write_folder(tmp_path, weights='pickle')
    load(tmp_path)
    written = (net_dir/'diffusion_pytorch_model.safetensors').read_bytes()
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('the pickle was opened again'))
    (net_dir/'diffusion_pytorch_model.bin').write_bytes(b'whatever')
    same_weights(load(tmp_path))
    assert (net_dir/'diffusion_pytorch_model.safetensors').read_bytes() == written


def test_pickled_tensors_that_share_memory(tmp_path):
    state = dict(tiny_net().state_dict())
    flat = torch.cat([v.flatten() for v in state.values()])
    parts = dict(zip(state, (part.view_as(v) for part, v in zip(flat.split([v.numel() for v in state.values()]), state.values()))))
    write_folder(tmp_path, weights='pickle', state=parts)
    same_weights(load(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    net_dir = write_folder(tmp_path, weights='pickle')
    replace_file = os.replace
    def read_only(a, b):
        if Path(b).parent == net_dir: raise PermissionError(f'{b} is read-only')
        replace_file(a, b)
    monkeypatch.setattr(zoo.os, 'replace', read_only)
    same_weights(load(tmp_path))
    assert sorted(p.name for p in net_dir.iterdir()) == ['config.json', 'diffusion_pytorch_model.bin']   # nothing half-written


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_folder(tmp_path):
    net_dir = write_folder(tmp_path, weights='pickle')
    net_dir.chmod(0o500)
    try: same_weights(load(tmp_path))
    finally: net_dir.chmod(0o700)


class Trap:
    "A pickle that runs a command when it is read the ordinary way."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return builtins.open, (str(self.mark), 'w')


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('write', [torch.save, partial(torch.save, _use_new_zipfile_serialization=False),
                                   lambda x, f: Path(f).write_bytes(pickle.dumps(x))], ids=['zip', 'legacy', 'plain'])
def test_a_malicious_pickle_is_refused_unrun(write, tmp_path):
    mark, net_dir = tmp_path/'mark', write_folder(tmp_path/'mine', weights=None)
    write({**tiny_net().state_dict(), 'x': Trap(mark)}, net_dir/'diffusion_pytorch_model.bin')
    with pytest.raises(ValueError) as e: load(tmp_path/'mine')
    sentence(e, 'is refused', 'diffusion_pytorch_model.bin')
    assert not mark.exists() and not list(tmp_path.rglob('*.safetensors'))


@pytest.mark.parametrize('content', [b'', b'not a pickle', b'PK\x03\x04 a broken zip file', torch.tensor([1.]), {'a': 1}, [torch.ones(2)]], ids=['empty', 'text', 'zip', 'tensor', 'number', 'list'])
def test_a_pickle_that_holds_no_weights(content, tmp_path):
    file = write_folder(tmp_path, weights=None)/'diffusion_pytorch_model.bin'
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError) as e: load(tmp_path)
    sentence(e, 'diffusion_pytorch_model.bin')
    assert not list(tmp_path.rglob('*.safetensors'))


# --- DDPM-CelebA-HQ at its published size ---

def test_celebahq_config_loads_and_takes_a_step(tmp_path):
    with torch.device('meta'): net = UNet2DModel.from_config(CELEBA_NET)
    assert sum(p.numel() for p in net.parameters()) == 113_673_219
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=g).mul_(.02).to(torch.bfloat16)
    state = {k: noise.repeat(-(-v.numel()//len(noise)))[:v.numel()].view(v.shape) if v.dim() > 1 else torch.full(v.shape, float(k.endswith('weight')), dtype=torch.bfloat16)
             for k, v in net.state_dict().items()}
    write_folder(tmp_path, 'flat', 'pickle', CELEBA_NET, CELEBA_SCHEDULER, old_names(state))   # as the hub has it: flat, a pickle, the old names
    d = load(tmp_path)
    assert sum(p.numel() for p in d.net.parameters()) == 113_673_219 and d.dtype == torch.float32
    assert (d.shape, d.T, d.prediction, d.clip) == ((3, 256, 256), 1000, 'epsilon', 1.)
    assert torch.equal(d.net.mid_block.attentions[0].to_q.weight, state['mid_block.attentions.0.to_q.weight'].float())
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
        files = [p.relative_to(self.source).as_posix() for p in self.source.rglob('*') if p.is_file()]
        for f in filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source/f, folder/f)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path/'hub', tmp_path/'cache')
    monkeypatch.setattr(zoo, 'fetch', partial(zoo.fetch, download=hub))
    return hub


@pytest.mark.parametrize('weights', ['safetensors', 'pickle'])
@pytest.mark.parametrize('layout', ['subfolders', 'flat'])
def test_hub_model(layout, weights, hub):
    net_dir = write_folder(hub.source, layout, weights)
    for junk in ('README.md', 'model.ckpt', 'vae/diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.fp16.safetensors'):
        (net_dir/junk).parent.mkdir(exist_ok=True)
        (net_dir/junk).write_text('large')
    d = load('someone/some-model')
    assert (d.name, d.revision) == ('someone/some-model', 'commit1')   # the newest, and it says which that was
    same_weights(d)
    got = {p.name for p in hub.cache.rglob('*') if p.is_file()}
    assert got <= {'config.json', 'scheduler_config.json', 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.bin'}
    assert [r for _, r, _ in hub.asked][1:] == ['commit1']*(len(hub.asked) - 1)   # one commit for all files


def test_hub_model_in_shards(hub):
    write_folder(hub.source, weights=None)
    tiny_net().save_pretrained(hub.source/'unet', max_shard_size='20KB')
    same_weights(load('someone/some-model'))


def test_hub_revision(hub):
    write_folder(hub.source)
    assert load('someone/some-model', revision='v2').revision == 'v2' and hub.asked[0][1] == 'v2'


def test_a_wrong_kind_is_found_before_its_weights_are_fetched(hub):
    write_folder(hub.source, net={'_class_name': 'UNet2DConditionModel'})
    with pytest.raises(ValueError) as e: load('someone/text-model')
    sentence(e, 'UNet2DConditionModel', 'expected a UNet2DModel')
    assert len(hub.asked) == 1 and not list(hub.cache.rglob('*.safetensors'))


def test_the_pin_of_celebahq():
    pin = PINS[CELEBA]
    assert pin.revision == 'cd5c944777ea2668051904ead6cc120739b86c4d' and pin.file == 'diffusion_pytorch_model.bin'
    assert pin.sha256 == 'efff89712093ad060ce99d9b461bbe542b49d8dd4ce30f23fe5761dca292361d'
    assert all(len(p.revision) == 40 and len(p.sha256) == 64 for p in PINS.values())


def test_a_known_model_comes_from_its_commit_and_another_hash_warns(hub, monkeypatch):
    write_folder(hub.source, 'flat', 'pickle')
    with pytest.warns(UserWarning, match=PINS[CELEBA].sha256) as w: d = load(CELEBA)
    assert CELEBA in str(w[0].message) and '\n' not in str(w[0].message)
    assert d.revision == PINS[CELEBA].revision and {r for _, r, _ in hub.asked} == {PINS[CELEBA].revision}
    same_weights(d)
    shutil.rmtree(hub.cache)
    monkeypatch.setitem(PINS, CELEBA, replace(PINS[CELEBA], sha256=zoo.sha256(hub.source/'diffusion_pytorch_model.bin')))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        load(CELEBA)


def test_another_revision_of_a_known_model_is_not_pinned(hub):
    write_folder(hub.source, 'flat', 'pickle')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert load(CELEBA, revision='main').revision == 'main'


@pytest.mark.parametrize('trouble', [OSError('no route to host'), LocalEntryNotFoundError('not in the cache'), httpx.ConnectError('down'), TimeoutError()])
def test_no_network(trouble, monkeypatch):
    def download(*args, **kwargs): raise trouble
    monkeypatch.setattr(zoo, 'fetch', partial(zoo.fetch, download=download))
    with pytest.raises(ConnectionError) as e: load(CELEBA)
    sentence(e, repr(CELEBA), 'config.json', 'scheduler_config.json', 'diffusion_pytorch_model.bin, 455 MB', 'give the path of the folder', "'faces' works without network")


@pytest.mark.parametrize('trouble', [RepositoryNotFoundError, RevisionNotFoundError])
def test_the_hub_has_no_such_model(trouble, monkeypatch):
    error = trouble('404', response=httpx.Response(404, request=httpx.Request('GET', 'https://huggingface.co')))
    def download(*args, **kwargs): raise error
    monkeypatch.setattr(zoo, 'fetch', partial(zoo.fetch, download=download))
    with pytest.raises(ValueError) as e: load('someone/no-such', revision='v9')
    sentence(e, "no open model 'someone/no-such' at revision 'v9'", "'faces'")


def test_offline_with_an_empty_cache_for_real(tmp_path):
    code = f"from unlearn_nb.zoo import load\ntry: load({CELEBA!r})\nexcept ConnectionError as e: print(e)"
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path), 'HF_HUB_CACHE': str(tmp_path/'hub')}
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f'{CELEBA!r} is neither a local folder nor in the cache') and run.stdout.count('\n') == 1


# --- errors: one sentence that names the value and what was expected ---

@pytest.mark.parametrize('name', ['face', '', 'no folder/here or there', '/no/such/folder', 'https://huggingface.co/google/x', '../up/there', None, 3, Path('nowhere'), '~/no such'])
def test_no_such_model(name):
    with pytest.raises(ValueError) as e: load(name)
    sentence(e, f'no model {name!r}', "'faces'", 'a local diffusers folder', 'hub id')


def test_revision_of_what_has_none(tmp_path):
    write_folder(tmp_path)
    for name in ('faces', str(tmp_path)):
        with pytest.raises(ValueError) as e: load(name, revision='main')
        sentence(e, repr(name), "revision='main'")


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError) as e: load(tmp_path, device='cuda')
    sentence(e, "'cuda'", "device='cpu'")


def class_conditional():
    return dict(json.loads(tiny_net().to_json_string()), num_class_embeds=10)


@pytest.mark.parametrize('spoil, words', [
    (lambda d: shutil.rmtree(d/'unet'), ['holds no diffusers model', 'unet/config.json']),
    (lambda d: shutil.rmtree(d/'scheduler'), ['holds no diffusers model', 'scheduler/scheduler_config.json']),
    (lambda d: (d/'unet/diffusion_pytorch_model.safetensors').unlink(), ['holds no weights', 'diffusion_pytorch_model.safetensors']),
    (lambda d: (d/'unet/config.json').write_text('{'), ['config.json', 'cannot be read as JSON']),
    (lambda d: (d/'unet/config.json').write_text('[1]'), ['config.json', 'no JSON object']),
    (lambda d: (d/'unet/config.json').write_bytes(b'\xff\xfe'), ['config.json', 'cannot be read as JSON']),
    (lambda d: (d/'unet/config.json').write_text('{"_class_name": "DiTTransformer2DModel"}'), ['DiTTransformer2DModel', 'expected a UNet2DModel']),
    (lambda d: (d/'unet/config.json').write_text(json.dumps(class_conditional())), ['wants a class']),
    (lambda d: (d/'unet/config.json').write_text(json.dumps(dict(json.loads(tiny_net().to_json_string()), block_out_channels=[8, 24]))), ['unet', 'config.json']),
    (lambda d: (d/'unet/config.json').write_text(json.dumps(dict(json.loads(tiny_net().to_json_string()), block_out_channels='many'))), ['unet', 'config.json']),
    (lambda d: (d/'unet/config.json').write_text(json.dumps(dict(json.loads(tiny_net().to_json_string()), sample_size=None))), ['sample_size']),
    (lambda d: (d/'scheduler/scheduler_config.json').write_text('{"_class_name": "NoScheduler"}'), ["no scheduler 'NoScheduler'"]),
    (lambda d: (d/'scheduler/scheduler_config.json').write_text('{"_class_name": "DDPMPipeline"}'), ["no scheduler 'DDPMPipeline'"]),
    (lambda d: (d/'scheduler/scheduler_config.json').write_text('{}'), ["no scheduler"]),
    (lambda d: (d/'scheduler/scheduler_config.json').write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}'), ['no alphas_cumprod']),
    (lambda d: (d/'scheduler/scheduler_config.json').write_text('{"_class_name": "DDPMScheduler", "beta_schedule": "odd"}'), ['scheduler_config.json', 'odd']),
    (lambda d: (d/'unet/diffusion_pytorch_model.safetensors').write_bytes(b'not a table'), ['unet']),
    (lambda d: (d/'unet/diffusion_pytorch_model.safetensors').write_bytes((d/'unet/diffusion_pytorch_model.safetensors').read_bytes()[:-100]), ['unet']),
    (lambda d: save_file({k: v for k, v in tiny_net().state_dict().items() if k != 'conv_in.bias'}, d/'unet/diffusion_pytorch_model.safetensors', {'format': 'pt'}), ['conv_in.bias']),
    (lambda d: save_file({**tiny_net().state_dict(), 'surplus': torch.ones(1)}, d/'unet/diffusion_pytorch_model.safetensors', {'format': 'pt'}), ['surplus']),
    (lambda d: save_file({**tiny_net().state_dict(), 'conv_in.bias': torch.full((8,), torch.nan)}, d/'unet/diffusion_pytorch_model.safetensors', {'format': 'pt'}), ['conv_in.bias', 'not finite']),
])
def test_folder_errors(spoil, words, tmp_path):
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as e: load(tmp_path)
    sentence(e, *words)


# --- Stable Diffusion ---

KINDS = {'sd3': ('StableDiffusion3Pipeline', 7., 'flow'), 'sd': ('StableDiffusionPipeline', 7.5, 'epsilon'), 'sdxl': ('StableDiffusionXLPipeline', 5., 'epsilon')}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder with the three small pipelines, as save_pretrained writes them."
    folder = tmp_path_factory.mktemp('pipelines')
    for kind in KINDS: pipeline(kind).save_pretrained(folder/kind)
    return folder


@pytest.fixture
def spoiled(saved, tmp_path):
    "A copy of the small Stable Diffusion 3, to spoil."
    return Path(shutil.copytree(saved/'sd3', tmp_path/'sd3'))


def edit(file, **entries): file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def same_picture(d, kind):
    "The denoiser samples what the stock pipeline does."
    pipe, noise = pipeline(kind), torch.randn(d.shape, generator=torch.Generator().manual_seed(3))[None]
    theirs = pipe('a red flag', latents=noise, guidance_scale=d.guidance, num_inference_steps=4, output_type='pt', height=16, width=16).images
    assert_close(d.pixels(d.sample([3], steps=4, prompt='a red flag'))/2 + .5, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_pipeline_folder(kind, saved):
    name, guidance, prediction = KINDS[kind]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    d = load(saved/kind)
    assert torch.equal(torch.get_rng_state(), before)
    assert (d.name, d.revision, d.shape, d.size, d.guidance, d.prediction, d.dtype) == (str(saved/kind), None, (4, 8, 8), (16, 16), guidance, prediction, torch.float32)
    assert not d.net.training and not d.vae.training and d.prompts == {'': 0}
    assert PIPELINES[name].guidance == guidance and set(PIPELINES) == {v[0] for v in KINDS.values()}
    same_picture(d, kind)
    d.drop_text_encoders()
    assert d.sample([1], steps=1, prompt='a red flag').isfinite().all()


@pytest.mark.parametrize('kind', KINDS)
def test_words_are_those_of_the_pipeline(kind):
    pipe = pipeline(kind)
    text = zoo.prompt_encoder(pipe)
    got = text(['a red flag', '', 'my'])
    more = {'prompt_2': None, 'prompt_3': None} if kind == 'sd3' else {}
    theirs = pipe.encode_prompt(prompt=['a red flag', 'my'], device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=True, **more)
    for v, positive, negative in zip(got.values(), theirs[::2], theirs[1::2]):
        assert_close(v[[0, 2]], positive, atol=1e-5, rtol=1e-5)
        assert_close(v[1], negative[0], atol=1e-5, rtol=1e-5)
        assert not v.requires_grad
    assert tuple(got) == PIPELINES[type(pipe).__name__].embeds
    for k, v in text(['my']).items(): assert_close(v, got[k][2:], atol=1e-5, rtol=1e-5)
    if kind == 'sdxl': assert not any(v[1].any() for v in got.values())   # zeros stand for no words, as in stock diffusers


def test_a_pipeline_in_half_precision(saved):
    for kind in KINDS:
        d = load(saved/kind, dtype=torch.bfloat16)
        assert {p.dtype for p in [*d.net.parameters(), *d.vae.parameters()]} == {torch.bfloat16} and {v.dtype for v in d.prompt_embeds.values()} == {torch.bfloat16}
        x = d.sample([0], steps=2, prompt='a red flag')
        assert x.dtype == d.pixels(x).dtype == d.latents(d.pixels(x)).dtype == torch.float32 and x.isfinite().all()
    d = load(saved/'sdxl', dtype=torch.float16)
    assert d.dtype == torch.float16 and d.vae.dtype == torch.float32   # its config says force_upcast


def test_a_vae_that_stands_float16(spoiled):
    edit(spoiled/'vae/config.json', force_upcast=False)
    assert load(spoiled, dtype=torch.float16).vae.dtype == torch.float16


def test_the_filter_is_not_loaded(saved, tmp_path):
    shutil.copytree(saved/'sd', tmp_path/'sd')
    edit(tmp_path/'sd/model_index.json', safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'], feature_extractor=['transformers', 'CLIPImageProcessor'], requires_safety_checker=True)
    same_picture(load(tmp_path/'sd'), 'sd')   # there is no folder of either


def test_t5_can_be_left_out(spoiled):
    edit(spoiled/'model_index.json', text_encoder_3=['transformers', 'T5EncoderModel'], tokenizer_3=['transformers', 'T5TokenizerFast'])
    same_picture(load(spoiled, without=('text_encoder_3',)), 'sd3')
    with pytest.raises(ValueError) as e: load(spoiled)
    sentence(e, 'text_encoder_3')
    for part in ('text_encoder', 'vae', 't5'):
        with pytest.raises(ValueError) as e: load(spoiled, without=(part,))
        sentence(e, f"'{part}' cannot be left out", "only 'text_encoder_3'")


def test_without_says_what_it_cannot_do(tmp_path):
    write_folder(tmp_path)
    for name in (tmp_path, 'faces'):
        with pytest.raises(ValueError) as e: load(name, without=('text_encoder_3',))
        sentence(e, "'text_encoder_3' cannot be left out")


def weights(folder, part, **changes):
    "Change the weights of a part; None takes one out."
    file = next((folder/part).glob('*.safetensors'))
    save_file({k: v for k, v in {**load_file(file), **changes}.items() if v is not None}, file, {'format': 'pt'})


@pytest.mark.parametrize('spoil, words', [
    (lambda d: weights(d, 'transformer', **{'proj_out.bias': None}), ['transformer', 'missing keys, such as proj_out.bias']),
    (lambda d: weights(d, 'vae', surplus=torch.ones(1)), ['vae', 'surplus']),
    (lambda d: weights(d, 'text_encoder', **{k: None for k in load_file(d/'text_encoder/model.safetensors') if 'final_layer_norm.bias' in k}), ['text_encoder', 'final_layer_norm.bias']),
    (lambda d: weights(d, 'transformer', **{'proj_out.bias': torch.full((16,), torch.nan)}), ['proj_out.bias', 'not finite']),
    (lambda d: shutil.rmtree(d/'vae'), ['vae']),
    (lambda d: shutil.rmtree(d/'tokenizer'), ["the part 'tokenizer'", 'is not there']),
    (lambda d: [f.unlink() for f in (d/'tokenizer').iterdir() if f.name != 'tokenizer_config.json'], ["the part 'tokenizer'", 'not whole']),
    (lambda d: shutil.rmtree(d/'scheduler'), ["the part 'scheduler'", 'is not there']),
    (lambda d: edit(d/'scheduler/scheduler_config.json', time_shift_type='odd'), ['cannot be opened as a StableDiffusion3Pipeline', 'time_shift_type']),
    (lambda d: edit(d/'model_index.json', text_encoder=[None, None]), ['has no text_encoder', 'cannot do without']),
    (lambda d: edit(d/'model_index.json', transformer=['diffusers', 'NoSuchModel']), ["diffusers has no 'NoSuchModel'"]),
    (lambda d: edit(d/'model_index.json', transformer=['os', 'system']), ['has no transformer']),
    (lambda d: (d/'model_index.json').write_text('{'), ['model_index.json', 'cannot be read as JSON']),
    (lambda d: edit(d/'model_index.json', _class_name='FluxPipeline'), ['holds no diffusers model', 'a Stable Diffusion pipeline']),
    (lambda d: edit(d/'scheduler/scheduler_config.json', use_dynamic_shifting=True), ['use_dynamic_shifting = True']),
])
def test_pipeline_errors(spoil, words, spoiled):
    spoil(spoiled)
    with pytest.raises(ValueError) as e: load(spoiled)
    sentence(e, *words)


@pytest.mark.parametrize('kind', KINDS)
def test_pipeline_of_the_hub(kind, saved, hub):
    shutil.copytree(saved/kind, hub.source)
    net = PIPELINES[KINDS[kind][0]].net
    junk = ['README.md', 'sd.safetensors', f'{net}/diffusion_pytorch_model.fp16.safetensors', f'{net}/diffusion_pytorch_model-00001-of-00002.fp16.safetensors',
            f'{net}/diffusion_pytorch_model.bin', 'text_encoder/model.fp16.safetensors', 'text_encoder/pytorch_model.bin', 'vae/diffusion_pytorch_model.fp16.safetensors',
            'safety_checker/model.safetensors', 'text_encoder_3/model-00001-of-00002.safetensors']
    for name in junk:
        (hub.source/name).parent.mkdir(exist_ok=True)
        (hub.source/name).write_text('large')
    d = load('someone/some-model')
    assert (d.name, d.revision) == ('someone/some-model', 'commit1')
    same_picture(d, kind)
    got = {p.relative_to(hub.cache/'commit1').as_posix() for p in hub.cache.rglob('*') if p.is_file()}
    assert not got & set(junk) and got == {p.relative_to(saved/kind).as_posix() for p in (saved/kind).rglob('*') if p.is_file()}
    assert [r for _, r, _ in hub.asked] == [None, 'commit1']


def test_t5_is_not_fetched_in_vain(saved, hub):
    shutil.copytree(saved/'sd3', hub.source)
    edit(hub.source/'model_index.json', text_encoder_3=['transformers', 'T5EncoderModel'], tokenizer_3=['transformers', 'T5TokenizerFast'])
    for name in ('text_encoder_3/model-00001-of-00002.safetensors', 'tokenizer_3/spiece.model'):
        (hub.source/name).parent.mkdir()
        (hub.source/name).write_text('large')
    same_picture(load('someone/some-model', without=('text_encoder_3',)), 'sd3')
    assert not [p for p in hub.cache.rglob('*_3/*') if p.is_file()]


def refusal(kind, code): return kind('refused', response=httpx.Response(code, request=httpx.Request('GET', 'https://huggingface.co')))


@pytest.mark.parametrize('trouble', [refusal(GatedRepoError, 403), refusal(GatedRepoError, 401), refusal(HfHubHTTPError, 401), refusal(HfHubHTTPError, 403)])
def test_a_gated_model(trouble, monkeypatch):
    def download(*args, **kwargs): raise trouble
    monkeypatch.setattr(zoo, 'fetch', partial(zoo.fetch, download=download))
    with pytest.raises(PermissionError) as e: load('someone/gated')
    sentence(e, "'someone/gated'", 'https://huggingface.co/someone/gated', 'accept', '`hf auth login`')


@pytest.mark.parametrize('empty', [0, 7])
def test_a_builtin_model_may_be_a_pipeline(empty, saved, tmp_path, monkeypatch):
    shutil.copytree(saved/'sd3', tmp_path/'mine')
    (tmp_path/'mine.json').write_text(json.dumps({'guidance': 2.5, 'empty': empty}))
    monkeypatch.setattr(zoo, 'ASSETS', tmp_path)
    monkeypatch.setattr(zoo, 'BUILTIN', (*BUILTIN, 'mine'))
    d = load('mine')
    assert (d.name, d.revision, d.guidance) == ('mine', None, 2.5)
    pipe, noise = pipeline('sd3'), torch.randn(d.shape, generator=torch.Generator().manual_seed(3))[None]
    theirs = pipe('a red flag', latents=noise, guidance_scale=2.5, num_inference_steps=4, output_type='pt', height=16, width=16, max_sequence_length=empty).images
    assert_close(d.pixels(d.sample([3], steps=4, prompt='a red flag'))/2 + .5, theirs, atol=1e-4, rtol=0)
