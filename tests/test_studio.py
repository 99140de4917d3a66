"The studio without a screen: its pictures, its thread, its buttons, and that the model is always as it was."
import random
import re
import threading
import time
import zipfile
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

import ipywidgets
import pytest
import torch
from diffusers import DDPMPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from small_pipelines import family, pipeline
from test_unlearn import TINY, tiny
from test_words import denoiser_of
from unlearn_nb import studio as module
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.metrics import describe
from unlearn_nb.studio import (EDITS, Clock, Stopped, Studio, Upload, View, Worker, curve, fit, live, mask_from_cells,
                               sentence, shade, sized, swipe)
from unlearn_nb.denoiser import read_image
from unlearn_nb.figures import png_bytes
from unlearn_nb.weights import WEIGHTS


FEW = replace(TINY, pool=16)


def noise(size, seed=0): return Image.frombytes("RGB", size, random.Random(seed).randbytes(3*size[0]*size[1]))


def ready():
    "A studio of a tiny model, with a picture and a surrogate."
    s = Studio(tiny(), seed=5, cfg=FEW, many=3)
    s.gallery()
    s.choose(6)
    s.edit("inpaint")
    return s


@pytest.fixture(scope="module")
def ran():
    s = ready()
    s.run()
    s.compare()
    return s


@pytest.fixture(autouse=True)
def few_seeds(monkeypatch, request):
    "A report that looks at few, and a descriptor that is there already."
    if "family" not in request.node.name: monkeypatch.setattr(module, "descriptor", lambda model: describe)
    monkeypatch.setattr(module, "PANEL", range(1000, 1008))
    monkeypatch.setattr(module, "FRESH", range(500_000, 500_024))


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


def test_pictures_are_enlarged_by_whole_pixels_or_made_smaller():
    picture = noise((3, 2))
    assert sized(picture, 13).size == (12, 8) and sized(noise((300, 100)), 60).size == (60, 20)
    assert sized(picture, 13).resize((3, 2), Image.Resampling.NEAREST).tobytes() == picture.tobytes()


@given(*[st.integers(1, 90)]*4)
def test_what_is_fitted_has_the_size_and_is_its_middle(w, h, wide, high):
    x, said = fit(noise((w, h)), (wide, high))
    assert x.size == (wide, high) and bool(said) == ((w, h) != (wide, high))
    share = min(w/wide, h/high)
    assert ("cut out" in said) == ((w, h) != (round(wide*share), round(high*share)))


def test_what_was_done_to_a_picture_is_said():
    for size, said in (((90, 60), "its middle of 60 x 60 was cut out, and it was made smaller"),
                       ((8, 8), "it was made larger"), ((64, 64), "it was made smaller"),
                       ((32, 40), "its middle of 32 x 32 was cut out")):
        assert fit(noise(size), (32, 32))[1].endswith(f"and this model makes 32 x 32: {said}")


@pytest.mark.slow
def test_every_weight_has_a_curve_of_its_own():
    model = tiny()
    assert len({curve(model, w, 200, 1000).tobytes() for w in [*WEIGHTS, lambda snr: snr.sqrt()]}) == len(WEIGHTS) + 1


def test_live_is_drawn_before_the_first_step_and_for_methods_that_log_little():
    logs = [], [{"forget": .1}], [{"forget": .1, "retain": .2, "cosine": -.3, "ratio": None}]
    assert len({live(log, 5).size for log in logs}) == 1


# --- uploads ---

def of_7(name, data): return {name: {"metadata": {"size": len(data)}, "content": data}}
def of_8(name, data): return ({"name": name, "content": memoryview(data)},)


def test_uploads_of_both_ipywidgets():
    for form, empty in ((of_7, {}), (of_8, ())):
        assert read_image(Upload(form("all.png", png_bytes(noise((9, 8)))))).tobytes() == noise((9, 8)).tobytes()
        with pytest.raises(ValueError, match="'a.txt' is not a picture"): read_image(Upload(form("a.txt", b"no")))
        with pytest.raises(ValueError, match="no file was uploaded yet"): Upload(empty)


# --- the plain half ---

