"The examples in the docstrings: they run as they stand, and no public name is without one but for the exceptions here."
import doctest
import pkgutil
from functools import cached_property
from importlib import import_module
from inspect import isclass

import pytest
import torch

import unlearn_nb
from unlearn_nb.audit import audit
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.hotfix import Hotfix, merge
from unlearn_nb.report import evaluate
from unlearn_nb.states import Request, States, default_retain, generate
from unlearn_nb.surrogates import check, propose
from unlearn_nb.unlearn import Config, problem_of, unlearn
from unlearn_nb.zoo import load

NAMES = [m.name for m in pkgutil.iter_modules(unlearn_nb.__path__) if not m.name.startswith('_')]
MODULES = {name: import_module(f'unlearn_nb.{name}') for name in NAMES}
FIRST = [Config, Denoiser, Hotfix, Request, States, audit, check, default_retain, evaluate, generate, load, merge,
         propose, unlearn]   # what people call first: the examples of all modules may use it
TYPES = staticmethod, classmethod, property, cached_property
WITHOUT = {   # public names without an example, and why
    'schedule.Schedule': 'stands for `DDPM` and `Flow`',
    'schedule.DDPM': 'its cell in the lesson is full; `Flow`, its sibling, shows the same',
    'metrics.lpips': 'wants torchvision, and weights from the network',
    'hotfix.Hotfix.push_to_hub': 'wants the hub',
    'unlearn.Config': 'its cell in the lesson is full; `Config.many` and `unlearn` make one',
    'baselines.selective_amnesia': 'needs 32 gradients before its first step; it is called as its siblings are',
    'bench.measure_step': 'takes seconds a round; tests/test_bench.py calls it',
    'bench.measure_costs': 'takes a minute; tests/test_bench.py calls it',
    'bench.bench': 'takes a minute; tests/test_bench.py calls it',
    'bench.table': 'shows what `bench` gives',
    'cli.forget_one': 'a whole run; `unlearn_nb forget` is its example',
    'leaderboard.tune': 'half an hour; `unlearn_nb leaderboard` calls it',
    'leaderboard.judge': 'half an hour; `unlearn_nb leaderboard` calls it',
    'leaderboard.at_budgets': 'hours: whole runs, each with several numbers of steps',
    'leaderboard.leaderboard': 'hours; `unlearn_nb leaderboard` calls it',
    'leaderboard.summary': 'of rows that `leaderboard` gives',
    'leaderboard.board_table': 'shows what `leaderboard` gives',
    'leaderboard.board_figure': 'shows what `leaderboard` gives',
    'leaderboard.read_board': 'reads what `leaderboard` writes',
    'forward_only.Edits': 'its cell is full; the examples of `zeroth` and `least_squares` move one',
    'studio.Studio.*': 'its buttons; the example of `Studio` presses them',
    'studio.View.*': 'what the widget does by itself; tests/test_browser.py has its page',
    'studio.Worker.*': 'the example of `Worker` starts it',
}


@pytest.fixture(scope='module')
def shared():
    "What the examples share: two built-in models, a request, a hotfix of two steps, its problem and its report."
    model, flags = load('faces', device='cpu'), load('flags', device='cpu')
    x = model.sample([7, 8, 9, 10], steps=10)   # [4, 3, 32, 32]
    image = model.decode(x)[0]
    surrogate = propose(model, image, seeds=range(1), steps=5)
    request = Request(image, surrogate, seed=7, steps=10, copies=())
    retain = default_retain(model, request, n=8, near=0, steps=5)
    few = dict(retain_images=8, near_images=0, pool=16, forget_batch=2, retain_batch=2, damping=0)
    cfg = Config.of(model, steps=2, sampling_steps=5, **few)
    fix, problem = unlearn(model, request, retain, cfg), problem_of(model, [request], retain, cfg)[0]
    few = dict(panel=range(1000, 1004), fresh=range(0), levels=(300,), steps=5)
    report, before, after = evaluate(model, fix, [request], x, m=3, **few)
    asked = Request(*flags.decode(flags.sample([1, 2], 2, prompt="irish flag")), prompt="irish flag")
    less = Config.of(flags, rank=0, damping=0, retain_images=2, sampling_steps=2, forget_batch=2, retain_batch=2)
    stay = generate(flags, [1, 2], 2, prompt=["irish flag", "polish flag"])
    worded = problem_of(flags, [asked], stay, less)[0]
    return dict(model=model, flags=flags, x=x, image=image, surrogate=surrogate, request=request, retain=retain,
                cfg=cfg, fix=fix, problem=problem, few=few, report=report, before=before, after=after, worded=worded,
                torch=torch)


def bare(f):
    "The function that a member of a class is made of."
    return f.__func__ if isinstance(f, TYPES[:2]) else f.fget if isinstance(f, property) else getattr(f, 'func', f)


def public(module):
    "{name: function or class} of all that a module makes public: its names, and the members of public classes."
    def mine(f): return callable(f) and getattr(f, '__module__', '') == module.__name__ and f.__name__ != '<lambda>'
    found = {name: f for name in module.__all__ if mine(f := getattr(module, name))}
    for c in {c for m in MODULES.values() for name in m.__all__ if isclass(c := getattr(m, name))}:
        members = {name: bare(f) for name, f in vars(c).items() if not name.startswith('_') or name == '__call__'}
        found |= {f'{c.__name__}.{name}': f for name, f in members.items() if mine(f) and not isclass(f)}
    return found


def lacks(what, f):
    "What a name lacks: a docstring, or an example. Methods that stand in their class are shown by that of the class."
    told, name = f.__doc__ or '', what.split('.')[-1]
    if not told or told.startswith(f'{f.__name__}('): return 'a docstring'   # that of a dataclass
    inside = f.__qualname__ == what if '.' in what else False
    return None if '>>> ' in told or inside or f.__name__ != name else 'an example'


def excused(what):
    "Is it among `WITHOUT`, itself or with all methods of its class?"
    return what in WITHOUT or f'{what.rpartition(".")[0]}.*' in WITHOUT


@pytest.mark.parametrize('name', MODULES)
def test_every_public_name_is_told_and_shown(name):
    found = {f'{name}.{what}': lacks(what, f) for what, f in public(MODULES[name]).items()}
    missing = {what: v for what, v in found.items() if v}
    assert not {what: v for what, v in missing.items() if v == 'a docstring' or not excused(what)}
    assert all(what in missing for what in WITHOUT if what in found), 'an exception that is none any more'


def test_exceptions_are_names_of_the_package():
    "Whoever takes a name away takes its exception away."
    names = {f'{name}.{what}' for name, module in MODULES.items() for what in public(module)}
    classes = {f'{what.rpartition(".")[0]}.*' for what in names if what.count('.') == 2}
    assert set(WITHOUT) <= names | classes


@pytest.mark.slow
@pytest.mark.parametrize('name', MODULES)
def test_examples(name, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, said = MODULES[name], []
    assert not set(module.__all__) & set(shared), 'the examples share a name that is public here'
    names = {f.__name__: f for f in FIRST} | vars(module) | shared
    for what, f in public(module).items():
        test = doctest.DocTestParser().get_doctest(f.__doc__ or '', names, f'{name}.{what}', None, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert not runner.run(test, out=said.append).failed, '\n'.join(said)
