"Drawn faces: who it is and how it was taken stay apart, masks are exact, the descriptor sees the person only."
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torchmetrics.functional.classification import binary_auroc

from unlearn_nb.faces import (BEARD, GLASSES, HAIR, FaceDescriptor, Identity, Scene, draw, face_descriptor, grid,
                              mask, sample_identity, sample_scene, to_tensor, vary)

TRAITS = [f.name for f in fields(Identity)]
PARTS = ('face', 'hair', 'eyes', 'mouth', 'brows', 'nose', 'beard', 'glasses', 'body')
UNSEEN = 20_000_000   # no model of ours was trained on seeds from here on
# Where a trait may change the picture: these parts, before or after.
TOUCHES = {
    **dict(eye_colour='eyes', nose='nose', mouth_width='mouth', lips='mouth', beard='beard', glasses='glasses'),
    **dict(hair_style='hair', brow_thickness='brows', brow_angle='brows', mole='face', freckles='face', ears='face'),
    **dict(jaw='face beard', hair_colour='hair brows beard'),
    **dict.fromkeys(('eye_size', 'eye_distance', 'eye_height'), 'eyes brows glasses')}
seeds = st.integers(0, 2**31)


@lru_cache(None)
def pixels(identity, scene, size=64): return np.asarray(draw(identity, scene, size)).astype(int)


@lru_cache(None)
def covers(identity, scene, part, size=64): return np.asarray(mask(identity, scene, size, part)).astype(int)


def changed(a, b, scene, size=64): return (pixels(a, scene, size) != pixels(b, scene, size)).any(-1)


# --- identity and scene ---

def test_traits_and_scene_are_two_separate_things():
    assert len(TRAITS) >= 14 and not set(TRAITS) & {f.name for f in fields(Scene)}
    for thing in (Identity(), Scene()):
        with pytest.raises(FrozenInstanceError): setattr(thing, fields(thing)[0].name, .1)
    assert len({Identity(), Identity(), Identity(skin=.9)}) == 2   # equal by value


@given(seeds, seeds)
def test_a_seed_is_an_identity_and_a_scene(a, b):
    i, s = sample_identity(a), sample_scene(a)
    assert i == sample_identity(a) and s == sample_scene(a)
    if a != b: assert i != sample_identity(b) and s != sample_scene(b)
    assert i.hair_style in HAIR and i.beard in BEARD and i.glasses in GLASSES
    assert all(0 <= v <= 1 for v in asdict(i).values() if not isinstance(v, str))


def test_sampling_leaves_the_global_generators_alone():
    np.random.seed(1), torch.manual_seed(1)
    first = sample_identity(3), np.random.random(), torch.rand(())
    np.random.seed(1), torch.manual_seed(1)
    assert (sample_identity(3), np.random.random(), torch.rand(())) == first


def test_sampled_traits_are_independent_and_all_kinds_occur():
    people = [sample_identity(k) for k in range(2000)]
    for trait, kinds in (('hair_style', HAIR), ('beard', BEARD), ('glasses', GLASSES)):
        assert {getattr(p, trait) for p in people} == set(kinds)
    number = {'hair_style': HAIR.index, 'beard': BEARD.index, 'glasses': GLASSES.index}
    table = np.array([[number.get(t, float)(getattr(p, t)) for t in TRAITS] for p in people])
    off = np.corrcoef(table.T) - np.eye(len(TRAITS))
    assert table.std(0).min() > .05 and abs(off).max() < .12   # 171 pairs of 2000: independent ones stay below .1


# --- pictures ---

def test_draw_any_size_again_and_again():
    i, s = sample_identity(5), sample_scene(6)
    for size in (32, 64, 256, 37):
        one, other = draw(i, s, size), draw(sample_identity(6), s, size)
        assert one.size == (size, size) and one.mode == 'RGB' and one.tobytes() == draw(i, s, size).tobytes()
        assert one.tobytes() not in (other.tobytes(), draw(i, sample_scene(5), size).tobytes())
        assert mask(i, s, size).size == (size, size) and mask(i, s, size).mode == 'L'
    with pytest.raises(ValueError, match='no part'): mask(i, s, part='hat')
    with pytest.raises(ValueError, match='not one of'): Identity(beard='long')


def test_small_and_large_pictures_show_the_same():
    for k in range(6):
        i, s = sample_identity(k), sample_scene(k)
        small, other = pixels(i, s, 32), pixels(sample_identity(k + 100), s, 32)
        large = np.asarray(draw(i, s, 256).resize((32, 32), Image.Resampling.BOX)).astype(int)
        assert abs(small - large).mean() < 6 and abs(small - large).mean() < .5*abs(other - large).mean()


def test_a_trait_shows_and_changes_its_own_part_only():
    "`vary` varies nothing but that trait; parts that have nothing to do with it stay, pixel for pixel."
    for trait in TRAITS:
        seen = False
        for k in range(6):
            i, s = sample_identity(k), sample_scene(k)
            other = vary(i, trait)
            assert [t for t in TRAITS if getattr(i, t) != getattr(other, t)] == [trait]
            different = changed(i, other, s)
            seen = seen or different.any()
            if trait not in TOUCHES or k > 1: continue
            where = sum(covers(who, s, part) for who in (i, other) for part in TOUCHES[trait].split())
            assert not (different & (where == 0)).any(), trait
            assert (where == 0).mean() > .2, trait   # the parts are not the whole picture
        assert seen, trait


