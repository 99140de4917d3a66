"Surrogates: outside the mask nothing changes, inside another seed is another face."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from test_denoiser import every_prediction, tiny
from unlearn_nb.surrogates import ellipse, inpaint
from unlearn_nb.zoo import load


def noise(seed=0, mode='RGB', size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3) if mode == 'RGB' else (size, size), dtype=np.uint8))


def half(size=8):
    m = np.zeros((size, size), np.uint8)
    m[:, size//2:] = 255
    return Image.fromarray(m)


def array(image): return np.asarray(image).astype(int)


# --- inpaint ---

@every_prediction
def test_outside_the_mask_not_a_pixel_changes(prediction):
    d, x = tiny(prediction), noise()
    y = inpaint(d, x, mask=half(), steps=4)
    assert y.size == x.size and y.mode == 'RGB'
    assert np.array_equal(array(x)[:, :4], array(y)[:, :4]) and (array(x)[:, 4:] != array(y)[:, 4:]).mean() > .5


@given(seed=st.integers(0, 2**40), picture=st.integers(0, 99), bits=st.lists(st.booleans(), min_size=64, max_size=64))
@settings(max_examples=20)
def test_any_mask_keeps_what_it_does_not_cover(seed, picture, bits):
    covered = np.array(bits).reshape(8, 8)
    x = noise(picture)
    y = inpaint(tiny(), x, mask=Image.fromarray(np.where(covered, 255, 0).astype(np.uint8)), seed=seed, steps=2)
    assert np.array_equal(array(x)[~covered], array(y)[~covered])


def test_an_empty_mask_changes_nothing_and_a_full_one_forgets_the_picture():
    d = tiny()
    assert inpaint(d, noise(), mask=Image.new('L', (8, 8), 0), steps=3).tobytes() == noise().tobytes()
    full = [inpaint(d, noise(k), mask=Image.new('L', (8, 8), 255), seed=4, steps=3) for k in (0, 1)]
    assert full[0].tobytes() == full[1].tobytes() != noise().tobytes()


@pytest.mark.parametrize('mask', [None, half()], ids=['ellipse', 'half'])
def test_the_seed_decides_what_is_inside(mask):
    d, x = tiny(), noise()
    one, again, other = (inpaint(d, x, mask=mask, seed=s, steps=4) for s in (1, 1, 2))
    assert one.tobytes() == again.tobytes()
    differs = (array(one) != array(other)).any(-1)
    assert differs.mean() > .2 and not differs[np.asarray(mask or ellipse(8)) == 0].any()


def test_the_picture_around_the_mask_decides_too():
    "The known part is given to the model at every level: another surrounding, another inside."
    d = tiny()
    a, b = (inpaint(d, noise(k), mask=half(), seed=1, steps=4) for k in (0, 1))
    assert (array(a) != array(b))[:, 4:].any()


def test_grey_models_and_masks_of_other_modes():
    y = inpaint(tiny(channels=1), noise(mode='L'), mask=half().convert('1'), steps=2)
    assert y.mode == 'L' and np.array_equal(array(y)[:, :4], array(noise(mode='L'))[:, :4])
    by_mode = {inpaint(tiny(), noise(), mask=half().convert(m), steps=2).tobytes() for m in ('1', 'L', 'RGB')}
    assert len(by_mode) == 1


@pytest.mark.parametrize('act, words', [
    (lambda: inpaint(tiny(), noise(), mask=Image.new('L', (9, 8)), steps=2), 'the mask is 9 x 8 pixels, the image 8 x 8'),
    (lambda: inpaint(tiny(), noise(size=9), steps=2), 'the image is 9 x 9 pixels, but this model makes 8 x 8'),
    (lambda: inpaint(tiny(), noise(), seed=-1, steps=2), 'seed -1 is no seed'),
    (lambda: inpaint(tiny(), noise(), steps=0), 'steps = 0'),
])
def test_errors(act, words):
    with pytest.raises(ValueError) as e: act()
    assert words in str(e.value) and '\n' not in str(e.value)


def test_the_built_in_model_paints_into_its_own_pictures():
    "With the trained model: the corners stay, the middle becomes another one's."
    d = load('faces', device='cpu')
    x, = d.decode(d.sample([100], steps=10))
    m = np.asarray(ellipse(32))
    one, other = (array(inpaint(d, x, seed=s, steps=10)) for s in (1, 2))
    for y in (one, other): assert np.array_equal(y[m == 0], array(x)[m == 0]) and abs(y - array(x))[m == 255].mean() > 3
    assert abs(one - other)[m == 255].mean() > 3


# --- ellipse ---

@given(st.integers(8, 300), st.floats(0, .06))
@settings(max_examples=25)
def test_an_ellipse_covers_the_middle_and_spares_the_lower_corners(size, feather):
    m = ellipse(size, feather=feather)
    a = array(m)
    assert m.mode == 'L' and m.size == (size, size) and a[size//2, size//2] == 255
    assert max(a[-1, 0], a[-1, -1]) <= 5 and abs(a - a[:, ::-1]).max() <= 64   # left and right alike, but for an edge rounded to one of four sub-pixels
    assert set(np.unique(a)) > {0, 255} and a.mean()/255 == pytest.approx(np.pi/4*.6*.75, rel=2/size)   # the area of the default ellipse


def test_box_and_feather():
    full, small = ellipse(64), ellipse(64, box=(.3, .3, .7, .7))
    assert (array(small) <= array(full)).all() and array(small).sum()/array(full).sum() == pytest.approx(.4*.4/(.6*.75), rel=.1)
    def soft(m): return ((array(m) > 20) & (array(m) < 235)).sum()
    assert soft(ellipse(64, feather=.08)) > 2*soft(ellipse(64, feather=0.))
    assert array(ellipse(64, box=(.25, .25, .75, .75), feather=0.)).sum()/255/64**2 == pytest.approx(np.pi/16, rel=.05)   # the area of the ellipse itself
