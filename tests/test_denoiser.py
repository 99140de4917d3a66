"The denoiser against diffusers' own schedulers and pipelines."
import gc
import weakref
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from small_pipelines import levels, pipeline, transformer, unet, vae
from unlearn_nb.denoiser import PREDICTIONS, Denoiser, max_batch, read_image
from unlearn_nb.schedule import generators, randn
from unlearn_nb.zoo import words

every_prediction = pytest.mark.parametrize('prediction', PREDICTIONS)
SCHEDULES = ('linear', 'scaled_linear', 'squaredcos_cap_v2')


@lru_cache
def tiny_net(channels=3, size=8, **config):
    "An untrained net whose output depends on its input and on the level."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**{**dict(sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2), **config}).eval()


def tiny(prediction='epsilon', scheduler=DDPMScheduler, channels=3, **config):
    return Denoiser(tiny_net(channels), scheduler(prediction_type=prediction, **config))


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- levels: noise, snr, target, clean, gain ---

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_noise_is_add_noise(schedule):
    d, t = tiny(beta_schedule=schedule), torch.tensor([0, 1, 250, 500, 998, 999])
    x0, eps = normal(6, 3, 8, 8), normal(6, 3, 8, 8, seed=1)
    assert_close(d.noise(x0, eps, t), d.scheduler.add_noise(x0, eps, t))


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_v_target_is_get_velocity(schedule):
    d, t = tiny('v_prediction', beta_schedule=schedule), torch.tensor([20, 250, 500, 998, 999])
    x0, eps = normal(5, 3, 8, 8), normal(5, 3, 8, 8, seed=1)
    assert_close(d.target(d.noise(x0, eps, t), x0, t), d.scheduler.get_velocity(x0, eps, t), atol=1e-4, rtol=1e-4)


def test_snr_of_the_linear_schedule():
    d = tiny()
    assert_close(d.snr(torch.tensor([250])), torch.tensor([1.09]), atol=.005, rtol=0)
    assert_close(d.snr(torch.tensor([0, 10, 100, 250, 500, 900])).sqrt(), torch.tensor([100, 21, 2.9, 1.04, .29, .016]), rtol=.03, atol=0)
    assert (d.snr(torch.arange(d.T)).diff() < 0).all()


@every_prediction
@given(t=st.integers(0, 999), schedule=st.sampled_from(SCHEDULES), seed=st.integers(0, 99))
@example(t=0, schedule='linear', seed=0)
@example(t=999, schedule='squaredcos_cap_v2', seed=0)
@settings(max_examples=60)
def test_clean_inverts_target(prediction, t, schedule, seed):
    d, t = tiny(prediction, beta_schedule=schedule), torch.tensor([t])
    x0, x_t = normal(1, 3, 8, 8, seed=seed), normal(1, 3, 8, 8, seed=seed + 100)   # any pair, not only a noised image and its own clean image
    out = d.target(x_t, x0, t)
    scale = (d.gain(t) * out.abs().max()).clamp(min=1)   # float32 rounding, seen through the gain
    assert_close((d.clean(x_t, out, t) - x0)/scale, torch.zeros_like(x0), atol=2e-5, rtol=0)


@every_prediction
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_shift_of_the_target(prediction, t, seed):
    "METHOD 6.1: pointing the same x_t at x_s moves the target by sqrt(SNR) D, D/s or -D; times the gain by D at every level."
    d, t = tiny(prediction), torch.tensor([t])
    x_f, x_s, eps = (normal(1, 3, 8, 8, seed=3*seed + k).double() for k in range(3))
    d.abar = d.scheduler.alphas_cumprod.double()
    x_t, (_, s), D = d.noise(x_f, eps, t), d.scales(t), x_f - x_s
    shift = d.target(x_t, x_s, t) - d.target(x_t, x_f, t)
    assert_close(shift, {'epsilon': d.snr(t).sqrt().view(-1, 1, 1, 1)*D, 'v_prediction': D/s, 'sample': -D}[prediction])
    assert_close((d.gain(t)*shift).abs(), D.abs())
    assert_close(d.clean(x_t, d.target(x_t, x_s, t), t), x_s)


def test_targets_of_a_noised_image():
    x0, eps, t = normal(2, 3, 8, 8).double(), normal(2, 3, 8, 8, seed=1).double(), torch.tensor([3, 700])
    for prediction, expected in (('epsilon', eps), ('sample', x0), ('v_prediction', None)):
        d = tiny(prediction)
        d.abar = d.scheduler.alphas_cumprod.double()
        a, s = d.scales(t)
        assert_close(d.target(d.noise(x0, eps, t), x0, t), a*eps - s*x0 if expected is None else expected)