def test_every_scene_field_shows():
    i, s = sample_identity(1), replace(sample_scene(1), mouth_open=0.)
    far = {'background': .9*(s.background < .5), 'shade': .2 if s.shade > .5 else .8, 'shirt': .9*(s.shirt < .5),
           'scale': .92 if s.scale > 1 else 1.06, 'brightness': .85 if s.brightness > 1 else 1.08, 'mouth_open': 1.}
    for field in (f.name for f in fields(Scene)):
        assert (pixels(i, s) != pixels(i, replace(s, **{field: far.get(field, -getattr(s, field))}))).any(), field


# --- masks ---

@given(seeds, seeds, st.sampled_from([32, 64]))
@settings(max_examples=12)
def test_masks_share_the_picture_out(person, scene, size):
    "Every point belongs to one part or to the wall: masks add up to 255 at most, but for rounding."
    i, s = sample_identity(person), sample_scene(scene)
    m = np.stack([covers(i, s, p, size) for p in PARTS])
    assert m.min() >= 0 and m.max() == 255 and m.sum(0).max() <= 255 + len(PARTS)/2
    for part in ('face', 'eyes', 'mouth'): assert covers(i, s, part, size).any(), part
    assert covers(i, s, 'beard', size).any() <= (i.beard != 'none')
    assert covers(i, s, 'glasses', size).any() == (i.glasses != 'none')
    wall, other = m.sum(0) == 0, replace(i, skin=1 - i.skin, hair_colour=1 - i.hair_colour)
    assert .05 < wall.mean() < .7 and (pixels(i, s, size) == pixels(other, s, size)).all(-1)[wall].all()


def test_the_background_is_where_no_part_is():
    i, s = sample_identity(2), sample_scene(2)
    moved = (pixels(i, s) != pixels(i, replace(s, background=(s.background + .5) % 1))).any(-1)
    full = sum(covers(i, s, p) for p in PARTS) >= 255 - len(PARTS)/2
    assert moved.any() and not (moved & full).any()


def test_grid():
    one = [draw(sample_identity(k), Scene(), 16) for k in range(5)]
    sheet = grid(one, columns=3, zoom=2)
    assert sheet.size == (96, 64)
    # the fifth: second row, second column
    cell = sheet.crop((32, 32, 64, 64)).resize((16, 16), Image.Resampling.NEAREST)
    assert cell.tobytes() == one[4].tobytes()


def test_to_tensor():
    pictures = [draw(Identity(), Scene(), 16), Image.new('RGB', (16, 16), (0, 255, 51))]
    x = to_tensor(pictures)
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32
    assert_close(x[1].mean((1, 2)), torch.tensor([-1., 1., -.6]))
    assert np.array_equal(((x[0] + 1)*127.5).round().permute(1, 2, 0).byte().numpy(), np.asarray(pictures[0]))


# --- the descriptor ---

def describe(pairs, size=32): return face_descriptor()(to_tensor([draw(i, s, size) for i, s in pairs]))


@lru_cache(None)
def unseen(n=100):
    "Descriptors [n, 64] of n unseen people in one scene, and of the same people in another."
    people = range(UNSEEN, UNSEEN + n)
    return tuple(describe([(sample_identity(k), sample_scene(2*k + j)) for k in people]) for j in (0, 1))


def auc(a, b):
    "How well the cosine tells couples (row i, row i) from all others; squeezed to [0, 1], as binary_auroc wants."
    return binary_auroc((a @ b.T).flatten()/2 + .5, torch.eye(len(a), dtype=torch.long).flatten()).item()


def test_the_descriptor_is_a_small_unit_vector():
    d, _ = unseen()
    assert sum(p.numel() for p in face_descriptor().parameters()) <= 500_000
    assert d.shape == (100, 64) and not d.requires_grad and not face_descriptor().training
    assert_close(d.norm(dim=1), torch.ones(100))


def test_the_descriptor_knows_people_again():
    "An untrained net of the same form does not."
    assert auc(*unseen()) >= .99
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FaceDescriptor()
    def new(j):
        return net(to_tensor([draw(sample_identity(k), sample_scene(2*k + j)) for k in range(UNSEEN, UNSEEN + 50)]))
    with torch.no_grad(): assert auc(new(0), new(1)) < .9


def test_the_descriptor_is_blind_to_the_background():
    people, (here, _) = range(UNSEEN, UNSEEN + 50), unseen()
    scenes = {k: replace(sample_scene(2*k), background=(sample_scene(2*k).background + .5) % 1) for k in people}
    there = describe([(sample_identity(k), scenes[k]) for k in people])
    assert (here[:50]*there).sum(1).median() > .8
    assert (here[:50]*here[:50].roll(1, 0)).sum(1).median() < .5   # which says something: others are far


def test_the_descriptor_takes_other_sizes():
    people, (small, _) = range(UNSEEN, UNSEEN + 30), unseen()
    large = describe([(sample_identity(k), sample_scene(2*k)) for k in people], 64)
    assert large.shape == (30, 64) and (small[:30]*large).sum(1).median() > .8
    assert face_descriptor()(torch.zeros(1, 3, 50, 40)).shape == (1, 64)
