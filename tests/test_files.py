"Files: whole or as before, whatever ends the writer; the names that files and nets get by what is in them."
import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import lru_cache, partial

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from unlearn_nb import files
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.files import code_sha256, fingerprint, sha256, write

DTYPES = torch.float32, torch.bfloat16, torch.float16


@lru_cache
def tiny_net():
    "An untrained net whose output depends on its input and on the level."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                           down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2).eval()


def base(dtype=torch.float32): return Denoiser(deepcopy(tiny_net()).to(dtype), DDPMScheduler(), name='tiny')


def content(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- the writer ---

@pytest.mark.parametrize('broken', ['fsync', 'replace'])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, broken):
    "The old file stays until the new one is whole, nothing else is left lying about, and one sentence says what to do."
    write(tmp_path/'x', b'old')
    def fail(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(f'unlearn_nb.files.os.{broken}', fail)
        for name in ('x', 'fresh'):
            with pytest.raises(OSError) as e: write(tmp_path/name, b'new')
            assert e.value.errno == errno.ENOSPC and '\n' not in e.value.strerror
            for word in (str(tmp_path/name), 'No space left', 'as it was', 'make room'): assert word in e.value.strerror
    assert content(tmp_path) == {'x': b'old'}
    write(tmp_path/'x', b'new')
    assert content(tmp_path) == {'x': b'new'}


def test_interrupted_it_tidies_up(tmp_path, monkeypatch):
    write(tmp_path/'x', b'old')
    def ctrl_c(*args): raise KeyboardInterrupt
    monkeypatch.setattr('unlearn_nb.files.os.fsync', ctrl_c)
    with pytest.raises(KeyboardInterrupt): write(tmp_path/'x', b'new')
    assert content(tmp_path) == {'x': b'old'}


def test_no_such_folder_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match='could not be written'): write(tmp_path/'nowhere'/'x', b'new')
    assert not list(tmp_path.iterdir())


WRITER = '''
import sys, types
sys.modules["torch"] = types.ModuleType("torch")   # the writer does not need it, and it takes seconds
import importlib.util
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
print("ready", flush=True)
k = 0
while True:
    files.write(sys.argv[2], bytes([k % 2]) * 3_000_000)
    k += 1
'''


def test_killed_while_writing_the_file_is_whole(tmp_path):
    "SIGKILL at any moment of writing two versions in turn: the file is one of them, the next write comes through."
    file, rng = tmp_path/'x', random.Random(0)
    write(file, b'\0' * 3_000_000)
    for _ in range(6):
        command = [sys.executable, '-c', WRITER, files.__file__, str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b'ready\n'
            time.sleep(rng.uniform(.005, .05))
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        data = file.read_bytes()
        assert len(data) == 3_000_000 and len(set(data)) == 1
    assert all(name == 'x' or name.startswith('.x.') and name.endswith('.part') for name in content(tmp_path))
    write(file, b'new')
    assert file.read_bytes() == b'new'


def test_sha256_of_a_file(tmp_path):
    for size in (0, 1, (1 << 22) + 3):   # more than one piece
        data = bytes(range(256)) * (size // 256 + 1)
        write(tmp_path/'x', data[:size])
        assert sha256(tmp_path/'x') == hashlib.sha256(data[:size]).hexdigest()


# --- what a function does ---

HELPERS = """
K = {k}
def helper(x): return {body}
def rule(x, c=1.): # {comment}
    return [helper(y) + K * c for y in x]
class Rule:
    def __init__(self, c): self.c = c
    def __call__(self, x): return rule(x, self.c)
"""


def module(k=2., body='x', comment=''):
    names = {'__name__': 'theirs'}
    exec(HELPERS.format(k=k, body=body, comment=comment), names)
    return names


def closes_over(v): return lambda x: (x, v)
def itself(n): return n and itself(n - 1)


def test_the_hash_of_a_function_is_that_of_what_it_does():
    "Comments and places in memory do not count; constants, defaults, helpers and what it closes over do."
    assert code_sha256(module()['rule']) == code_sha256(module(comment='another')['rule'])
    rules = [module(), module(k=3.), module(body='-x')]
    hashes = [code_sha256(m['rule']) for m in rules] + [code_sha256(m['Rule'](1.)) for m in rules]
    hashes += [code_sha256(rules[0]['Rule'](2.)), code_sha256(partial(rules[0]['rule'], c=2.))]
    hashes += [code_sha256(closes_over(v)) for v in (1, 2., 'a', (1, 2), {'a': 1}, torch.ones(2), rules[0]['rule'])]
    hashes += [code_sha256(f) for f in (itself, torch.add, torch.mul)]
    assert len({*hashes}) == len(hashes)
    for v in (1, {'a': 1}, {'b', 'a', 'c'}, torch.ones(2), rules[1]['rule']):
        assert code_sha256(closes_over(v)) == code_sha256(closes_over(v))


def test_the_hash_of_a_function_is_the_same_in_every_process():
    code = "from test_files import *; print(code_sha256(module()['rule']), code_sha256(closes_over({'a', 'b'})))"
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')])}
    found = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            env=env | {'PYTHONHASHSEED': str(seed)}).stdout for seed in (1, 2)}
    assert len(found) == 1 and found.pop().split()[0] == code_sha256(module()['rule'])


# --- the fingerprint ---

@given(which=st.integers(0, 10**6), element=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES))
@settings(max_examples=8)
def test_one_changed_number_is_another_fingerprint(which, element, dtype):
    d = base(dtype)
    before, names = fingerprint(d), list(d.net.state_dict())
    assert before == fingerprint(base(dtype)) and len(before) == 64
    v = d.net.state_dict()[names[which % len(names)]].view(-1)
    v[element % len(v)] += 1
    assert fingerprint(d) != before


def test_type_and_name_are_in_the_fingerprint():
    assert len({fingerprint(base(t)) for t in DTYPES}) == 3
    d = base()
    before, state = fingerprint(d), d.net.state_dict()
    a, b = 'conv_norm_out.weight', 'down_blocks.0.resnets.0.norm1.weight'   # two of one shape
    state[a].mul_(2), state[b].mul_(3)
    one = fingerprint(d)
    state[a].mul_(1.5), state[b].div_(1.5)   # the numbers change places
    assert len({before, one, fingerprint(d)}) == 3


def test_the_fingerprint_depends_on_values_alone():
    "Not on memory layout, gradients or mode; with base=True on what lies beneath a hotfix."
    d = base()
    before = fingerprint(d)
    d.net.to(memory_format=torch.channels_last).train().requires_grad_(False)
    assert fingerprint(d) == before
    name, v = next(iter(d.net.state_dict().items()))
    d.base[name] = v.clone()
    v.add_(1)
    assert fingerprint(d, base=True) == before != fingerprint(d)