# --- sampler ---

@every_prediction
@pytest.mark.parametrize('clip_sample', [True, False])
@pytest.mark.parametrize('eta', [0., .3, 1.])
def test_step_is_ddim_step(prediction, clip_sample, eta):
    theirs = DDIMScheduler(prediction_type=prediction, timestep_spacing='trailing', clip_sample=clip_sample)
    d, x_t, z = Denoiser(tiny_net(), theirs), normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    for steps in (1000, 50, 4):
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == d.timesteps(999, steps).tolist()
        for t in (999, 999 - 1000//steps, 1000//steps - 1):   # the first, the second, the last step
            with torch.no_grad(): out = d(x_t, torch.full((4,), t))
            expected = theirs.step(out, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=z)
            x0 = d.predict(x_t, t)
            x = d.step(x_t, x0, t, t - 1000//steps, eta, z)
            if d.clip: x0 = x0.clamp(-d.clip, d.clip)
            # the clean image of a high level is the net's output times the gain, which carries float32 rounding along
            tolerance = 2e-5*max(1., x0.abs().max().item())
            assert_close(x0, expected.pred_original_sample, atol=tolerance, rtol=1e-5)
            assert_close(x, expected.prev_sample, atol=tolerance, rtol=1e-5)


@every_prediction
@pytest.mark.parametrize('clip_sample', [True, False])
def test_eta_one_over_all_levels_is_ddpm(prediction, clip_sample):
    theirs = DDPMScheduler(prediction_type=prediction, variance_type='fixed_small', clip_sample=clip_sample)
    d, x_t = Denoiser(tiny_net(), theirs), normal(2, 3, 8, 8)
    for t in (999, 998, 500, 250, 20, 1, 0):
        with torch.no_grad(): out = d(x_t, torch.full((2,), t))
        expected = theirs.step(out, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
        x = d.step(x_t, d.predict(x_t, t), t, t - 1, 1., normal(2, 3, 8, 8, seed=5))
        assert_close(x, expected, atol=1e-4, rtol=1e-4)


@every_prediction
def test_sample_is_the_stock_pipeline(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, timestep_spacing='trailing')
    d, seeds = Denoiser(tiny_net(), scheduler), [4, 0, 123456789]
    pipe = DDIMPipeline(d.net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=3, generator=[torch.Generator().manual_seed(s) for s in seeds], eta=0., num_inference_steps=20,
                  use_clipped_model_output=True, output_type='np').images
    ours = (d.sample(seeds, steps=20).clamp(-1, 1)/2 + .5).permute(0, 2, 3, 1)
    assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=0)
    picture = pipe(batch_size=1, generator=[torch.Generator().manual_seed(4)], num_inference_steps=20, use_clipped_model_output=True).images[0]
    assert abs(np.asarray(d.decode(d.sample([4], steps=20))[0]).astype(int) - np.asarray(picture)).max() <= 1


def test_a_sample_depends_on_its_own_seed_alone():
    d = tiny('v_prediction')
    for eta in (0., 1.):
        alone = {s: d.sample([s], steps=8, eta=eta) for s in (3, 8, 21)}
        for seeds, batch in (([3, 8, 21], 64), ([21, 8, 3], 2), ([8, 3, 8, 21, 3], 3), (range(25), 7), (torch.tensor([21, 8, 3]), 1)):
            torch.manual_seed(len(seeds))   # nor on the global generator
            x = d.sample(seeds, steps=8, eta=eta, batch=batch)
            for k, s in enumerate(seeds):
                if int(s) in alone: assert_close(x[k:k+1], alone[int(s)], atol=1e-5, rtol=1e-5)
        assert (alone[3] - alone[8]).abs().max() > .01


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    d = tiny()
    d.reconstruct(d.sample([1], steps=3, eta=1.), 10, [2], eta=1.)
    assert torch.equal(torch.get_rng_state(), before)


@given(start=st.integers(0, 999), steps=st.integers(1, 1200))
@example(start=999, steps=3)
def test_times_go_down_evenly(start, steps):
    t = tiny().timesteps(start, steps)
    assert t[0] == start and t.dtype == torch.int64 and len(t) == min(steps, start + 1) and t[-1] >= 0
    gaps = -t.diff(append=torch.tensor([-1]))
    assert (gaps >= 1).all() and gaps.max() - gaps.min() <= 1


def test_times_are_trailing_spacing():
    d, theirs = tiny(), DDIMScheduler(timestep_spacing='trailing')
    for n in (1, 2, 3, 5, 7, 10, 16, 30, 50, 64, 99, 128, 250, 333, 500, 999, 1000):
        theirs.set_timesteps(n)
        assert d.timesteps(999, n).tolist() == theirs.timesteps.tolist()[:n], n


def test_path_visits_and_ends():
    d = tiny()
    x = normal(2, 3, 8, 8)
    visited = list(d.path(x, 999, 4, generators([0, 1])))
    assert [t for t, _ in visited] == [999, 749, 499, 249, -1]
    assert visited[0][1] is x and all(v.shape == x.shape for _, v in visited)


# --- reconstruct ---

@pytest.mark.parametrize('t, steps, visited', [(6, 50, [6, 5, 4, 3, 2, 1, 0]), (6, 7, [6, 5, 4, 3, 2, 1, 0]), (0, 1, [0]), (250, 251, list(range(250, -1, -1))), (99, 2, [99, 49])])
def test_reconstruct_visits_t_to_0_inclusive(t, steps, visited, monkeypatch):
    d, seen = tiny(), []
    monkeypatch.setattr(Denoiser, '__call__', lambda self, x, level, c=None: seen.append(level.tolist()) or torch.zeros_like(x))
    d.reconstruct(normal(1, 3, 8, 8), t, [0, 1], steps=steps)
    assert seen == [[v, v] for v in visited]


@every_prediction
def test_a_perfect_net_reconstructs_perfectly(prediction, monkeypatch):
    d, x0 = tiny(prediction, clip_sample=False), normal(1, 3, 8, 8)
    monkeypatch.setattr(Denoiser, '__call__', lambda self, x, level, c=None: self.target(x, x0.expand_as(x), level))
    for eta in (0., 1.): assert_close(d.reconstruct(x0, 400, [0, 7], steps=20, eta=eta), x0.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_reconstruct_noises_each_row_with_its_own_seed():
    d, x0 = tiny('v_prediction'), normal(1, 3, 8, 8)
    both = d.reconstruct(x0, 300, [5, 9], steps=5)
    assert both.shape == (2, 3, 8, 8)
    assert_close(d.reconstruct(x0, 300, [9], steps=5), both[1:], atol=1e-5, rtol=1e-5)
    first = next(iter(d.path(d.noise(x0, randn(generators([5]), d.shape), torch.tensor([300])), 300, 5, None)))
    assert_close(first[1], d.scheduler.add_noise(x0, torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))[None], torch.tensor([300])))


def test_a_step_towards_another_picture():
    "A step asks for the clean image alone: led by one picture all the way, the path ends there from any noise."
    d, x0, x = tiny(), normal(1, 3, 8, 8).clamp(-1, 1), normal(1, 3, 8, 8, seed=1)
    for t, t_next in ((999, 600), (600, 200), (200, 0), (0, -1)): x = d.step(x, x0, t, t_next)
    assert torch.equal(x, x0)


# --- the edges: pictures, gradients, models of other kinds ---

@pytest.mark.parametrize('channels, mode', [(3, 'RGB'), (1, 'L')])
def test_encode_decode_round_trip(channels, mode):
    d = tiny(channels=channels)
    shape = (8, 8, 3) if channels == 3 else (8, 8)
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)) for k in range(3)]
    x = d.encode(pictures)
    assert x.shape == (3, channels, 8, 8) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    back = d.decode(x)
    assert all(b.mode == mode and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pictures, back))


