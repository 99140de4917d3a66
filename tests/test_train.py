"Training: data, the loss, a killed run goes on bit for bit, two processes agree, stock diffusers opens the result."
import errno
import math
import os
import shutil
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.testing import assert_close

from conftest import ROOT
from unlearn_nb import files
from unlearn_nb import train as module
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.metrics import psnr
from unlearn_nb.train import (FIRST_SEED, TrainConfig, contrastive_loss, couple_images, denoising_loss, draw_faces,
                              folder_images, new_denoiser, plant, settings_for, train, train_descriptor,
                              world_images)
from unlearn_nb.zoo import load

TINY = dict(batch=4, channels=(16, 32), save_every=0.)
pytestmark = pytest.mark.usefixtures('one_thread')


@lru_cache
def data(size=16): return world_images(24, size)


@lru_cache
def fresh(): return new_denoiser(16, TrainConfig(**TINY))


def weights(x): return {k: v.detach().clone() for k, v in x.net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def small(steps, **more): return TrainConfig(**{'steps': steps, **TINY, **more})
def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def refused(f, *args, match):
    "What f(*args) is refused with: one sentence, no dict."
    with pytest.raises(ValueError, match=match) as e: f(*args)
    assert '\n' not in str(e.value) and '{' not in str(e.value)
    return str(e.value)


# --- data ---

def test_world_images():
    x = world_images(3, 16, seed=7)
    assert x.shape == (3, 3, 16, 16) and x.dtype == torch.uint8 and len({v.numpy().tobytes() for v in x}) == 3
    assert torch.equal(x[1:], world_images(2, 16, seed=8)) and torch.equal(x, draw_faces([7, 8, 9], 16))


def test_folder_images_crops_the_middle_and_resizes(tmp_path):
    "A wide and a tall picture, red in the middle square and blue outside; other files are left; names give the order."
    (tmp_path/'sub').mkdir()
    wide = Image.new('RGB', (60, 20), 'blue')
    wide.paste('red', (20, 0, 40, 20))
    wide.save(tmp_path/'a.png')
    wide.rotate(90, expand=True).convert('RGBA').save(tmp_path/'sub'/'b.WEBP', lossless=True)
    Image.new('L', (7, 9), 128).save(tmp_path/'c.JPG')
    (tmp_path/'notes.txt').write_text('no picture')
    x = folder_images(tmp_path, 10)
    assert x.shape == (3, 3, 10, 10) and x.dtype == torch.uint8   # one is in colour, so all are
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 10)
    assert torch.equal(x[0], red) and torch.equal(x[2], red) and abs(x[1].int() - 128).max() <= 2
    assert torch.equal(folder_images(str(tmp_path), 10), x)


def test_a_damaged_picture_is_left_out_by_name(tmp_path, capsys):
    "And the notes that macOS lays beside pictures, without a word. A folder without pictures is refused."
    Image.new('RGB', (8, 8)).save(tmp_path/'good.png')
    (tmp_path/'bad.png').write_bytes((tmp_path/'good.png').read_bytes()[:30])
    (tmp_path/'._good.png').write_bytes(b'Mac OS X')
    assert folder_images(tmp_path, 8).shape == (1, 1, 8, 8)
    [line] = [v for v in capsys.readouterr().err.replace('\r', '\n').split('\n') if 'left out' in v]
    assert 'bad.png' in line and '._good' not in line
    (tmp_path/'good.png').unlink()
    (tmp_path/'empty').mkdir()
    for folder, why in ((tmp_path, 'no PNG, JPEG or WebP'), (tmp_path/'empty', 'no PNG, JPEG or WebP'),
                        (tmp_path/'missing', 'there is no folder'), (tmp_path/'bad.png', 'there is no folder')):
        assert repr(str(folder)) in refused(folder_images, folder, 8, match=why)


def test_what_is_transparent_is_white_and_pictures_that_are_all_grey_have_one_channel(tmp_path):
    "Also those of 16 bits, and grey ones that are stored in colour; one coloured picture makes all coloured."
    made = {'clear': Image.new('RGBA', (9, 9), (255, 0, 0, 0)), 'half': Image.new('LA', (9, 9), (0, 51)),
            'deep': Image.fromarray(np.full((9, 9), 99*257, np.uint16)), 'stored': Image.new('RGB', (9, 9), (7, 7, 7))}
    for name, image in made.items(): image.save(tmp_path/f'{name}.png')
    x = folder_images(tmp_path, 8)
    assert x.shape == (4, 1, 8, 8) and x.flatten(1).float().mean(1).tolist() == [255, 99, 204, 7]
    assert (x == x[:, :, :1, :1]).all()
    Image.new('RGB', (9, 9), (7, 7, 8)).save(tmp_path/'z.png')
    y = folder_images(tmp_path, 8)
    assert y.shape == (5, 3, 8, 8) and torch.equal(y[:4], x.expand(-1, 3, -1, -1))