def test_what_cannot_be_done_yet_is_refused_with_what_to_do_first():
    s = Studio(tiny(), cfg=FEW, many=2)
    def refused(match, *acts):
        for act in acts:
            with pytest.raises(ValueError, match=match): act()
    refused("not in the gallery; show it first", lambda: s.choose(0))
    refused("no picture is chosen yet", lambda: s.edit("inpaint"), s.run)
    s.gallery()
    s.choose(1)
    refused("no surrogate yet", s.run)
    refused("no hotfix yet; run first", s.apply, s.remove, s.compare, s.judge, s.attack, lambda: s.save("x"))
    refused("of one size", lambda: swipe(noise((4, 4)), noise((5, 4)), .5))
    refused("without words", lambda: Studio(s.model, prompt="red"), lambda: s.gallery(prompt="red"))
    refused("no model is named", lambda: s.change_model(" "))
    refused("no model 'nobody'", lambda: module.studio("nobody"))


def test_edits_stay_inside_the_mask_and_a_picture_made_elsewhere_is_taken():
    s = ready()
    s.mask = mask_from_cells([[True, False]], 8, feather=0)
    for name in EDITS:
        s.edit(name, 1)
        assert s.surrogate.size == s.image.size and s.found.background == float("inf"), name
    s.edit(noise((8, 8)))
    assert s.surrogate.tobytes() == noise((8, 8)).tobytes()
    s.edit(noise((90, 80)))   # brought to the model's size
    assert s.surrogate.size == (8, 8)


def test_a_picture_of_ones_own_goes_the_whole_way(tmp_path):
    "It has no seed: it is noised and denoised, to see what is left of it."
    s = Studio(tiny(), seed=5, cfg=FEW, many=3)
    base = fingerprint(s.model)
    s.choose_own(noise((20, 16)))
    assert s.seed is None and s.image.size == (8, 8)
    s.edit(noise((8, 8), 1))
    s.run()
    s.compare()
    assert len(s.frames) == 3 and len(s.before) == len(s.after) == 4 and fingerprint(s.model) == base
    s.save(tmp_path/"fix")
    assert s.saved and s.hotfix.receipt.requests[0].seed is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDPM, grey", "DDPM, 12 x 20", "DiT", "SD 1"])
def test_every_family_goes_the_whole_way(name, tmp_path):
    "As a folder typed in, by clicks; a picture of one's own as well."
    pipe, prompt = family(name)
    pipe.save_pretrained(tmp_path/"model")
    hand = Hand(View(Studio(tiny(), cfg=FEW, many=2)))
    s = hand.view.studio
    said, base = loads(hand, str(tmp_path/"model")), fingerprint(s.model)
    assert "choose the picture" in said or "type some as prompt" in said
    s.cfg = replace(s.cfg, steps=2, retain_images=8, near_images=2, pool=16, sampling_steps=4)
    hand.sets(steps=2)
    if prompt: hand.sets(**{"class" if s.classes else "prompt": prompt})
    for act in (lambda: hand("show others", f"forget {s.seeds[0]}"), lambda: hand.gives(1, "a.png", noise((50, 40)))):
        act()
        assert hand("forget this picture", "forget this picture") if s.seed is None else s.prompt == prompt
        assert s.image.size == s.model.size and s.image.mode == ("L" if "grey" in name else "RGB")
        hand("make the surrogate")
        assert s.surrogate, hand.said()
        assert "passed" in hand("run"), hand.said()
        assert s.evidence and s.rows() and hand("apply").startswith("the hotfix is on"), hand.said()
        assert hand("remove").startswith("the hotfix is off") and fingerprint(s.model) == base
        hand.sets(folder=str(tmp_path/"fix"))
        assert hand("save").startswith("written to")
        s.no_picture()


def test_words_and_classes():
    "A prompt is asked for; another one lets go of the picture; a number of a class is one, too."
    small = denoiser_of(pipeline("sd3"))
    s = Studio(small, cfg=replace(FEW, rank=2), many=2)
    with pytest.raises(ValueError, match="makes pictures of words; type some as 'prompt' first"): s.gallery()
    s.gallery(prompt=" red flag ")
    s.choose(1)
    assert s.prompt == "red flag" and s.sample([1])[0].tobytes() == s.image.tobytes()
    s.edit(noise((8, 8)))
    s.gallery(2)
    assert s.image
    s.gallery(prompt="flag")
    assert s.image is s.surrogate is None and list(s.seeds) == [2, 3]
    s.choose_own(noise((8, 8)), "red")
    assert s.prompt == "red" and s.pictures == [] and s.image.size == small.size
    small.others = ("0", "1")
    s = Studio(small, many=2)
    assert s.classes and s.known == ("0", "1") and s.prompt == "0" and not Studio(tiny()).known
    s.prompt = None
    with pytest.raises(ValueError, match="the number of a class; type one as 'class'"): s.gallery()