def test_encode_takes_other_modes_and_decode_cuts():
    d = tiny()
    grey, clear = Image.new('L', (8, 8), 255), Image.new('RGBA', (8, 8), (0, 0, 0, 255))
    assert_close(d.encode([grey, clear]), torch.tensor([1., -1.]).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    assert np.asarray(d.decode(torch.full((1, 3, 8, 8), 7.))[0]).min() == 255


def picture(file, mode='RGB', size=(8, 6), **save):
    "Random pixels, written to a file; returns them as an image."
    image = Image.frombytes(mode, size, np.random.default_rng(0).bytes(size[0]*size[1]*len(Image.new(mode, (1, 1)).getbands())))
    image.save(file, **save)
    return image


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'CMYK'])
def test_read_image_gives_rgb(mode, tmp_path):
    file = tmp_path/('a.jpg' if mode == 'CMYK' else 'a.png')
    made = picture(file, mode)
    read = read_image(file)
    assert read.mode == 'RGB' and read.size == (8, 6)
    if mode != 'CMYK': assert np.array_equal(np.asarray(read), np.asarray(made.convert('RGB')))


def test_read_image_turns_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6   # turned by 90 degrees
    made = picture(tmp_path/'a.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path/'a.png')), np.rot90(np.asarray(made), -1))


@pytest.mark.parametrize('write, words', [
    (lambda f: None, 'there is no file'),
    (lambda f: f.mkdir(), 'is not a picture'),
    (lambda f: f.write_bytes(b''), 'is not a picture'),
    (lambda f: f.write_text('<svg/>'), 'is not a picture'),
    (lambda f: picture(f, format='GIF'), 'expected a whole PNG, JPEG or WebP file'),
    (lambda f: picture(f, format='TIFF'), 'expected a whole PNG, JPEG or WebP file'),
    (lambda f: (picture(f, size=(64, 64)), f.write_bytes(f.read_bytes()[:3000])), 'is not a picture'),
    (lambda f: Image.new('1', (10_000, 5_001)).save(f), '10000 x 5001 pixels'),
])
def test_read_image_errors(write, words, tmp_path):
    write(tmp_path/'a.png')
    with pytest.raises(ValueError) as e: read_image(tmp_path/'a.png')
    assert words in str(e.value) and 'a.png' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [12_000, 14_000])
