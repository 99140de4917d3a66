"Training: data, the loss, a run that is killed goes on bit for bit, two processes agree, stock diffusers opens what is written."
import math
import os
import shutil
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from diffusers import DDPMPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

from conftest import ROOT
from unlearn_nb import train as room
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.train import (TrainConfig, contrastive_loss, couple_images, denoising_loss, folder_images,
                              new_denoiser, train, train_descriptor, world_images)
from unlearn_nb.zoo import load

TINY = dict(batch=4, channels=(16, 32), save_every=0.)


pytestmark = pytest.mark.usefixtures('one_thread')


@lru_cache
def data(size=16): return world_images(24, size)


def weights(x): return {k: v.detach().clone() for k, v in x.net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- data ---

def test_world_images():
    x = world_images(3, 16, seed=7)
    assert x.shape == (3, 3, 16, 16) and x.dtype == torch.uint8 and len({v.numpy().tobytes() for v in x}) == 3
    assert torch.equal(x[1:], world_images(2, 16, seed=8)) and not torch.equal(x, world_images(3, 16, seed=8))


def test_folder_images_crops_the_middle_and_resizes(tmp_path):
    "A wide and a tall picture, red within the middle square and blue outside; other files are left aside; names give the order."
    (tmp_path/'sub').mkdir()
    wide = Image.new('RGB', (60, 20), 'blue')
    wide.paste('red', (20, 0, 40, 20))
    wide.save(tmp_path/'a.png')
    wide.rotate(90, expand=True).convert('RGBA').save(tmp_path/'sub'/'b.WEBP', lossless=True)
    Image.new('L', (7, 9), 128).save(tmp_path/'c.JPG')
    (tmp_path/'notes.txt').write_text('no picture')
    x = folder_images(tmp_path, 10)
    assert x.shape == (3, 3, 10, 10) and x.dtype == torch.uint8
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 10)
    assert torch.equal(x[0], red) and torch.equal(x[2], red) and abs(x[1].int() - 128).max() <= 2
    assert torch.equal(folder_images(str(tmp_path), 10), x)


@pytest.mark.parametrize('make', [lambda f: None, lambda f: f.mkdir(), lambda f: (f.mkdir(), (f/'x.txt').write_text('x'))], ids=['missing', 'empty', 'no pictures'])
def test_a_folder_without_pictures_is_refused(tmp_path, make):
    make(tmp_path/'here')
    with pytest.raises(ValueError, match='no PNG, JPEG or WebP') as e: folder_images(tmp_path/'here', 8)
    assert str(tmp_path/'here') in str(e.value) and '\n' not in str(e.value)


def test_a_damaged_picture_is_refused_by_name(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'good.png')
    (tmp_path/'bad.png').write_bytes((tmp_path/'good.png').read_bytes()[:30])
    with pytest.raises(ValueError, match='bad.png') as e: folder_images(tmp_path, 8)
    assert '\n' not in str(e.value)


# --- the loss ---

@given(st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=20)
def test_each_batch_has_a_level_from_each_equal_part(B, seed):
    class Spy(Denoiser):
        def __call__(self, x_t, t):
            levels.append(t)
            return torch.zeros_like(x_t)
    levels, d = [], new_denoiser(16, TrainConfig(**TINY))
    denoising_loss(Spy(d.net, d.scheduler), torch.zeros(B, 3, 16, 16), torch.Generator().manual_seed(seed))
    part = (levels[0] + 1e-9)*B/d.T   # rounded down to a whole level, a level may reach one below its part
    assert ((part >= torch.arange(B) - B/d.T) & (part < torch.arange(B) + 1)).all()


def test_a_net_that_knows_the_answer_has_no_loss():
    d, x0 = new_denoiser(16, TrainConfig(**TINY)), data()[:4].float()/127.5 - 1
    class Perfect(Denoiser):
        def __call__(self, x_t, t): return self.target(x_t, x0, t)
    assert denoising_loss(Perfect(d.net, d.scheduler), x0, torch.Generator().manual_seed(0)) == 0
    assert denoising_loss(d, x0, torch.Generator().manual_seed(0)) > .3


def test_a_new_net_is_its_seeds_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (weights(new_denoiser(16, TrainConfig(seed=s, **TINY))) for s in (1, 1, 2))
    assert equal(a, b) and not equal(a, c) and torch.equal(torch.get_rng_state(), before)


