"Measures, judged by scikit-image, torchmetrics, scipy and plain loops."
import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import t as student
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from small_pipelines import FAMILIES, family
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from unlearn_nb.denoiser import Denoiser
from unlearn_nb.faces import draw, sample_identity, sample_scene, to_tensor
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import (arcface, bits_per_dim, denoising_error, describe, drift, features, frechet, interval,
                                kid, log_likelihood, lpips, precision_recall, psnr, reconstruction_curve,
                                relative_forgetting, similarity, sscd, ssim, subsets)
from unlearn_nb.zoo import load

seeds = st.integers(0, 2**31)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def pictures(*shape, seed=0): return normal(*shape, seed=seed).clamp(-1, 1)


@lru_cache(None)
def faces(n=12, other=0, start=500):
    return to_tensor([draw(sample_identity(k + other), sample_scene(k)) for k in range(start, start + n)])


@lru_cache(None)
def model(): return load('faces')


# --- psnr ---

@given(seeds, st.floats(1e-4, 1), st.sampled_from([(1, 3, 8, 8), (4, 3, 5, 7), (2, 1, 16, 16)]))
@settings(max_examples=50)
def test_psnr_is_that_of_skimage(seed, size, shape):
    a = pictures(*shape, seed=seed)
    b = (a + size*normal(*shape, seed=seed + 1)).clamp(-1, 1)
    theirs = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2) for x, y in zip(a, b)]
    assert_close(psnr(a, b), torch.tensor(theirs, dtype=torch.float32), atol=1e-3, rtol=1e-4)
    assert_close(psnr(a, b), psnr(b, a))


def test_psnr_of_known_pictures():
    a = torch.zeros(3, 3, 4, 4)
    b = a + torch.tensor([0., .02, 2.]).view(3, 1, 1, 1)
    assert psnr(a, b)[0] == math.inf
    assert_close(psnr(a, b)[1:], torch.tensor([40., 0.]), atol=1e-4, rtol=0)


# --- ssim, lpips, and pictures that do not fit ---

@given(seeds, st.floats(1e-3, 1), st.sampled_from([(1, 3, 16, 16), (3, 3, 12, 20), (2, 1, 32, 32)]))
@settings(max_examples=20)
def test_ssim_is_that_of_skimage(seed, size, shape):
    a = pictures(*shape, seed=seed)
    b = (a + size*normal(*shape, seed=seed + 1)).clamp(-1, 1)
    def mirrored(x):   # theirs leaves 5 pixels out at every border
        return np.pad((x.double().numpy() + 1)/2, ((0, 0), (5, 5), (5, 5)), 'reflect')
    how = dict(data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    theirs = [structural_similarity(mirrored(x), mirrored(y), **how) for x, y in zip(a, b)]
    assert_close(ssim(a, b), torch.tensor(theirs, dtype=torch.float32), atol=1e-4, rtol=1e-3)
    assert_close(ssim(a, b[:1]), ssim(a, b[:1].expand_as(a)))
    assert_close(ssim(a, a), torch.ones(len(a)))


class OnePair(nn.Module):
    "Stands for the LPIPS of torchmetrics; it counts how often its net is built."
    built = 0

    def __init__(self, net_type):
        super().__init__()
        OnePair.built += net_type == 'alex'

    def forward(self, x, y):
        assert len(x) == len(y) == 1
        return (x - y).abs().mean()


def test_lpips_gives_rows_and_builds_its_net_once(monkeypatch):
    monkeypatch.setattr('torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity', OnePair)
    a, b = pictures(3, 3, 16, 16), pictures(3, 3, 16, 16, seed=1)
    assert_close(lpips(a, b), (a - b).abs().flatten(1).mean(1))
    assert OnePair.built == 1
    assert lpips(a[:1], b).shape == (3,)


def test_lpips_without_its_weights(monkeypatch):
    for error in (ModuleNotFoundError('no torchvision'), URLError('no network')):
        def fail(*args, **kw): raise error
        monkeypatch.setattr('torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity', fail)
        with pytest.raises(ValueError, match='LPIPS needs torchvision .*(no torchvision|no network).* `ssim`'):
            lpips(faces(1), faces(1))


def test_bad_input_is_refused_in_one_sentence():
    rows = 'cannot be compared row by row; give two tensors'
    sets = 'cannot be compared; expected [N, D] and [M, D]'
    shapes = (((2, 3, 16, 16), (3, 3, 16, 16)), ((1, 3, 16, 16), (1, 3, 16, 17)), ((3, 16, 16), (3, 16, 16)))
    cases = [(f, (pictures(*a), pictures(*b)), rows) for f in (psnr, ssim, lpips, similarity, drift) for a, b in shapes]
    shapes = (((1, 4), (20, 4)), ((20, 4), (20, 5)), ((20,), (20, 4)), ((20, 4), (0, 4)))
    distances = (kid, frechet, precision_recall, lambda a, b: subsets(kid, a, b, 5))
    cases += [(f, (normal(*a), normal(*b)), sets) for f in distances for a, b in shapes]
    cases += [(denoising_error, (model(), faces(1), [t], [0]), 'does not exist') for t in (-1, 1000)]
    cases += [(ssim, (pictures(1, 3, 10, 20),) * 2, '20 x 10 pixels are smaller than the window of SSIM; expected 11'),
              (describe, (pictures(2, 1, 32, 32),), '[2, 1, 32, 32] cannot be described; expected [B, 3, H, W]'),
              (interval, (torch.ones(4, 1),), '1 value gives no interval')]
    for f, given_it, words in cases:
        with pytest.raises(ValueError) as e: f(*given_it)
        assert words in str(e.value) and '\n' not in str(e.value)


# --- the model's own features ---

def small_unet(side=16, channels=3):
    "An untrained net of two blocks, the same every time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DModel(sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1,
                          block_out_channels=(8, 16), norm_num_groups=4,
                          down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2)
    return Denoiser(net.eval(), DDPMScheduler(100))


