"""Each notebook as Colab would run it: alone in an empty folder, in a fresh environment that holds what Colab has, without the repository.

Its own setup cell installs the wheel, because a stand-in for `google.colab` can be imported. The versions are those of the interpreter that runs the tests, not Colab's:
the requirements of the package are linked into the new environment, and Jupyter's kernel and pip; the checkout and the tools of developers are not.
The method on one page and the first tutorial run always; `--slow` runs all.
"""
import json
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, version
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

NBS = ROOT/'nbs'
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
ON_COLAB = [*(Requirement(r).name for r in SETTINGS['DEFAULT']['requirements'].split()), 'ipykernel', 'pip']
ALWAYS = ['method_on_one_page', 'tutorials/01_forget_a_face']
NAMES = sorted(p.relative_to(NBS).with_suffix('').as_posix() for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TO_DOWNLOAD = {'tutorials/01_forget_a_face': 'hotfix_seed_103.zip'}
LOOK = '''import json, os, sys
import torch, unlearn_nb
print(json.dumps({'package': unlearn_nb.__file__, 'torch': [torch.__version__, torch.__file__], 'path': [os.path.realpath(p) for p in sys.path]}))'''


def needed_by(names):
    "The installed distributions of these names, and of all that they require."
    found, todo = {}, list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found: continue
        found[name] = distribution(name)
        requires = [Requirement(r) for r in found[name].requires or []]
        todo += [r.name for r in requires if r.marker is None or r.marker.evaluate({'extra': ''})]
    return list(found.values())


@pytest.fixture(scope='session')
def machine(tmp_path_factory):
    "What all environments share: `packages`, links to what Colab has; `stub`, an empty `google.colab`; `home`."
    place = tmp_path_factory.mktemp('colab')
    for folder in ('packages', 'stub/google/colab', 'home'): (place/folder).mkdir(parents=True)
    (place/'stub/google/colab/__init__.py').touch()
    for d in needed_by(ON_COLAB):
        for name in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not name.endswith('.pth') and not (place/'packages'/name).exists(): (place/'packages'/name).symlink_to(d.locate_file(name))
    return place


@pytest.fixture
def venv(machine, tmp_path):
    "A fresh environment that sees the machine's packages, but lies apart from them: pip can change none of them."
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv'], check=True)
    [site] = tmp_path.glob('venv/lib/python*/site-packages')
    (site/'colab.pth').write_text(f'{machine/"packages"}\n')
    kernel = {'argv': [str(tmp_path/'venv/bin/python'), '-m', 'ipykernel_launcher', '-f', '{connection_file}'], 'display_name': 'Colab', 'language': 'python'}
    (tmp_path/'kernels/python3').mkdir(parents=True)
    (tmp_path/'kernels/python3/kernel.json').write_text(json.dumps(kernel))
    return tmp_path/'venv'


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in NAMES])
def test_notebook_as_colab_runs_it(name, machine, venv, wheel, tmp_path):
    "It installs the wheel and nothing else, leaves torch as it is, and runs to its end."
    (folder := tmp_path/'content').mkdir()
    (folder/Path(f'{name}.ipynb').name).write_bytes((NBS/f'{name}.ipynb').read_bytes())
    env = {k: v for k, v in os.environ.items() if k.endswith('_NUM_THREADS')} | {
        'PATH': f'{venv/"bin"}:{os.defpath}', 'HOME': str(machine/'home'), 'PYTHONPATH': str(machine/'stub'), 'LANG': 'C.UTF-8', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1',
        'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(wheel.parent), 'PIP_CONFIG_FILE': os.devnull}
    notebook = nbformat.read(NBS/f'{name}.ipynb', 4)
    notebook.cells.append(nbformat.v4.new_code_cell(LOOK))
    kernels = AsyncKernelManager(kernel_name='python3', kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(tmp_path/'kernels')]))
    NotebookClient(notebook, km=kernels, timeout=1800, resources={'metadata': {'path': str(folder)}}).execute(env=env, cleanup_kc=True)   # else a kernel whose manager is given goes on
    seen = json.loads(notebook.cells[-1].outputs[0].text)
    [site] = venv.glob('lib/python*/site-packages')
    assert sorted(p.name for p in site.iterdir()) == ['colab.pth', 'unlearn_nb', f"unlearn_nb-{SETTINGS['DEFAULT']['version']}.dist-info"], 'pip installed more than the package'
    assert seen['package'] == str(site/'unlearn_nb/__init__.py')
    assert seen['torch'] == [version('torch'), str(machine/'packages/torch/__init__.py')]
    assert not [p for p in seen['path'] if Path(p).is_relative_to(ROOT)]
    if name in TO_DOWNLOAD:
        with ZipFile(folder/TO_DOWNLOAD[name]) as file: assert {'hotfix.safetensors', 'card.json'} <= set(file.namelist())
