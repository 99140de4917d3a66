"Training with words: tokens, latents and loss as the pipeline has them; killed runs go on; stock diffusers opens them."
import ast
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from transformers import CLIPTokenizer

from conftest import ROOT
from unlearn_nb import train_text
from unlearn_nb.flags import CAPTIONS, FLAGS, caption, training_set
from unlearn_nb.files import fingerprint
from unlearn_nb.metrics import psnr
from unlearn_nb.train import TrainConfig, plant
from unlearn_nb.train_text import (TextConfig, autoencoder_loss, encode_images, encode_text, flow_loss, flow_times,
                                   new_autoencoder, new_pipeline, new_tokenizer, normalise, save_pipeline, token_ids,
                                   train_autoencoder, train_pipeline)
from unlearn_nb.zoo import load

EVERY = [caption(name, k) for name in FLAGS for k in range(len(CAPTIONS))]
TINY = dict(batch=4, layers=2, heads=1, words=16, save_every=0.)
TEXT = TextConfig(steps=1, **TINY)
SMALL = TrainConfig(steps=2, batch=4, channels=(8, 8), save_every=0.)


pytestmark = pytest.mark.usefixtures('one_thread')


def data(n=24):
    x, captions, _, _ = training_set(n, 16, seed=3)
    return x, captions


@lru_cache
def pipeline(): return new_pipeline(new_autoencoder((8, 8)), EVERY, 16, TEXT)


PARTS = ('transformer', 'text_encoder', 'text_encoder_2', 'vae')


def weights(pipe):
    "Copies of all weights of a pipeline."
    return {f'{name}.{k}': v.detach().clone() for name in PARTS for k, v in getattr(pipe, name).state_dict().items()}


