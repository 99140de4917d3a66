"Hotfix: on and off again bit for bit, refused where it does not belong, whole on the disk or refused."
import hashlib
import json
import subprocess
import sys
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import ROOT
from test_denoiser import tiny_net
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.hotfix import Hotfix, fingerprint, write

DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)


def base(dtype=torch.float32): return Denoiser(deepcopy(tiny_net()).to(dtype), DDPMScheduler(), name='tiny')
def weights(d): return {k: v.detach().clone() for k, v in d.net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def hotfix(d, seed=0, part=3, size=.01):
    "A change of every `part`-th weight of d."
    g = torch.Generator().manual_seed(seed)
    delta = {k: (size*torch.randn(v.shape, generator=g)).half() for k, v in list(weights(d).items())[::part]}
    return Hotfix(delta, {'base': {'id': d.name, 'revision': None, 'sha256': fingerprint(d)}, 'config': {'steps': 3, 'text': 'ä "quoted"\n'}, 'seeds': [1, 2]})


def refused(act, *words):
    "The one sentence of the ValueError."
    with pytest.raises(ValueError) as e: act()
    message = str(e.value)
    assert type(e.value) is ValueError and '\n' not in message and len(message) > 20
    for word in words: assert str(word) in message
    return message


# --- fingerprint ---

@lru_cache
def names(): return list(tiny_net().state_dict())


@DTYPES
@given(which=st.integers(0, 10**6), element=st.integers(0, 10**6))
@settings(max_examples=6)
def test_one_changed_number_is_another_fingerprint(dtype, which, element):
    d = base(dtype)
    before = fingerprint(d)
    assert before == fingerprint(base(dtype)) and len(before) == 64
    v = d.net.state_dict()[names()[which % len(names())]].view(-1)
    v[element % len(v)] += 1
    assert fingerprint(d) != before


def test_type_and_name_are_in_the_fingerprint():
    prints = {fingerprint(base(t)) for t in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(prints) == 3
    d = base()
    before, state = fingerprint(d), d.net.state_dict()
    a, b = ('conv_norm_out.weight', 'down_blocks.0.resnets.0.norm1.weight')   # two of one shape
    state[a].mul_(2), state[b].mul_(3)
    one = fingerprint(d)
    state[a].mul_(1.5), state[b].div_(1.5)   # the numbers change places
    assert len({before, one, fingerprint(d)}) == 3


def test_the_fingerprint_depends_on_values_alone():
    "Not on the memory layout, nor on what a gradient or a mode has to do with them."
    d = base()
    before = fingerprint(d)
    d.net.to(memory_format=torch.channels_last).train().requires_grad_(False)
    assert fingerprint(d) == before


# --- on and off ---

@DTYPES
@given(seed=st.integers(0, 10**6), part=st.sampled_from([1, 2, 7]), size=st.sampled_from([1e-4, .01, 100.]))
@settings(max_examples=6)
def test_off_again_bit_for_bit(dtype, seed, part, size):
    d = base(dtype)
    before, mark, fix = weights(d), fingerprint(d), hotfix(d, seed, part, size)
    for _ in range(2):   # and it goes on again
        fix.apply(d)
        on = weights(d)
        assert fingerprint(d) != mark
        for k, v in before.items():
            assert torch.equal(on[k], v + fix.delta[k].to(dtype) if k in fix.delta else v), k
        fix.remove(d)
        assert fingerprint(d) == mark and equal(weights(d), before)


def test_off_again_whatever_became_of_the_weights():
    "Half a training step on the edited model, weights that are no numbers: the base comes back."
    d = base()
    before, fix = weights(d), hotfix(d, part=1)
    fix.apply(d)
    with torch.no_grad():
        for p in d.net.parameters(): p.mul_(float('nan'))
    fix.remove(d)
    assert equal(weights(d), before)


def test_applied_it_changes_what_the_model_gives():
    d = base()
    fix, before = hotfix(d), d.sample([3], steps=3)
    fix.apply(d)
    assert (d.sample([3], steps=3) - before).abs().max() > 1e-3
    fix.remove(d)
    assert torch.equal(d.sample([3], steps=3), before)


def test_refused_where_it_does_not_belong():
    d, other = base(), base()
    fix, mine = hotfix(d), hotfix(d, seed=1)
    list(other.net.parameters())[0].data[0] += .5
    before = weights(other)
    refused(lambda: fix.apply(other), 'tiny', fingerprint(d)[:12], fingerprint(other)[:12])
    assert equal(weights(other), before)
    refused(lambda: fix.remove(d), 'not applied')
    refused(lambda: fix.apply(base(torch.bfloat16)), 'tiny')
    fix.apply(d)
    on = weights(d)
    refused(lambda: fix.apply(d), 'already applied')
    refused(lambda: mine.apply(d), 'remove the hotfix')   # on a base that has another one on
    refused(lambda: hotfix(base()).apply(d), 'remove the hotfix')   # the same one, loaded twice
    assert equal(weights(d), on)
    fix.remove(d)
    refused(lambda: fix.remove(d), 'not applied')
    mine.apply(d)   # now it may
    mine.remove(d)
    assert fingerprint(d) == fingerprint(base())


def test_not_taken_off_another_model():
    "Base weights of one model must not be written over another model; the hotfix stays removable where it is on."
    d, other = base(), base()
    fix = hotfix(d)
    fix.apply(d)
    with torch.no_grad(): other.net.conv_in.weight.add_(1)
    before = weights(other)
    refused(lambda: fix.remove(other))
    assert equal(weights(other), before)
    fix.remove(d)
    assert fingerprint(d) == fingerprint(base())


# --- on the disk ---

def test_round_trip_bit_for_bit(tmp_path):
    fix = hotfix(base())
    fix.save(tmp_path/'a'/'b')
    again = Hotfix.load(tmp_path/'a'/'b')
    assert equal(again.delta, fix.delta)
    assert {k: v for k, v in again.card.items() if k != 'hotfix_sha256'} == fix.card and 'hotfix_sha256' not in fix.card
    again.save(str(tmp_path/'c'))
    for name in ('hotfix.safetensors', 'card.json'): assert (tmp_path/'a'/'b'/name).read_bytes() == (tmp_path/'c'/name).read_bytes()
    assert {p.name for p in (tmp_path/'c').iterdir()} == {'hotfix.safetensors', 'card.json'}
    assert equal(load_file(tmp_path/'c'/'hotfix.safetensors'), fix.delta)   # stock safetensors
    d, e = base(), base()
    fix.apply(d), again.apply(e)
    assert fingerprint(d) == fingerprint(e)


def test_a_newer_version_replaces_the_older(tmp_path):
    old, new = hotfix(base(), 0), hotfix(base(), 1, part=5)
    old.save(tmp_path), new.save(tmp_path)
    assert equal(Hotfix.load(tmp_path).delta, new.delta)


@lru_cache
def saved(tmp):
    hotfix(base(), part=9).save(tmp)
    return {name: (tmp/name).read_bytes() for name in ('hotfix.safetensors', 'card.json')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('damaged')


@given(where=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=25)
def test_one_flipped_bit_of_the_weights_is_refused(folder, where, bit):
    data = bytearray(saved(folder)['hotfix.safetensors'])
    data[where % len(data)] ^= 1 << bit
    (folder/'hotfix.safetensors').write_bytes(data)
    try: refused(lambda: Hotfix.load(folder), folder)
    finally: (folder/'hotfix.safetensors').write_bytes(saved(folder)['hotfix.safetensors'])
    assert Hotfix.load(folder).delta   # whole again


@pytest.mark.parametrize('damage', [
    lambda f: (f/'hotfix.safetensors').unlink(),
    lambda f: (f/'hotfix.safetensors').write_bytes(b''),
    lambda f: (f/'hotfix.safetensors').write_bytes((f/'hotfix.safetensors').read_bytes()[:-1]),
    lambda f: (f/'card.json').unlink(),
    lambda f: (f/'card.json').write_bytes(b''),
    lambda f: (f/'card.json').write_bytes((f/'card.json').read_bytes()[:-20]),
    lambda f: (f/'card.json').write_bytes(b'\xff\xfe\x00'),
    lambda f: (f/'card.json').write_text('[]'),
    lambda f: (f/'card.json').write_text('null'),
    lambda f: (f/'card.json').write_text('{}'),
    lambda f: (f/'card.json').write_text(json.dumps({'hotfix_sha256': hashlib.sha256((f/'hotfix.safetensors').read_bytes()).hexdigest()})),   # names no base
    lambda f: (f/'hotfix.safetensors').write_bytes(b'no safetensors') and (f/'card.json').write_text(
        json.dumps(json.loads((f/'card.json').read_text()) | {'hotfix_sha256': hashlib.sha256(b'no safetensors').hexdigest()})),
], ids=['no weights', 'empty weights', 'short weights', 'no card', 'empty card', 'short card', 'no text', 'list card', 'null card', 'bare card', 'card without base', 'no safetensors'])
def test_damaged_folders_are_refused(tmp_path, damage):
    hotfix(base(), part=9).save(tmp_path)
    damage(tmp_path)
    refused(lambda: Hotfix.load(tmp_path), tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    refused(lambda: Hotfix.load(tmp_path), tmp_path)
    refused(lambda: Hotfix.load(tmp_path/'nowhere'), tmp_path/'nowhere')
    (tmp_path/'file').write_text('x')
    refused(lambda: Hotfix.load(tmp_path/'file'), tmp_path/'file')


# --- crashes ---

def test_write_keeps_the_old_file_until_the_new_one_is_there(tmp_path, monkeypatch):
    file = tmp_path/'x'
    write(file, b'old')
    for broken in ('fsync', 'replace'):
        with monkeypatch.context() as m:
            def fail(*args): raise OSError('disk full')
            m.setattr(f'unlearn_nb.hotfix.os.{broken}', fail)
            with pytest.raises(OSError, match='disk full'): write(file, b'new')
        assert file.read_bytes() == b'old'
    write(file, b'new')
    assert file.read_bytes() == b'new' and [p.name for p in tmp_path.iterdir()] == ['x']


KILLER = '''
import os, random, signal, sys, time, torch
from pathlib import Path
from unlearn_nb.hotfix import Hotfix
folder, rng, outcomes = Path(sys.argv[1]), random.Random(0), []
card = {'base': {'id': 'tiny', 'revision': None, 'sha256': '0' * 64}}
def version(k): return {'a': torch.full((300, 300), float(k)).half(), **({'b': torch.ones(7).half()} if k % 2 else {})}
def save_for_ever():
    k = 0
    while True:
        Hotfix(version(k % 2), card | {'number': k % 2}).save(folder)
        k += 1
for _ in range(25):
    pid = os.fork()
    if not pid: save_for_ever()
    time.sleep(rng.uniform(.01, .08))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    try: found = Hotfix.load(folder)
    except ValueError: outcomes.append('refused')
    else:
        k = found.card['number']
        whole = found.delta.keys() == version(k).keys() and all(torch.equal(v, found.delta[n]) for n, v in version(k).items())
        outcomes.append('whole' if whole else 'MIXED')
print(*outcomes)
'''


def test_killed_while_saving_it_is_whole_or_refused(tmp_path):
    "25 SIGKILLs at arbitrary moments of saving two versions in turn: what loads is one of them; a later save always mends the folder."
    done = subprocess.run([sys.executable, '-c', KILLER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert len(outcomes) == 25 and set(outcomes) <= {'whole', 'refused'} and 'whole' in outcomes, outcomes
    fix = hotfix(base())
    fix.save(tmp_path)
    assert equal(Hotfix.load(tmp_path).delta, fix.delta)