def test_read_image_opens_no_bomb(side, tmp_path):
    Image.new('1', (side, side)).save(tmp_path/'a.png')
    assert (tmp_path/'a.png').stat().st_size < 100_000
    with pytest.raises(ValueError, match='50 million'): read_image(tmp_path/'a.png')


def test_gradients_reach_the_net_and_sampling_keeps_none():
    d, t = tiny(), torch.tensor([5, 500])
    x = normal(2, 3, 8, 8)
    grads = torch.autograd.grad((d(x, t) - d.target(x, torch.zeros_like(x), t)).square().mean(), list(d.net.parameters()), allow_unused=True)
    assert sum(g is not None and g.abs().sum() > 0 for g in grads) > 10
    assert not d.sample([0], steps=2).requires_grad


def test_a_half_precision_net_answers_in_float32():
    d = Denoiser(UNet2DModel.from_config(tiny_net().config).to(torch.bfloat16).eval(), DDPMScheduler())
    out = d(normal(1, 3, 8, 8), torch.tensor([5]))
    assert d.dtype == torch.bfloat16 and out.dtype == torch.float32 and d.sample([1], steps=2).dtype == torch.float32


def test_says_which_base_it_is():
    d = tiny()
    assert (d.name, d.revision, d.shape, d.T) == ('custom', None, (3, 8, 8), 1000)
    d = Denoiser(tiny_net(), DDPMScheduler(), name='mine', revision='abc')
    assert (d.name, d.revision) == ('mine', 'abc') and repr(d).startswith("Denoiser('mine': 3 x 8 x 8, epsilon, T = 1000, ")


def test_oblong_model():
    net = UNet2DModel(**{**{k: v for k, v in tiny_net().config.items() if not k.startswith('_')}, 'sample_size': (8, 16)}).eval()
    d = Denoiser(net, DDPMScheduler())
    assert d.shape == (3, 8, 16) and d.sample([0], steps=1).shape == (1, 3, 8, 16)
    x = d.encode([Image.new('RGB', (16, 8))])
    assert x.shape == (1, 3, 8, 16) and d.decode(x)[0].size == (16, 8)


# --- errors: one sentence that names the value ---

