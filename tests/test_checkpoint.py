"Stopped, killed, and gone on: to the last bit, and only with what the run was about."
import errno
import os
import random
import signal
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from test_unlearn import (FORMS, TINY, Stop, apart, child, nan_at, refused, request_of, run, same, setting, state_of,
                          stopping_at, straight, tiny)
from unlearn_nb.baselines import neggrad_retain
from unlearn_nb.states import generate
from unlearn_nb.surgery import plain
from unlearn_nb.unlearn import Config, unlearn

LONG = replace(TINY, steps=12)
QUICK = replace(TINY, damping=0.)


def step_of(file):
    with safe_open(file, "pt") as f: return int(f.metadata()["step"])


# --- stopped, and gone on ---

@pytest.mark.parametrize("form, rule", [
    ("free directions", "symmetric"), ("full", "subspace"),
    pytest.param("lora", "symmetric", marks=pytest.mark.slow), pytest.param("full", "vaccine", marks=pytest.mark.slow),
    pytest.param("free directions", "subspace", marks=pytest.mark.slow)])
def test_gone_on_bit_for_bit(tmp_path, form, rule):
    "With a second look in the middle, at step 5."
    cfg = replace(LONG, surgery=rule, near_images=2, pool=6, **FORMS[form])
    file, model = tmp_path / "run.safetensors", setting()[0]
    before = state_of(model)
    with pytest.raises(Stop): run(cfg, watch=stopping_at(11), checkpoint=file)
    assert step_of(file) == 10 and state_of(model) == before and len(list(tmp_path.iterdir())) == 1
    resumed, again = run(cfg, checkpoint=file), run(cfg, checkpoint=file)   # and one that has nothing left to do
    for other in (resumed, again):
        assert same(straight(cfg).delta, other.delta) and straight(cfg).receipt.log == other.receipt.log
    assert step_of(file) == 12 and state_of(model) == before and len(resumed.receipt.log[4]["moved"]) == 2


def test_gone_on_with_the_same_paths_pushed(tmp_path):
    "What was still known at the second look is kept in the log, and the draws go on as they were."
    cfg, file = replace(LONG, damping=0., t_min=0), tmp_path / "run.safetensors"
    def describe(x):
        return torch.nn.functional.normalize(x.flatten(1) - x.mean(), dim=1)
    whole = run(cfg, describe=describe)
    with pytest.raises(Stop): run(cfg, watch=stopping_at(11), checkpoint=file, describe=describe)
    resumed = run(cfg, checkpoint=file, describe=describe)
    assert whole.receipt.log[4]["known"] and whole.receipt.log == resumed.receipt.log
    assert same(whole.delta, resumed.delta) and not same(whole.delta, run(cfg).delta)


@pytest.mark.slow
def test_a_run_goes_on_with_other_threads(tmp_path, one_thread):
    "What must stay is then computed anew, and rounded otherwise."
    file, whole = tmp_path / "run.safetensors", straight(LONG)
    with pytest.raises(Stop): run(LONG, watch=stopping_at(11), checkpoint=file)
    torch.set_num_threads(2)
    resumed = run(LONG, checkpoint=file)
    assert step_of(file) == LONG.steps and apart(whole.delta, resumed.delta)[0] < 1e-3


def test_numbers_that_are_none(tmp_path):
    "A run that stops at one keeps the steps before it, if there are any, and says so."
    cfg = replace(LONG, damping=0.)
    def stopped(call):
        file = tmp_path / f"{call}.safetensors"
        act = lambda: run(cfg, checkpoint=file)
        with nan_at(call): return refused(act, f"step {call - 1}", error=FloatingPointError), file
    assert "kept" not in stopped(1)[0] and not list(tmp_path.iterdir())
    for call in (5, 12):
        message, file = stopped(call)
        assert all(words in message for words in ("steps before it are kept", "another checkpoint", str(file)))
        assert step_of(file) == call - 1
    resumed = run(cfg, checkpoint=file)
    assert same(straight(cfg).delta, resumed.delta) and straight(cfg).receipt.log == resumed.receipt.log


# --- refused ---

