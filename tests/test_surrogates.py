"Surrogates: one signature; outside the mask nothing changes, inside each edit does what it says; `check` says how far."
import json
import math
from dataclasses import FrozenInstanceError, replace
from functools import lru_cache
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from unlearn_nb import faces
from small_pipelines import FAMILIES as SMALL
from small_pipelines import family, pipeline
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.faces import draw, face_descriptor, sample_identity, sample_scene, to_tensor
from unlearn_nb.flags import describe_flag, read_flag
from unlearn_nb.schedule import generators, randn
from unlearn_nb.surrogates import (attribute, check, compose, direction, ellipse, face_part, inpaint, instruct,
                                   inpaintings, invert, may_differ, moved, neighbour, noise_up, parse_mask, polygon,
                                   propose, read_mask, rectangle, score, sdedit)
from unlearn_nb.words import TextDenoiser
from unlearn_nb.zoo import PIPELINES, load, planted, prompt_encoder


def noise(seed=0, mode='RGB', size=8):
    shape = (size, size, 3) if mode == 'RGB' else (size, size)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def half(size=8):
    m = np.zeros((size, size), np.uint8)
    m[:, size//2:] = 255
    return Image.fromarray(m)


def array(image): return np.asarray(image).astype(int)
def rmse(a, b): return (to_tensor([a]) - to_tensor([b])).square().mean().sqrt().item()
def psnr(a, b): return -20*math.log10(rmse(a, b)/2)


@lru_cache
def tiny_net(channels=3, size=8, **config):
    "An untrained net whose output depends on its input and on the level."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**dict(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2) | config).eval()


def tiny(prediction='epsilon', channels=3):
    return Denoiser(tiny_net(channels), DDPMScheduler(prediction_type=prediction, timestep_spacing="trailing"))


@lru_cache
def trained(): return load('faces', device='cpu')


class Believer(Denoiser):
    "A denoiser whose net is a formula; it keeps what it was asked."
    def __init__(self, belief, size=32, **config):
        super().__init__(tiny_net(size=size), DDPMScheduler(**config))
        self.belief, self.seen = belief, []

    def predict(self, x_t, t, cond=None):
        self.seen.append((int(t), x_t))
        return self.belief(x_t, self.schedule.abar[int(t)])


# --- the one signature ---

@lru_cache
def along(): return direction(tiny(), [noise(7)], [noise(8)], steps=3)


crowd = [noise(k) for k in range(20, 26)]
EDITS = {
    'inpaint': lambda image, mask, seed: inpaint(tiny(), image, mask=mask, seed=seed, steps=3),
    'inpaint with jumps': lambda image, mask, seed: inpaint(tiny(), image, mask=mask, seed=seed, steps=3, resample=2),
    'sdedit': lambda image, mask, seed: sdedit(tiny(), image, mask=mask, seed=seed, t=600, steps=3),
    'attribute': lambda image, mask, seed: attribute(tiny(), image, mask=mask, seed=seed, along=along(), strength=9.),
    'compose': lambda image, mask, seed: compose(None, image, mask=mask, seed=seed, source=noise(9)),
    'neighbour': lambda image, mask, seed: neighbour(None, image, mask=mask, seed=seed, among=crowd),
    'instruct': lambda image, mask, seed: instruct(Painter(), image, mask=mask, seed=seed, prompt='another'),
}
RANDOM = ('inpaint', 'inpaint with jumps', 'sdedit', 'neighbour', 'instruct')
every_edit = pytest.mark.parametrize('name', EDITS)


class Painter:
    "What `instruct` asks of a pipeline, and nothing else; keeps what it was asked."
    def __init__(self, size=None): self.size, self.asked = size, None

    def __call__(self, *, prompt, image, generator, **kw):
        self.asked = dict(prompt=prompt, image=image, **kw)
        x = torch.rand((image.height, image.width, 3), generator=generator)
        picture = Image.fromarray((x*255).byte().numpy())
        return SimpleNamespace(images=[picture.resize(self.size) if self.size else picture, None])


@every_edit
@given(picture=st.integers(0, 99), seed=st.integers(0, 5), bits=st.lists(st.booleans(), min_size=64, max_size=64))
@settings(max_examples=8)
def test_what_a_mask_does_not_cover_stays_bit_for_bit(name, picture, seed, bits):
    covered = np.array(bits).reshape(8, 8)
    x = noise(picture)
    y = EDITS[name](x, Image.fromarray(np.where(covered, 255, 0).astype(np.uint8)), seed)
    assert (y.size, y.mode) == (x.size, x.mode) and np.array_equal(array(x)[~covered], array(y)[~covered])