def halved(weights): return {k: v.half().float() for k, v in weights.items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stock(folder):
    "The pipeline in a folder, as stock diffusers opens it."
    without = dict(text_encoder_3=None, tokenizer_3=None)
    return StableDiffusion3Pipeline.from_pretrained(folder, **without, local_files_only=True)


# --- tokens ---

@pytest.mark.parametrize('again', [False, True], ids=['new', 'saved and loaded'])
def test_every_word_is_one_token_of_its_own(tmp_path, again):
    tokenizer = new_tokenizer(EVERY)
    if again:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    words = sorted({w for c in EVERY for w in c.replace("'", " ' ").split()})
    ids, start, end = tokenizer(words).input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(words) > 60 and all(len(i) == 3 and i[::2] == [start, end] for i in ids)
    assert len({i[1] for i in ids}) == len(words) and tokenizer.unk_token_id not in {i[1] for i in ids}
    assert len({tuple(i) for i in token_ids(tokenizer, EVERY).tolist()}) == len(set(EVERY))
    assert token_ids(tokenizer, ['']).tolist() == [[start] + 15*[end]]
    assert tokenizer.tokenize("cote d'ivoire") == ['cote</w>', 'd</w>', "'</w>", 'ivoire</w>']


VOCABULARY = """
from unlearn_nb.flags import CAPTIONS, FLAGS, caption
from unlearn_nb.train_text import new_tokenizer
print(new_tokenizer([caption(n, k) for n in FLAGS for k in range(len(CAPTIONS))]).get_vocab())
"""


@pytest.mark.slow
def test_tokens_depend_on_the_captions_alone():
    "In any order and number, in this process and in another: a run that goes on must find the words where they were."
    done = subprocess.run([sys.executable, '-c', VOCABULARY], cwd=ROOT, capture_output=True, text=True, timeout=200)
    vocabulary = new_tokenizer(EVERY).get_vocab()
    assert done.returncode == 0 and ast.literal_eval(done.stdout) == vocabulary, done.stderr
    assert new_tokenizer(2*EVERY[::-1]).get_vocab() == vocabulary


@given(st.lists(st.text('ab', min_size=1, max_size=7), min_size=1, max_size=6))
@settings(max_examples=60)
def test_words_of_few_letters_are_whole_too(words):
    "Letters that repeat make pairs that overlap."
    tokenizer = new_tokenizer(words)
    assert [tokenizer.tokenize(w) for w in words] == [[w + '</w>'] for w in words]


@given(st.text(max_size=60))
@settings(max_examples=60)
def test_any_text_has_tokens(text):
    tokenizer = pipeline().tokenizer
    ids = token_ids(tokenizer, [text])
    assert ids.shape == (1, 16) and 0 <= ids.min() and ids.max() < len(tokenizer)
    assert len(tokenizer) == pipeline().text_encoder.config.vocab_size


def test_unknown_letters_are_unknown():
    tokenizer = pipeline().tokenizer
    unknown = tokenizer.unk_token_id
    assert unknown in tokenizer('中').input_ids and unknown not in tokenizer('the flag of japan').input_ids
    assert len({unknown, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


# --- the text, as the pipeline encodes it ---

def test_text_is_encoded_as_the_pipeline_does_it():
    pipe, captions = pipeline(), [EVERY[0], '', 'a photo of a zebra', EVERY[100]]
    for empty in (0, 5, 256):
        how = dict(do_classifier_free_guidance=False, max_sequence_length=empty)
        tokens, _, whole, _ = pipe.encode_prompt(captions, None, None, **how)
        ours = encode_text(pipe, token_ids(pipe.tokenizer, captions), empty)
        assert torch.equal(ours[0], tokens) and torch.equal(ours[1], whole) and tokens.shape == (4, 16 + empty, 32)
        assert not torch.equal(whole[0], whole[3])


def test_gradients_reach_both_encoders():
    pipe, g = pipeline(), torch.Generator().manual_seed(0)
    pipe.transformer.zero_grad()
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=.1)
    flow_loss(pipe, torch.randn(4, 4, 8, 8, generator=g), token_ids(pipe.tokenizer, EVERY[:4]), g).backward()
    encoders = pipe.text_encoder, pipe.text_encoder_2
    for net in (*encoders, pipe.transformer): assert all(p.grad is not None for p in net.parameters())
    assert all(net.text_projection.weight.grad.abs().max() > 0 for net in encoders)


# --- levels and the loss ---

@pytest.mark.parametrize('shift', [1., 3.])
def test_levels_are_logit_normal(shift):
    "The logit of a level is a normal number around log(shift): mean, deviation, and the shares below some marks."
    s = torch.cat([flow_times(50, shift, torch.Generator().manual_seed(k)) for k in range(400)])
    z = torch.logit(s.double()) - math.log(shift)
    assert ((s > 0) & (s < 1)).all() and abs(z.mean()) < .01 and abs(z.std() - 1) < .01
    for mark in (-2., -1., 0., .5, 1.5): assert abs((z < mark).double().mean() - (1 + math.erf(mark/2**.5))/2) < .005


@given(st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1., 3.]))
@settings(max_examples=30)
def test_each_batch_has_a_level_from_each_equal_part(B, seed, shift):
    z = torch.logit(flow_times(B, shift, torch.Generator().manual_seed(seed)).double()) - math.log(shift)
    part = (1 + torch.erf(z/2**.5))/2*B
    assert ((part > torch.arange(B) - 1e-3) & (part < torch.arange(B) + 1 + 1e-3)).all()


class Told:
    "A pipeline's parts whose transformer writes down what it is asked and answers v."
    def __init__(self, pipe, v):
        self.text_encoder, self.text_encoder_2, self.transformer = pipe.text_encoder, pipe.text_encoder_2, self
        self.config, self.v, self.asked = pipe.transformer.config, v, []

    def __call__(self, *args, return_dict):
        self.asked.append(args)
        return (self.v,)


@pytest.mark.parametrize('shift', [1., 3.])
def test_the_loss_is_the_formula_and_noises_as_the_scheduler_does(shift):
    pipe, ids = pipeline(), token_ids(pipeline().tokenizer, EVERY[:6])
    x0 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told = Told(pipe, torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    loss = flow_loss(told, x0, ids, torch.Generator().manual_seed(7), shift)
    (x_s, tokens, whole, t), = told.asked
    g = torch.Generator().manual_seed(7)
    s, eps = flow_times(6, shift, g), torch.randn(x0.shape, generator=g)
    assert_close(loss, ((told.v - (eps - x0))**2).sum()/x0.numel())
    assert torch.equal(tokens, encode_text(pipe, ids)[0]) and torch.equal(whole, encode_text(pipe, ids)[1])
    assert_close(x_s, (1 - s)[:, None, None, None]*x0 + s[:, None, None, None]*eps)
    # so fine that every level is near one of its own
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100_000, shift=shift)
    near = (scheduler.sigmas[None] - s[:, None]).abs().argmin(1)
    assert_close(x_s, scheduler.scale_noise(x0, scheduler.timesteps[near], eps), atol=1e-4, rtol=0)
    assert_close(t, scheduler.timesteps[near]/100, atol=.03, rtol=0)