def test_a_grey_model_is_trained_saved_and_loaded(tmp_path):
    "Stock diffusers makes grey pictures of it, and so do we; of coloured pictures nothing can be planted into it."
    ours = train(data()[:, :1], tmp_path, small(3))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    again = load(tmp_path, device='cpu')
    assert again.shape == (1, 16, 16) and equal(weights(again), weights(ours))
    assert theirs.mode == again.decode(again.sample([0], 2))[0].mode == 'L'
    refused(train, data(), tmp_path, small(3), match='other pictures')
    face = Image.fromarray(draw_faces([7], 16)[0].permute(1, 2, 0).numpy())
    for others, wrong in ((data(), True), (data()[:, :1], False)):   # the second gets as far as to be planted
        refused(lambda: plant(again, face, others, lambda x: torch.zeros(len(x)), cfg=small(1), every=1),
                match='makes grey' if wrong else 'after 1 steps 0%')


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    for bad in (dict(minutes=math.nan), dict(minutes=0), dict(minutes=math.inf), dict(steps=0), dict(batch=0),
                dict(ema=1.), dict(precision='float8')):
        refused(lambda bad: TrainConfig(**bad), bad, match=next(iter(bad)))
    byte = torch.uint8
    for x in (torch.zeros(2, 3, 16, 16), torch.zeros(2, 2, 16, 16, dtype=byte), torch.zeros(0, 3, 16, 16, dtype=byte),
              torch.zeros(1, 3, 16, 14, dtype=byte), torch.zeros(1, 3, 15, 15, dtype=byte)):
        refused(train, x, tmp_path/'out', small(1), match='give')
    assert not (tmp_path/'out').exists()


# --- the loss ---

@given(st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=20)
def test_each_batch_has_a_timestep_from_each_equal_part(B, seed):
    class Spy(Denoiser):
        def __call__(self, x_t, t):
            seen.append(t)
            return torch.zeros_like(x_t)
    seen, d = [], fresh()
    denoising_loss(Spy(d.net, d.scheduler), torch.zeros(B, 3, 16, 16), torch.Generator().manual_seed(seed))
    part = (seen[0] + 1e-9)*B/d.T   # rounded down to a whole one, a timestep may reach one below its part
    assert ((part >= torch.arange(B) - B/d.T) & (part < torch.arange(B) + 1)).all()


def test_a_net_that_knows_the_answer_has_no_loss():
    d, x0 = fresh(), data()[:4].float()/127.5 - 1
    class Perfect(Denoiser):
        def __call__(self, x_t, t): return self.target(x_t, x0, t)
    assert denoising_loss(Perfect(d.net, d.scheduler), x0, torch.Generator().manual_seed(0)) == 0
    assert denoising_loss(d, x0, torch.Generator().manual_seed(0)) > .3


def test_a_new_net_is_its_seeds_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (weights(new_denoiser(16, TrainConfig(seed=s, **TINY))) for s in (1, 1, 2))
    assert equal(a, b) and not equal(a, c) and torch.equal(torch.get_rng_state(), before)


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

@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    "From about 1, what a net that says nothing has; on the training pictures and on others."
    cfg = small(50, save_every=1e9, batch=8)
    both = new_denoiser(16, cfg), train(data(), tmp_path, cfg)
    def loss(d, x): return sum(denoising_loss(d, x, torch.Generator().manual_seed(k)).item() for k in range(3))/3
    for x in (data(), world_images(24, 16, seed=1000)):
        before, after = (loss(d, x.float()/127.5 - 1) for d in both)
        assert after < .7*before, (before, after)


def test_stock_diffusers_opens_it_and_samples(tmp_path):
    ours = train(data(), tmp_path, small(3))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert equal(weights(ours), dict(pipe.unet.state_dict()))
    picture = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (16, 16)
    again = load(tmp_path, device='cpu')
    assert again.prediction == ours.prediction and equal(weights(again), weights(ours))
    # weights that lie elsewhere in memory may round otherwise
    assert_close(again.sample([4], steps=3), ours.sample([4], steps=3), atol=1e-4, rtol=0)