@pytest.mark.parametrize('name', FAMILIES)
def test_features_of_every_family(name, tmp_path):
    "They need no label and no random number, do not depend on the batch, and leave the model as it was."
    family(name)[0].save_pretrained(tmp_path)
    d = load(tmp_path, size=(16, 16) if 'Flux' in name or 'alpha' in name else None)
    x = pictures(4, 3, *d.size[::-1])
    hooks = [len(m._forward_hooks) for m in d.net.modules()]
    prompts, state = dict(d.prompts), {k: v.clone() for k, v in d.net.state_dict().items()}
    torch.manual_seed(5)
    f, after = features(d, 24), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), 'the global generator was used'
    v = f(x)
    assert re.fullmatch(r"base model's own features \((up|transformer)_blocks\.\d at level 100 of 1000\)", f.name)
    assert 0 < f.limit < 1
    assert_close(v.norm(dim=1), torch.ones(4)) and not v.requires_grad and v.device.type == 'cpu'
    again = features(d, 24)
    one_by_one = torch.cat([again(x[k:k + 1]) for k in range(4)])   # not remembered yet
    assert_close(one_by_one @ one_by_one.T, v @ v.T, atol=1e-3, rtol=0)
    assert torch.equal(f(x), v) and f(x[:0]).shape == (0, v.shape[1])
    assert f(pictures(2, 3, 40, 30)).shape == (2, v.shape[1])                         # another size
    assert hooks == [len(m._forward_hooks) for m in d.net.modules()] and d.prompts == prompts
    assert all(torch.equal(v, state[k]) for k, v in d.net.state_dict().items())
    with pytest.raises(ValueError, match=r'expected \[B, 3, H, W\]'): f(x[:, :1])


def test_features_are_those_of_the_base():
    "A hotfix that is on, LoRA adapters and training change nothing; nor do threads that ask at the same time."
    d, x = small_unet(), pictures(12, 3, 16, 16)
    names = [k for k in d.net.state_dict() if 'conv1.weight' in k or 'conv_in' in k]
    g = torch.Generator().manual_seed(0)
    delta = {k: .3*torch.randn(d.net.state_dict()[k].shape, generator=g).half() for k in names}
    fix = Hotfix(delta, {'base': {'sha256': fingerprint(d), 'id': 'custom'}})
    first = features(d, 64)
    alike = first(x) @ first(x).T
    net = deepcopy(d.net)
    fix.apply(d)
    second = features(d, 64)                      # made while it is on
    fresh = features(Denoiser(net, d.scheduler), 64)
    with ThreadPoolExecutor(4) as pool: rows = list(pool.map(lambda k: fresh(x[k:k + 3]), range(9)))
    assert_close(torch.cat(rows[::3]), fresh(x)[:9], atol=1e-4, rtol=0)
    fix.remove(d)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=['conv1', 'conv_in'], init_lora_weights=False), d.net)
    for p in d.net.parameters(): p.data.mul_(1.5)
    third = torch.cat([first(x[:1] * .999), first(x[1:])])
    for v in (second(x), fresh(x)): assert_close(v @ v.T, alike, atol=1e-3, rtol=0)
    assert_close(third @ third.T, alike, atol=.02, rtol=0)