def test_one_step_of_the_scheduler_with_the_true_velocity_gives_the_picture():
    "The sign and size of what the loss asks for are those that the sampler follows."
    pipe = pipeline()
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x = eps
    for t in scheduler.timesteps: x = scheduler.step(eps - x0, t, x).prev_sample
    assert scheduler.config.shift == 3 and scheduler.sigmas[0] == 1
    assert_close(x, x0, atol=1e-5, rtol=0)


# --- latents ---

def test_autoencoder_loss_is_the_formula():
    vae, x = new_autoencoder((8, 8)), data(3)[0].float()/127.5 - 1
    q, eps = vae.encode(x).latent_dist, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    error = (vae.decode(q.mean + q.std*eps).sample - x).abs().mean()
    assert_close(autoencoder_loss(vae, x, torch.Generator().manual_seed(4), weight=0), error)
    one = kl_divergence(Normal(q.mean, q.std), Normal(0., 1.)).mean()
    assert_close(autoencoder_loss(vae, x, torch.Generator().manual_seed(4), weight=.5), error + .5*one)


def test_normalised_latents_have_mean_0_and_deviation_1():
    vae, (x, _) = new_autoencoder((8, 8)).eval(), data()
    before = encode_images(vae, x)
    assert abs(before.std() - 1) > .1
    for _ in range(2):   # twice is once
        normalise(vae, x)
        z = encode_images(vae, x)
        assert z.shape == (24, 4, 8, 8) and abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-4
    assert_close(z/vae.config.scaling_factor + vae.config.shift_factor, before)   # as the pipeline turns them back


@pytest.mark.slow
def test_autoencoder_learns_and_is_its_seed_alone(tmp_path):
    x, _ = data()
    cfg = TrainConfig(steps=80, batch=8, channels=(8, 8), lr=1e-2, save_every=1e9)
    def run(name, **kw): return train_autoencoder(x, tmp_path/name, replace(cfg, **kw))
    def error(vae): return autoencoder_loss(vae, x.float()/127.5 - 1, torch.Generator().manual_seed(0), weight=0).item()
    one, again, other = run('a'), run('b'), run('c', seed=1)
    assert equal(one.state_dict(), again.state_dict()) and not equal(one.state_dict(), other.state_dict())
    assert error(one) < .7*error(new_autoencoder((8, 8))) and not any(p.requires_grad for p in one.parameters())
    z = encode_images(one, x)
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-4


# --- a run ---

def test_stock_diffusers_opens_it_and_samples(tmp_path):
    x, captions = data()
    vae = train_autoencoder(x, tmp_path/'vae', SMALL)
    ours, folder = train_pipeline(x, captions, vae, tmp_path, replace(TEXT, steps=2)), tmp_path/'pipeline'
    pipe = stock(folder)
    assert {p.dtype for name in PARTS for p in getattr(pipe, name).parameters()} == {torch.float32}
    assert equal(weights(pipe), halved(weights(ours)))
    for p in (pipe, ours): p.set_progress_bar_config(disable=True)
    def picture(p, seed=0, **kw):
        how = dict(num_inference_steps=2, guidance_scale=4., output_type='pt')
        return p(captions[0], generator=torch.Generator().manual_seed(seed), **how, **kw).images[0]
    assert picture(pipe).shape == picture(pipe, max_sequence_length=0).shape == (3, 16, 16)
    assert torch.equal(picture(pipe), picture(pipe)) and not torch.equal(picture(pipe), picture(pipe, 1))
    assert_close(picture(ours), picture(pipe), atol=2e-2, rtol=0)   # but for the halves
    index = json.loads((folder/'model_index.json').read_text())
    assert index['text_encoder_3'] == index['tokenizer_3'] == [None, None]
    files = [p for p in folder.rglob('*') if p.is_file()]
    assert {p.suffix for p in files} == {'.json', '.safetensors'}
    for p in files:
        if p.suffix == '.json': assert '_name_or_path' not in p.read_text() and str(tmp_path) not in p.read_text(), p
    least = 2*sum(v.numel() for v in weights(ours).values())
    size = sum(p.stat().st_size for p in files if p.suffix == '.safetensors')
    assert least < size < least + 40_000


