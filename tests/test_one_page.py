"The method on one page: short, without this package's code, and with the package's numbers."
import ast
import json

import pytest
import torch

from conftest import ROOT
from unlearn_nb.states import Request, generate
from unlearn_nb.unlearn import Config, unlearn
from unlearn_nb.zoo import load

PAGE = json.loads((ROOT / 'nbs/method_on_one_page.ipynb').read_text(encoding='utf-8'))
CELLS = [''.join(c['source']) for c in PAGE['cells'] if c['cell_type'] == 'code']
RUN = '\nafter = unlearn(symmetric)'
METHOD = [s for s in CELLS[:[RUN in s for s in CELLS].index(True) + 1] if not s.startswith('#|')]
SEEDS, LR = range(100, 116), 7e-5


@pytest.fixture(scope='module')
def page():
    "What the page's cells define, up to the run itself; the runs here are shorter."
    names = {}
    for source in METHOD: exec(source.replace(RUN, ''), names)
    assert 'after' not in names
    return names


def test_it_is_at_most_sixty_lines():
    "Of code: without imports and docstrings."
    def is_code(line): return line.strip() and not line.strip().startswith(('import ', 'from ', '"'))
    assert len(list(filter(is_code, '\n'.join(METHOD).splitlines()))) <= 60


def test_none_of_our_code_runs_in_it():
    nodes = [node for s in CELLS[1:] for node in ast.walk(ast.parse(s))]
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {'json', 'importlib.resources', 'math', 'torch', 'diffusers', 'PIL', 'safetensors.torch'}


@pytest.mark.slow
def test_it_gives_the_numbers_of_the_package(page):
    "The same pictures, the same states, and after eight steps the same change to a hundredth."
    model = load('faces')
    assert torch.allclose(model.sample(SEEDS, 25), page['before'], atol=1e-4)
    pair = torch.cat([page['x_f'], page['x_s']])
    request = Request(*model.decode(pair))
    assert torch.equal(model.encode([request.image, request.surrogate]), pair)
    retain = generate(model, range(100_000, 100_024), 25)
    for name, v in (('x_r', retain.x_t), ('goal_r', retain.goal)): assert torch.allclose(v, page[name], atol=1e-4)
    cfg = Config(steps=8, lr=LR, forget_batch=4, retain_batch=12, near_images=0, damping=0., path_share=0.,
                 weight='unit_eps', across=1., retain_weight='unit_v', surgery='symmetric')
    unlearn(model, [request], retain, cfg).apply(model)
    ours, plain = model.sample(SEEDS, 25), page['unlearn'](page['symmetric'], 8, LR)
    moved = (plain - page['before']).square().mean().sqrt()
    assert moved > .02 and (plain - ours).square().mean().sqrt() < .01 * moved


@pytest.mark.slow
def test_the_page_starts_from_the_base_again(page):
    def alone(g_f, g_r): return g_f
    assert torch.equal(page['unlearn'](alone, 1), page['unlearn'](alone, 1))


def test_nothing_to_retain_is_no_conflict():
    names, source = {}, next(s for s in METHOD if '\ndef symmetric' in s)
    exec('import torch' + source[source.index('\ndef symmetric'):], names)
    g_f = [torch.randn(3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for zero in (0., 1e-8):   # exactly 0 on some machines
        assert all(map(torch.equal, names['symmetric'](g_f, [g * -zero for g in g_f]), g_f))