def test_features_that_cannot_be():
    d = small_unet()
    d.net.up_blocks = nn.ModuleList()
    with pytest.raises(ValueError, match='UNet2DModel has no blocks whose features are known here; give'):
        features(d)
    d = small_unet()
    d.net.conv_in.weight.data.mul_(math.nan)
    with pytest.raises(ValueError, match='are not finite in torch.float32; load it as float32 or bfloat16'):
        features(d, 24)


@pytest.mark.slow
def test_features_know_people_again():
    "Without a label they tell one person in two scenes from two strangers; pixels do not."
    one, again = (to_tensor([draw(sample_identity(k), sample_scene(k + other)) for k in range(200, 300)])
                  for other in (0, 5000))
    def auc(f):
        s = F.normalize(f(one), dim=1) @ F.normalize(f(again), dim=1).T
        return (s.diag()[:, None, None] > s[~torch.eye(100, dtype=bool)]).double().mean()
    f = features(model())
    assert f.name.startswith("base model's own features (up_blocks.1 ")
    assert auc(f) > .96 > .85 > auc(lambda x: x.flatten(1))


# --- descriptors from a file ---

class Pool(nn.Module):
    "A stand-in for SSCD and ArcFace: the sides and the mean colours of parts of what it is shown, not normalised."
    def forward(self, x):
        sides = torch.tensor([float(x.shape[2]), float(x.shape[3])]).repeat(x.shape[0], 1)/1000
        return torch.cat([sides, nn.functional.adaptive_avg_pool2d(x, (4, 4)).flatten(1)], 1)


def save(net, file):
    "TorchScript as a file; its SHA-256."
    with pytest.warns(DeprecationWarning): torch.jit.script(net).save(str(file))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@pytest.fixture
def stand_in(tmp_path): return tmp_path/'net.pt', save(Pool(), tmp_path/'net.pt')


def unit_rows(x): return x/x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize('size', [(32, 32), (40, 60), (700, 500)])
def test_sscd_prepares_like_its_authors(stand_in, size):
    "Pillow resizes the shorter side to 288 (bilinear), then mean and deviation of ImageNet."
    coarse = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)) for k in range(2)]
    images = [i.resize(size, Image.Resampling.BICUBIC) for i in coarse]
    short = min(size)
    sides = tuple(int(288*s/short) if s != short else 288 for s in size)
    resized = [np.array(i.resize(sides, Image.Resampling.BILINEAR)) for i in images]
    shown = torch.stack([torch.from_numpy(v).permute(2, 0, 1)/255 for v in resized])
    shown = (shown - torch.tensor([.485, .456, .406]).view(3, 1, 1))/torch.tensor([.229, .224, .225]).view(3, 1, 1)
    assert_close(sscd(*stand_in)(to_tensor(images)), unit_rows(Pool()(shown)), atol=3e-3, rtol=0)


def test_arcface_prepares_112_pixels(stand_in):
    x = nn.functional.interpolate(pictures(3, 3, 14, 14), (112, 112), mode='bilinear')
    assert_close(arcface(*stand_in)(x), unit_rows(Pool()(x)), atol=1e-5, rtol=0)
    assert_close(arcface(*stand_in)(faces(3))[:, 0]/arcface(*stand_in)(faces(3))[:, 1], torch.ones(3))


def test_a_descriptor_is_used_by_every_measure(stand_in):
    eye = arcface(*stand_in)
    a, b = faces(), faces(other=1)
    assert_close(similarity(a, b, eye), (eye(a)*eye(b)).sum(1))
    assert_close(eye(a.bfloat16()), eye(a), atol=.05, rtol=0)
    assert drift(a, b, eye)['cosine_median'] == pytest.approx((eye(a)*eye(b)).sum(1).median().item(), abs=1e-6)