def test_the_loss_falls(tmp_path):
    "From about 1, what a net that says nothing has; on the training pictures and on others."
    cfg = TrainConfig(steps=50, **TINY | dict(save_every=1e9, batch=8))
    new, trained = new_denoiser(16, cfg), train(data(), tmp_path, cfg)
    for x in (data(), world_images(24, 16, seed=1000)):
        before, after = (sum(denoising_loss(d, x.float()/127.5 - 1, torch.Generator().manual_seed(k)).item() for k in range(3))/3 for d in (new, trained))
        assert after < .7*before, (before, after)


@pytest.mark.parametrize('seed', [0, 3])
def test_contrastive_loss_of_known_vectors(seed):
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))
    assert contrastive_loss(q, q) < 1e-3                                    # each its own
    assert_close(contrastive_loss(q, q.roll(1, 0)), torch.tensor(1/.07), atol=1e-3, rtol=1e-3)   # each another's
    assert_close(contrastive_loss(q[:1].expand(8, -1), q[:1].expand(8, -1)), torch.tensor(math.log(8)))   # all the same
    assert_close(contrastive_loss(q, q, temperature=1.), torch.tensor(math.log(math.e + 7) - 1))


@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(.05, 2))
@settings(max_examples=40)
def test_contrastive_loss_is_the_formula(seed, n, temperature):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=1) for _ in range(2))
    logits = (a.double() @ b.double().T/temperature).exp()
    loss = contrastive_loss(a, b, temperature)
    assert_close(loss.double(), -(logits.diag()/logits.sum(1)).log().mean(), atol=1e-4, rtol=1e-4)
    order = torch.randperm(n, generator=g)
    assert_close(contrastive_loss(a[order], b[order], temperature), loss)   # the order of people is nothing


# --- a run ---

def test_stock_diffusers_opens_it_and_samples(tmp_path):
    ours = train(data(), tmp_path, TrainConfig(steps=3, **TINY))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert equal(weights(ours), {k: v for k, v in pipe.unet.state_dict().items()})
    picture = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (16, 16)
    again = load(tmp_path, device='cpu')
    assert again.prediction == ours.prediction and equal(weights(again), weights(ours))
    assert_close(again.sample([4], steps=3), ours.sample([4], steps=3), atol=1e-4, rtol=0)   # weights that lie elsewhere in memory may round otherwise


def test_a_finished_run_is_not_trained_further(tmp_path):
    cfg = TrainConfig(steps=3, **TINY)
    first = weights(train(data(), tmp_path, cfg))
    shutil.rmtree(tmp_path/'unet')   # as if killed before the folder was written
    assert equal(weights(train(data(), tmp_path, cfg)), first) and equal(weights(load(tmp_path, device='cpu')), first)


@pytest.mark.parametrize('other', [dict(seed=1), dict(steps=4), dict(channels=(16, 16)), dict(lr=1e-4)], ids=str)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, other):
    train(data(), tmp_path, TrainConfig(**dict(steps=1, **TINY)))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match='other settings') as e: train(data(), tmp_path, TrainConfig(**dict(steps=1, **TINY) | other))
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}


def test_a_checkpoint_of_another_picture_size_is_refused(tmp_path):
    train(data(), tmp_path, TrainConfig(steps=1, **TINY))
    with pytest.raises(ValueError) as e: train(data(8), tmp_path, TrainConfig(steps=1, **TINY))
    assert '\n' not in str(e.value)