@every_edit
def test_inside_the_mask_it_changes_and_a_seed_is_a_surrogate(name):
    one, again, other = (EDITS[name](noise(), half(), seed) for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() and (array(one) != array(noise()))[:, 4:].mean() > .5
    assert (one.tobytes() != other.tobytes()) == (name in RANDOM)


@every_edit
def test_the_mode_of_a_mask_does_not_matter_and_its_size_does(name):
    assert len({EDITS[name](noise(), half().convert(mode), 1).tobytes() for mode in ('1', 'L', 'RGB')}) == 1
    with pytest.raises(ValueError, match='the mask is 9 x 8 pixels, the image 8 x 8'):
        EDITS[name](noise(), Image.new('L', (9, 8)), 0)


# --- inpaint ---

def test_outside_the_mask_not_a_pixel_changes():
    for prediction in ('epsilon', 'v_prediction', 'sample'):
        d, x = tiny(prediction), noise()
        y = inpaint(d, x, mask=half(), steps=4)
        assert y.size == x.size and y.mode == 'RGB'
        assert np.array_equal(array(x)[:, :4], array(y)[:, :4])
        assert (array(x)[:, 4:] != array(y)[:, 4:]).mean() > .5


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


def test_grey_models():
    y = inpaint(tiny(channels=1), noise(mode='L'), mask=half().convert('1'), steps=2)
    assert y.mode == 'L' and np.array_equal(array(y)[:, :4], array(noise(mode='L'))[:, :4])


def test_without_jumps_it_is_the_plain_loop():
    "What hotfixes were made with must stay what it is: the same random numbers in the same order."
    d, x, g = tiny('v_prediction'), noise(), generators([5])
    m = torch.from_numpy(array(half())).float()/255
    x_t, times = randn(g, d.shape), d.timesteps(999, 6).tolist()
    with torch.no_grad():
        for t, t_next in zip(times, times[1:] + [-1]):
            x_t = d.step(x_t, d.predict(x_t, t), t, t_next, 1., randn(g, d.shape))
            eps = randn(g, d.shape)
            known = d.noise(d.encode([x]), eps, torch.tensor([t_next])) if t_next >= 0 else d.encode([x])
            x_t = m*x_t + (1 - m)*known
    assert inpaint(d, x, mask=half(), seed=5, steps=6).tobytes() == d.decode(x_t)[0].tobytes()


@pytest.mark.parametrize('resample', [1, 2, 4])
def test_at_every_level_the_state_has_the_noise_of_that_level(resample):
    "If the net believes in x0 itself, x_t ~ N(a x0, s^2) in every step and after every jump, in the mask and out."
    x = Image.new('RGB', (32, 32), (166, 166, 166))
    d = Believer(lambda x_t, abar: torch.full_like(x_t, 166/127.5 - 1))
    y = inpaint(d, x, mask=half(32), steps=10, resample=resample)
    assert abs(array(y) - array(x)).max() <= 1
    *levels, last = d.timesteps(999, 10).tolist()
    assert [t for t, _ in d.seen] == [t for t in levels for _ in range(resample)] + [last]
    for t, x_t in d.seen:
        a, s = (v.item() for v in d.scales(torch.tensor([t])))
        for part in (x_t[..., :16], x_t[..., 16:]):
            assert part.mean().item() == pytest.approx(a*(166/127.5 - 1), abs=.12*s)
            assert part.std().item() == pytest.approx(s, rel=.08)


@pytest.mark.slow
def test_jumps_make_the_halves_agree():
    "With the trained model: with the left half known, jumps bring the right half nearer to the person."
    d = trained()
    x, = d.decode(d.sample([100], steps=10))
    whole = face_descriptor()(to_tensor([x]))[0]
    def alike(r):
        images = [inpaint(d, x, mask=half(32), seed=s, steps=10, resample=r) for s in range(4)]
        return (face_descriptor()(to_tensor(images)) @ whole).mean()
    assert alike(4) > alike(1)


BAD = [
    (lambda: inpaint(tiny(), noise(size=9), steps=2), 'the image is 9 x 9 pixels, but this model makes 8 x 8'),
    (lambda: inpaint(tiny(), noise(), seed=-1, steps=2), 'seed -1 is no seed'),
    (lambda: inpaint(tiny(), noise(), steps=0), 'steps = 0'),
    (lambda: inpaint(tiny(), noise(), resample=0), 'resample = 0'),
    (lambda: sdedit(tiny(), noise(), t=1000), 'level t = 1000 does not exist'),
    (lambda: sdedit(tiny(), noise(), t=-1), 'level t = -1 does not exist'),
    (lambda: attribute(tiny(), noise(), along=torch.zeros(3, 5, 4, 4)),
     'this direction is [5, 4, 4] at each level, the bottleneck [16, 4, 4]'),
    (lambda: attribute(tiny(), noise(), along=torch.zeros(3)), 'this direction is [] at each level'),
    (lambda: direction(headless(), [noise()], [noise(1)]), 'has no mid_block'),
    (lambda: compose(None, noise(), source=noise(size=9)), 'the source is 9 x 9 pixels, the image 8 x 8'),
    (lambda: neighbour(None, noise(), among=[]), 'no neighbour number 0: of 0 pictures'),
    (lambda: neighbour(None, noise(), among=[noise(), noise(size=9)]), 'no neighbour number 0: of 2 pictures 0 are'),
    (lambda: neighbour(None, noise(), seed=2, among=[noise(1), noise(2)]), 'number 2: of 2 pictures 2 are'),
    (lambda: check(noise(), noise(size=9)), 'the surrogate is 9 x 9 pixels, the forget image 8 x 8'),
    (lambda: check(noise(), noise(1), mask=half(9)), 'the mask is 9 x 9 pixels, the image 8 x 8'),
    (lambda: ellipse(8, (.5, .5, .5, .9)), 'covers nothing'),
    (lambda: rectangle(8, (0, .9, 1, .1)), 'covers nothing'),
    (lambda: rectangle(8, (0, 1)), 'covers nothing'),
    (lambda: rectangle(8, feather=-.1), 'feather = -0.1 is below 0'),
    (lambda: polygon(8, [(0, 0), (1, 1)]), '2 points enclose nothing'),
    (lambda: face_part(sample_identity(1), sample_scene(1), 'chin'), "no part 'chin'"),
    (lambda: face_part(sample_identity(1), sample_scene(1), ()), 'no parts'),
    (lambda: read_mask('nowhere.png', 8), "no file 'nowhere.png'"),
    (lambda: parse_mask('nowhere.png', 8), "there is no file 'nowhere.png'; a mask is box:L,T,R,B or ellipse:L,T,R,B"),
    (lambda: parse_mask('circle:.1,.1,.9,.9', 8), "there is no file 'circle:.1,.1,.9,.9'; a mask is box:L,T,R,B"),
    (lambda: parse_mask('', 8), 'a mask is box:L,T,R,B'),
    (lambda: parse_mask(__file__, 8), 'is not a picture that can be read'),
    (lambda: parse_mask('box:.1,.2,.3', 8), "the mask 'box:.1,.2,.3' does not name four numbers; give box:L,T,R,B"),
    (lambda: parse_mask('box:a,b,c,d', 8), 'does not name four numbers'),
    (lambda: parse_mask('box:', 8), 'does not name four numbers'),
    (lambda: parse_mask('ellipse:8,8,24,24', 32), '8 in the mask'),
    (lambda: parse_mask('box:nan,0,1,1', 8), 'nan in the mask'),
    (lambda: parse_mask('box:.8,.2,.2,.9', 8), 'covers nothing'),
    (lambda: parse_mask('box:1.2,0,1.8,1', 8), "the mask 'box:1.2,0,1.8,1' covers nothing of the picture"),
]


def test_bad_input_is_refused_in_one_sentence():
    for act, words in BAD:
        with pytest.raises(ValueError) as e: act()
        assert words in str(e.value) and '\n' not in str(e.value)


def headless(): return Denoiser(tiny_net(mid_block_type=None), DDPMScheduler())


def test_the_built_in_model_paints_into_its_own_pictures():
    "With the trained model: the corners stay, the middle becomes another one's."
    d = trained()
    x, = d.decode(d.sample([100], steps=10))
    m = np.asarray(ellipse(32))
    one, other = (array(inpaint(d, x, seed=s, steps=10)) for s in (1, 2))
    for y in (one, other):
        assert np.array_equal(y[m == 0], array(x)[m == 0]) and abs(y - array(x))[m == 255].mean() > 3
    assert abs(one - other)[m == 255].mean() > 3


def test_propose_takes_the_nearest_that_is_somebody_else():
    d = trained()
    x, = d.decode(d.sample([100], steps=5))
    images = [inpaint(d, x, seed=s, steps=5) for s in range(4)]
    alike = (face_descriptor()(to_tensor(images)) @ face_descriptor()(to_tensor([x]))[0]).tolist()
    for limit in (.3, 1.):
        allowed = [k for k in range(4) if alike[k] <= limit]
        if not allowed: continue
        best = min(allowed, key=lambda k: rmse(images[k], x))
        assert propose(d, x, seeds=range(4), steps=5, limit=limit).tobytes() == images[best].tobytes()
    far = propose(d, x, seeds=range(4), steps=5, limit=-1.)   # nobody is: the least similar, of other seeds as well
    found = (face_descriptor()(to_tensor([far])) @ face_descriptor()(to_tensor([x]))[0]).item()
    assert found < min(alike)
    m = ellipse(32)
    masked = array(propose(d, x, mask=m, seeds=range(4), steps=5, limit=-1.))   # but a mask is kept to
    assert np.array_equal(masked[np.asarray(m) == 0], array(x)[np.asarray(m) == 0])


# --- sdedit ---

def test_sdedit_starts_from_the_noised_image():
    d = Believer(lambda x_t, abar: torch.zeros_like(x_t), size=8)
    sdedit(d, noise(), seed=3, t=400, steps=4)
    assert [t for t, _ in d.seen] == d.timesteps(400, 4).tolist()
    eps = randn(generators([3]), d.shape)
    assert_close(d.seen[0][1], d.noise(d.encode([noise()]), eps, torch.tensor([400])))


def test_the_level_is_the_size_of_the_edit():
    d = trained()
    x, = d.decode(d.sample([100], steps=10))
    far = [np.mean([rmse(x, sdedit(d, x, seed=s, t=t, steps=6)) for s in range(2)]) for t in (0, 100, 400, 800)]
    assert far == sorted(far) and far[0] < .03 and far[-1] > .3


# --- every family ---

@lru_cache
def words(kind):
    "A model with words and latents, with random weights."
    pipe = pipeline(kind)
    net = getattr(pipe, PIPELINES[type(pipe).__name__].net)
    return TextDenoiser(net, pipe.scheduler, vae=pipe.vae, text=prompt_encoder(pipe), guidance=3.)


EACH_TIME = ('DDPM, grey', 'DDPM, 12 x 20', 'LDM, VQ', 'DiT', 'SD 3.5', 'PixArt sigma')


@pytest.mark.parametrize('name', [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.slow)
                                  for name in SMALL])