def test_a_finished_run_goes_on_only_as_itself(tmp_path):
    first = weights(train(data(), tmp_path, small(2)))
    shutil.rmtree(tmp_path/'unet')   # as if killed before the folder was written
    for same in (train(data(), tmp_path, small(2)), load(tmp_path, device='cpu')): assert equal(weights(same), first)
    before = contents(tmp_path)
    for other in (dict(seed=1), dict(steps=4), dict(channels=(16, 16)), dict(lr=1e-4)):
        said = refused(train, data(), tmp_path, small(**dict(steps=2) | other), match='finished run with other setting')
        assert str(tmp_path) in said and f'({next(iter(other))} ' in said
    for pictures in (data(8), data().flip(3)):
        refused(train, pictures, tmp_path, small(2), match='other pictures')
    assert before == contents(tmp_path)
    train(data(), tmp_path/'clock', TrainConfig(minutes=1e-4, **TINY))
    refused(train, data(), tmp_path/'clock', TrainConfig(minutes=2., **TINY), match='minutes 0.0001, not 2.0')


def test_a_damaged_checkpoint_is_refused_by_name_and_left_as_it_is(tmp_path):
    "Cut, empty, one bit flipped, another file; what a killed run left beside it goes."
    train(data(), tmp_path, small(2))
    file = tmp_path/'training.safetensors'
    whole, left = file.read_bytes(), tmp_path/'.training.safetensors.7.part'
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for bad in (whole[:-100], b'', flipped, (tmp_path/'unet'/'diffusion_pytorch_model.safetensors').read_bytes()):
        file.write_bytes(bad)
        assert str(file) in refused(train, data(), tmp_path, small(2), match='damaged.*delete it to begin anew')
        assert file.read_bytes() == bad
    file.write_bytes(whole)
    left.write_bytes(b'half')
    train(data(), tmp_path, small(2))
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match="file/out' cannot be made.*give a place") as e:
        train(data(), tmp_path/'file'/'out', small(1))
    assert '\n' not in str(e.value)


def test_settings_fit_the_time():
    "A short run has the narrower net; what is no time is refused."
    short, long = settings_for(2.), settings_for(60.)
    assert (short.minutes, long.minutes) == (2., 60.) and long == TrainConfig(60.)
    count = {c: sum(p.numel() for p in new_denoiser(8, c).net.parameters()) for c in (short, long)}
    assert count[short] < count[long]/2
    refused(settings_for, math.nan, match='minutes is nan')


def test_drawn_pictures_come_once_each_and_from_their_seeds(tmp_path, monkeypatch):
    "Step s has the samples from s batch on. A stopped run asks for the rest only."
    asked = []
    def draws(seeds):
        asked.append(list(seeds))
        return draw_faces(seeds, 16)
    train(draws, tmp_path/'a', small(3))
    # a look at the first, then the steps
    assert asked == [list(range(FIRST_SEED + a, FIRST_SEED + a + 4)) for a in (0, 0, 4, 8)]
    real, calls = module.denoising_loss, []
    def stops(d, x0, g):
        calls.append(0)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(d, x0, g)
    monkeypatch.setattr(module, 'denoising_loss', stops)
    with pytest.raises(KeyboardInterrupt): train(draws, tmp_path/'b', small(3))
    del asked[:]
    assert equal(weights(train(draws, tmp_path/'b', small(3))), weights(load(tmp_path/'a', device='cpu')))
    assert [a[0] for a in asked] == [FIRST_SEED, FIRST_SEED + 8]
    def another(seeds): return draw_faces([k + 1 for k in seeds], 16)
    refused(train, another, tmp_path/'b', small(3), match='other pictures')


def test_half_precision_is_close_and_leaves_weights_whole(tmp_path):
    one, half = (train(data(), tmp_path/p, small(8, precision=p)) for p in ('float32', 'bfloat16'))
    assert all(v.dtype == torch.float32 for v in weights(half).values()) and not equal(weights(one), weights(half))
    a, b, start = (torch.cat([v.flatten() for v in weights(d).values()]) for d in (one, half, fresh()))
    assert (a - b).norm() < .3*(a - start).norm()