def test_a_run_leaves_the_model_and_the_random_numbers_as_they_were(one_thread):
    s = ready()
    base, state = fingerprint(s.model), torch.get_rng_state()
    worker = Worker(lambda: s.model.net)
    worker.start(lambda: s.run() or s.compare())
    worker.thread.join()
    assert fingerprint(s.model) == base and torch.equal(torch.get_rng_state(), state)
    assert len(s.log) == len(s.frames) == TINY.steps and len(s.before) == len(s.after) == 3


@pytest.mark.slow
def test_looking_changes_nothing(one_thread):
    few, many = ready(), ready()
    few.run(looks=1), many.run(looks=3)
    assert [n for n, _ in few.frames] == [3] and [n for n, _ in many.frames] == [1, 2, 3]
    assert all(torch.equal(v, many.hotfix.delta[k]) for k, v in few.hotfix.delta.items())


def test_apply_and_remove_bit_for_bit_and_what_is_shown_is_of_now(ran):
    base = fingerprint(ran.model)
    def now(): return [x.tobytes() for x in ran.now], [x.tobytes() for x in ran.pictures]
    before, was = [x.tobytes() for x in ran.before], now()
    ran.apply()
    assert ran.applied and fingerprint(ran.model) != base
    assert now()[0] == [x.tobytes() for x in ran.after] and now()[1] == [x.tobytes() for x in ran.sample([5, 6, 7])]
    ran.gallery()   # may be looked at
    for act in (lambda: ran.choose(5), lambda: ran.choose_own(noise((8, 8))), lambda: ran.edit("inpaint"), ran.run,
                ran.compare, ran.judge, ran.attack, lambda: ran.change_model("faces")):
        with pytest.raises(ValueError, match="the hotfix is on the model; remove it first"): act()
    ran.remove()
    assert not ran.applied and fingerprint(ran.model) == base and now() == was and was[0] == before
    with pytest.raises(ValueError, match="not applied"): ran.remove()


def test_save_writes_a_hotfix_and_its_zip_and_nothing_over_something_else(ran, tmp_path, monkeypatch):
    for _ in range(2): packed = ran.save(tmp_path/"fix")   # and again over itself
    with zipfile.ZipFile(packed) as z: z.extractall(tmp_path/"elsewhere")
    for name in ("fix", "elsewhere"): assert Hotfix.load(tmp_path/name).id == ran.hotfix.id
    with zipfile.ZipFile(packed) as z: assert set(z.namelist()) == {"hotfix.safetensors", "card.json"}   # no receipt
    assert {p.name for p in (tmp_path/"fix-private").iterdir()} == {"receipt.json", "forget_1.png", "surrogate_1.png"}
    for name in ("mine-private", "other"): (tmp_path/name).mkdir()
    (tmp_path/"mine-private"/"forget_7.png").touch()
    (tmp_path/"zipped.zip").write_bytes(b"of somebody")
    (tmp_path/"other"/"mine.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for bad in (tmp_path, packed, tmp_path/"mine", tmp_path/"other", tmp_path/"zipped"):
        with pytest.raises(ValueError, match="holds something else; give another name"): ran.save(bad)
    with pytest.raises(ValueError, match="the folder has no name"): ran.save(" ")
    with pytest.raises(ValueError, match="is no folder; give another name"): ran.save(tmp_path/"no"/"where")
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module.shutil, "make_archive", full)
    for name in ("fix", "new"):   # nothing half-written, and what was there stays
        with pytest.raises(OSError, match="No space"): ran.save(tmp_path/name)
    assert sorted(tmp_path.rglob("*")) == before and Hotfix.load(tmp_path/"fix").id == ran.hotfix.id


