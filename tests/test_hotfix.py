"Hotfix: on and off again bit for bit in any order, refused where it does not belong, whole on the disk or refused."
import errno
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
from peft import LoraConfig, LoraModel
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from conftest import ROOT
from test_denoiser import tiny_net
from unlearn_nb import hotfix as room
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import fingerprint, write
from unlearn_nb.hotfix import PARTS, Hotfix, change, changed

DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)


def base(dtype=torch.float32): return Denoiser(deepcopy(tiny_net()).to(dtype), DDPMScheduler(), name='tiny')
def weights(d): return {k: v.detach().clone() for k, v in d.net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def hotfix(d, seed=0, part=3, size=.01):
    "A change of every `part`-th weight of d."
    g = torch.Generator().manual_seed(seed)
    delta = {k: (size*torch.randn(v.shape, generator=g)).half() for k, v in list(weights(d).items())[::part]}
    return Hotfix(delta, {'base': {'id': d.name, 'revision': None, 'sha256': fingerprint(d)}, 'config': {'steps': 3, 'text': 'ä "quoted"\n'}, 'seeds': [1, 2]})


def low_rank(d, seed=0, part=2, rank=2, size=.05):
    "A change of every `part`-th convolution and linear layer of d, as two factors each."
    g, delta = torch.Generator().manual_seed(seed), {}
    for name, v in [(k, v) for k, v in weights(d).items() if v.dim() > 1][::part]:
        delta[name.replace('weight', 'lora_A.weight')] = (size*torch.randn(rank, *v.shape[1:], generator=g)).half()
        delta[name.replace('weight', 'lora_B.weight')] = torch.randn(len(v), rank, *[1]*(v.dim() - 2), generator=g).half()
    return Hotfix(delta, hotfix(d).card)


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
    other.net.conv_in.weight.data[0] += .5
    before = weights(other)
    refused(lambda: fix.apply(other), 'tiny', fingerprint(d)[:12], fingerprint(other)[:12])
    assert equal(weights(other), before) and not other.hotfixes
    refused(lambda: fix.remove(d), 'not applied')
    refused(lambda: fix.apply(base(torch.bfloat16)), 'tiny')
    fix.apply(d)
    on = weights(d)
    refused(lambda: fix.apply(d), 'already applied')
    refused(lambda: hotfix(base()).apply(d), 'already applied')   # the same one, loaded twice
    refused(lambda: mine.remove(d), 'not applied')
    refused(lambda: hotfix(other, seed=2).apply(d), fingerprint(other)[:12], fingerprint(base())[:12])   # for another base, while one is on
    assert equal(weights(d), on) and d.hotfixes == [fix]
    fix.remove(d)
    refused(lambda: fix.remove(d), 'not applied')
    assert fingerprint(d) == fingerprint(base())


def test_refused_on_another_base_with_the_same_hotfixes_on():
    "The weights may even be equal: what counts is the base beneath."
    d, other = base(), base()
    fix = hotfix(d, part=1)
    for k, v in other.net.state_dict().items(): v.add_(fix.delta[k])
    fix.apply(d)
    assert fingerprint(d) == fingerprint(other) and fingerprint(d, base=True) == fingerprint(base())
    refused(lambda: hotfix(base(), seed=1).apply(other), fingerprint(other)[:12])
    hotfix(base(), seed=1).apply(d)
    assert len(d.hotfixes) == 2


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


# --- several, in any order ---

@lru_cache
def pool(dtype):
    "Full and low-rank changes that overlap, of one base."
    d = base(dtype)
    return [hotfix(d, 1, part=1), hotfix(d, 2, part=2), hotfix(d, 3, part=3, size=10.), low_rank(d, 4, part=1), low_rank(d, 5, part=2), low_rank(d, 6, part=3, rank=1)]


def stacked(dtype, fixes):
    "The weights of a fresh base with these on, in their order."
    d = base(dtype)
    for fix in fixes: fix.apply(d)
    return weights(d)


@DTYPES
@given(moves=st.lists(st.integers(0, 5), min_size=1, max_size=8), last=st.permutations(range(6)))
@settings(max_examples=5)
def test_on_and_off_in_any_order(dtype, moves, last):
    "Each move puts a hotfix on, or takes it off if it is on; after each, the weights are the base with those that are on, as if nothing else had ever been on."
    d, fixes, on = base(dtype), pool(dtype), []
    before, mark = weights(d), fingerprint(d)
    def go(fix):
        (fix.remove if fix in on else fix.apply)(d)
        (on.remove if fix in on else on.append)(fix)
        assert d.hotfixes == on and equal(weights(d), stacked(dtype, on)) and fingerprint(d, base=True) == mark
    for k in moves: go(fixes[k])
    for k in last:
        if fixes[k] in on: go(fixes[k])
    assert not on and not d.base and equal(weights(d), before) and fingerprint(d) == mark


def test_several_are_the_sum_of_their_changes():
    "The order is seen in the last bits alone, and weights that none is about are never touched."
    d, fixes = base(), pool(torch.float32)[1:5]
    before = weights(d)
    for fix in fixes: fix.apply(d)
    for k, v in before.items():
        changes = [change(fix.delta, k) for fix in fixes if k in changed(fix.delta)]
        if changes: assert_close(weights(d)[k], v + sum(changes), atol=1e-5, rtol=1e-5)
        else: assert torch.equal(weights(d)[k], v)


# --- low rank ---

class Layers(nn.Module):
    "A layer of every kind that a low-rank change is made for."
    def __init__(self):
        super().__init__()
        self.conv, self.stride, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, (2, 3), stride=2, bias=False), nn.Conv2d(6, 5, 2, padding=(0, 1))
        self.point, self.linear, self.out = nn.Conv2d(5, 4, 1), nn.Linear(4, 7), nn.Linear(7, 2, bias=False)

    def forward(self, x): return self.out(self.linear(self.point(self.wide(self.stride(self.conv(x)))).flatten(2).transpose(1, 2)))


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
@settings(max_examples=10)
def test_a_low_rank_change_is_what_peft_computes(seed, rank):
    net, plain = Layers(), Layers()
    plain.load_state_dict(net.state_dict())
    names = [k for k, m in net.named_children()]
    adapter = LoraModel(net, {'x': LoraConfig(r=rank, lora_alpha=rank, target_modules=names)}, 'x')
    g, x = torch.Generator().manual_seed(seed), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed + 1))
    delta = {k.replace('.x.', '.'): w.data.copy_(torch.randn(w.shape, generator=g)*.3) for k, w in net.named_parameters() if '.lora_' in k}
    assert changed(delta) == sorted(f'{k}.weight' for k in names)
    with torch.no_grad():
        before, expected = plain(x), adapter(x)
        for k in changed(delta): plain.get_parameter(k).add_(change(delta, k))
        assert_close(plain(x), expected, atol=2e-4, rtol=2e-4)
        assert (expected - before).norm() > .1*before.norm()
    adapter.merge_and_unload()   # and weight by weight, as peft itself adds it
    for k, v in net.state_dict().items(): assert_close(plain.state_dict()[k], v, atol=1e-5, rtol=1e-5)


