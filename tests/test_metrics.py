"Measures, judged by scikit-image, torchmetrics, scipy and plain loops."
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio
from torch.testing import assert_close
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from unlearn_nb.faces import draw, sample_identity, sample_scene, to_tensor
from unlearn_nb.metrics import describe, drift, frechet, kid, precision_recall, psnr, relative_forgetting, similarity

seeds = st.integers(0, 2**31)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def pictures(*shape, seed=0): return normal(*shape, seed=seed).clamp(-1, 1)


@lru_cache(None)
def faces(n=12, other=0, start=500): return to_tensor([draw(sample_identity(k + other), sample_scene(k)) for k in range(start, start + n)])


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
    assert relative_forgetting(before, min(before + .1, 1.), floor) <= 0 and relative_forgetting(before, floor - .1, floor) > 1


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
    assert d['psnr_p5'] == pytest.approx(np.percentile(p, 5), abs=1e-2) and d['cosine_p5'] == pytest.approx(np.percentile(c, 5), abs=1e-4)
    # torch's median of an even number is the lower of the middle two
    for key, v, e in (('psnr_median', p, 1e-2), ('cosine_median', c, 1e-4)): assert np.sort(v)[5] - e <= d[key] <= np.sort(v)[6] + e, key


def test_drift_sees_another_person():
    d = drift(faces(), faces(other=1))
    assert d['psnr_median'] < 25 and d['cosine_median'] < .8 and all(isinstance(v, float) for v in d.values())


# --- distances of sets ---

sets = given(st.integers(0, 10**6), st.sampled_from([(20, 20), (35, 35), (12, 40)]), st.sampled_from([2, 5, 64]), st.floats(0, 2))


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
    assert kid(a[:n], b[:n]) == pytest.approx(poly_mmd(a[:n].double(), b[:n].double(), degree=3, gamma=1., coef=1.).item(), rel=1e-3, abs=1e-3)


@sets
@settings(max_examples=10)
def test_kid_is_the_unbiased_mean_over_pairs(seed, sizes, dim, shift):
    "By loops, for sets of any two sizes."
    a, b = (x.double().numpy() for x in unit_sets(seed, sizes, dim, shift))
    def k(x, y): return (x @ y + 1)**3
    def within(s): return np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    assert kid(*unit_sets(seed, sizes, dim, shift)) == pytest.approx(within(a) + within(b) - 2*np.mean([k(x, y) for x in a for y in b]), rel=1e-3, abs=1e-3)


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
    assert frechet(a, b) == pytest.approx(((m - n)**2).sum() + np.trace(s + t - 2*sqrtm(s @ t).real), rel=1e-4)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(.1, 3))
@settings(max_examples=25)
def test_frechet_of_known_gaussians(seed, shift, scale):
    "A set moved and stretched: |shift|^2 + (1 - scale)^2 tr(cov); also where there are fewer vectors than dimensions."
    for n in (50, 4):
        a = normal(n, 8, seed=seed).double()
        b = (a - a.mean(0))*scale + a.mean(0) + shift
        assert frechet(a, b) == pytest.approx(8*shift**2 + (1 - scale)**2*a.T.cov().trace().item(), rel=1e-4, abs=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


# --- precision and recall ---

def by_loops(real, fake, k):
    def inside(x, centres):
        for i, c in enumerate(centres):
            others = sorted(math.dist(c, o) for j, o in enumerate(centres) if j != i)
            if math.dist(x, c) <= others[k - 1]: return True
        return False
    return np.mean([inside(x, real) for x in fake]), np.mean([inside(x, fake) for x in real])


@given(seed=st.integers(0, 10**6), n=st.integers(8, 40), m=st.integers(8, 40), k=st.integers(1, 5), shift=st.floats(0, 3))
@settings(max_examples=20)
def test_precision_recall_by_loops(seed, n, m, k, shift):
    real, fake = normal(n, 3, seed=seed), .7*normal(m, 3, seed=seed + 1) + shift
    assert precision_recall(real, fake, k) == pytest.approx(by_loops(real.double().tolist(), fake.double().tolist(), k), abs=1e-6)


def test_precision_recall_of_known_sets():
    real = normal(60, 4)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, normal(60, 4, seed=1) + 50) == (0, 0)
    narrow = .05*normal(60, 4, seed=1)   # all believable, little variety
    precision, recall = precision_recall(real, narrow)
    assert precision > .9 and recall < .1
    assert precision_recall(narrow, real) == (recall, precision)