def test_many_pictures_are_described_in_parts(stand_in):
    eye = sscd(*stand_in)
    assert_close(eye(faces(40)), torch.cat([eye(faces(40)[:7]), eye(faces(40)[7:])]), atol=1e-5, rtol=0)


def test_a_missing_file():
    for load_it in (lambda f: sscd(f), lambda f: arcface(f, '0'*64)):
        with pytest.raises(FileNotFoundError, match="no file 'nothing.pt'; get it from https://.* own features"):
            load_it('nothing.pt')


def test_an_unknown_hash_is_never_opened(stand_in, monkeypatch):
    def never(*args, **kw): raise AssertionError('it was opened')
    monkeypatch.setattr(torch.jit, 'load', never)
    file, good = stand_in
    others = (lambda: sscd(file), lambda: sscd(file, good[:-1]), lambda: sscd(file, ''), lambda: arcface(file, 'f'*64))
    for load_it in others:
        with pytest.raises(ValueError, match=f'has the SHA-256 {good}, expected .* not opened'): load_it()
    with pytest.raises(AssertionError, match='it was opened'): sscd(file, good.upper())


def test_files_that_hold_no_descriptor(tmp_path):
    (tmp_path/'x.pt').write_bytes(b'no zip')
    with pytest.raises(ValueError, match='is not a TorchScript file'):
        sscd(tmp_path/'x.pt', hashlib.sha256(b'no zip').hexdigest())
    eye = arcface(tmp_path/'y.pt', save(nn.ReLU(), tmp_path/'y.pt'))
    with pytest.raises(ValueError, match=r'gives \[2, 3, 112, 112\] for 2 pictures; expected .*, \[2, D\]'):
        eye(faces(2))
    with pytest.raises(ValueError, match='cannot be described'): eye(pictures(2, 1, 32, 32))


def test_sscd_is_fetched_once(tmp_path, monkeypatch, stand_in):
    calls = []
    def fetch(url, file, hash_prefix, progress):
        calls.append((url, hash_prefix))
        Path(file).write_bytes(stand_in[0].read_bytes())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    for _ in range(2): sscd(sha256=stand_in[1])
    [(url, digest)] = calls
    assert url.startswith('https://dl.fbaipublicfiles.com/') and digest == stand_in[1]
    with pytest.raises(ValueError, match='not opened'): sscd()


def test_sscd_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for error in (URLError('no network'), RuntimeError('invalid hash value')):
        def fail(*args, **kw): raise error
        monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
        with pytest.raises(FileNotFoundError, match='could not be fetched .*(no network|invalid hash).* own features'):
            sscd()


# --- similarity ---

def test_similarity_is_the_cosine_of_unit_vectors():
    a, b = faces(), faces(other=1)
    d = describe(a)
    assert d.shape == (12, 64) and not d.requires_grad
    assert_close(d.norm(dim=1), torch.ones(12))
    assert_close(describe(a, batch=5), d, atol=1e-5, rtol=1e-5)
    assert_close(similarity(a, b), torch.cosine_similarity(d, describe(b)), atol=1e-5, rtol=1e-5)
    assert_close(similarity(a, a), torch.ones(12))


def test_similarity_sees_the_person():
    same = to_tensor([draw(sample_identity(k), sample_scene(k + 7000)) for k in range(500, 512)])
    assert similarity(faces(), same).median() > similarity(faces(), faces(other=1)).median() + .3


def test_describe_takes_half_precision():
    assert_close(describe(faces().bfloat16()), describe(faces()), atol=.05, rtol=0)
    assert describe(faces().bfloat16()).dtype == torch.float32


# --- relative forgetting ---

cosines = st.floats(-1, 1)


@given(cosines, cosines, cosines)
@example(.5, .3, .46)
@example(.5, .3, .4)
def test_relative_forgetting(before, after, floor):
    F = relative_forgetting(before, after, floor)
    if abs(before - floor - .05) < 1e-9: return   # on the edge, rounding decides
    if before - floor < .05: assert F is None
    else: assert F == pytest.approx((before - after)/(before - floor), abs=1e-9)


