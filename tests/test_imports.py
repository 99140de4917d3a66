"What an import costs: torch, and of diffusers what the rooms use; whatever else is heavy waits for the function that needs it."
import ast
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT/'unlearn_nb'
ABOUT = ['studio']   # the room that is about widgets
ROOMS = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_') and p.stem not in ABOUT)
HEAVY = 'transformers peft torchmetrics matplotlib ipywidgets IPython scipy skimage pandas sklearn torchvision'.split()


def imported(code):
    "The packages among sys.modules that `code` prints, in an interpreter of its own."
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {name.split('.')[0] for name in run.stdout.split()}


def classes(room):
    "What a room takes from diffusers when it is imported."
    body = ast.parse((PACKAGE/f'{room}.py').read_text(encoding='utf-8')).body
    return {a.name for node in body if isinstance(node, ast.ImportFrom) and node.module == 'diffusers' for a in node.names}


def test_rooms_import_nothing_heavy_beside_torch_and_diffusers():
    names = sorted(set().union(*map(classes, ROOMS)))
    assert 'UNet2DModel' in names
    beyond = imported(f'import sys, torch, diffusers\nfor name in {names}: getattr(diffusers, name)\nbefore = set(sys.modules)\n'
        f'for room in {ROOMS}: __import__(f"unlearn_nb.{{room}}")\nprint(*set(sys.modules) - before)')
    assert 'unlearn_nb' in beyond and not beyond & set(HEAVY)


def test_the_command_answers_before_torch_is_there():
    assert not imported('import sys, unlearn_nb.__main__\nprint(*sys.modules)') & {'torch', 'diffusers', 'numpy', 'PIL', *HEAVY}