@pytest.mark.slow
def test_the_report_and_the_audit_are_kept_with_the_hotfix(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "audit", partial(module.audit, attacks=["A1", "A9", "A14a"]))
    base, worker, s = fingerprint(ran.model), Worker(lambda: ran.model.net), ran
    s.judge()
    s.attack()
    assert fingerprint(s.model) == base and s.evidence["verdicts"] and s.attacks["attacks"]
    with zipfile.ZipFile(s.save(tmp_path/"fix")) as z:
        assert set(z.namelist()) == module.FILES
        public = z.read("report.json").decode()
    private = {p.name for p in (tmp_path/"fix-private").iterdir()}
    assert private == module.PRIVATE and "similarity" not in public and '"attacks"' in public
    said = []
    worker.count = lambda n: worker.stop()
    worker.tell = said.append
    for act in (s.judge, s.attack, s.compare, s.apply):   # and stopped they leave all as it was
        worker.start(act)
        worker.thread.join()
        assert fingerprint(s.model) == base and not s.applied, act
    assert said == ["stopped; the model is as it was"]*4 and s.hotfix and s.evidence and not s.model.net._forward_hooks


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
    worker = Worker(lambda: s.model.net, said.append)
    def stop_in(s):
        if len(s.log) == after: worker.stop()
    if not after: worker.count = lambda n: worker.stop()
    worker.start(lambda: s.run(stop_in))
    worker.thread.join()
    worker.count = lambda n: None
    assert said == ["stopped; the model is as it was"] and len(s.log) == after and s.hotfix is None
    assert fingerprint(s.model) == base and [p.requires_grad for p in s.model.net.parameters()] == wanted
    worker.start(s.run)   # and it can be begun again
    worker.thread.join()
    assert len(said) == 2 and s.hotfix is not None


def test_one_job_at_a_time_and_only_its_thread_hears_stop():
    model, said, go = tiny(), [], threading.Event()
    worker = Worker(lambda: model.net, said.append)
    worker.start(lambda: go.wait(10) and model.sample([0], 2) and None)
    worker.start(lambda: "a second job")
    assert said == ["something is still running; wait, or press stop"]
    worker.stop()
    model.sample([0], 2)   # of somebody else
    go.set()
    worker.thread.join()
    assert said[1:] == ["stopped; the model is as it was"] and not model.net._forward_pre_hooks


def test_a_clock_tells_the_time_left_at_the_rate_that_it_measured(monkeypatch):
    now, clock = [0.], Clock()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock.begin("pictures", 100)
    assert clock.left is None and str(clock) == "pictures" and clock.share == 0
    now[0] = 5.
    clock.count(25)
    assert clock.left == 15 and str(clock) == "pictures: 15 s left" and clock.share == .25
    now[0] = 100.
    assert str(clock) == "pictures: 5 min left"
    clock.count(80)   # more than was thought
    assert clock.left is None and clock.share == 1


@pytest.mark.slow
def test_the_work_of_each_part_is_known_before(ran):
    "What the clock is told is what passes through the net, to a tenth."
    parts, s = [], ready()
    def count(n):
        if not parts or parts[-1][0] is not s.clock.start: parts.append([s.clock.start, s.clock.name, s.clock.total, 0])
        parts[-1][3] += n
    worker = Worker(lambda: s.model.net, count=count)
    worker.start(lambda: s.gallery() or s.edit("inpaint") or s.run() or s.compare() or s.judge())
    worker.thread.join()
    seen = {name: (total, done) for _, name, total, done in parts if total and s.clock.passes}
    for part in ("pictures", "surrogate", "what must stay (1 of 4)", "before and after (3 of 4)", "report (4 of 4)"):
        total, done = seen[part]
        assert .9 < done/total < 1.1, (part, total, done)


def test_an_error_in_the_thread_is_a_sentence_and_frees_the_buttons():
    model, said, states = tiny(), [], []
    worker = Worker(lambda: model.net, said.append, states.append)
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

    def __call__(self, *names):
        for name in names:
            self.view.buttons[name].click()
            if self.view.worker.thread: self.view.worker.thread.join()
        return self.said()

    def said(self): return self.view.text

    def sets(self, **values):
        for name, value in values.items(): named(self.view, name).value = value
        return self.said()

    def gives(self, k, name, picture):
        "Upload number k (1: the picture, 2: the surrogate)."
        file = [w for w in inside(self.view) if isinstance(w, ipywidgets.FileUpload)][k - 1]
        data = picture if isinstance(picture, bytes) else png_bytes(picture)
        value = [of_8(name, data)[0] | {"type": "", "size": 1, "last_modified": START}]
        if int(ipywidgets.__version__[0]) < 8: value = of_7(name, data)
        file.set_trait("value", value)
        return self.said()

    def result(self):
        "What is written in the last tab."
        return " ".join(w.value for w in inside(self.view.tabs.children[4]) if isinstance(w, ipywidgets.HTML))


START = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def hand(): return Hand(View(Studio(tiny(), seed=5, cfg=FEW, many=3)))