@given(cosines, cosines)
def test_relative_forgetting_is_0_for_nothing_and_1_at_the_surrogate(before, floor):
    assume(before - floor > .0501)
    assert relative_forgetting(before, before, floor) == 0
    assert relative_forgetting(before, floor, floor) == 1
    assert relative_forgetting(before, min(before + .1, 1.), floor) <= 0
    assert relative_forgetting(before, floor - .1, floor) > 1


# --- intervals and the reconstruction curve ---

@given(seeds, st.integers(2, 40), st.floats(.1, 10))
@settings(max_examples=30)
def test_interval_is_that_of_scipy(seed, n, size):
    x = size*normal(3, n, seed=seed) + 1
    mean, half = interval(x)
    for row, m, h in zip(x.double().numpy(), mean, half):
        low, high = student.interval(.95, n - 1, loc=row.mean(), scale=row.std(ddof=1)/n**.5)
        assert m.item() == pytest.approx(row.mean(), abs=1e-4*size)
        assert 2*h.item() == pytest.approx(high - low, rel=1e-3)


def test_reconstruction_curve_is_the_similarity_of_reconstructions():
    x, levels, noises = faces(1), (50, 500, 950), range(5, 9)
    sims = reconstruction_curve(model(), x, levels, noises, steps=3)
    assert sims.shape == (3, 4) and sims[0].mean() > sims[1].mean() > sims[2].mean() and sims[0].min() > .9
    assert_close(sims[1], similarity(model().reconstruct(x, 500, noises, 3), x.expand(4, -1, -1, -1)))
    alone = reconstruction_curve(model(), x, [500], [7], steps=3)[0, 0]   # a seed's noise depends on no other seed
    assert_close(alone, sims[1, 2], atol=1e-5, rtol=0)
    pixels = reconstruction_curve(model(), x, [50], [5, 6], steps=3, describe=lambda v: unit_rows(v.flatten(1)))
    assert_close(pixels[0], torch.cosine_similarity(model().reconstruct(x, 50, [5, 6], 3).flatten(1), x.flatten(1)))


# --- drift ---

def test_identical_pictures_do_not_drift():
    d = drift(faces(), faces().clone())
    assert d['psnr_median'] == d['psnr_p5'] == 100
    assert d['cosine_median'] == pytest.approx(1, abs=1e-5) and d['cosine_p5'] == pytest.approx(1, abs=1e-5)


@given(st.lists(st.floats(1e-5, .5), min_size=12, max_size=12))
@settings(max_examples=15)
def test_drift_is_median_and_5th_percentile(sizes):
    a = faces()
    b = a + torch.tensor(sizes).view(-1, 1, 1, 1)*normal(*a.shape)
    d = drift(a, b)
    p = np.minimum(100, [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2) for x, y in zip(a, b)])
    c = torch.cosine_similarity(describe(a), describe(b)).numpy()
    assert d.keys() == {'psnr_median', 'psnr_p5', 'cosine_median', 'cosine_p5'}
    assert d['psnr_p5'] == pytest.approx(np.percentile(p, 5), abs=1e-2)
    assert d['cosine_p5'] == pytest.approx(np.percentile(c, 5), abs=1e-4)
    # torch's median of an even number is the lower of the middle two
    for key, v, e in (('psnr_median', p, 1e-2), ('cosine_median', c, 1e-4)):
        assert np.sort(v)[5] - e <= d[key] <= np.sort(v)[6] + e, key


def test_drift_sees_another_person():
    d = drift(faces(), faces(other=1))
    assert d['psnr_median'] < 25 and d['cosine_median'] < .8 and all(isinstance(v, float) for v in d.values())


# --- distances of sets ---

sets = given(st.integers(0, 10**6), st.sampled_from([(20, 20), (35, 35), (12, 40)]), st.sampled_from([2, 5, 64]),
             st.floats(0, 2))


def two_sets(seed, sizes, dim, shift):
    mix = normal(dim, dim, seed=seed + 2)/dim**.5
    return normal(sizes[0], dim, seed=seed), normal(sizes[1], dim, seed=seed + 1) @ mix + shift


def unit(x): return x/x.norm(dim=1, keepdim=True)
def unit_sets(*args): return [unit(x) for x in two_sets(*args)]


