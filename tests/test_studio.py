"The studio without a screen: its pictures, its thread, its buttons, and that the model is always as it was."
import random
import re
import threading
import zipfile
from dataclasses import replace
from io import BytesIO

import ipywidgets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from test_unlearn import TINY, tiny
from unlearn_nb import studio as module
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.studio import (EDITS, Stopped, Studio, Upload, View, Worker, curve, live, mask_from_cells, png,
                               sentence, shade, swipe)
from unlearn_nb.surrogates import read_mask
from unlearn_nb.weights import WEIGHTS


def noise(size, seed=0): return Image.frombytes("RGB", size, random.Random(seed).randbytes(3*size[0]*size[1]))


def ready():
    "A studio of a tiny model, with a picture and a surrogate."
    s = Studio(tiny(), seed=5, cfg=TINY, many=3)
    s.gallery()
    s.choose(6)
    s.edit("inpaint")
    return s


@pytest.fixture(scope="module")
def ran():
    s = ready()
    s.run()
    return s


# --- pictures ---

@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_a_seam_shows_before_at_its_left_and_after_at_its_right(w, h, at):
    a, b = noise((w, h)), noise((w, h), 1)
    both, x = swipe(a, b, at), round(at*w)
    assert both.size == (w, h)
    if x < w - 1: assert both.crop((x + 1, 0, w, h)).tobytes() == b.crop((x + 1, 0, w, h)).tobytes()
    if x: assert both.crop((0, 0, x, h)).tobytes() == a.crop((0, 0, x, h)).tobytes()
    assert swipe(a, b, 0).tobytes() == b.tobytes() and swipe(a, b, 1).tobytes() == a.tobytes()


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4), st.sampled_from([8, 64]))
def test_a_mask_of_cells_is_white_where_they_are_on(cells, size):
    if not any(map(any, cells)):
        with pytest.raises(ValueError, match="no cell is on"): mask_from_cells(cells, size)
        return
    mask, step = mask_from_cells(cells, size, feather=0), size//4
    assert mask.size == (size, size) and mask.mode == "L"
    for r, row in enumerate(cells):
        for c, on in enumerate(row):
            cell = mask.crop((c*step, r*step, (c + 1)*step, (r + 1)*step))
            assert set(cell.tobytes()) == {255*on}


def test_a_shaded_picture_is_itself_where_the_mask_is_black():
    picture, mask = noise((8, 8)), mask_from_cells([[True, False]], 8, feather=0)
    shaded = shade(picture, mask)
    assert shaded.crop((4, 0, 8, 8)).tobytes() == picture.crop((4, 0, 8, 8)).tobytes()
    assert shaded.crop((0, 0, 4, 8)).tobytes() != picture.crop((0, 0, 4, 8)).tobytes()


def test_png_enlarges_by_whole_pixels():
    picture = noise((3, 2))
    with Image.open(BytesIO(png(picture, 4))) as out:
        assert out.size == (12, 8) and out.resize((3, 2), Image.Resampling.NEAREST).tobytes() == picture.tobytes()


def test_every_weight_has_a_curve_of_its_own():
    model = tiny()
    assert len({curve(model, w, 200, 1000).tobytes() for w in [*WEIGHTS, lambda snr: snr.sqrt()]}) == len(WEIGHTS) + 1


def test_live_is_drawn_before_the_first_step_and_for_methods_that_log_little():
    logs = [], [{"forget": .1}], [{"forget": .1, "retain": .2, "cosine": -.3, "ratio": None}]
    assert len({live(log, 5).size for log in logs}) == 1


# --- uploads ---

def test_uploads_of_both_ipywidgets():
    of_7 = lambda name, data: {name: {"metadata": {"size": len(data)}, "content": data}}
    of_8 = lambda name, data: ({"name": name, "content": memoryview(data)},)
    for form, empty in ((of_7, {}), (of_8, ())):
        mask = read_mask(Upload(form("all.png", png(Image.new("L", (16, 16), 255)))), 8)
        assert mask.getextrema() == (255, 255)
        with pytest.raises(ValueError, match="'notes.txt' is not a picture"):
            read_mask(Upload(form("notes.txt", b"no picture")), 8)
        with pytest.raises(ValueError, match="no file was uploaded yet"): Upload(empty)


# --- the plain half ---

def test_what_cannot_be_done_yet_is_refused_with_what_to_do_first():
    s = Studio(tiny(), cfg=TINY, many=2)
    def refused(match, *acts):
        for act in acts:
            with pytest.raises(ValueError, match=match): act()
    refused("not in the gallery; show it first", lambda: s.choose(0))
    refused("no picture is chosen yet", lambda: s.edit("inpaint"), s.run)
    s.gallery()
    s.choose(1)
    refused("no surrogate yet", s.run)
    refused("no hotfix yet; run first", s.apply, s.remove, s.compare, lambda: s.save("x"))
    refused("of one size", lambda: swipe(noise((4, 4)), noise((5, 4)), .5), lambda: s.edit(noise((9, 8))))
    refused("give prompt=", lambda: module.studio("flags"))
    refused("no model 'nobody'", lambda: module.studio("nobody"))