@pytest.mark.parametrize('act, words', [
    (lambda: Denoiser(tiny_net(), FlowMatchEulerDiscreteScheduler()), 'FlowMatchEulerDiscreteScheduler has no alphas_cumprod'),
    (lambda: tiny('flow'), "prediction type 'flow' is not supported; expected one of epsilon, v_prediction, sample"),
    (lambda: Denoiser(tiny_net(out_channels=6), DDPMScheduler()), '6 output channels for 3 input channels'),
    (lambda: Denoiser(tiny_net(size=None), DDPMScheduler()), 'says no sample_size'),
    (lambda: tiny(thresholding=True), 'thresholding'),
    (lambda: tiny().encode([Image.new('RGB', (9, 8))]), 'the image is 9 x 8 pixels, but this model makes 8 x 8; resize it first'),
    (lambda: tiny(channels=2).encode([Image.new('RGB', (8, 8))]), '2 channels'),
    (lambda: tiny().sample([0], steps=0), 'steps = 0 makes no picture'),
    (lambda: tiny().sample([-1]), 'seed -1 is no seed'),
    (lambda: tiny().sample([1.5]), 'seed 1.5 is no seed'),
    (lambda: tiny().sample(['a']), "seed 'a' is no seed"),
    (lambda: tiny().sample([2**63]), 'is no seed'),
    (lambda: tiny().sample([]), 'no seeds were given'),
    (lambda: tiny().reconstruct(normal(1, 3, 8, 8), 1000, [0]), 'level t = 1000 does not exist; this model has levels 0 ... 999'),
    (lambda: tiny().reconstruct(normal(1, 3, 8, 8), -1, [0]), 'level t = -1 does not exist'),
    (lambda: tiny().reconstruct(normal(1, 3, 9, 9), 10, [0]), r'the image is [1, 3, 9, 9], but this model makes [1, 3, 8, 8]'),
])
def test_errors(act, words):
    with pytest.raises(ValueError) as e: act()
    assert words in str(e.value) and '\n' not in str(e.value)


# --- flow ---

SHIFTS = (1., 3., 6.)


def letters(prompts):
    "A toy for a text encoder."
    counts = torch.tensor([[float(p.count(chr(97 + k))) for k in range(16)] for p in prompts])
    return {'encoder_hidden_states': counts[:, None], 'pooled_projections': counts}


@lru_cache
def flow_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformer(joint=16, pooled=16)


def flow(shift=3., **more): return Denoiser(flow_net(), FlowMatchEulerDiscreteScheduler(shift=shift), **{'text': letters, **more})