OTHER = dict(
    steps=4, forget_batch=5, retain_batch=5, lr=2e-3, clip=2., t_max=300, t_min=1, sampling="uniform", path_share=.75,
    mix_share=.25, retain_images=4, near_images=1, pool=5, sampling_steps=5, weight="unit_eps",
    across=.5, retain_weight="unit_v", surgery="plain", damping=.5, rank=1, micro_batch=5, precision="bf16",
    gradient_checkpointing=True, seed=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    file = tmp_path_factory.mktemp("finished") / "run.safetensors"
    run(QUICK, checkpoint=file)
    return file


def test_a_run_with_another_setting_is_refused(finished):
    data, before = finished.read_bytes(), state_of(setting()[0])
    assert OTHER.keys() == {f.name for f in fields(Config)}
    for name, value in OTHER.items():
        refused(lambda: run(replace(QUICK, **{name: value}), checkpoint=finished), repr(name), finished)
    assert finished.read_bytes() == data and state_of(setting()[0]) == before


def test_a_run_about_something_else_is_refused(finished):
    model, request, retain = setting()
    data, more = finished.read_bytes(), generate(setting()[0], [1], 4)
    def refuses(word, model=model, requests=(request,), retain=retain, **kw):
        act = lambda: unlearn(model, list(requests), retain, QUICK, checkpoint=finished, **kw)
        refused(act, word, finished)
    refuses("'weights of the model'", model=tiny(seed=1))
    more_faces = [request_of(model, seed).image for seed in (7, 9)]
    for change in (dict(seed=6), dict(image=more_faces[0]), dict(surrogate=more_faces[1])):
        refuses("'requests'", requests=[replace(request, **change)])
    refuses("'requests'", requests=[request, request])
    for other in (more, replace(retain, goal=retain.goal + .01), replace(retain, timesteps=retain.timesteps - 1),
                  [(1, retain), (1, more)]):
        refuses("'what must stay'", retain=other)
    refuses("'earlier requests'", earlier=[request])
    assert finished.read_bytes() == data and same(run(QUICK, checkpoint=finished).delta, straight(QUICK).delta)


def scaled(k): return lambda snr: k * snr / (1 + snr)
def turned(rule, k): return lambda g_f, g_r: rule([k * g for g in g_f], g_r)


class Scaled:
    "A weight that is an object: it has no name of its own."
    def __init__(self, k): self.k = k
    def __call__(self, snr): return self.k * snr / (1 + snr)


class Silent:
    "A rule that does not say what it does."
    __slots__ = ()
    def __call__(self, g_f, g_r): return g_f


@pytest.mark.parametrize("name, of", [("weight", scaled), ("weight", Scaled), ("surgery", partial(turned, plain)),
                                      ("method", lambda k: partial(neggrad_retain, c=k))])
def test_a_function_is_known_by_what_it_does(tmp_path, name, of):
    "Not by its name, which two may share, and not by its place in memory, which no two processes share."
    file = tmp_path / "run.safetensors"
    def go(k):
        how = {name: of(k)}
        return run(QUICK, checkpoint=file, **how) if name == "method" else run(replace(QUICK, **how), checkpoint=file)
    first = go(1.)
    assert same(go(1.).delta, first.delta) and "0x" not in str(first.card)   # the same, made anew: nothing left to do
    refused(lambda: go(2.), repr(name), file)


def test_what_does_not_say_what_it_does_is_refused(tmp_path):
    refused(lambda: run(replace(QUICK, surgery=Silent()), checkpoint=tmp_path / "x"), "give a function")
    assert not list(tmp_path.iterdir()) and run(replace(QUICK, surgery=Silent())).card["config"]["surgery"] == "Silent"


def test_more_steps_for_a_finished_run_are_refused_in_its_own_words(finished):
    longer = replace(QUICK, steps=9)
    refused(lambda: run(longer, checkpoint=finished), "a run of 3 steps", "learning rate is zero", "give 3")


def test_a_run_with_other_shares_is_refused(tmp_path):
    model, request, retain = setting()
    more = generate(model, [1], 4)
    def go(share):
        mix = [(1, [(1, retain), (share, more)]), (1, more)]
        return unlearn(model, [request], mix, QUICK, checkpoint=tmp_path / "run.safetensors")
    go(1)
    refused(lambda: go(3), "'what must stay'")


def test_what_is_no_checkpoint_is_refused(finished, tmp_path):
    "Files that are cut, foreign, or no file at all: in one sentence, and left as they are."
    data, before = finished.read_bytes(), state_of(setting()[0])
    files = {f"cut{size}": data[:size] for size in (0, 7, 8, 300, len(data) // 2, -1)} | {"text": b"dear diary"}
    for name, content in files.items(): (tmp_path / name).write_bytes(content)
    for k, metadata in enumerate((None, {"x": "1"}, {"identity": "{}", "step": "3", "log": "[]"},
                                  {"identity": "[]", "step": "3", "log": "[]"})):
        save_file({"a": torch.zeros(3)}, tmp_path / f"foreign{k}", metadata)
        files[f"foreign{k}"] = (tmp_path / f"foreign{k}").read_bytes()
    for name, content in files.items():
        refused(lambda: run(QUICK, checkpoint=tmp_path / name), tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    refused(lambda: run(QUICK, checkpoint=tmp_path), tmp_path)
    refused(lambda: run(QUICK, checkpoint=tmp_path / "nowhere" / "x"), "folder that does not exist")
    assert state_of(setting()[0]) == before


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    cfg, before = replace(LONG, damping=0.), state_of(setting()[0])
    for where in ("fsync", "replace"):
        folder, calls, real = tmp_path / where, [], getattr(os, where)
        folder.mkdir()
        file = folder / "run.safetensors"
        def full(*args):
            calls.append(1)
            if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)
        with monkeypatch.context() as m:
            m.setattr(f"unlearn_nb.files.os.{where}", full)
            with pytest.raises(OSError) as e: run(cfg, checkpoint=file)
        assert e.value.errno == errno.ENOSPC and repr(str(file)) in str(e.value) and "as it was" in str(e.value)
        assert state_of(setting()[0]) == before and step_of(file) == 10
        assert [p.name for p in folder.iterdir()] == ["run.safetensors"]
        assert same(run(cfg, checkpoint=file).delta, straight(cfg).delta)


# --- killed, and gone on ---

def die(*_): os.kill(os.getpid(), signal.SIGKILL)


class Kill(Stop):
    "No exception, but the end."
    __init__ = die


def forked(act):
    "The process id of a fork that does this, and nothing else."
    if pid := os.fork(): return pid
    try: act()
    finally: os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_once(tmp_path, one_thread):
    "kill -9 in the twelfth step, two after the last save: the run that goes on gives the same bits."
    file, cfg = tmp_path / "run.safetensors", replace(LONG, damping=0.)
    whole = straight(cfg)
    pid = forked(lambda: run(cfg, watch=stopping_at(11, Kill), checkpoint=file))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and step_of(file) == 10
    (tmp_path / ".run.safetensors.77.part").write_bytes(b"half a file")   # of a run that was killed while it wrote
    resumed = run(cfg, checkpoint=file)
    assert same(whole.delta, resumed.delta) and whole.receipt.log == resumed.receipt.log
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def killed_in(how, cfg, file, rng):
    "A run that kills itself in some step, or in its second save: with part of the new file written, or all of it."
    watch = stopping_at(rng.randint(1, 14), Kill) if how == "step" else ()
    if how in ("fsync", "replace"):
        real, calls = getattr(os, how), []
        def second(*args):
            calls.append(1)
            if len(calls) < 2: return real(*args)
            if how == "fsync": os.ftruncate(args[0], rng.randint(0, os.fstat(args[0]).st_size))
            die()
        setattr(os, how, second)
    run(cfg, watch=watch, checkpoint=file)


def killed_runs(folder, kills, form, seed):
    """Fork a run, kill it, go on from what is on the disk, so many times; print how each ended.

    At last print whether the result is that of a run that nobody stopped."""
    torch.set_num_threads(1)
    kills, file = int(kills), Path(folder) / "run.safetensors"
    cfg, steps = replace(TINY, steps=20 + 12 * kills, **FORMS[form]), [0]
    def inode(): return file.stat().st_ino if file.exists() else None
    for k in range(kills):
        how, was, rng = ("fsync", "step", "time", "replace")[k % 4], inode(), random.Random(f"{seed} {k}")
        pid = forked(lambda: killed_in(how, cfg, file, rng))
        if how == "time":   # from outside, soon after a save
            def running(): return not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            while inode() == was and running(): time.sleep(.005)
            time.sleep(rng.uniform(0, .2))
            os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)[1]
        steps.append(step_of(file) if file.exists() else 0)
        print(how, "killed" if ended == signal.SIGKILL else f"ended {ended}", steps[-1])
    resumed, alone = run(cfg, checkpoint=file), [p.name for p in Path(folder).iterdir()] == ["run.safetensors"]
    whole = steps == sorted(steps) and 0 < steps[-1] < cfg.steps and alone
    equal = same(straight(cfg).delta, resumed.delta) and straight(cfg).receipt.log == resumed.receipt.log
    print("result", "same" if whole and equal else "OTHER")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["free directions", "lora"])
def test_killed_again_and_again(tmp_path, form):
    *rows, last = child(__file__, "killed_runs", tmp_path, 8, form, 1).splitlines()
    assert last == "result same" and len(rows) == 8 and all(" killed " in row for row in rows), (rows, last)


if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])