@sets
@settings(max_examples=40)
def test_kid_is_that_of_torchmetrics(seed, sizes, dim, shift):
    a, b = unit_sets(seed, sizes, dim, shift)
    n = min(sizes)   # theirs wants sets of one size
    theirs = poly_mmd(a[:n].double(), b[:n].double(), degree=3, gamma=1., coef=1.).item()
    assert kid(a[:n], b[:n]) == pytest.approx(theirs, rel=1e-3, abs=1e-3)


@sets
@settings(max_examples=10)
def test_kid_is_the_unbiased_mean_over_pairs(seed, sizes, dim, shift):
    "By loops, for sets of any two sizes."
    a, b = (x.double().numpy() for x in unit_sets(seed, sizes, dim, shift))
    def k(x, y): return (x @ y + 1)**3
    def within(s): return np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    by_loops = within(a) + within(b) - 2*np.mean([k(x, y) for x in a for y in b])
    assert kid(*unit_sets(seed, sizes, dim, shift)) == pytest.approx(by_loops, rel=1e-3, abs=1e-3)


def test_kid_is_about_0_for_one_distribution_and_grows_with_the_shift():
    half = [kid(unit(normal(100, 16, seed=k)), unit(normal(100, 16, seed=k + 50))) for k in range(20)]
    assert abs(np.mean(half)) < .05 and min(half) < 0   # unbiased: below 0 too
    a = normal(200, 16)
    shifted = [kid(unit(a), unit(normal(200, 16, seed=1) + s)) for s in (0., .2, .5, 1.)]
    assert shifted == sorted(shifted) and shifted[-1] > 1


@sets
@settings(max_examples=40)
def test_frechet_is_that_of_torchmetrics(seed, sizes, dim, shift):
    a, b = (x.double() for x in two_sets(seed, sizes, dim, shift))
    theirs = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert frechet(b, a) == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert frechet(a.float(), b.float()) == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_frechet_is_the_formula_of_the_paper():
    a, b = two_sets(0, (40, 30), 5, .7)
    m, n, s, t = a.mean(0).numpy(), b.mean(0).numpy(), np.cov(a.numpy().T), np.cov(b.numpy().T)
    formula = ((m - n)**2).sum() + np.trace(s + t - 2*sqrtm(s @ t).real)
    assert frechet(a, b) == pytest.approx(formula, rel=1e-4)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(.1, 3))
@settings(max_examples=25)
def test_frechet_of_known_gaussians(seed, shift, scale):
    "A set moved and stretched: |shift|^2 + (1 - scale)^2 tr(cov); also where there are fewer vectors than dimensions."
    for n in (50, 4):
        a = normal(n, 8, seed=seed).double()
        b = (a - a.mean(0))*scale + a.mean(0) + shift
        exact = 8*shift**2 + (1 - scale)**2*a.T.cov().trace().item()
        assert frechet(a, b) == pytest.approx(exact, rel=1e-4, abs=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


class Features(nn.Module):
    "Our descriptor in the form that torchmetrics takes: pictures of 0 ... 255."
    def forward(self, x): return describe(x.float()/127.5 - 1)


def test_torchmetrics_agrees_on_our_features():
    a, b = (((faces(other=k)+1)*127.5).round().to(torch.uint8) for k in (0, 1))
    theirs = (FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32)),
              KernelInceptionDistance(feature=Features(), subsets=2, subset_size=12, degree=3, gamma=1., coef=1.))
    for metric in theirs:
        metric.update(a, real=True)
        metric.update(b, real=False)
    real, fake = Features()(a), Features()(b)
    assert frechet(real, fake) == pytest.approx(theirs[0].compute().item(), rel=1e-3, abs=1e-4)
    mean, deviation = theirs[1].compute()
    assert kid(real, fake) == pytest.approx(mean.item(), rel=1e-3, abs=1e-4) and deviation < 1e-4
    assert_close(subsets(kid, real, fake, 12, n=3), mean.expand(3), rtol=1e-3, atol=1e-4)


def test_subsets_scatter_around_the_whole():
    a, b = (unit(normal(300, 8, seed=k) + .3*k) for k in (0, 1))
    values = subsets(kid, a, b, 50, n=200)
    assert values.shape == (200,) and values.std() > 0
    assert abs(values.mean() - kid(a, b)) < 4*values.std()/200**.5
    assert_close(subsets(kid, a, b, 50, n=5), values[:5])
    assert not torch.equal(subsets(kid, a, b, 50, n=5, seed=1), values[:5])