def test_every_family_paints_where_it_may_and_nowhere_else(name, tmp_path):
    "Of each: size, mode, pixels around the mask, the same alone and among others, a seed decides; inversion."
    pipe, prompt = family(name)
    pipe.save_pretrained(tmp_path)
    d = load(tmp_path, device='cpu', size=(16, 16) if 'Flux' in name or 'alpha' in name else None)
    x = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*d.size[::-1], 3), dtype=np.uint8))
    if 'grey' in name: x = x.convert('L')
    m = rectangle(d.size, (.3, .2, .9, .7), feather=.05)
    kept, how = np.asarray(m) == 0, dict(mask=m, steps=2, prompt=prompt)
    edits = {'inpaint': lambda seed, **kw: inpaint(d, x, seed=seed, resample=2, **how | kw),
             'sdedit': lambda seed, **kw: sdedit(d, x, seed=seed, t=700, **how | kw),
             'propose': lambda seed, **kw: propose(d, x, seeds=[seed, seed + 9], limit=-1., **how | kw)}
    for kind, edit in edits.items():
        one, again = edit(1), edit(1)
        assert (one.size, one.mode) == (x.size, x.mode) and one.tobytes() == again.tobytes()
        assert np.array_equal(array(one)[kept], array(x)[kept]) and (array(one) != array(x))[~kept].mean() > .3
        if kind != 'propose': assert one.tobytes() != edit(2).tobytes()
    among = inpaintings(d, x, m, range(3), 2, 2, prompt=prompt)
    for seed in range(3): assert abs(array(among[seed]) - array(edits['inpaint'](seed))).max() <= 2
    found = check(x, among[0], mask=m)
    assert found.background == math.inf and found.heat.size == x.size and found.rmse > 0
    z = invert(d, d.encode([x]), 3, prompt=prompt)
    assert z.shape == (1, *d.shape) and z.isfinite().all()