def test_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    calls, real = [], room.denoising_loss
    def breaks(d, x0, g):
        calls.append(0)
        return real(d, x0, g)*(float('nan') if len(calls) == 3 else 1)
    monkeypatch.setattr(room, 'denoising_loss', breaks)
    with pytest.raises(FloatingPointError, match='at step 2'): train(data(), tmp_path, TrainConfig(steps=5, **TINY))
    with safe_open(tmp_path/'training.safetensors', 'pt') as f:
        assert f.metadata()['step'] == '2' and all(f.get_tensor(k).isfinite().all() for k in f.keys())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    train(data(), tmp_path, TrainConfig(steps=2, **TINY))
    before = (tmp_path/'training.safetensors').read_bytes()
    def fail(*args): raise OSError('disk full')
    monkeypatch.setattr(room.os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'): train(data(), tmp_path, TrainConfig(steps=2, **TINY))
    assert (tmp_path/'training.safetensors').read_bytes() == before


# A run is started twice and killed at an arbitrary moment after it has gone on; fork saves the time of a second import.
KILLER = '''
import os, random, signal, sys, time, torch
from pathlib import Path
from safetensors import safe_open
torch.set_num_threads(1)
from unlearn_nb.train import TrainConfig, train, world_images
out, steps, data, rng = Path(sys.argv[1]), int(sys.argv[2]), world_images(24, 16), random.Random(int(sys.argv[3]))
def step():
    if not (out / "training.safetensors").exists(): return 0
    with safe_open(out / "training.safetensors", "pt") as f: return int(f.metadata()["step"])
for _ in range(2):
    before, pid = step(), os.fork()
    if not pid:
        train(data, out, TrainConfig(steps=steps, batch=4, channels=(16, 32), save_every=0.))
        os._exit(0)
    while step() == before: time.sleep(.002)
    time.sleep(rng.uniform(0, .1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
    assert before < step() < steps
    print(step())
'''


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    steps = 50
    done = subprocess.run([sys.executable, '-c', KILLER, str(tmp_path/'killed'), str(steps), '0'], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and not (tmp_path/'killed'/'unet').exists()
    def run(out, **settings): return weights(train(data(), tmp_path/out, TrainConfig(steps=steps, **TINY | settings)))
    resumed, whole, other = run('killed'), run('whole', save_every=0.), run('other', seed=1, save_every=1e9)
    assert equal(resumed, whole) and not equal(resumed, other)
    assert equal(weights(load(tmp_path/'killed', device='cpu')), whole)


TWO = '''
import hashlib, os, sys, time, torch
from pathlib import Path
from unlearn_nb.train import TrainConfig, average, new_denoiser, processes, train, world_images
rank, world = processes()
out = Path(sys.argv[1])
net = new_denoiser(16, TrainConfig(channels=(16, 32))).net
for p in net.parameters(): p.grad = torch.full_like(p, 1. + rank)
assert average(net, 10. * rank) == 5 and all((p.grad == 1.5).all() for p in net.parameters())
clock, start = time.monotonic, time.monotonic()
for name, cfg in (("steps", dict(steps=6)), ("minutes", dict(minutes=.02))):
    if name == "minutes": time.monotonic = lambda: start + (clock() - start) * (1 + 2 * rank)   # clocks never agree
    d = train(world_images(8, 16), out / name, TrainConfig(**cfg, batch=4, channels=(16, 32)))
    (out / f"{name}.{rank}").write_text(hashlib.sha256(b"".join(v.numpy().tobytes() for v in d.net.state_dict().values())).hexdigest())
'''


def test_two_processes_finish_and_agree(tmp_path):
    "By a number of steps and by the clock, although their clocks differ; each takes its share of the batch; one writes."
    (tmp_path/'two.py').write_text(TWO)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'two.py'), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    said = {p.name: p.read_text() for p in tmp_path.glob('*.[01]')}
    assert said.get('steps.0') == said.get('steps.1') is not None, done.stderr[-3000:]
    assert load(tmp_path/'steps', device='cpu').shape == (3, 16, 16)
    assert said.get('minutes.0') == said.get('minutes.1') is not None and done.returncode == 0, done.stderr[-3000:]


# --- the descriptor's training ---

def test_couples_differ_in_one_trait_in_the_same_scenes():
    x = couple_images(3, scenes=2, seed=40)
    assert x.shape == (3, 2, 2, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(x[1:], couple_images(2, scenes=2, seed=41))
    near = (x[:, 0].float() - x[:, 1].float()).abs().mean((1, 2, 3, 4))      # the two of a couple
    far = (x[:, 0, 0].float() - x[:, 0, 1].float()).abs().mean((1, 2, 3))    # one person in two scenes
    assert (near < far).all() and near.max() > 0


def test_train_descriptor_is_its_seed_alone_and_learns():
    x = couple_images(6, scenes=2, seed=50)
    def end(**kw): return train_descriptor(x, steps=4, couples=6, **kw).state_dict()
    one, again, other = end(), end(), end(seed=1)
    assert equal(one, again) and not equal(one, other)
    new, trained = train_descriptor(x, steps=1, couples=2, lr=1e-9), train_descriptor(x, steps=20, couples=6)
    y = x.flatten(0, 1).float()/127.5 - 1
    with torch.no_grad(): before, after = (contrastive_loss(net(y[:, 0]), net(y[:, 1])).item() for net in (new, trained))
    assert after < .8*before and not trained.training