def test_frechet_is_biased_and_kid_is_not():
    a, b = normal(2000, 32), normal(2000, 32, seed=1)
    few, more = (subsets(frechet, a, b, n, 20).mean() for n in (50, 500))
    assert few > 5*more > 0
    kids = subsets(kid, unit(a), unit(b), 50, 50)
    assert abs(kids.mean()) < kids.std()


# --- precision and recall ---

def by_loops(real, fake, k):
    def inside(x, centres):
        for i, c in enumerate(centres):
            others = sorted(math.dist(c, o) for j, o in enumerate(centres) if j != i)
            if math.dist(x, c) <= others[k - 1]: return True
        return False
    return np.mean([inside(x, real) for x in fake]), np.mean([inside(x, fake) for x in real])


@given(st.integers(0, 10**6), st.integers(8, 40), st.integers(8, 40), st.integers(1, 5), st.floats(0, 3))
@settings(max_examples=20)
def test_precision_recall_by_loops(seed, n, m, k, shift):
    real, fake = normal(n, 3, seed=seed), .7*normal(m, 3, seed=seed + 1) + shift
    theirs = by_loops(real.double().tolist(), fake.double().tolist(), k)
    assert precision_recall(real, fake, k) == pytest.approx(theirs, abs=1e-6)


def test_precision_recall_of_known_sets():
    real = normal(60, 4)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, normal(60, 4, seed=1) + 50) == (0, 0)
    narrow = .05*normal(60, 4, seed=1)   # all believable, little variety
    precision, recall = precision_recall(real, narrow)
    assert precision > .9 and recall < .1
    assert precision_recall(narrow, real) == (recall, precision)


# --- denoising error, likelihood: a Gaussian whose best denoiser and density are known ---

class Best(nn.Module):
    "E[x0 | x_t] of N(mean, cov), cov [D, D], as a net that predicts the sample."
    device, dtype = torch.device('cpu'), torch.float32

    def __init__(self, mean, cov, side, abar):
        super().__init__()
        self.mean, self.abar = mean.double(), abar.double()
        self.config = FrozenDict(in_channels=1, out_channels=1, sample_size=side)
        self.values, self.vectors = torch.linalg.eigh(cov.double())

    def forward(self, x_t, timestep):
        abar = self.abar[timestep].unsqueeze(1)
        gain = abar.sqrt()*self.values/(abar*self.values + 1 - abar)
        x = (((x_t.flatten(1).double() - abar.sqrt()*self.mean) @ self.vectors)*gain) @ self.vectors.T + self.mean
        return SimpleNamespace(sample=x.view_as(x_t).to(x_t.dtype))


Best.__name__ = 'UNet2DModel'   # a denoiser goes by the name of the class


def gaussian(mean, cov, side=8, **kw):
    "The denoiser of N(mean, cov), and the exact density of what it holds for pictures at its lowest level."
    scheduler = DDPMScheduler(prediction_type='sample', **kw)
    abar = scheduler.alphas_cumprod
    low = (1 - abar[0].double())/abar[0].double()
    density = torch.distributions.MultivariateNormal(mean.double(), cov.double() + low*torch.eye(side*side))
    return Denoiser(Best(mean, cov, side, abar), scheduler), density


def mixed(scale, seed=0):
    "A covariance [64, 64] far from diagonal."
    a = normal(64, 64, seed=seed)/8
    return scale*(a @ a.T + .3 + .05*torch.eye(64))