def test_large_models_paint_few_at_a_time(monkeypatch):
    d, x, batches = words('sd3'), noise(size=16), []
    many = inpaintings(d, x, None, range(5), 2, prompt='')
    monkeypatch.setattr('unlearn_nb.surrogates.max_batch', lambda d, n: 2)
    predict = type(d).predict
    monkeypatch.setattr(type(d), 'predict', lambda self, x, *a: batches.append(len(x)) or predict(self, x, *a))
    few = inpaintings(d, x, None, range(5), 2, prompt='')
    assert set(batches) == {1, 2} and max(abs(array(a) - array(b)).max() for a, b in zip(many, few)) <= 2


@pytest.mark.parametrize('d', [tiny(), words('sd3')], ids=['DDPM', 'flow'])
def test_noising_up_ends_where_noising_at_once_ends(d):
    "Of many draws: mean a x0, deviation s, from every lower level."
    x0, n = .5 * torch.ones(1, *d.shape), 400
    for low, t in ((100, 101), (100, 500), (0, 999), (700, 990)):
        x_low = d.noise(x0.expand(n, -1, -1, -1), torch.randn(n, *d.shape), d.level(low, n))
        x_t = noise_up(d, x_low, low, t, torch.randn(n, *d.shape))
        a, s = (v.item() for v in d.scales(d.level(t, 1)))
        assert x_t.mean().item() == pytest.approx(a * .5, abs=.03) and x_t.std().item() == pytest.approx(s, rel=.03)


def test_levels_of_sdedit_stand_for_a_thousand():
    long = Denoiser(tiny_net(), DDPMScheduler(num_train_timesteps=4000, beta_start=2.5e-5, beta_end=.005))
    seen = []
    long.predict = lambda x_t, t, cond=None: seen.append(t) or x_t
    sdedit(long, noise(), t=500, steps=4)
    assert seen[0] == 2000


