"The examples in the docstrings of the names that people call first: they run, one after another, as they stand."
import doctest

import pytest

from unlearn_nb.audit import audit
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.hotfix import Hotfix, merge
from unlearn_nb.report import evaluate
from unlearn_nb.states import Request, default_retain
from unlearn_nb.surrogates import check, propose
from unlearn_nb.unlearn import Config, unlearn
from unlearn_nb.zoo import load

FIRST = [load, Denoiser.sample, propose, check, Request, default_retain, Config.many, unlearn, Hotfix, merge, evaluate,
         audit]   # each goes on where the one before has ended


@pytest.mark.slow
def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {f.__name__: f for f in FIRST} | {'Config': Config}
    for f in FIRST:
        test = doctest.DocTestParser().get_doctest(f.__doc__, names, f.__qualname__, None, 0)
        said = []
        assert test.examples, f'{f.__qualname__} has no example'
        assert not doctest.DocTestRunner().run(test, out=said.append, clear_globs=False).failed, '\n'.join(said)
        names = test.globs