def test_the_whole_path_by_clicks(hand, tmp_path):
    "And an image is shown only when it has something to show."
    view, base, bare = hand.view, fingerprint(hand.view.studio.model), []
    hidden = [i for i, _, _ in view.shown if i.layout.display == "none"]
    def look(change, i): bare.extend([i] * (change.new is None and not i.value))
    for i in hidden: i.layout.observe(lambda change, i=i: look(change, i), "display")
    assert view.state.value.endswith("tiny: no hotfix yet") and "run first" in hand.result()
    assert "seeds 5 to 7" in hand("show others") and "seeds 8 to 10" in hand("show others")
    assert hand("forget 6").startswith("seed 9 is to be forgotten")
    assert hand("make the surrogate") and view.studio.surrogate
    named(view, "weight").value, named(view, "surgery").value, named(view, "steps").value = "unit_v", "plain", 2
    assert (view.studio.cfg.weight, view.studio.cfg.surgery, view.studio.cfg.steps) == ("unit_v", "plain", 2)
    assert "this hotfix is kept (5)" in hand("run") and len(view.studio.log) == 2
    assert view.studio.evidence["said"] in hand.result() and "data:text/html" in hand.result()
    named(view, "picture").index, named(view, "seam").value = 1, .2
    assert "lets go of the hotfix, which is not saved; click 'forget 8' again" in hand("forget 5")
    assert "lets go of the hotfix" in hand("run") and view.studio.hotfix   # the question is asked anew
    named(view, "folder").value = str(tmp_path/"fix")
    assert re.search("written to .*fix, which may be given away.*fix-private, which must be kept", hand("save"))
    assert Hotfix.load(tmp_path/"fix").id == view.studio.hotfix.id and "data:application/zip" in hand.result()
    assert hand("apply").startswith("the hotfix is on the model") and view.state.value.endswith("the hotfix is ON")
    assert "already applied" in hand("apply") and "remove it first" in hand("run")
    assert hand("remove").startswith("the hotfix is off") and fingerprint(view.studio.model) == base
    assert view.state.value.endswith("the hotfix is off") and len(hidden) > 3 and not bare


def damaged(place):
    "A folder of a model whose weights end too early."
    model = tiny()
    DDPMPipeline(model.net, model.scheduler).save_pretrained(place)
    weights = place/"unet"/"diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return str(place)


def loads(hand, name):
    "Type a name in the first tab, and press load, twice if asked."
    named(hand.view, "model").value = "my own: a folder, or from the hub"
    named(hand.view, "name").value = name
    said = hand("load")
    return hand("load") if "again" in said else said


BAD = {   # what somebody does with a picture and a surrogate at hand: what is said
    "no model named": (lambda hand, place: loads(hand, " "), "no model is named; type a diffusers folder or a hub id"),
    "unknown model": (lambda hand, place: loads(hand, "no/body"), "'no/body' is neither a local folder nor in the ca"),
    "no such folder": (lambda hand, place: loads(hand, "./nobody"), "nobody"),
    "damaged folder": (lambda hand, place: loads(hand, damaged(place/"bad")), "cannot be loaded into the net"),
    "text file": (lambda hand, place: hand.gives(1, "notes.txt", b"no picture"), "'notes.txt' is not a picture"),
    "text file as surrogate": (lambda hand, place: hand.gives(2, "x.txt", b"no"), "'x.txt' is not a picture"),
    "wrong size": (lambda hand, place: hand.gives(1, "a.png", noise((90, 60))),
                   "a.png: it has 90 x 60 pixels, and this model makes 8 x 8: its middle of 60 x 60 was cut out, and "
                   "it was made smaller; click 'forget this picture' if it is good so"),
    "good size": (lambda hand, place: hand.gives(2, "b.png", noise((8, 8))), "it has the size of this model"),
    "another picture": (lambda hand, place: hand("forget 5"), "this lets go of the surrogate; click 'forget 5' again"),
    "empty mask": (lambda hand, place: hand.sets(mask="brush"), "no cell is on"),
    "empty ellipse": (lambda hand, place: hand.sets(mask="ellipse", across=(.5, .5)), "covers nothing"),
    "too early": (lambda hand, place: hand("apply"), "there is no hotfix yet; run first (4 run)"),
}


def test_whatever_is_wrong_is_a_sentence_and_nothing_is_lost(hand, tmp_path):
    view, s = hand.view, hand.view.studio
    assert "no picture is chosen yet" in hand("make the surrogate") and "no picture is chosen yet" in hand("run")
    hand("show others", "forget 6", "make the surrogate")
    base, there = fingerprint(s.model), (s.model, s.seed, s.image, s.surrogate, s.pictures, s.prompt, s.mask.tobytes())
    for name, (act, said) in BAD.items():
        (tmp_path/name).mkdir()
        assert said in act(hand, tmp_path/name), (name, hand.said())
        assert "\n" not in hand.said() and "this failed" not in hand.said(), name
        assert there == (s.model, s.seed, s.image, s.surrogate, s.pictures, s.prompt, s.mask.tobytes()), name
    assert fingerprint(s.model) == base and s is view.studio


