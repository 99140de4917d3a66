"What an import costs: torch, and of diffusers what a module uses; all else that is heavy waits for who needs it."
import ast
import subprocess
import sys

import pytest

from conftest import ROOT

PACKAGE = ROOT/'unlearn_nb'
ABOUT_WIDGETS = ['studio']
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_') and p.stem not in ABOUT_WIDGETS)
HEAVY = 'transformers peft torchmetrics matplotlib ipywidgets IPython scipy skimage pandas sklearn torchvision'.split()


def imported(code):
    "The packages among sys.modules that `code` prints, in an interpreter of its own."
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {name.split('.')[0] for name in run.stdout.split()}


def tree(module): return ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))


def classes(module):
    "What a module takes from diffusers when it is imported."
    found = [n for n in tree(module).body if isinstance(n, ast.ImportFrom) and n.module == 'diffusers']
    return {a.name for node in found for a in node.names}


@pytest.mark.slow
def test_modules_import_nothing_heavy_beside_torch_and_diffusers():
    names = sorted(set().union(*map(classes, MODULES)))
    assert 'UNet2DModel' in names
    beyond = imported('import sys, torch, diffusers\n'
                      f'for name in {names}: getattr(diffusers, name)\n'
                      'before = set(sys.modules)\n'
                      f'for module in {MODULES}: __import__(f"unlearn_nb.{{module}}")\n'
                      'print(*set(sys.modules) - before)')
    assert 'unlearn_nb' in beyond and not beyond & set(HEAVY)


def test_the_command_answers_before_torch_is_there():
    beyond = imported('import sys, unlearn_nb.__main__\nprint(*sys.modules)')
    assert not beyond & {'torch', 'diffusers', 'numpy', 'PIL', *HEAVY}


def test_no_module_imports_a_private_name_of_another():
    for module in MODULES + ABOUT_WIDGETS:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [a.name for a in node.names if a.name.startswith('_') and not a.name.endswith('__')]
                assert not private, f'{module} takes {private} from {node.module}'