def test_edits_stay_inside_the_mask_and_a_picture_made_elsewhere_is_taken():
    s = ready()
    s.mask = mask_from_cells([[True, False]], 8, feather=0)
    for name in EDITS:
        s.edit(name, 1)
        assert s.surrogate.size == s.image.size and s.found.background == float("inf"), name
    s.edit(noise((8, 8)))
    with pytest.raises(ValueError, match="of one size"): s.edit(noise((9, 8)))
    assert s.surrogate.tobytes() == noise((8, 8)).tobytes()


def test_a_run_leaves_the_model_and_the_random_numbers_as_they_were(one_thread):
    s = ready()
    base, state = fingerprint(s.model), torch.get_rng_state()
    worker = Worker(s.model.net)
    worker.start(s.run)
    worker.thread.join()
    assert fingerprint(s.model) == base and torch.equal(torch.get_rng_state(), state)
    assert len(s.log) == len(s.frames) == TINY.steps and len(s.before) == len(s.after) == 3


def test_looking_changes_nothing(one_thread):
    few, many = ready(), ready()
    few.run(looks=1), many.run(looks=3)
    assert [n for n, _ in few.frames] == [3] and [n for n, _ in many.frames] == [1, 2, 3]
    assert all(torch.equal(v, many.hotfix.delta[k]) for k, v in few.hotfix.delta.items())


def test_apply_and_remove_bit_for_bit(ran):
    base = fingerprint(ran.model)
    ran.apply()
    assert ran.applied and fingerprint(ran.model) != base
    assert [x.tobytes() for x in ran.sample([6, 5, 7])] == [x.tobytes() for x in ran.after]
    for act in (ran.gallery, lambda: ran.choose(5), lambda: ran.edit("inpaint"), ran.run, ran.compare):
        with pytest.raises(ValueError, match="the hotfix is on the model; remove it first"): act()
    ran.remove()
    assert not ran.applied and fingerprint(ran.model) == base
    with pytest.raises(ValueError, match="not applied"): ran.remove()


def test_save_writes_a_hotfix_and_its_zip_and_nothing_over_something_else(ran, tmp_path):
    for _ in range(2): packed = ran.save(tmp_path/"fix")   # and again over itself
    with zipfile.ZipFile(packed) as z: z.extractall(tmp_path/"elsewhere")
    for name in ("fix", "elsewhere"): assert Hotfix.load(tmp_path/name).id == ran.hotfix.id
    with zipfile.ZipFile(packed) as z: assert set(z.namelist()) == module.FILES   # nothing of the receipt
    assert {p.name for p in (tmp_path/"fix-private").iterdir()} == module.PRIVATE
    (tmp_path/"mine-private").mkdir()
    (tmp_path/"mine-private"/"forget_7.png").touch()
    before = sorted(tmp_path.rglob("*"))
    for bad in (tmp_path, packed, tmp_path/"mine"):
        with pytest.raises(ValueError, match="holds something else"): ran.save(bad)
    with pytest.raises(ValueError, match="the folder has no name"): ran.save(" ")
    assert sorted(tmp_path.rglob("*")) == before


# --- the thread ---

def test_errors_are_sentences():
    for e, said in ((ValueError("so it is\n not [B, 3]"), "so it is not [B, 3]"),
                    (OSError(28, "No space left on device"), "No space left on device"),
                    (OSError(13, "Permission denied", "/x"), "Permission denied: '/x'"),
                    (ConnectionError("no network"), "no network"),
                    (Stopped(), "stopped; the model is as it was"),
                    (RuntimeError("no memory"), "this failed (RuntimeError: no memory); the model is as it was")):
        assert sentence(e) == said


@pytest.mark.parametrize("after", [0, 2])
def test_stop_brings_the_model_back(after, one_thread):
    "Pressed while the pictures that must stay are made, and after the second step."
    s, said = ready(), []
    base, wanted = fingerprint(s.model), [p.requires_grad for p in s.model.net.parameters()]
    worker = Worker(s.model.net, said.append)
    def stop_in(s):
        if len(s.log) == after: worker.stop()
    if not after: hook = s.model.net.register_forward_pre_hook(lambda *_: worker.stop())
    worker.start(lambda: s.run(stop_in))
    worker.thread.join()
    if not after: hook.remove()
    assert said == ["stopped; the model is as it was"] and len(s.log) == after and s.hotfix is None
    assert fingerprint(s.model) == base and [p.requires_grad for p in s.model.net.parameters()] == wanted
    worker.start(s.run)   # and it can be begun again
    worker.thread.join()
    assert len(said) == 2 and s.hotfix is not None


def test_one_job_at_a_time_and_only_its_thread_hears_stop():
    model, said, go = tiny(), [], threading.Event()
    worker = Worker(model.net, said.append)
    worker.start(lambda: go.wait(10) and model.sample([0], 2) and None)
    worker.start(lambda: "a second job")
    assert said == ["something is still running; wait, or press Stop"]
    worker.stop()
    model.sample([0], 2)   # of somebody else
    go.set()
    worker.thread.join()
    assert said[1:] == ["stopped; the model is as it was"] and not model.net._forward_pre_hooks