def test_another_model_takes_the_place_of_the_one_before(hand, tmp_path):
    model, s = tiny(seed=1), hand.view.studio
    DDPMPipeline(model.net, model.scheduler).save_pretrained(tmp_path/"new")
    hand("show others", "forget 6", "make the surrogate")
    old, hand.view.worker.count = fingerprint(s.model), lambda n: hand.view.worker.stop()
    assert loads(hand, str(tmp_path/"new")) == "stopped; the model is as it was"
    assert fingerprint(s.model) == old and s.surrogate
    hand.view.worker.count = hand.view.beat
    assert "choose the picture to forget" in loads(hand, str(tmp_path/"new"))
    assert fingerprint(s.model) == fingerprint(model) and s.image is None and len(s.pictures) == 3
    assert hand("forget 7").startswith("seed 7 is to be forgotten") and hand("make the surrogate")
    assert not s.model.net._forward_hooks


def test_own_pictures_are_shown_and_then_taken(hand):
    s = hand.view.studio
    hand("show others")
    hand.gives(1, "a.png", noise((90, 60)))
    assert s.image is None and hand("forget this picture").startswith("your picture is to be forgotten")
    hand.gives(2, "b.png", noise((8, 8), 1))
    assert s.surrogate is None and hand("take this surrogate") and s.surrogate.tobytes() == noise((8, 8), 1).tobytes()


def test_words_by_clicks():
    hand = Hand(module.studio(denoiser_of(pipeline("sd3")), cfg=replace(FEW, rank=2)))
    assert "type some as prompt, then show pictures" in hand.said()
    assert "type some as 'prompt' first" in hand("show others")
    named(hand.view, "prompt").value = "red flag"
    assert "seeds 0 to 7" in hand("show others") and hand.view.buttons["show others"].description == "show others"
    hand("forget 3")
    assert hand.view.studio.prompt == "red flag" and hand.view.studio.seed == 3


def test_masks_by_clicks(hand):
    view, cells = hand.view, hand.view.board
    hand("show others", "forget 5")
    def mask(): return view.studio.mask.tobytes()
    seen, shape = [mask()], named(view, "mask")
    named(view, "across").value = (0., .5)
    seen.append(mask())
    shape.value = "rectangle"
    seen.append(mask())
    shape.value = "brush"
    assert "no cell is on" in hand.said() and mask() == seen[-1] and cells.grid.layout.display is None
    cells.cells[14].click()
    seen.append(mask())
    assert cells.rows[1][2] and cells.cells[14].tooltip == "row 2, column 3: may change" and len(set(seen)) == 4
    assert "no cell is on" in hand("paint anew") and not any(cells.on)
    shape.value = "ellipse"
    assert cells.grid.layout.display == "none"


def test_while_a_job_runs_what_touches_the_model_is_disabled(hand):
    view, go = hand.view, threading.Event()
    view.worker.start(lambda: go.wait(10) and "done")
    assert all(w.disabled for w in view.locked) and not view.halt.disabled
    for name in ("run", "load"):
        view.buttons[name].click()
        assert hand.said() == "something is still running; wait, or press stop"
    view.halt.click()
    assert view.worker.halt.is_set()
    go.set()
    view.worker.thread.join()
    assert not any(w.disabled for w in view.locked) and view.halt.disabled and hand.said() == "done"
    view.tell("<img src=x>")   # sentences cannot be markup
    assert "<img" not in view.said.value


def test_a_setting_of_ones_own_is_kept_and_so_is_another_name_of_a_rule():
    def mine(snr): return snr.sqrt()
    view = View(Studio(tiny(), cfg=replace(FEW, weight=mine, surgery="pcgrad"), many=2))
    assert view.studio.cfg.weight is mine and named(view, "weight").label == "mine"
    assert view.studio.cfg.surgery == named(view, "surgery").label == "pcgrad"
    labels = [label for label, _ in named(View(Studio(tiny(), cfg=FEW, many=2)), "surgery").options]
    assert TINY.surgery in labels and not {"pcgrad", "agem", "gradvac"} & set(labels)
