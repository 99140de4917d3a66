"The loop: what it promises whatever the model, the pieces a batch comes in, and whatever stops it."
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import ROOT
from unlearn_nb import states, surgery, weights
from unlearn_nb.baselines import finetune
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint
from unlearn_nb.hotfix import Hotfix, change, changed
from unlearn_nb.parametrization import Full
from unlearn_nb.schedule import Flow
from unlearn_nb.states import Request, default_retain, generate, noised_states
from unlearn_nb.unlearn import MORE, PRESETS, STRENGTHS, Config, gradient, least_strength, retain_settings, unlearn
from unlearn_nb.weights import min_snr, x0_loss
from unlearn_nb.zoo import load

TINY = Config(weight="min_snr", lr=1.2e-3, steps=3, forget_batch=4, retain_batch=4, retain_images=3, near_images=0,
              sampling_steps=4)
FORMS = {"free directions": {}, "full": dict(damping=0.), "lora": dict(rank=2, damping=0.),
         "free directions, as a lora": dict(rank=2)}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
BOTH = FORMS["free directions"], FORMS["lora"]
both = pytest.mark.parametrize("form", BOTH, ids=["free directions", "lora"])
PREDICTIONS = "epsilon", "v_prediction", "sample"


# --- a setting for all tests ---

def tiny(prediction="v_prediction", seed=0, size=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet2DModel(sample_size=size, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return Denoiser(net.eval(), DDPMScheduler(prediction_type=prediction), name="tiny")


def request_of(model, seed=5):
    forget, surrogate = model.decode(model.sample([seed, seed + 1], 4))
    return Request(forget, surrogate, seed)


@lru_cache
def settings_of(prediction, threads):
    model = tiny(prediction)
    (_, retain), = default_retain(model, [request := request_of(model)], **retain_settings(TINY))
    return model, request, retain


def setting(prediction="v_prediction"):
    "A model, a request and what must stay: always the same ones, since a run leaves them as they are."
    return settings_of(prediction, torch.get_num_threads())   # with other threads sums are rounded otherwise


def run(cfg=TINY, prediction="v_prediction", **kw):
    model, request, retain = setting(prediction)
    return unlearn(model, [request], retain, cfg, **kw)


@lru_cache
def straight_with(cfg, threads): return run(cfg)


def straight(cfg=TINY):
    "What a run gives that nothing stops and nobody shares; it is kept, since it is always the same."
    return straight_with(cfg, torch.get_num_threads())


def gen(seed=0): return torch.Generator().manual_seed(seed)
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def norm(tensors): return sum(v.double().square().sum() for v in tensors) ** .5


def apart(a, b):
    "How far two changes are from one another: in norms of the weights, and in norms of the change."
    assert changed(a) == changed(b)
    a, b = ({k: change(delta, k) for k in changed(delta)} for delta in (a, b))   # whole, if it is stored as factors
    difference = norm([a[k] - b[k] for k in a])
    return (difference / norm(setting()[0].net.state_dict().values())).item(), (difference / norm(a.values())).item()


def refused(act, *words, error=ValueError):
    "It is refused in one sentence that has the words in it."
    with pytest.raises(error) as e: act()
    assert type(e.value) is error and "\n" not in str(e.value) and all(str(w) in str(e.value) for w in words), e.value
    return str(e.value)


@contextmanager
def on(model, fix):
    "With this hotfix on."
    fix.apply(model)
    try: yield
    finally: fix.remove(model)


class Stop(Exception): pass


def stopping_at(call, how=Stop):
    "A watcher that stops the run when it is called for that time, which is once a step."
    calls = []
    def watch(step, seen):
        calls.append(1)
        if len(calls) == call: raise how
    return watch


@contextmanager
def nan_at(call):
    "For a while the weight called min_snr gives no number at that call, which is once a step."
    calls = []
    def weight(snr):
        calls.append(1)
        return snr * float("nan") if len(calls) == call else min_snr(snr)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(weights.WEIGHTS, "min_snr", weight)
        yield


def child(file, *args, launcher=()):
    "A test file as a program, with one thread."
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, file, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- the base comes back ---

def state_of(model):
    "All of a model that a run must leave as it was: bits, identities, flags, hooks."
    net = model.net
    def hooks(m): return len(m._forward_hooks) + len(m._forward_pre_hooks)
    return {"bits": fingerprint(model), "attributes": sorted(vars(net)), "hotfixes": list(model.hotfixes),
            "parameters": [(k, id(p), p.requires_grad, p.grad, p.dtype) for k, p in net.named_parameters()],
            "modules": [(k, id(m), m.training, hooks(m)) for k, m in net.named_modules()],
            "checkpointing": net.is_gradient_checkpointing}


@forms
def test_base_comes_back_bit_for_bit_and_the_hotfix_moves_it(form):
    model, request, retain = setting()
    before, mark = state_of(model), fingerprint(model)
    for precision in ("fp32", "bf16") if form else ("fp32", "bf16", "fp16"):
        fix = run(replace(TINY, precision=precision, **form))
        assert state_of(model) == before and fix.card["base"]["sha256"] == mark
        with on(model, fix): assert fingerprint(model) != mark
        assert state_of(model) == before


def test_every_prediction_comes_back():
    for prediction in PREDICTIONS:
        model = setting(prediction)[0]
        before, fix = state_of(model), run(replace(TINY, damping=0.), prediction)
        assert any(v.any() for v in fix.delta.values()) and state_of(model) == before, prediction


def test_base_comes_back_after_whatever_happens():
    model = setting()[0]
    before = state_of(model)
    for form, how in zip(FORMS.values(), (Stop, KeyboardInterrupt) * 2):
        cfg = replace(TINY, gradient_checkpointing=how is Stop, **form)
        with pytest.raises(how): run(cfg, watch=stopping_at(2, how))
        assert state_of(model) == before


@both
def test_the_watcher_sees_every_step_and_its_weights(form):
    model = setting()[0]
    before, seen = state_of(model), []
    def watch(step, what): seen.append((step, what, fingerprint(model)))
    fix = run(replace(TINY, **form), watch=watch)
    steps, logged, marks = zip(*seen)
    assert list(steps) == list(range(TINY.steps)) and list(logged) == fix.receipt.log
    assert len({*marks, before["bits"]}) == TINY.steps + 1 and state_of(model) == before
    def stop(step, what):
        if step == 1: raise Stop
    with pytest.raises(Stop): run(replace(TINY, **form), watch=stop)
    assert state_of(model) == before


def test_a_watcher_that_has_seen_enough_ends_the_run_with_its_hotfix(tmp_path):
    "All watchers see every step; the change is that of the steps so far; a checkpoint of it can be gone on with."
    model, file, cfg = setting()[0], tmp_path / "run.safetensors", replace(TINY, steps=4)
    before, seen = state_of(model), []
    def enough(step, what): return step == 1
    fix = run(cfg, watch=[enough, lambda step, what: seen.append((step, what))], checkpoint=file)
    assert state_of(model) == before and [step for step, _ in seen] == [0, 1] and fix.card["cost"]["steps"] == 2
    assert [row["lr"] for row in fix.receipt.log] == pytest.approx([cfg.lr, cfg.lr * .8536], rel=1e-4)
    assert all(row["norm"] > 0 for row in fix.receipt.log)
    whole, marks = run(cfg), []
    def mark(step, what): marks.append({k: v.clone() for k, v in model.net.state_dict().items()})
    run(cfg, watch=mark)
    with on(model, fix):
        assert all(torch.allclose(v, marks[1][k], atol=1e-3) for k, v in model.net.state_dict().items())
    assert same(run(cfg, checkpoint=file).delta, whole.delta) and not same(fix.delta, whole.delta)


def test_whatever_mode_the_caller_is_in():
    "Without gradients, in inference mode; but not a model that was made in it."
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(): assert same(run().delta, straight().delta)
    with torch.inference_mode(): frozen = tiny()
    _, request, retain = setting()
    refused(lambda: unlearn(frozen, [request], retain, TINY), "inference_mode", "outside")


def test_progress_is_shown_where_diffusers_shows_it(capfd, monkeypatch):
    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)   # else what is done at once says nothing
        run(replace(TINY, steps=1, damping=0.))
        assert ("unlearn" in capfd.readouterr().err) == shown


def test_paths_of_the_base_are_kept_for_other_requests(tmp_path, monkeypatch):
    "The second request to a model makes none of the common paths, and gets what it would have got without a cache."
    model, made = tiny(), []
    cfg = replace(TINY, near_images=2, pool=6)
    def counted(denoiser, seeds, *a, **kw): return made.append(len(seeds)) or generate(denoiser, seeds, *a, **kw)
    monkeypatch.setattr("unlearn_nb.states.generate", counted)
    unlearn(model, request_of(model), cfg=cfg, cache=tmp_path)
    first, other = sum(made), request_of(model, 9)
    model.pool.clear(), made.clear()
    fix = unlearn(model, other, cfg=cfg, cache=tmp_path)
    assert first - sum(made) >= cfg.retain_images + cfg.pool
    assert same(fix.delta, unlearn(model, other, cfg=cfg).delta)


def test_models_that_come_in_another_state(tmp_path):
    "Frozen weights are frozen again, half precision and another layout in memory are no obstacle."
    request, retain = setting()[1:]
    def frozen(model): model.net.requires_grad_(False).conv_in.requires_grad_(True)
    def half(model): model.net.to(torch.bfloat16)
    def layout(model): model.net.to(memory_format=torch.channels_last)
    for change_it, form in ((frozen, "lora"), (frozen, "full"), (half, "lora"), (half, "free directions"),
                            (layout, "free directions")):
        model = tiny()
        change_it(model)
        before = state_of(model)
        fix = unlearn(model, [request], retain, replace(TINY, steps=2, lr=.01, **FORMS[form]))
        assert state_of(model) == before, (form, change_it)
        fix.save(tmp_path)
        with on(model, Hotfix.load(tmp_path)): assert fingerprint(model) != before["bits"]
        assert fingerprint(model) == before["bits"]


def test_gradient_checkpointing_is_on_and_off_again():
    "It really goes through the net once more, and changes nothing else; one's own stays."
    model, calls = tiny(), []
    request, retain = setting()[1:]
    def go(**kw): return unlearn(model, [request], retain, replace(TINY, damping=0., **kw)).delta
    count = model.net.down_blocks[0].resnets[0].register_forward_pre_hook
    handle = count(lambda *_: calls.append(torch.is_grad_enabled()))
    plain, once = go(), calls.count(True)
    calls.clear()
    again = go(gradient_checkpointing=True)
    assert calls.count(True) == 2 * once and not model.net.is_gradient_checkpointing and same(plain, again)
    handle.remove()
    model.net.enable_gradient_checkpointing()
    go(gradient_checkpointing=True)
    assert model.net.is_gradient_checkpointing


def test_chance_is_the_seed_alone():
    "Same seed, same hotfix; another seed, another one; the global random state plays no part and is left alone."
    for form in BOTH:
        cfg = replace(TINY, **form)
        torch.manual_seed(1)
        one = run(cfg)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        two = run(cfg)
        assert torch.equal(torch.get_rng_state(), before)
        assert same(one.delta, two.delta) and one.receipt.log == two.receipt.log
        assert not same(one.delta, run(replace(cfg, seed=1)).delta)


# --- several requests, one after another, and what must stay ---

def test_several_requests_in_one():
    model, _, retain = setting()
    mark = fingerprint(model)
    for seeds in ((None,), (None, 7), (7, 9, None)):
        requests = [replace(request_of(model, 7 + 2 * k), seed=s) for k, s in enumerate(seeds)]
        fix = unlearn(model, requests, retain, TINY)
        assert [r.seed for r in fix.receipt.requests] == list(seeds) and len({*fix.card["requests"]}) == len(seeds)
        assert {r.steps for r in fix.receipt.requests if r.seed is not None} <= {TINY.sampling_steps}
        if len(seeds) > 1: assert not same(fix.delta, unlearn(model, requests[:1], retain, TINY).delta)
    assert fingerprint(model) == mark


def test_requests_one_after_another(monkeypatch):
    "Among what must stay is what the edited model now makes of the images before."
    model, _, retain = setting()
    requests, fixes, drawn, base = [request_of(model, s) for s in (5, 7, 9)], [], [], state_of(model)
    def spy(retain, n, g): return drawn.append(retain) or states.draw(retain, n, g)
    monkeypatch.setattr("unlearn_nb.unlearn.draw", spy)
    for k, request in enumerate(requests):
        drawn.clear()
        before, given_retain = state_of(model), [(2, retain), (1, retain)] if k == 2 else retain
        fix = unlearn(model, [request], given_retain, TINY, earlier=requests[:k])
        assert state_of(model) == before and fix.card["on"] == [f.id for f in fixes]
        assert fix.card["base"]["sha256"] == base["bits"] == fingerprint(model, base=True)
        if k:
            (most, given), (share, [(_, own)]) = drawn[-1]
            assert (most, share) == (4, k ** .5) and given is given_retain
            now = generate(model, [r.seed for r in requests[:k]], TINY.sampling_steps)
            left = (model.encode([r.surrogate for r in requests[:k]]) - now.x0)[:, None]
            assert_close(own.x_t[::2], now.x_t, atol=1e-5, rtol=1e-5)
            assert_close(own.goal[::2], now.goal + left * (now.timesteps >= TINY.t_min).view(1, -1, 1, 1, 1))
        fix.apply(model)
        fixes.append(fix)
    for k in (1, 0, 2): fixes[k].remove(model)
    assert state_of(model) == base


def test_given_retain_is_what_is_used():
    model, request, retain = setting()
    other = generate(model, [1], 4)
    nested = [(1, [(1, retain), (1, other)]), (1, other)]
    def given(mix): return unlearn(model, [request], mix, TINY).delta
    results = [*map(given, (None, other, [(1, retain), (1, other)], nested))]
    assert same(results[0], straight().delta)
    for a, b in combinations(results, 2): assert not same(a, b)


@pytest.mark.slow
def test_it_forgets_and_stays_forgotten():
    "On the built-in model, a short run of the default: a later hotfix leaves no more of an earlier request."
    model = load("faces", device="cpu")
    mark, x = fingerprint(model), model.sample([100, 7, 1003, 8], 10)
    images = model.decode(x)
    first, second = Request(images[0], images[1], 100), Request(images[2], images[3], 1003)
    cfg = Config(steps=30, forget_batch=6, retain_batch=10, retain_images=16, near_images=0, pool=32,
                 sampling_steps=10)
    def left(seed, k):   # of the way between image and surrogate
        return ((model.sample([seed], 10) - x[k + 1]).norm() / (x[k] - x[k + 1]).norm()).item()
    one = unlearn(model, [first], cfg=cfg)
    one.apply(model)
    before = left(100, 0)
    assert before < .7 and left(1003, 2) > .9
    two = unlearn(model, [second], cfg=cfg, earlier=[first])
    two.apply(model)
    assert left(100, 0) < before and left(1003, 2) < .6
    one.remove(model)
    assert left(100, 0) > .9 and left(1003, 2) < .6   # each takes its own with it
    two.remove(model)
    assert fingerprint(model) == mark


# --- batches in pieces ---

def a_batch(model, n=6):
    _, request, _ = setting(model.schedule.prediction)
    return noised_states(model, model.encode([request.image]), model.encode([request.surrogate]), n, gen(), t_max=500)


def whole_gradient(model, batch, w):
    loss = x0_loss(model, *batch, w)
    return loss.item(), torch.autograd.grad(loss, list(model.net.parameters()))


def a_process(k=0, of=1): return SimpleNamespace(process_index=k, num_processes=of)


def test_gradient_is_that_of_the_loss():
    for prediction in PREDICTIONS:
        model = setting(prediction)[0]
        batch, form = a_batch(model), Full(model, {})
        loss, expected = whole_gradient(model, batch, min_snr)
        for how in (("fp32", 4, 2e-6), ("fp32", 100, 2e-6), ("bf16", 4, .05), ("fp16", 1, .01)):
            precision, micro_batch, bound = how
            cfg = replace(TINY, precision=precision, micro_batch=micro_batch)
            found, g = gradient(model, batch, min_snr, form, cfg, a_process())
            assert abs(found - loss) < bound * loss and all(v.dtype == torch.float32 for v in g)
            assert norm([a - b for a, b in zip(g, expected)]) < bound * norm(expected)


@given(n=st.integers(1, 9), processes=st.integers(1, 4), micro_batch=st.integers(1, 10))
@settings(max_examples=10)
def test_the_pieces_add_up(n, processes, micro_batch):
    "The parts of all processes together are the gradient of the whole batch; one without a row gives zeros."
    model = setting()[0]
    batch, form, cfg = a_batch(model, n), Full(model, {}), replace(TINY, micro_batch=micro_batch)
    loss, expected = whole_gradient(model, batch, min_snr)
    parts = [gradient(model, batch, min_snr, form, cfg, a_process(k, processes)) for k in range(processes)]
    assert abs(sum(part for part, _ in parts) - loss) < 1e-5 * loss
    assert norm([sum(column) - e for *column, e in zip(*(g for _, g in parts), expected)]) < 1e-5 * norm(expected)


def test_half_precision_of_a_large_loss():
    model = tiny("epsilon", size=32)
    x = torch.full((1, 3, 32, 32), .9)
    batch, form = noised_states(model, x, -4 * x, 8, gen(), t_max=500), Full(model, {})
    _, expected = whole_gradient(model, batch, min_snr)
    g = gradient(model, batch, min_snr, form, replace(TINY, precision="fp16"), a_process())[1]
    assert norm([a - b for a, b in zip(g, expected)]) < .01 * norm(expected)


def test_a_micro_batch_changes_nothing():
    for form in BOTH:
        cfg = replace(TINY, **form)
        of_weights, of_change = apart(straight(cfg).delta, run(replace(cfg, micro_batch=3)).delta)
        assert of_weights < 5e-5 and of_change < 1e-2


SHARED = {
    "free directions, plain": dict(surgery="plain"),
    "lora, plain": dict(rank=2, damping=0., surgery="plain", micro_batch=1),
    "full, symmetric": dict(damping=0.),
    "free directions, symmetric": dict(forget_batch=5, retain_batch=7),
}


def shared_runs(folder):
    "Every run of SHARED, by however many processes there are; each writes what it got."
    folder, state, got = Path(folder), PartialState(cpu=True), {}
    for k, (name, how) in enumerate(SHARED.items()):
        got[name] = run(replace(TINY, **how), checkpoint=None if k else folder / "run.safetensors").delta
    torch.save(got, folder / f"{state.num_processes}.{state.process_index}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, one_thread):
    "As `accelerate launch` starts them; and one process goes on where two were."
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    child(__file__, "shared_runs", tmp_path, launcher=launcher)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.0.pt", "2.1.pt", "run.safetensors"]
    first, second = (torch.load(tmp_path / f"2.{k}.pt") for k in range(2))
    for name, how in SHARED.items():
        assert same(first[name], second[name])
        of_weights, of_change = apart(straight(replace(TINY, **how)).delta, first[name])
        assert of_weights < 5e-5 and of_change < 1e-2
    name, how = next(iter(SHARED.items()))
    assert same(run(replace(TINY, **how), checkpoint=tmp_path / "run.safetensors").delta, first[name])


# --- the log, and what surgery sees ---

def test_the_log_says_what_happened():
    for form in BOTH:
        seen, cfg = [], replace(TINY, clip=1e-5, **form)
        def spy(g_f, g_r):
            seen.append(([g.clone() for g in g_f], [g.clone() for g in g_r]))
            return surgery.symmetric(g_f, g_r)
        fix = run(replace(cfg, surgery=spy))
        card = fix.card
        assert json.loads(json.dumps(card, allow_nan=False)) == card and card["config"]["surgery"] == "spy"
        first, *log = fix.receipt.log
        assert len(log) == len(seen) == cfg.steps - 1 == card["cost"]["steps"] - 1   # no surgery in the first step
        assert first["retain"] < 1e-9 and list(first) == ["forget", "retain", "cosine", "ratio", "lr", "norm"]
        for row, (g_f, g_r) in zip(log, seen):
            assert row["forget"] > 0 <= row["retain"] and abs(row["cosine"]) <= 1 + 1e-6
            assert norm(g_f) > 10 * cfg.clip   # surgery comes before the clipping
            assert_close(row["cosine"], surgery.cosine(g_f, g_r).item(), rtol=1e-4, atol=1e-5)
            assert_close(row["ratio"], (norm(g_f) / norm(g_r)).item(), rtol=1e-4, atol=0.)


def test_a_retain_gradient_of_zero_has_no_ratio():
    row = run(replace(TINY, retain_weight=lambda snr: 0 * snr)).receipt.log[0]
    assert row["ratio"] is None and row["cosine"] == row["retain"] == 0


def test_the_preset_goes_by_family_and_the_pieces_by_size():
    def sized(side, words=False, schedule=None, dtype=torch.float32, widest=112, vae=None):
        net = SimpleNamespace(config=SimpleNamespace(block_out_channels=(32, widest)))
        words = {"": 0} if words else {}
        return SimpleNamespace(schedule=schedule, prompts=words, shape=(4, side, side), dtype=dtype, net=net, vae=vae)
    for name, model, pieces in (("pixels", sized(32), 32), ("pixels", sized(256), 2), ("unet", sized(64, True), 4),
                                ("latents", sized(32, vae="one"), 32),
                                ("transformer", sized(16, True, Flow(1000)), 32),
                                ("transformer", sized(128, True, Flow(1000), torch.bfloat16), 1)):
        size = dict(micro_batch=pieces, gradient_checkpointing=pieces < 32,
                    precision="bf16" if model.dtype == torch.bfloat16 else "fp32")
        assert Config.of(model, steps=7) == Config(**PRESETS[name] | size | {"steps": 7}), name
    lr = [Config.of(sized(32, widest=widest)).lr for widest in (28, 112, 224)]
    assert lr == [.003, .003, .0015] and Config.of(sized(64, True, widest=224)).lr == PRESETS["unet"]["lr"]
    assert {*PRESETS} == {"pixels", "unet", "latents", "transformer"} and Config().many(1) == Config()
    assert [Config().many(4).steps, Config().many(4).near_images] == [100, 32]


# --- refused ---

def test_bad_settings_are_one_sentence(monkeypatch):
    "And before anything is computed."
    nan = float("nan")
    monkeypatch.setattr("unlearn_nb.states.generate", lambda *_, **kw: pytest.fail("the model ran"))
    for change_it, says in (
            (dict(steps=0), "steps is 0"), (dict(lr=-1.), "lr is -1"), (dict(lr=nan), "lr is nan"),
            (dict(clip=0.), "clip is 0"), (dict(clip=nan), "clip is nan"), (dict(forget_batch=0), "forget_batch"),
            (dict(retain_batch=-1), "retain_batch"), (dict(micro_batch=0), "micro_batch"),
            (dict(retain_images=0), "retain_images"), (dict(sampling_steps=0), "sampling_steps"),
            (dict(near_images=-1), "near_images is -1"), (dict(pool=0), "pool is 0"), (dict(rank=-1), "rank is -1"),
            (dict(damping=-.5), "damping is -0.5"), (dict(damping=nan), "damping is nan"),
            (dict(path_share=-.1), "path_share is -0.1"), (dict(path_share=nan), "path_share is nan"),
            (dict(mix_share=2.), "mix_share is 2"), (dict(t_max=0), "t_max is 0"), (dict(t_max=1001), "t_max is 1001"),
            (dict(sampling="high"), "sampling 'high'"), (dict(precision="fp8"), "fp8"), (dict(precision=None), "None"),
            (dict(weight="heavy"), "heavy"), (dict(retain_weight="light"), "light"), (dict(surgery="brain"), "brain")):
        refused(lambda: run(replace(TINY, **change_it)), says)


def test_settings_at_the_edge_work():
    for edge in (dict(t_max=1000), dict(t_max=1), dict(path_share=0.), dict(path_share=1.), dict(rank=100),
                 dict(forget_batch=1, retain_batch=1)):
        fix = run(replace(TINY, steps=2, **edge))
        assert all(v.isfinite().all() for v in fix.delta.values()) and any(v.any() for v in fix.delta.values()), edge


def test_bad_requests():
    model, r, _ = setting()
    assert same(unlearn(model, r, setting()[2], TINY).delta, straight().delta)   # a single one is a list of one
    assert {r: 1}[replace(r)] == 1 and r != replace(r, seed=6)                   # and can be a key
    x = model.encode([r.image])
    for empty in ([], None): refused(lambda: unlearn(model, empty, cfg=TINY), "no request")
    for bad, says in (("face.png", "'face.png' is no request"), ([r, 5], "'5' is no request"),
                      (replace(r, image="face.png"), "image of a request is a str; give a PIL image, such as read"),
                      (replace(r, surrogate=Path("x")), "surrogate of a request is a"), (replace(r, image=x), "Tensor"),
                      (replace(r, image=x[0].numpy()), "ndarray"), (replace(r, surrogate=None), "NoneType"),
                      (replace(r, surrogate=r.image.copy()), "nothing would be forgotten")):
        refused(lambda: unlearn(model, bad, cfg=TINY), says)
    for bad, says in ((replace(r, seed=-1), "seed -1"), (replace(r, surrogate=r.surrogate.resize((16, 16))), "16 x 16"),
                      (replace(r, image=r.image.resize((4, 8))), "4 x 8")):
        refused(lambda: unlearn(model, [r, bad], cfg=TINY), says)
        refused(lambda: unlearn(model, [r], cfg=TINY, earlier=[bad]), says)


@both
def test_not_finite_stops_with_the_step_named_and_the_base_back(form):
    model = setting()[0]
    before = state_of(model)
    def stops(*words, **how):
        return refused(lambda: run(replace(TINY, **how, **form)), *words, error=FloatingPointError)
    with nan_at(3): assert "kept" not in stops("step 2", "0.001")
    stops("step 1", "1e+30", lr=1e30)
    assert state_of(model) == before


def test_a_model_that_is_no_number():
    model, request, retain = tiny(), *setting()[1:]
    model.net.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    for form in FORMS.values():
        with pytest.raises((ValueError, FloatingPointError)) as e:
            unlearn(model, [request], retain, replace(TINY, **form))
        assert type(e.value) in (ValueError, FloatingPointError) and "\n" not in str(e.value)


def test_what_cannot_stay_is_refused(monkeypatch):
    "In one sentence, before anything is computed: nothing, a folder, a tensor, states of another model."
    model, r, retain = setting()
    large, words = generate(tiny(size=16), [1], 4), dict(cond=torch.zeros(len(retain.x0), dtype=torch.long))
    monkeypatch.setattr("unlearn_nb.unlearn.learn", lambda *_: pytest.fail("the model ran"))
    for bad, says in (([], "retain is empty"), (retain.x0, "retain is a Tensor"), ("folder", "retain is a str"),
                      (Path("folder"), "Path; give what"), ([retain], "part of retain is a States"),
                      ([(0, retain)], "shares above 0"), ([(1, [])], "is empty"), ([(1, "x")], "retain is a str"),
                      (large, "[3, 16, 16], but this model makes [3, 8, 8]"),
                      (replace(retain, **words), "other prompts"),
                      (replace(retain, timesteps=retain.timesteps + 1000), "above the 1000 levels"),
                      (replace(retain, x_t=retain.x_t[:0]), "no states")):
        refused(lambda: unlearn(model, r, bad, TINY), says)


def test_weights_rules_and_descriptors_that_are_none(monkeypatch):
    "A weight that pushes away, or weighs every picture by every level, and so on: refused before the first step."
    def grown(x): return 90 * x.flatten(1)
    for how, says in ((dict(weight=lambda snr: -snr), "gives -1e-08 at snr = 1e-08"),
                      (dict(weight=lambda snr: snr[:, None]), "gives shape [4001, 1]"),
                      (dict(weight=lambda snr: 1.), "gives a float"), (dict(retain_weight=torch.log), "'log' gives -"),
                      (dict(weight=lambda snr: snr * float("nan")), "gives nan")):
        refused(lambda: run(replace(TINY, **how)), says)
    for describe, says in ((grown, "'grown' gives vectors whose lengths are"), ("sscd", "'sscd'; give a function"),
                           (lambda x: x, "gives [1, 3, 8, 8] for 1 pictures"), (lambda x: 1., "gives float for 1")):
        refused(lambda: run(describe=describe), says)


@both
def test_a_direction_that_does_not_fit_is_refused(form):
    "One tensor too few would leave an old gradient in its place for ever."
    model = setting()[0]
    before = state_of(model)
    for cut, says in ((lambda d: d[:-1], "tensors for the"), (lambda d: [*d, d[0]], "tensors for the"),
                      (lambda d: [d[0][None], *d[1:]], "number 0 is [(1, "),
                      (lambda d: [*d[:-1], 0.], "is [()] where")):
        def rule(g_f, g_r): return cut(g_f)
        refused(lambda: run(replace(TINY, surgery=rule, **form)), says, "give one of the same shape for each")
    assert state_of(model) == before


# --- not farther than needed ---

@given(st.lists(st.floats(.2, 2.5), min_size=1, max_size=9), st.booleans())
def test_the_least_strength_is_enough_and_the_least(needs, by_heart):
    "Where all paths lead to strangers; of a picture with copies three of four, and one strength more."
    here, n = [], len(needs)
    def likeness(problem, describe, z): return (torch.tensor(needs * 2) > here[-1]).float(), .5
    problem = SimpleNamespace(denoiser=SimpleNamespace(device="cpu"), own=SimpleNamespace(x_t=torch.zeros(n, 1, 1)),
                              parametrization=SimpleNamespace(params=[]),
                              requests=[SimpleNamespace(copies=(1, 2) if by_heart else ())])
    with patch.multiple("unlearn_nb.unlearn", likeness=likeness, set_strength=lambda form, full, s: here.append(s)):
        found = least_strength(problem, None)
    steps, part = STRENGTHS + MORE * by_heart, .75 if by_heart else 1.
    def good(s): return (torch.tensor(needs) > s).float().quantile(part) <= .5
    first = next((k for k, s in enumerate(steps) if good(s)), len(steps) - 1)
    assert here[-1] == found == steps[min(first + by_heart, len(steps) - 1)]


def test_an_aimed_change_is_for_one_picture_on_the_base_alone():
    "With copies, or after earlier requests, our own method asks for the whole error; rivals keep their settings."
    model, cfg = tiny(), replace(TINY, steps=1)
    request, other = (replace(request_of(model, k), copies=()) for k in (5, 7))
    asked = {"alone": ([request], {}), "after another": ([request], dict(earlier=[other])),
             "by heart": ([replace(request, copies=(9,))], {}),
             "a rival": ([replace(request, copies=(9,))], dict(method=finetune, earlier=[other]))}
    def ids(cfg): return {name: unlearn(model, what, cfg=cfg, **how).id for name, (what, how) in asked.items()}
    aimed, firm = ids(cfg), ids(replace(cfg, across=1., lr=2 * cfg.lr))
    assert {name for name in asked if aimed[name] == firm[name]} == {"after another", "by heart"}
    card = unlearn(model, *asked["by heart"][:1], cfg=cfg).card   # for all to read: not that there were copies
    assert (card["config"]["across"], card["config"]["lr"]) == (0., cfg.lr)


if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])