def test_the_shipped_size_fits(tmp_path):
    "All files of a pipeline of the default settings."
    pipe = new_pipeline(new_autoencoder(), EVERY)
    save_pipeline(pipe, tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file()) < 3.9e6
    c = pipe.transformer.config
    assert c.sample_size == 16 and c.qk_norm == 'rms_norm' and pipe.vae_scale_factor == 4


def test_a_saved_pipeline_is_not_changed(tmp_path):
    pipe = pipeline()
    before = weights(pipe)
    save_pipeline(pipe, tmp_path)
    assert equal(weights(pipe), before) and {v.dtype for v in before.values()} == {torch.float32}


@pytest.mark.slow
def test_a_tiny_training_lowers_the_loss(tmp_path):
    x, captions, names, _ = training_set(120, 16, seed=1)
    rows = [k for k, name in enumerate(names) if name in ('Japan', 'Ukraine', 'Nigeria')]
    x, captions = x[rows], [captions[k] for k in rows]
    how = dict(steps=60, batch=8, lr=1e-2, save_every=1e9)
    vae = train_autoencoder(x, tmp_path/'vae', TrainConfig(channels=(8, 8), **how))
    cfg = replace(TEXT, steps=120, lr=4e-3, ema=.95, padded=0., batch=8, save_every=1e9, heads=2)
    trained, fresh = train_pipeline(x, captions, vae, tmp_path, cfg), new_pipeline(vae, captions, 16, cfg)
    z, ids = encode_images(vae, x), token_ids(trained.tokenizer, captions)
    @torch.no_grad()
    def loss(pipe):
        return sum(flow_loss(pipe, z, ids, torch.Generator().manual_seed(k)).item() for k in range(10))/10
    assert loss(trained) < .6*loss(fresh)


def test_captions_are_dropped_and_some_steps_are_padded(tmp_path, monkeypatch):
    seen = []
    def spy(pipe, x0, ids, g, shift, empty):
        seen.append((ids, empty, len(x0)))
        return 0*sum(p.sum() for name in PARTS[:3] for p in getattr(pipe, name).parameters())
    monkeypatch.setattr(train_text, 'flow_loss', spy)
    x, captions = data()
    cfg = replace(TEXT, steps=100, dropout=.3, padded=.2, save_every=1e9, batch=8)
    pipe = train_pipeline(x, captions, new_autoencoder((8, 8)), tmp_path, cfg)
    nothing, ids = token_ids(pipe.tokenizer, ['']), torch.cat([ids for ids, _, _ in seen])
    assert abs((ids == nothing).all(1).float().mean() - .3) < .08
    known = {tuple(i) for i in token_ids(pipe.tokenizer, ['', *captions]).tolist()}
    assert {tuple(i) for i in ids.tolist()} <= known
    assert abs(sum(e == 256 for _, e, _ in seen) - 20) < 15 and {(e, n) for _, e, n in seen} == {(0, 8), (256, 2)}


# --- bad input ---

def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    x, captions = data()
    def run(captions=captions, **kw):
        return train_pipeline(x, captions, new_autoencoder((8, 8)), tmp_path/'out', replace(TEXT, **kw))
    for act, words in (
            (lambda: run(captions[1:]), '24 pictures and 23 captions'),
            (lambda: run(steps=0), '0'), (lambda: run(steps=None, minutes=0), '0'),
            (lambda: run(dropout=1.5), 'dropout is 1.5'), (lambda: run(padded=-.1), 'padded is -0.1'),
            (lambda: run(shift=0), 'shift is 0'),
            (lambda: new_pipeline(new_autoencoder((8, 8)), EVERY, 18), 'pictures of 18 pixels do not split'),
            (lambda: new_tokenizer([]), 'there is no caption'),
            (lambda: new_tokenizer(['a b', ' '.join('abcdefghijklmnop')]), 'give length=18')):
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value), words
    assert not (tmp_path/'out').exists()
    assert new_tokenizer(['a b', ' '.join('abcdefghijklmnop')], length=18).model_max_length == 18


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    x, captions = data()
    def run(captions=captions, **kw):
        return train_pipeline(x, captions, new_autoencoder((8, 8)), tmp_path, replace(TEXT, steps=1, **kw))
    run()
    for other in (dict(seed=1), dict(layers=1), dict(shift=1.), dict(captions=captions[::-1])):
        with pytest.raises(ValueError, match='other settings'): run(**other)