def hadamard(n):
    return torch.ones(1, 1) if n == 1 else torch.kron(torch.tensor([[1., 1.], [1., -1.]]), hadamard(n//2))


def in_bits(nats, D=64): return math.log2(127.5) - nats/(D*math.log(2))


@pytest.mark.slow
@pytest.mark.parametrize('scale, schedule', [(1., 'linear'), (.1, 'squaredcos_cap_v2')])
def test_likelihood_of_a_known_gaussian(scale, schedule):
    "With a full set of orthogonal signs the trace is exact, so that only the steps err: within 1 %, less with more."
    model, density = gaussian(.3*normal(64, seed=3), mixed(scale), beta_schedule=schedule)
    x = density.sample((2,)).float().view(2, 1, 8, 8)
    a, exact = model.schedule.abar[0].sqrt(), in_bits(density.log_prob(x.flatten(1).double())).float()
    signs = [e.view(1, 1, 8, 8).expand_as(x) for e in hadamard(64)]
    def ours(steps):
        return in_bits(torch.stack([log_likelihood(model, a*x, e, steps) for e in signs]).mean(0) + 64*a.log())
    error = (ours(50) - exact).abs().max()
    assert error < .01*exact.min(), (error, exact)
    assert (ours(120) - exact).abs().max() < max(error/2, .01)


def test_bits_per_dim_with_random_signs():
    model, density = gaussian(torch.zeros(64), .1*(torch.eye(64) + .2))
    x = torch.cat([density.sample((3,)).float(), 3*density.sample((1,)).float()]).view(4, 1, 8, 8)
    bits = bits_per_dim(model, x, range(30))
    assert bits.shape == (4, 30) and not bits.requires_grad
    mean, half = interval(bits)
    exact = in_bits(density.log_prob(x.flatten(1).double())).float()
    assert ((mean - exact).abs() < half*1.5 + .01*exact).all() and (half < .1*exact).all()
    assert (mean[3] > mean[:3]).all()   # three times too large is unlikely


def test_bits_of_standard_noise_are_the_entropy():
    "The flow of standard normal data stands still: every step is exact, and the mean over pictures is the entropy."
    model, density = gaussian(torch.zeros(64), torch.eye(64))
    x = normal(500, 1, 8, 8)
    assert bits_per_dim(model, x, steps=5).mean().item() == pytest.approx(in_bits(-density.entropy().item()), abs=.02)


def test_bits_depend_on_the_seed_alone():
    model, _ = gaussian(torch.zeros(64), mixed(.1))
    x = .3*normal(3, 1, 8, 8)
    bits = bits_per_dim(model, x, [4, 9], steps=10)
    assert_close(bits_per_dim(model, x[1:2], [9], steps=10)[0, 0], bits[1, 1], atol=1e-4, rtol=0)
    with torch.no_grad(): assert_close(bits_per_dim(model, x, [4, 9], steps=10), bits)
    assert (bits[:, 0] != bits[:, 1]).all()


def test_a_last_level_without_any_picture_does_no_harm():
    "Zero terminal SNR: log sigma of the last level is infinite, and left out."
    model, density = gaussian(torch.zeros(64), .1*torch.eye(64), rescale_betas_zero_snr=True)
    assert model.schedule.abar[-1] < 1e-7
    x = density.sample((4,)).float().view(4, 1, 8, 8)
    noisy = bits_per_dim(model, x, range(4), steps=100).mean(1)
    assert_close(noisy, in_bits(density.log_prob(x.flatten(1).double())).float(), rtol=.01, atol=0)


def test_likelihood_of_the_built_in_model():
    "Its own picture is likelier than that picture with noise on it."
    x = model().sample([3], steps=10)
    bits = bits_per_dim(model(), torch.cat([x, (x + .2*normal(*x.shape)).clamp(-1, 1)]), steps=8)[:, 0]
    assert bits.isfinite().all() and bits[1] > bits[0] + 1
    assert all(p.grad is None for p in model().net.parameters())


def test_denoising_error_by_loops():
    model, _ = gaussian(torch.zeros(64), mixed(.2))
    x, levels, noises = .4*normal(3, 1, 8, 8), (10, 300, 999), (2, 7)
    errors, abar = denoising_error(model, x, levels, noises), model.schedule.abar
    assert errors.shape == (3, 3, 2)
    for i, t in enumerate(levels):
        for k, seed in enumerate(noises):
            eps = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
            for j in range(3):
                x_t = abar[t].sqrt()*x[j] + (1 - abar[t]).sqrt()*eps
                error = (model.predict(x_t[None], t)[0] - x[j]).square().mean().item()
                assert errors[i, j, k].item() == pytest.approx(error, rel=1e-4)


def test_denoising_error_of_a_gaussian_is_its_posterior_variance():
    model, _ = gaussian(torch.zeros(64), .25*torch.eye(64))
    errors = denoising_error(model, .5*normal(200, 1, 8, 8), (100, 500, 900), range(20)).mean((1, 2))
    assert_close(errors, torch.stack([1/(4 + model.snr(t)) for t in (100, 500, 900)]), rtol=.05, atol=0)
    assert errors[0] < errors[1] < errors[2]