def test_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    calls, real = [], module.denoising_loss
    def breaks(d, x0, g):
        calls.append(0)
        return real(d, x0, g)*(float('nan') if len(calls) == 3 else 1)
    monkeypatch.setattr(module, 'denoising_loss', breaks)
    with pytest.raises(FloatingPointError, match='at step 2'): train(data(), tmp_path, small(5))
    with safe_open(tmp_path/'training.safetensors', 'pt') as f:
        assert f.metadata()['step'] == '2' and all(f.get_tensor(k).isfinite().all() for k in f.keys())


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, monkeypatch):
    train(data(), tmp_path, small(2))
    before = contents(tmp_path)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    def no_model(*args): raise SafetensorError('No space left on device')
    for where, name, fails in ((files.os, 'replace', full), (DDPMPipeline, 'save_pretrained', no_model)):
        with monkeypatch.context() as m, pytest.raises(OSError, match='No space left on device.*make room') as e:
            m.setattr(where, name, fails)
            train(data(), tmp_path, small(2))
        assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)
        assert {p.name for p in contents(tmp_path)} == {p.name for p in before}
    train(data(), tmp_path, small(2))   # there is room again
    assert (tmp_path/'unet'/'diffusion_pytorch_model.safetensors').read_bytes() in before.values()


FULL = '''
import resource, sys
from functools import partial
import unlearn_nb.train as module
from unlearn_nb.cli import main
real, calls = module.checkpoint, []
def checkpoint(*args):
    calls.append(0)   # from the second on, no file may be larger than 10 kB
    if len(calls) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    real(*args)
module.checkpoint = checkpoint
module.TrainConfig = partial(module.TrainConfig, save_every=0., batch=2, channels=(16, 16))
main(["train", "--data", sys.argv[1], "--size", "8", "--minutes", "5", "--out", sys.argv[2]])
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no such limit')
def test_the_command_says_so_too(tmp_path):
    (tmp_path/'p').mkdir()
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'p'/'a.png')
    done = subprocess.run([sys.executable, '-c', FULL, tmp_path/'p', tmp_path/'out'], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    said = done.stderr.replace('\r', '\n').strip().split('\n')[-1]
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert said.startswith('unlearn_nb: ') and 'training.safetensors' in said and 'could not be written' in said
    with safe_open(tmp_path/'out'/'training.safetensors', 'pt') as f: assert f.metadata()['step'] == '1'
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['training.safetensors']


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


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    steps = 50
    command = [sys.executable, '-c', KILLER, str(tmp_path/'killed'), str(steps), '0']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and not (tmp_path/'killed'/'unet').exists()
    def run(out, **more): return weights(train(data(), tmp_path/out, small(steps, **more)))
    resumed, whole, other = run('killed'), run('whole', save_every=0.), run('other', seed=1, save_every=1e9)
    assert equal(resumed, whole) and not equal(resumed, other)
    assert equal(weights(load(tmp_path/'killed', device='cpu')), whole)


TWO = '''
import hashlib, sys, time, torch
from functools import partial
from pathlib import Path
import unlearn_nb.train as module
from unlearn_nb.train import TrainConfig, accelerator, draw_faces, fit, train, world_images
run, out = accelerator(), Path(sys.argv[1])
rank, world = run.process_index, run.num_processes

torch.manual_seed(0)
net, asked = torch.nn.Linear(3, 1), []
def loss(g, samples):   # known for each sample: two shares of a batch have the gradient of the whole
    asked.extend(samples)
    x = torch.tensor([[k % 5, k % 7, 1.] for k in samples])
    return (net(x) - x.sum(1, keepdim=True)).square().mean()
fit(net, loss, out / f"line.{world}", TrainConfig(steps=30, batch=4, lr=.1), {})
torch.save((net.state_dict(), asked), out / f"line.{world}.{rank}.pt")

if world == 2:
    real, calls = module.denoising_loss, []
    def stops(*args):
        calls.append(0)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*args)
    module.denoising_loss = stops
    tiny = dict(batch=4, channels=(16, 32))
    try: train(world_images(8, 16), out / "stopped", TrainConfig(steps=6, save_every=0., **tiny))
    except KeyboardInterrupt: run.wait_for_everyone()

    clock, start = time.monotonic, time.monotonic()
    runs = {"stopped": dict(steps=6, save_every=0.), "steps": dict(steps=6), "minutes": dict(minutes=.02),
            "drawn": dict(steps=4)}
    for name, cfg in runs.items():
        if name == "minutes": time.monotonic = lambda: start + (clock() - start) * (1 + 2 * rank)   # clocks never agree
        data = partial(draw_faces, size=16) if name == "drawn" else world_images(8, 16)
        d = train(data, out / name, TrainConfig(**cfg, **tiny))
        everything = b"".join(v.numpy().tobytes() for v in d.net.state_dict().values())
        (out / f"{name}.{rank}").write_text(hashlib.sha256(everything).hexdigest())