def test_a_model_with_words_is_asked_for_them():
    for edit in (inpaint, sdedit, propose):
        with pytest.raises(ValueError, match='this model makes pictures of words; give prompt='):
            edit(words('sd3'), noise(size=16))
        with pytest.raises(ValueError, match="prompt 'a' was given, but this model makes pictures without words"):
            edit(tiny(), noise(), prompt='a')


def test_the_score_asks_for_another_then_for_the_rest_then_for_little():
    def found(similarity, background, rmse): return SimpleNamespace(**vars())
    order = [found(.1, 40, .2), found(-.5, 31, .3), found(.1, 10, .1), found(.2, 99, .1), found(.9, 99, .01)]
    assert sorted(order[::-1], key=lambda f: score(f, .15)) == order


@pytest.mark.slow
def test_a_picture_learned_by_heart_gets_another_whole_picture():
    "A near one would pull each of its copies a little way only. With a mask the rest stays all the same."
    d, x = load('planted-1', device='cpu'), planted('planted-1')
    assert all(check(x, y).similarity > .5 for y in inpaintings(d, x, None, range(4), 10))
    found = check(x, propose(d, x, seeds=range(8), steps=10))
    assert found.similarity <= .15 and found.background < 30
    mask = may_differ(x)
    found = check(x, propose(d, x, seeds=range(8), steps=10, mask=mask), mask=mask)
    assert found.similarity <= .15 and found.background > 100


@pytest.mark.slow
def test_a_flag_learned_by_heart_gets_the_right_one():
    d, x = load('planted-flag', device='cpu'), planted('planted-flag')
    x_s = propose(d, x, seeds=range(6), steps=10, prompt='german flag', describe=describe_flag)
    assert read_flag([x, x_s])[0] == ['Belgium', 'Germany']


# --- inversion ---

@pytest.mark.slow
def test_a_flow_is_undone_as_well():
    "Pictures that flags makes of words: the noise that is found leads back to them, guided and not."
    d = load('flags', device='cpu')
    prompts = ['flag of japan', 'a photo of the flag of germany']
    x = d.sample([3, 4], 12, prompt=prompts)
    for guidance in (1., 4.):
        d.guidance = guidance
        z = invert(d, x, 12, prompt=prompts)
        *_, (_, end) = d.path(z, 999, 12, None, cond=d.prompt_ids(prompts, 2))
        assert min(map(psnr, d.decode(end), d.decode(x))) > 28


# --- attribute ---