SHAPES = {'wide.weight': (3, 17), 'tall.weight': (11, 2), 'conv.weight': (5, 4, 3, 2)}


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 12), part=st.sampled_from(['', *PARTS.values()]))
def test_cut_to_a_rank_it_is_the_nearest(seed, rank, part):
    "What is lost is what the smaller singular values hold (Eckart and Young); a weight whose own rank is no larger loses nothing; all factors have the one rank."
    g = torch.Generator().manual_seed(seed)
    whole = {k: torch.randn(shape, generator=g) for k, shape in SHAPES.items()}
    thin = room.low_rank(whole, rank, part)
    assert changed(thin) == sorted(whole) and {v.dtype for v in thin.values()} == {torch.float16} and all(k.startswith(part) for k in thin)
    for k, v in whole.items():
        A, B = (thin[f"{part}{k.replace('weight', f'lora_{x}.weight')}"] for x in 'AB')
        assert A.shape == (rank, *v.shape[1:]) and B.shape == (len(v), rank, *[1]*(v.dim() - 2))
        lost, tail = (change(thin, k) - v).norm().item(), torch.linalg.svdvals(v.flatten(1))[rank:].norm().item()
        assert tail - .01 <= lost <= tail + .01*v.norm().item()


def test_a_change_of_nothing_can_be_cut(): assert not change(room.low_rank({'a.weight': torch.zeros(4, 3)}, 2), 'a.weight').any()


def test_a_low_rank_change_survives_the_disk(tmp_path):
    fix = low_rank(base())
    fix.save(tmp_path)
    again, d, e = Hotfix.load(tmp_path), base(), base()
    fix.apply(d), again.apply(e)
    assert fingerprint(d) == fingerprint(e) and again.id == fix.id
    assert sum(v.numel() for v in fix.delta.values()) < sum(weights(d)[k].numel() for k in changed(fix.delta))/2


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

@pytest.mark.parametrize('broken', ['fsync', 'replace'])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, broken):
    "The old file stays until the new one is whole, and nothing else is left lying about."
    write(tmp_path/'x', b'old')
    def fail(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(f'unlearn_nb.hotfix.os.{broken}', fail)
        for name in ('x', 'fresh'):
            with pytest.raises(OSError) as e: write(tmp_path/name, b'new')
            assert e.value.errno == errno.ENOSPC
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('x', b'old')]
    write(tmp_path/'x', b'new')
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('x', b'new')]


def test_a_part_of_a_killed_write_is_in_nobodys_way(tmp_path):
    (tmp_path/'x.part').write_bytes(b'a long half-written file of somebody who was killed')
    write(tmp_path/'x', b'new')
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('x', b'new')]


def test_a_full_disk_while_saving_leaves_the_older_hotfix(tmp_path, monkeypatch):
    old, new = hotfix(base(), 0), hotfix(base(), 1)
    old.save(tmp_path)
    def fail(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('unlearn_nb.hotfix.os.fsync', fail)
        with pytest.raises(OSError): new.save(tmp_path)
    assert Hotfix.load(tmp_path).id == old.id and len(list(tmp_path.iterdir())) == 2


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