@pytest.mark.parametrize('shift', SHIFTS)
@pytest.mark.parametrize('steps', [1, 2, 3, 10, 28, 50, 1000])
def test_times_of_a_flow_are_the_schedulers(steps, shift):
    d, theirs = flow(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    t = d.timesteps(999, steps)
    assert len(t) == steps and t[0] == 999
    assert_close(t + 1, theirs.timesteps, atol=1e-3, rtol=1e-6)
    assert_close(d.scales(t)[1].flatten(), theirs.sigmas[:-1], atol=1e-6, rtol=1e-6)


@given(start=st.floats(-.999, 999), steps=st.integers(1, 200), shift=st.sampled_from(SHIFTS))
@example(start=0, steps=50, shift=3.)
@settings(max_examples=100)
def test_times_of_a_flow_go_down(start, steps, shift):
    t = flow(shift).timesteps(start, steps)
    assert abs(t[0] - start) < 1e-4 and 1 <= len(t) <= steps and (t.diff() < 0).all() and t[-1] > -1
    if start > 50: assert len(t) == steps      # the last level lies below, for every shift


@pytest.mark.parametrize('shift', SHIFTS)
def test_noise_and_step_of_a_flow_are_the_schedulers(shift):
    d, theirs = flow(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps, out = (normal(3, 4, 8, 8, seed=k) for k in range(3))
    theirs.set_timesteps(7)
    t = d.timesteps(999, 7)
    x_t = d.noise(x0, eps, t[[0, 3, 6]])
    assert_close(x_t, theirs.scale_noise(x0, theirs.timesteps[[0, 3, 6]], eps))
    assert_close(d.target(x_t[:1], x0[:1], t[:1]), eps[:1] - x0[:1])
    x = theirs_x = normal(3, 4, 8, 8, seed=3)
    for k, now in enumerate(t.tolist()):
        theirs_x = theirs.step(out, theirs.timesteps[k], theirs_x).prev_sample
        x = d.step(x, d.clean(x, out, d.level(now, 3)), now, (t.tolist() + [-1])[k + 1])
        assert_close(x, theirs_x, atol=1e-4, rtol=1e-4)


@given(t=st.one_of(st.integers(0, 999), st.floats(-.99, 999)), seed=st.integers(0, 99))
@example(t=999, seed=0)
@settings(max_examples=60)
def test_flow_at_any_level(t, seed):
    d, level = flow(), torch.tensor([t])
    x0, x_s, eps = (normal(1, 4, 8, 8, seed=3*seed + k).double() for k in range(3))
    x_t, (a, s) = d.noise(x0, eps, level.double()), d.scales(level.double())
    assert_close(a + s, torch.ones_like(a))
    assert_close(x_t, (1 - s)*x0 + s*eps)
    assert_close(d.target(x_t, x0, level.double()), eps - x0, atol=1e-6, rtol=1e-6)
    assert_close(d.clean(x_t, d.target(x_t, x_s, level.double()), level.double()), x_s)   # the inverse, for any picture
    assert_close(d.gain(level.double())*(d.target(x_t, x_s, level.double()) - d.target(x_t, x0, level.double())), x0 - x_s)


def test_snr_of_a_flow():
    d = flow()
    assert_close(d.snr(torch.tensor([499, 249, 999])), torch.tensor([1., 9., 0.]))
    assert (d.snr(torch.arange(d.T)).diff() < 0).all() and (d.snr(torch.linspace(-.9, 999, 5000)).diff() < 0).all() and d.snr(torch.tensor([-1])).isinf()
    assert_close(d.snr(torch.arange(9)), d.snr(torch.arange(9.)))


def test_a_flow_is_told_its_sigma():
    d, seen = flow(), []
    handle = d.net.register_forward_pre_hook(lambda net, args, kw: seen.append(kw['timestep']), with_kwargs=True)
    try: d(normal(2, 4, 8, 8), torch.tensor([0, 998]), torch.tensor([0, 0])), d.predict(normal(1, 4, 8, 8), 411.25, torch.tensor([0]))
    finally: handle.remove()
    assert [v.tolist() for v in seen] == [[1., 999.], [412.25]]


def test_a_perfect_flow_reconstructs_perfectly(monkeypatch):
    d, x0 = flow(), normal(1, 4, 8, 8)
    monkeypatch.setattr(Denoiser, '__call__', lambda self, x, level, c: self.target(x, x0.expand_as(x), level))
    for t in (999, 400, 17.5): assert_close(d.reconstruct(x0, t, [0, 7], steps=20, prompt=''), x0.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


# --- words and guidance ---

def test_the_table_of_words():
    asked = []
    d = Denoiser(flow_net(), FlowMatchEulerDiscreteScheduler(), text=lambda prompts: asked.extend(prompts) or letters(prompts))
    assert d.prompts == {'': 0} and d.prompt_id('') == 0 and d.prompt_id('abc') == 1 and d.prompt_id('cab') == 2 and d.prompt_id('abc') == 1 and asked == ['', 'abc', 'cab']
    assert d.prompt_ids('cab', 3).tolist() == [2, 2, 2] and d.prompt_ids(['', 'abc'], 2).tolist() == [0, 1] and d.prompt_ids('', 1).dtype == torch.int64
    for k, v in letters(['', 'abc', 'cab']).items(): assert torch.equal(d.table[k], v)
    d.drop_text_encoders()
    assert d.prompt_id('abc') == 1 and d.sample([0], steps=1, prompt='abc').isfinite().all()


def test_free_text_lets_go_of_the_encoders():
    class Encoder:
        def __call__(self, prompts): return letters(prompts)
    encoder = Encoder()
    d, ref = Denoiser(flow_net(), FlowMatchEulerDiscreteScheduler(), text=encoder), weakref.ref(encoder)
    del encoder
    assert ref() is not None
    d.drop_text_encoders(), gc.collect()
    assert ref() is None


def test_guidance():
    d, x, t = flow(), normal(2, 4, 8, 8), 700.
    c, level, none = d.prompt_ids(['aab', 'ccc'], 2), d.level(700, 2), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        without, plain = d.clean(x, d(x, level, none), level), d.clean(x, d(x, level, c), level)
        assert_close(d.predict(x, t, c), plain, atol=0, rtol=0)   # 1: unguided, and asked once
        assert (plain - without).abs().max() > 1e-4
        d.guidance = 7.
        assert_close(d.predict(x, t, c), without + 7*(plain - without), atol=1e-5, rtol=1e-5)
        assert_close(d(x, level, c), (x - plain)/d.scales(level)[1], atol=1e-5, rtol=1e-5)   # the net itself is never guided
        assert_close(d.predict(x, t, none), without, atol=1e-6, rtol=1e-5)
        d.guidance = 0.
        assert_close(d.predict(x, t, c), without, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('g', [1., 5.])
def test_a_picture_depends_on_its_seed_and_prompt_alone(g):
    d = flow(guidance=g)
    prompts = {3: 'aa', 8: 'bcd', 21: ''}
    alone = {s: d.sample([s], steps=4, prompt=p) for s, p in prompts.items()}
    for seeds, batch in (([3, 8, 21], 64), ([21, 8, 3], 2), ([8, 3], 1)):
        x = d.sample(seeds, steps=4, batch=batch, prompt=[prompts[s] for s in seeds])
        for k, s in enumerate(seeds): assert_close(x[k:k+1], alone[s], atol=1e-5, rtol=1e-5)
    assert (d.sample([3], steps=4, prompt='bcd') - alone[3]).abs().max() > 1e-3
    both = d.reconstruct(alone[3], 500, [1, 2], steps=4, prompt=['aa', 'bcd'])
    assert_close(d.reconstruct(alone[3], 500, [2], steps=4, prompt='bcd'), both[1:], atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_net_of_a_flow():
    d, t, c = flow(), torch.tensor([5., 500.5]), torch.tensor([0, 0])
    grads = torch.autograd.grad((d(normal(2, 4, 8, 8), t, c)).square().mean(), list(d.net.parameters()), allow_unused=True)
    assert sum(g is not None and g.abs().sum() > 0 for g in grads) > 10


# --- latents ---

@lru_cache
def small_vae(**config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vae(**config)


@pytest.mark.parametrize('config', [{}, dict(scaling_factor=1.5, shift_factor=.06)])
def test_latents_are_the_scaled_mean(config):
    v = small_vae(**config)
    d = flow(vae=v)
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)) for k in range(3)]
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])/127.5 - 1
    with torch.no_grad(): mean = v.encode(x).latent_dist.mean
    z = d.encode(pictures)
    assert (d.shape, d.size) == ((4, 8, 8), (16, 16)) and z.shape == (3, 4, 8, 8) and z.dtype == torch.float32 and not z.requires_grad
    assert_close(z, (mean - config.get('shift_factor', 0))*config.get('scaling_factor', .18215), atol=1e-5, rtol=1e-5)
    assert torch.equal(z, d.encode(pictures)) and torch.equal(z, d.latents(x))
    with torch.no_grad(): back = v.decode(mean).sample
    assert_close(d.pixels(z), back.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert [p.size for p in d.decode(z)] == [(16, 16)]*3 and d.pixels(normal(2, 4, 8, 8)*50).abs().max() <= 1


def test_many_pictures_go_through_the_vae_in_pieces():
    d, z = flow(vae=small_vae()), normal(5, 4, 8, 8)
    whole, back = d.pixels(z), d.latents(normal(5, 3, 16, 16))
    d.size = (2048, 1024)   # two at a time
    assert_close(d.pixels(z), whole, atol=1e-5, rtol=1e-5)
    assert_close(d.latents(normal(5, 3, 16, 16)), back, atol=1e-5, rtol=1e-5)


def test_a_model_of_pixels_has_no_latents():
    d, x = tiny(), normal(2, 3, 8, 8)
    assert d.latents(x) is x and d.pixels(x) is x and d.size == (8, 8)


# --- the stock pipelines ---

def parts(kind, *config):
    pipe = pipeline(kind, *config)
    return dict(net=pipe.transformer if kind == 'sd3' else pipe.unet, scheduler=pipe.scheduler, vae=pipe.vae, text=words(pipe)), pipe


@pytest.mark.parametrize('config', [('sd3', 'flow', 3.), ('sd3', 'flow', 1.), ('sd', 'epsilon'), ('sd', 'v_prediction'), ('sdxl', 'epsilon'), ('sdxl', 'v_prediction')])
@pytest.mark.parametrize('guidance, steps', [(7., 5), (1., 4)])   # numbers that divide 1000: at others stock DDIM steps to levels that it does not visit
def test_sample_is_the_stock_pipeline_with_words(config, guidance, steps):
    given, pipe = parts(*config)
    d, seeds, prompts = Denoiser(**given, guidance=guidance), [4, 1], ['a red flag', 'my']
    noise = torch.stack([torch.randn(d.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    def stock(kind): return pipe(prompt=prompts, latents=noise, guidance_scale=guidance, num_inference_steps=steps, output_type=kind, height=16, width=16).images
    x = d.sample(seeds, steps=steps, prompt=prompts)
    theirs = stock('latent')
    assert_close(x/theirs.abs().max(), theirs/theirs.abs().max(), atol=1e-4, rtol=0)
    assert_close(d.pixels(x)/2 + .5, stock('pt'), atol=1e-4, rtol=0)
    assert (x - d.sample(seeds, steps=steps, prompt='')).abs().max() > 1e-3   # the words do something


def test_sdxl_is_told_the_size():
    d, seen = Denoiser(**parts('sdxl')[0]), []
    handle = d.net.register_forward_pre_hook(lambda net, args, kw: seen.append(kw['added_cond_kwargs']['time_ids']), with_kwargs=True)
    try: d.sample([0, 1], steps=1, prompt='a')
    finally: handle.remove()
    assert seen[0].tolist() == [[16, 16, 0, 0, 16, 16]]*2


@pytest.mark.parametrize('act, words', [
    (lambda: flow().sample([0]), 'this model makes pictures of words; give prompt='),
    (lambda: flow()(normal(1, 4, 8, 8), torch.tensor([5])), 'give c, rows of prompts'),
    (lambda: tiny().sample([0], prompt='a flag'), "prompt 'a flag' was given, but this model makes pictures without words"),
    (lambda: tiny()(normal(1, 3, 8, 8), torch.tensor([5]), torch.tensor([0])), 'leave c out'),
    (lambda: flow().sample([0, 1], prompt=['a']), '1 prompts were given for 2 images'),
    (lambda: flow().sample([0], prompt=[3]), '3 is no prompt'),
    (lambda: flow().sample([0], eta=.5, prompt=''), 'eta = 0.5'),
    (lambda: flow().sample([0], steps=0, prompt=''), 'steps = 0 makes no picture'),
    (lambda: flow().reconstruct(normal(1, 4, 8, 8), 999.5, [0], prompt=''), 'level t = 999.5 does not exist; this model has levels above -1 up to 999'),
    (lambda: flow().timesteps(-1, 5), 'level t = -1 does not exist'),
    (lambda: flow(vae=small_vae()).encode([Image.new('RGB', (8, 8))]), 'the image is 8 x 8 pixels, but this model makes 16 x 16; resize it first'),
    (lambda: flow(vae=vae(3)), 'the VAE has latents of 3 channels, but the net wants 4'),
    (lambda: flow(text=None), 'a SD3Transformer2DModel wants words'),
    (lambda: Denoiser(tiny_net(), DDPMScheduler(), text=letters), 'a UNet2DModel takes no words'),
    (lambda: Denoiser(flow_net(), DDPMScheduler(), text=letters), 'a SD3Transformer2DModel wants a FlowMatchEulerDiscreteScheduler, but the scheduler is a DDPMScheduler'),
    (lambda: Denoiser(unet(), FlowMatchEulerDiscreteScheduler(), text=letters), 'FlowMatchEulerDiscreteScheduler has no alphas_cumprod'),
    (lambda: Denoiser(flow_net(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text=letters), 'use_dynamic_shifting = True'),
    (lambda: Denoiser(small_vae(), DDPMScheduler()), 'the net is a AutoencoderKL; expected one of UNet2DModel'),
])
def test_errors_of_words_and_latents(act, words):
    with pytest.raises(ValueError) as e: act()
    assert words in str(e.value) and '\n' not in str(e.value)


def test_an_unknown_prompt_after_free_text():
    d = flow()
    d.prompt_id('abc'), d.drop_text_encoders()
    with pytest.raises(ValueError) as e: d.sample([0], prompt='new')
    assert str(e.value) == "prompt 'new' is not in the table, and the text encoders are gone; known prompts: '', 'abc'"


def test_says_what_it_is_with_words():
    assert repr(flow(vae=small_vae(), guidance=7.)).startswith("Denoiser('custom': 4 x 8 x 8, latents of 16 x 16 pixels, guidance 7, prompts: 1, flow, T = 1000, ")
    assert flow().layout == torch.contiguous_format and tiny().layout == Denoiser(unet(), levels(), text=letters).layout == torch.channels_last


@pytest.mark.parametrize("shape, words, n", [((3, 32, 32), False, 64), ((3, 256, 256), False, 16), ((16, 128, 128), True, 8), ((16, 64, 64), True, 32), ((3, 2048, 2048), False, 1)])
def test_large_pictures_go_through_the_net_a_few_at_a_time(shape, words, n):
    denoiser = SimpleNamespace(shape=shape, prompts={"": 0} if words else {})
    assert max_batch(denoiser, 64) == n and max_batch(denoiser, 1) == 1
