"The denoiser against diffusers' own schedulers and pipelines."
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from unlearn_nb.denoiser import PREDICTIONS, Denoiser, generators, randn, read_image

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
        assert theirs.timesteps.tolist() == d.times(999, steps).tolist()
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
    t = tiny().times(start, steps)
    assert t[0] == start and t.dtype == torch.int64 and len(t) == min(steps, start + 1) and t[-1] >= 0
    gaps = -t.diff(append=torch.tensor([-1]))
    assert (gaps >= 1).all() and gaps.max() - gaps.min() <= 1


def test_times_are_trailing_spacing():
    d, theirs = tiny(), DDIMScheduler(timestep_spacing='trailing')
    for n in (1, 2, 3, 5, 7, 10, 16, 30, 50, 64, 99, 128, 250, 333, 500, 999, 1000):
        theirs.set_timesteps(n)
        assert d.times(999, n).tolist() == theirs.timesteps.tolist()[:n], n


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
    monkeypatch.setattr(Denoiser, '__call__', lambda self, x, level: seen.append(level.tolist()) or torch.zeros_like(x))
    d.reconstruct(normal(1, 3, 8, 8), t, [0, 1], steps=steps)
    assert seen == [[v, v] for v in visited]


@every_prediction
def test_a_perfect_net_reconstructs_perfectly(prediction, monkeypatch):
    d, x0 = tiny(prediction, clip_sample=False), normal(1, 3, 8, 8)
    monkeypatch.setattr(Denoiser, '__call__', lambda self, x, level: self.target(x, x0.expand_as(x), level))
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