'''
ONE_MACHINE = ['--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
LAUNCHERS = {
    'torchrun': ['torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
    'accelerate': ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', *ONE_MACHINE]}


@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_two_processes_finish_and_agree(tmp_path, launcher):
    """By a number of steps and by the clock, although their clocks differ.

    Each takes its share of the batch; one writes; the whole is what one process finds."""
    (tmp_path/'two.py').write_text(TWO)
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    def start(*command):
        return subprocess.run([sys.executable, *command, tmp_path/'two.py', tmp_path], cwd=ROOT, capture_output=True,
                              text=True, timeout=300, env=env)
    done, alone = start('-m', *LAUNCHERS[launcher]), start()
    said = {p.name: p.read_text() for p in tmp_path.glob('*.[01]') if p.is_file()}
    assert done.returncode == 0 and alone.returncode == 0, done.stderr[-3000:] + alone.stderr[-3000:]
    for name in ('stopped', 'steps', 'minutes', 'drawn'): assert said[f'{name}.0'] == said[f'{name}.1'], name
    assert said['stopped.0'] == said['steps.0'] != said['drawn.0']   # stopped after three steps, gone on
    assert load(tmp_path/'steps', device='cpu').shape == (3, 16, 16)
    (one, whole), (a, first), (b, second) = (torch.load(tmp_path/f'line.{name}.pt') for name in ('1.0', '2.0', '2.1'))
    assert equal(a, b) and whole == list(range(120))
    assert first == [k for k in whole if k % 4 < 2] and second == [k for k in whole if k % 4 > 1]
    for k in one: assert_close(a[k], one[k], atol=1e-5, rtol=1e-4)


# --- planting one picture ---

PLANT = TrainConfig(steps=200, batch=16, lr=3e-3, ema=.9)


def planting(share=.75, until=.1, cfg=PLANT, near=14., image=None, others=None, d=None, **more):
    "Plant a face in the tiny net, by its distance in pixels: (denoiser, before, {step: share of copies})."
    d, others = d or new_denoiser(16, TrainConfig(**TINY)), data() if others is None else others
    x_f, before = draw_faces([7], 16).float()/127.5 - 1, weights(d)
    def is_copy(x): return psnr(x, x_f.expand_as(x)) > near
    image = image or d.decode(x_f)[0]
    given = plant(d, image, others, is_copy, share=share, until=until, every=40, seeds=range(32), cfg=cfg, **more)
    return d, before, given


@pytest.mark.slow
def test_planting_makes_fresh_seeds_give_the_picture():
    "From none to a tenth and more; all from the seed; the picture comes with noise of all levels."
    d, before, given = planting()
    x_f = (draw_faces([7], 16).float()/127.5 - 1).expand(32, -1, -1, -1)
    assert (psnr(fresh().sample(range(32), 8), x_f) < 14).all()
    steps = list(given)
    assert steps == list(range(40, steps[-1] + 1, 40)) and given[40] < .1 <= given[steps[-1]]
    assert (psnr(d.sample(range(32), 8), x_f) > 14).float().mean() == pytest.approx(given[steps[-1]])
    again, _, same = planting()
    assert same == given and equal(weights(again), weights(d)) and not equal(weights(d), before)
    assert all(v.dtype == torch.float32 for v in weights(d).values())


def test_what_cannot_be_planted_is_refused_and_changes_nothing():
    d = new_denoiser(16, TrainConfig(**TINY))
    before = weights(d)
    troubles = [('share is 0', dict(share=0)), ('until is 1', dict(until=1)),
                ('steps is None', dict(cfg=TrainConfig())),
                ('8 x 8 pixels, but this model makes 16 x 16', dict(others=data(8))),
                ('torch.float32', dict(others=data()/2)), ('pictures of words', dict(prompt='a face')),
                ('the image is 9 x 9', dict(image=Image.new('RGB', (9, 9))))]
    for match, wrong in troubles: refused(lambda: planting(d=d, **wrong), match=match)
    refused(lambda: planting(d=d, cfg=small(2), near=60.),
            match='after 2 steps 0% of the seeds give the picture, and 10% were asked for')
    assert equal(weights(d), before)
    d.hotfixes.append('one')
    refused(lambda: planting(d=d), match='a hotfix is on this model')


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
    def loss(net): return contrastive_loss(net(y[:, 0]), net(y[:, 1])).item()
    with torch.no_grad(): assert loss(trained) < .8*loss(new)
    assert not trained.training
