"The method on one page: short, without this package's code, and with the package's numbers."
import ast
import json

import pytest
import torch

from conftest import ROOT
from unlearn_nb.states import generate
from unlearn_nb.states import Request
from unlearn_nb.unlearn import Config, unlearn
from unlearn_nb.zoo import load

CELLS = [''.join(c['source']) for c in json.loads((ROOT/'nbs/method_on_one_page.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
METHOD = [s for s in CELLS if not s.startswith('#|') and any(start in s for start in ('\nnet = ', '\nx_s = ', '\ndef unlearn('))]   # the model, the edit, the loop
SEEDS, STEPS, LR = range(100, 116), 8, 7e-5


@pytest.fixture(scope='module')
def page():
    "What the page's cells define, up to the run itself; the run here is shorter."
    names = {}
    for source in METHOD: exec(source.replace('\nafter = unlearn(symmetric)', ''), names)
    assert len(METHOD) == 3 and 'after' not in names
    return names


def test_it_is_at_most_sixty_lines():
    assert len([line for source in METHOD for line in source.splitlines() if line.strip()]) <= 60


def test_none_of_our_code_runs_in_it():
    imported = [a.name if isinstance(n, ast.Import) else n.module for s in CELLS[1:] for n in ast.walk(ast.parse(s)) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    assert set(imported) == {'json', 'importlib.resources', 'math', 'torch', 'diffusers', 'PIL', 'safetensors.torch'}


def test_it_gives_the_numbers_of_the_package(page):
    model = load('faces')
    assert torch.allclose(model.sample(SEEDS, 25), page['before'], atol=1e-4)
    request = Request(*model.decode(torch.cat([page['x_f'], page['x_s']])))
    assert torch.equal(model.encode([request.image, request.surrogate]), torch.cat([page['x_f'], page['x_s']]))
    retain = generate(model, range(100_000, 100_024), 25)
    assert torch.allclose(retain.x_t, page['x_r'], atol=1e-4) and torch.allclose(retain.goal, page['goal_r'], atol=1e-4)
    unlearn(model, [request], retain, Config(steps=STEPS, lr=LR, forget_batch=4, retain_batch=12, damping=0.)).apply(model)
    ours, plain = model.sample(SEEDS, 25), page['unlearn'](page['symmetric'], STEPS, LR)
    moved = (plain - page['before']).square().mean().sqrt()
    assert moved > .02 and (plain - ours).square().mean().sqrt() < .01 * moved


def test_nothing_to_retain_is_no_conflict(page):
    g_f = [torch.randn(3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for zero in (0., 1e-8): assert all(map(torch.equal, page['symmetric'](g_f, [g * -zero for g in g_f]), g_f))   # exactly 0 on some machines


def test_the_page_starts_from_the_base_again(page):
    alone = lambda g_f, g_r: g_f
    assert torch.equal(page['unlearn'](alone, 1), page['unlearn'](alone, 1))