def test_an_error_in_the_thread_is_a_sentence_and_frees_the_buttons():
    model, said, states = tiny(), [], []
    worker = Worker(model.net, said.append, states.append)
    worker.start(lambda: 1/0)
    worker.thread.join()
    assert said == ["this failed (ZeroDivisionError: division by zero); the model is as it was"]
    assert states == [True, False]


# --- the widget ---

def inside(w):
    yield w
    for child in getattr(w, "children", ()): yield from inside(child)


def named(view, description): return next(w for w in inside(view) if getattr(w, "description", None) == description)


class Hand:
    "Somebody who clicks, waits, and reads."
    def __init__(self, view):
        self.view = view
        if view.worker.thread: view.worker.thread.join()

    def __call__(self, name):
        self.view.buttons[name].click()
        if self.view.worker.thread: self.view.worker.thread.join()
        return self.said()

    def said(self): return self.view.text
    def seen(self): return sum(i.layout.display is None for i, _, _ in self.view.shown)


@pytest.fixture
def hand(): return Hand(View(Studio(tiny(), seed=5, cfg=TINY, many=3)))


def test_the_whole_path_by_clicks(hand, tmp_path):
    "And an image is shown only when it has something to show."
    view, base, bare = hand.view, fingerprint(hand.view.studio.model), []
    hidden = [i for i, _, _ in view.shown if i.layout.display == "none"]
    def look(change, i): bare.extend([i] * (change.new is None and not i.value))
    for i in hidden: i.layout.observe(lambda change, i=i: look(change, i), "display")
    assert "no picture is chosen yet" in hand("make the surrogate")
    assert "seeds 8 to 10" in hand("show others") and "forget" in view.buttons["forget 5"].description
    assert hand("forget 6").startswith("seed 9 is to be forgotten")
    assert "no surrogate yet" in hand("run")
    assert hand("make the surrogate") and view.studio.surrogate
    named(view, "weight").value, named(view, "surgery").value, named(view, "steps").value = "unit_v", "plain", 2
    assert (view.studio.cfg.weight, view.studio.cfg.surgery, view.studio.cfg.steps) == ("unit_v", "plain", 2)
    assert hand("run").startswith("done in ") and len(view.studio.log) == 2
    named(view, "picture").index, named(view, "seam").value = 1, .2
    named(view, "folder").value = str(tmp_path/"fix")
    assert re.search("written to .*fix, which may be given away.*fix-private, which must be kept", hand("save"))
    assert Hotfix.load(tmp_path/"fix").id == view.studio.hotfix.id
    assert any("data:application/zip" in w.value for w in inside(view) if isinstance(w, ipywidgets.HTML))
    assert hand("apply") == "the hotfix is on the model" and "already applied" in hand("apply")
    assert "remove it first" in hand("run")
    assert hand("remove").startswith("the hotfix is off") and fingerprint(view.studio.model) == base
    assert hand.seen() == len(view.shown) and len(hidden) >= 3 and not bare


def test_masks_by_clicks(hand):
    view = hand.view
    hand("show others"), hand("forget 5")
    def mask(): return view.studio.mask.tobytes()
    seen, shape = [mask()], named(view, "mask")
    named(view, "across").value = (0., .5)
    seen.append(mask())
    shape.value = "rectangle"
    seen.append(mask())
    shape.value = "paint"
    assert "no cell is on" in hand.said() and mask() == seen[-1]
    [w for w in inside(view) if isinstance(w, ipywidgets.ToggleButton)][9].value = True
    seen.append(mask())
    shape.value = "file"
    assert "no file was uploaded yet" in hand.said() and len(set(seen)) == 4 == len(seen)
    named(view, "across").value = (.5, .5)
    shape.value = "ellipse"
    assert "covers nothing" in hand.said()


def test_while_a_job_runs_what_touches_the_model_is_disabled(hand):
    view, go = hand.view, threading.Event()
    view.worker.start(lambda: go.wait(10) and "done")
    assert all(w.disabled for w in view.locked) and not view.halt.disabled
    view.halt.click()
    assert view.worker.halt.is_set()
    go.set()
    view.worker.thread.join()
    assert not any(w.disabled for w in view.locked) and view.halt.disabled and hand.said() == "done"
    view.tell("<img src=x>")   # sentences cannot be markup
    assert "<img" not in view.said.value


def test_a_setting_of_ones_own_is_kept_and_so_is_another_name_of_a_rule():
    def mine(snr): return snr.sqrt()
    view = View(Studio(tiny(), cfg=replace(TINY, weight=mine, surgery="pcgrad"), many=2))
    assert view.studio.cfg.weight is mine and named(view, "weight").label == "mine"
    assert view.studio.cfg.surgery == named(view, "surgery").label == "pcgrad"
    labels = [label for label, _ in named(View(Studio(tiny(), cfg=TINY, many=2)), "surgery").options]
    assert TINY.surgery in labels and not {"pcgrad", "agem", "gradvac"} & set(labels)