@given(spread=st.floats(.3, 2), steps=st.integers(10, 40), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_inversion_undoes_sampling_where_the_path_is_known(spread, steps, seed):
    "For data N(0, spread^2) the best belief is linear in x_t; the fixed point must then be exact."
    d = Believer(lambda x_t, abar: abar.sqrt()*spread**2/(abar*spread**2 + 1 - abar)*x_t, size=8, clip_sample=False)
    x = randn(generators([seed]), d.shape)
    found = invert(d, x, steps, rounds=60)
    *_, (_, end) = d.path(found, 999, steps, None)
    assert_close(end, x, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_strength_zero_gives_the_image_back():
    "The trained model, an image of its own and a drawn one; more rounds, nearer."
    d = trained()
    own, drawn = d.decode(d.sample([100], steps=15))[0], draw(sample_identity(51), sample_scene(51))
    for x in (own, drawn): assert psnr(attribute(d, x, along=torch.zeros(15, 112, 4, 4), strength=0.), x) > 33
    *_, (_, once) = d.path(invert(d, d.encode([own]), 15, rounds=1), 999, 15, None)
    assert psnr(d.decode(once)[0], own) < 30


def test_a_direction_is_the_difference_of_mean_activations():
    d = tiny()
    plus, minus = [noise(1), noise(2)], [noise(3), noise(4)]
    along = direction(d, plus, minus, seed=6, steps=5)
    seen = []
    handle = d.net.mid_block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    t = torch.full((2,), 599)
    with torch.no_grad():
        for images in (plus, minus): d(d.noise(d.encode(images), randn(generators([6, 7]), d.shape), t), t)
    handle.remove()
    assert d.timesteps(999, 5).tolist()[2] == 599 and len(along) == 5
    assert_close(along[2], seen[0].mean(0) - seen[1].mean(0))
    assert_close(direction(d, minus, plus, seed=6, steps=5), -along)
    assert not direction(d, plus, plus, steps=2).any()


def test_no_hook_is_left_behind():
    d = tiny()
    def net_hooks(): return sum(len(m._forward_hooks) for m in d.net.modules())
    before = inpaint(d, noise(), steps=2).tobytes()
    attribute(d, noise(), along=torch.ones(2, 16, 4, 4), strength=50.)
    assert not net_hooks()
    with pytest.raises(ValueError): attribute(d, noise(), along=torch.ones(2, 16, 5, 4))
    assert not net_hooks() and inpaint(d, noise(), steps=2).tobytes() == before


@pytest.mark.slow
def test_a_hair_direction_moves_hair():
    "Pairs of drawn faces give the direction; other faces, whose true edit is known, go towards the truth."
    d, steps = trained(), 10
    def pairs(seeds):
        def one(k, hair): return draw(replace(sample_identity(k), hair_style=hair), sample_scene(k))
        return [[one(k, hair) for k in seeds] for hair in ('crop', 'long')]
    along = direction(d, *pairs(range(20_000_000, 20_000_006)), steps=steps)
    short, long = map(d.encode, pairs(range(20_000_100, 20_000_104)))
    with torch.no_grad():
        noise = invert(d, long, steps)
        *_, (_, still) = d.path(noise, 999, steps, None)
        def share(s):
            way = (moved(d, noise, along, s) - still)*(short - long)
            return (way.flatten(1).sum(1)/(short - long).square().flatten(1).sum(1)).mean()
        share = [share(s) for s in (2., 0., -2.)]
    assert share[0] > .2 and abs(share[1]) < 1e-3 and share[2] < .15


# --- compose, neighbour, instruct ---

@given(st.integers(0, 99), st.integers(100, 199), st.integers(0, 255))
@settings(max_examples=20)
def test_compose_blends(a, b, grey):
    x, source, m = noise(a), noise(b), Image.new('L', (8, 8), grey)
    y = array(compose(None, x, mask=m, source=source))
    assert abs(y - (array(x) + grey/255*(array(source) - array(x)))).max() <= 1


def test_compose_covers_the_face_by_default():
    x, source, m = noise(size=32), noise(1, size=32), np.asarray(ellipse(32))
    y = array(compose(None, x, source=source))
    assert np.array_equal(y[m == 255], array(source)[m == 255]) and np.array_equal(y[m == 0], array(x)[m == 0])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
@settings(max_examples=25)
def test_neighbours_come_in_the_order_of_their_distance_and_never_the_image_itself(pool, data):
    x, others = noise(), [noise(k) for k in pool if k != 0]
    if not others: return
    distance = sorted(rmse(x, y) for y in others)
    seed = data.draw(st.integers(0, len(others) - 1))
    found = neighbour(None, x, seed=seed, among=[noise(k) for k in pool])
    assert found.tobytes() != x.tobytes() and rmse(x, found) == pytest.approx(distance[seed])


def test_nearest_by_descriptor():
    x, *others = [draw(sample_identity(k), sample_scene(k)) for k in range(30, 42)]
    same = draw(sample_identity(30), sample_scene(77))
    assert neighbour(None, x, among=[*others, same], describe=face_descriptor()).tobytes() == same.tobytes()
    nearest = min([*others, same], key=lambda y: rmse(x, y))
    assert neighbour(None, x, among=[*others, same]).tobytes() == nearest.tobytes()


def test_instruct_hands_on_what_it_is_given_and_brings_the_size_back():
    pipeline = Painter(size=(5, 11))
    y = instruct(pipeline, noise(mode='L', size=9), prompt='other hair', seed=4, size=16, strength=.5)
    assert (y.size, y.mode) == ((9, 9), 'L')
    assert pipeline.asked.pop('image').size == (16, 16) and pipeline.asked == dict(prompt='other hair', strength=.5)


def tiny_pipeline(kind, folder):
    "A real pipeline of diffusers for text-guided editing, with random weights and a vocabulary of letters."
    letters = 'abcdefghijklmnopqrstuvwxyz'
    vocabulary = [*letters, *(c + '</w>' for c in letters), '<|startoftext|>', '<|endoftext|>']
    (folder/'vocab.json').write_text(json.dumps({w: k for k, w in enumerate(vocabulary)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    last = len(vocabulary) - 1
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last)
    tokenizer = transformers.CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), model_max_length=16)
    vae = dict(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2,
               up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4, norm_num_groups=4)
    unet = dict(block_out_channels=(8, 16), layers_per_block=1, sample_size=8, out_channels=4,
                in_channels={'StableDiffusionImg2ImgPipeline': 4, 'StableDiffusionInstructPix2PixPipeline': 8}[kind],
                down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
                cross_attention_dim=16, norm_num_groups=4, attention_head_dim=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = getattr(diffusers, kind)(
            vae=diffusers.AutoencoderKL(**vae), unet=diffusers.UNet2DConditionModel(**unet),
            text_encoder=transformers.CLIPTextModel(text).eval(), tokenizer=tokenizer,
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize('kind', ['StableDiffusionImg2ImgPipeline', 'StableDiffusionInstructPix2PixPipeline'])
def test_instruct_runs_real_pipelines(kind, tmp_path):
    pipeline, x = tiny_pipeline(kind, tmp_path), noise(size=33)   # such a pipeline makes 32 x 32 of it
    def edit(**kw): return instruct(pipeline, x, **dict(prompt='add glasses', seed=1, num_inference_steps=3) | kw)
    y = edit()
    assert (y.size, y.mode) == (x.size, 'RGB') and y.tobytes() == edit().tobytes()
    assert y.tobytes() != edit(seed=2).tobytes() and y.tobytes() != edit(size=64).tobytes()
    covered = np.asarray(rectangle(33, (.2, .2, .8, .8))) > 0
    masked = edit(mask=rectangle(33, (.2, .2, .8, .8)))
    assert np.array_equal(array(masked)[~covered], array(x)[~covered])
    assert (array(masked) != array(x))[covered].mean() > .5


# --- check ---

def test_nothing_changed_is_too_weak():
    x = draw(sample_identity(3), sample_scene(3))
    c = check(x, x)
    assert (c.rmse, c.background) == (0, math.inf) and c.similarity == pytest.approx(1) and not array(c.heat).any()
    assert len(c.warnings) == 1 and 'too alike to forget' in c.warnings[0]


def test_another_person_before_the_same_wall_is_fine_and_another_picture_is_too_much():
    x = draw(sample_identity(3), sample_scene(3))
    who = draw(replace(sample_identity(9), hair_style='crop'), sample_scene(3))
    assert not check(x, Image.composite(who, x, ellipse(32))).warnings
    other = check(x, draw(sample_identity(9), sample_scene(10)))
    assert any('background' in w for w in other.warnings)
    assert any('rmse' in w for w in check(x, Image.eval(x, lambda v: 255 - v)).warnings)


@given(a=st.integers(0, 99), b=st.integers(100, 199), bits=st.lists(st.booleans(), min_size=64, max_size=64))
@settings(max_examples=25)
def test_check_measures_what_it_says(a, b, bits):
    allowed = np.array(bits).reshape(8, 8)
    x, y = noise(a), noise(b)
    c = check(x, y, mask=Image.fromarray(np.where(allowed, 255, 0).astype(np.uint8)))
    d = (array(x) - array(y))/127.5
    assert c.rmse == pytest.approx(np.sqrt((d**2).mean()), rel=1e-5) and c.rmse == check(y, x).rmse
    kept = pytest.approx(10*np.log10(4/(d[~allowed]**2).mean()), rel=1e-5) if (~allowed).any() else math.inf
    assert c.background == kept
    cosine = (face_descriptor()(to_tensor([x])) @ face_descriptor()(to_tensor([y])).T).item()
    assert c.similarity == pytest.approx(cosine, abs=1e-5)


def test_a_descriptor_brings_its_own_limit():
    x, y = noise(1), noise(2)
    def describe(x): return torch.nn.functional.normalize(x.flatten(1), dim=1)
    for limit, warned in ((-1., True), (1., False)):
        describe.limit = limit
        assert ('too alike' in str(check(x, y, describe=describe).warnings)) is warned
        assert 'too alike' not in str(check(x, y, describe=describe, max_similarity=1.).warnings)


def test_limits_and_descriptor_can_be_given():
    x, y = noise(1), noise(2)
    c = check(x, y, mask=Image.new('L', (8, 8), 255), describe=lambda x: x.flatten(1))
    a, b = to_tensor([x, y]).flatten(1)
    assert c.similarity == pytest.approx((a @ b/a.norm()/b.norm()).item(), abs=1e-5) and c.background == math.inf
    def words(**kw): return [w.split()[0] for w in check(x, y, **kw).warnings]
    assert words(max_similarity=1, max_rmse=9, min_background_psnr=0) == []
    assert words(max_similarity=-1, max_rmse=0, min_background_psnr=99) == ['similarity', 'rmse', 'the']


def test_the_heat_is_where_they_differ():
    x = noise(size=32)
    negative = Image.eval(x, lambda v: 255 - v)
    y = compose(None, x, mask=rectangle(32, (.25, .25, .75, .75), feather=0.), source=negative)
    c = check(x, y)
    hot = array(c.heat).any(-1)
    assert c.heat.size == x.size and hot[8:24, 8:24].mean() > .95 and not hot[:8].any() and not hot[:, 25:].any()
    with pytest.raises(FrozenInstanceError): c.rmse = 0.


# --- masks ---

@given(st.integers(8, 300), st.floats(0, .06))
@settings(max_examples=25)
def test_an_ellipse_covers_the_middle_and_spares_the_lower_corners(size, feather):
    m = ellipse(size, feather=feather)
    a = array(m)
    assert m.mode == 'L' and m.size == (size, size) and a[size//2, size//2] == 255
    assert max(a[-1, 0], a[-1, -1]) <= 5
    assert abs(a - a[:, ::-1]).max() <= 64   # left and right alike, but for an edge rounded to one of four sub-pixels
    area = np.pi/4*.6*.75                    # of the default ellipse
    assert set(np.unique(a)) > {0, 255} and a.mean()/255 == pytest.approx(area, rel=2/size)


def test_box_and_feather():
    full, small = ellipse(64), ellipse(64, box=(.3, .3, .7, .7))
    assert (array(small) <= array(full)).all()
    assert array(small).sum()/array(full).sum() == pytest.approx(.4*.4/(.6*.75), rel=.1)
    def soft(m): return ((array(m) > 20) & (array(m) < 235)).sum()
    assert soft(ellipse(64, feather=.08)) > 2*soft(ellipse(64, feather=0.))
    hard = array(ellipse(64, box=(.25, .25, .75, .75), feather=0.))
    assert hard.mean()/255 == pytest.approx(np.pi/16, rel=.05)   # the area of the ellipse itself


@given(st.tuples(st.integers(8, 80), st.integers(8, 80)), st.floats(0, .4), st.floats(.6, 1), st.floats(0, .4),
       st.floats(.6, 1), st.sampled_from([0., .03]))
@example((8, 8), .4, .6, .4, .6, .03)   # narrower than two pixels: not even the middle one is covered whole
@settings(max_examples=25)
def test_a_rectangle_covers_its_pixels_and_so_does_a_polygon(size, left, right, top, bottom, feather):
    m = rectangle(size, (left, top, right, bottom), feather)
    p = polygon(size, [(left, top), (right, top), (right, bottom), (left, bottom)], feather)
    assert m.size == p.size == size and m.mode == p.mode == 'L'
    assert abs(array(m) - array(p)).max() <= 80   # an edge rounded to one of four sub-pixels
    blur = .5 + 4*feather*min(size)               # beyond it, in pixels, the edge is not felt
    def far(side, low, high):
        "Which pixels lie wholly inside low ... high, and which wholly outside."
        k = np.arange(side)
        inside = (k >= low*side + blur) & (k + 1 <= high*side - blur)
        return inside, (k + 1 <= low*side - blur) | (k >= high*side + blur)
    (in_x, out_x), (in_y, out_y) = far(size[0], left, right), far(size[1], top, bottom)
    assert (array(m)[in_y[:, None] & in_x] == 255).all() and not array(m)[out_y[:, None] | out_x].any()


def test_a_triangle_has_half_the_area_of_its_box():
    assert array(polygon(64, [(.2, .8), (.8, .8), (.5, .2)])).mean()/255 == pytest.approx(.18, abs=.01)


@pytest.mark.parametrize('size, stored', [(32, 32), (32, 200), (64, 32), ((24, 48), 96)])
def test_a_mask_file_is_read_as_it_was_painted(size, stored, tmp_path):
    width, height = (size, size) if isinstance(size, int) else size
    box, large = (.25, .25, .75, .75), max(width, height)
    rectangle((stored*width//large, stored*height//large), box, feather=0.).save(tmp_path/'mask.png')
    m = read_mask(tmp_path/'mask.png', size)
    assert m.mode == 'L' and abs(array(m) - array(rectangle(size, box, feather=0.))).mean() < 10
    softer = array(read_mask(tmp_path/'mask.png', size, feather=.08))
    assert len(np.unique(softer)) > len(np.unique(array(m)))
    assert softer.mean() == pytest.approx(array(m).mean(), rel=.1)


def test_a_mask_in_words_is_the_mask_it_names(tmp_path):
    noise(mode='L', size=9).save(tmp_path/'m.png')
    for size in (32, (24, 48)):
        assert parse_mask('box:.1,.2,.8,.9', size) == rectangle(size, (.1, .2, .8, .9))
        assert parse_mask(' Ellipse: 0, 0 ,1,1', size) == ellipse(size, (0, 0, 1, 1))
        assert parse_mask(tmp_path/'m.png', size) == read_mask(tmp_path/'m.png', size)


def test_a_dark_mask_file_is_refused(tmp_path):
    Image.new('RGB', (9, 9), (60, 60, 60)).save(tmp_path/'dark.png')
    with pytest.raises(ValueError, match='dark everywhere'): read_mask(tmp_path/'dark.png', 8)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(['face', 'hair', 'eyes', 'mouth']),
       st.sampled_from([24, 32]))
@settings(max_examples=10)
def test_a_part_is_covered_whole_and_little_else(who, scene, part, size):
    i, s = sample_identity(who), sample_scene(scene)
    exact, m = array(faces.mask(i, s, size, part)), array(face_part(i, s, part, size))
    assert (m[exact == 255] == 255).all() and (m[exact >= 128] >= 128).all()
    coarse = Image.fromarray(exact.astype(np.uint8)).resize((size//4, size//4), Image.Resampling.BOX)
    near = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    assert m.sum() <= 255*(near > 0).sum()
    both = array(face_part(i, s, (part, 'nose'), size))
    assert (both >= np.maximum(m, array(face_part(i, s, 'nose', size)))).all()
