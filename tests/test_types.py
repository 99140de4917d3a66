"Types: editors and checkers see the package as it is, patched methods included."
import ast
import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest

from conftest import ROOT
from make_stubs import write_stubs

# what others ship is not looked into, which takes minutes: their types are theirs
CONFIG = """[mypy]
[mypy-torch.*,diffusers.*,transformers.*,accelerate.*,peft.*,safetensors.*,PIL.*,numpy.*,matplotlib.*,IPython.*,\
ipywidgets.*,torchmetrics.*,scipy.*,click.*,tqdm.*,huggingface_hub.*]
follow_imports = skip
ignore_missing_imports = True
"""
WRONG = {   # a line that must be found: what the checker says
    'unlearn(model, "face.png")': 'arg-type',
    'unlearn(model, request, cfg=5)': 'arg-type',
    'unlearn(model, request, steps=5)': 'call-arg',
    'Config(step=5)': 'call-arg',
    'Config(weight=5)': 'arg-type',
    'model.sampel([5])': 'attr-defined',
    'model.sample(steps=5)': 'call-arg',
    'fix.aply(model)': 'attr-defined',
    'fix.save(5)': 'arg-type',
    'merge(fix)': 'arg-type',
    'load("faces").sampel([5])': 'attr-defined',
    'Hotfix.from_pretrained("a").aply(model)': 'attr-defined',
}


@pytest.fixture(scope='module')
def stubs(tmp_path_factory):
    "A folder with the stubs of the package, as the wheel brings them."
    place = tmp_path_factory.mktemp('stubs')
    (place/'unlearn_nb').mkdir()
    write_stubs(ROOT/'unlearn_nb', place/'unlearn_nb')
    (place/'mypy.ini').write_text(CONFIG)
    return place


def mypy(stubs, *what):
    "What mypy says, line by line."
    command = [sys.executable, '-m', 'mypy', '--config-file', stubs/'mypy.ini', '--no-color-output', *what]
    env = os.environ | {'MYPYPATH': str(stubs), 'PYTHONPATH': ''}
    done = subprocess.run(command, cwd=stubs, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_public_face_is_sound(stubs):
    [line] = mypy(stubs, '-p', 'unlearn_nb')
    assert line.startswith('Success')


def test_a_program_that_builds_on_the_package_is_right(stubs):
    lines = mypy(stubs, ROOT/'tests'/'typed_example.py')
    assert lines[-1].startswith('Success'), lines


def test_mistakes_are_found(stubs):
    head = ['from unlearn_nb.denoiser import Denoiser', 'from unlearn_nb.hotfix import Hotfix, merge',
            'from unlearn_nb.states import Request', 'from unlearn_nb.unlearn import Config, unlearn',
            'from unlearn_nb.zoo import load', 'def f(model: Denoiser, fix: Hotfix, request: Request) -> None:']
    (stubs/'wrong.py').write_text('\n'.join(head + [f'    {line}' for line in WRONG]) + '\n')
    *said, _ = [line for line in mypy(stubs, 'wrong.py') if ': note:' not in line]
    for k, (line, kind) in enumerate(WRONG.items(), len(head) + 1):
        assert any(f'wrong.py:{k}: error' in s and f'[{kind}]' in s for s in said), (line, said)
    assert len(said) == len(WRONG), said


def test_the_stubs_have_what_the_modules_have(stubs):
    "Every function with its parameters, every class with its methods, wherever they were attached."
    for file in sorted((stubs/'unlearn_nb').glob('*.pyi')):
        if file.stem == '__init__': continue
        module, tree = import_module(f'unlearn_nb.{file.stem}'), ast.parse(file.read_text())
        there = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own = [v for v in vars(module).values() if getattr(v, '__module__', None) == module.__name__]
        classes, patched = [v for v in own if inspect.isclass(v)], set()
        for c in classes:
            body = ast.unparse(there[c.__name__])
            for name, f in vars(c).items():
                if name.startswith('__') or not inspect.isfunction(f): continue
                patched.add(f)
                assert f'def {name}(' in body or f'\n    {name}' in body, (c, name)
        for f in filter(inspect.isfunction, own):
            if f in patched or f.__name__ not in there: continue
            a = there[f.__name__].args
            found = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
            assert sorted(found) == sorted(inspect.signature(f).parameters), f