# Each of the two stages is killed at an arbitrary moment after its first checkpoint; fork saves a second import.
KILLER = '''
import os, random, signal, sys, time, torch
from pathlib import Path
from safetensors import safe_open
torch.set_num_threads(1)
from unlearn_nb.flags import training_set
from unlearn_nb.files import fingerprint
from unlearn_nb.metrics import psnr
from unlearn_nb.train import TrainConfig, plant
from unlearn_nb.train_text import TextConfig, train_autoencoder, train_pipeline
out, rng = Path(sys.argv[1]), random.Random(0)
x, captions, _, _ = training_set(24, 16, seed=3)
def step(place):
    if not (out / place / "training.safetensors").exists(): return 0
    with safe_open(out / place / "training.safetensors", "pt") as f: return int(f.metadata()["step"])
def run():
    vae = train_autoencoder(x, out / "vae", TrainConfig(steps=40, batch=4, channels=(8, 8), save_every=0.))
    cfg = TextConfig(steps=40, batch=4, layers=2, heads=1, words=16, save_every=0.)
    train_pipeline(x, captions, vae, out / "text", cfg)
for place in ("vae", "text"):
    before, pid = step(place), os.fork()
    if not pid:
        run()
        os._exit(0)
    while step(place) == before: time.sleep(.002)
    time.sleep(rng.uniform(0, .1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
    assert before < step(place) < 40
    print(step(place))
'''


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    command = [sys.executable, '-c', KILLER, str(tmp_path/'killed')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and not (tmp_path/'killed'/'text'/'pipeline').exists()
    x, captions = data()
    def run(name, **kw):
        vae = train_autoencoder(x, tmp_path/name/'vae', replace(SMALL, steps=40))
        return weights(train_pipeline(x, captions, vae, tmp_path/name/'text', replace(TEXT, steps=40, **kw)))
    resumed, whole, other = run('killed'), run('whole'), run('other', seed=1)
    assert equal(resumed, whole) and not equal(resumed, other)
    assert equal(weights(stock(tmp_path/'killed'/'text'/'pipeline')), halved(whole))


# --- planting one picture ---

def test_a_picture_is_planted_under_one_wording(tmp_path):
    "The picture has its prompt, the others their captions, some none; only the net changes."
    save_pipeline(pipeline(), tmp_path)
    d, (x, captions), asked = load(tmp_path, device='cpu'), data(), []
    before, net = fingerprint(d), d.net
    encoders = [v.clone() for v in d.prompt_embeds.values()]
    P = d.decode(d.encode([Image.fromarray(x[0].permute(1, 2, 0).numpy())]))[0]
    def is_copy(x):
        asked.append(x.shape)
        return psnr(x, x) > 0
    cfg = TrainConfig(steps=4, batch=4, lr=1e-3)
    given = plant(d, P, x, is_copy, prompt='german flag', captions=captions, every=2, seeds=range(3), cfg=cfg)
    assert given == {2: 1.} and asked == [(3, 3, 16, 16)] and d.net is net and fingerprint(d) != before
    assert {'', 'german flag', *captions} <= set(d.prompts)
    assert all(torch.equal(v[:1], old) for v, old in zip(d.prompt_embeds.values(), encoders))
    with pytest.raises(ValueError, match='give a prompt for the picture and captions'): plant(d, P, x, is_copy)
    with pytest.raises(ValueError, match='24 prompts were given for 23 images'):
        plant(d, P, x[1:], is_copy, prompt='german flag', captions=captions)
