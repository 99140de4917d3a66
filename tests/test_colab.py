"""Each notebook as Colab would run it: alone in an empty folder, in a fresh environment that holds what Colab has.

Its own setup cell installs the package from the repository, because a stand-in for `google.colab` can be imported;
git is told that the repository's address is a copy of this checkout, and pip's index has no such package. The versions
are those of the interpreter that runs the tests, not Colab's: the requirements of the package are linked into the new
environment, and Jupyter's kernel, pip and setuptools; the checkout and the tools of developers are not."""
import json
import os
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, copy_to
from make_setup import NBS, NOTEBOOKS, SETTINGS, setup

pytestmark = pytest.mark.notebooks

ON_COLAB = [*(Requirement(r).name for r in SETTINGS['requirements'].split()), 'ipykernel', 'pip', 'setuptools']
NAMES = ['06_states', 'tutorials/01_forget_a_face']   # nbdev_test runs all others
TO_DOWNLOAD = {'tutorials/01_forget_a_face': 'hotfix_seed_103.zip'}
LOOK = '''import json, os, sys
import torch, unlearn_nb
print(json.dumps({'package': unlearn_nb.__file__, 'torch': [torch.__version__, torch.__file__],
                  'path': [os.path.realpath(p) for p in sys.path]}))'''


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
    "What all environments share: `packages`, links to what Colab has; `stub`, an empty `google.colab`; `home`; `repo`."
    place = tmp_path_factory.mktemp('colab')
    for folder in ('packages', 'stub/google/colab', 'home'): (place/folder).mkdir(parents=True)
    (place/'stub/google/colab/__init__.py').touch()
    for d in needed_by(ON_COLAB):
        for name in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not name.endswith('.pth') and not (place/'packages'/name).exists():
                (place/'packages'/name).symlink_to(d.locate_file(name))
    copy_to(place/'repo')
    def git(*args): subprocess.run(['git', *args], cwd=place/'repo', check=True, capture_output=True)
    who = ['-c', 'user.name=x', '-c', 'user.email=x@x.org']
    git('init', '-q', '-b', SETTINGS['branch']), git('add', '-A'), git(*who, 'commit', '-qm', 'as it is')
    if SETTINGS['colab_ref'] != SETTINGS['branch']: git('tag', SETTINGS['colab_ref'])
    return place


@pytest.fixture
def venv(machine, tmp_path):
    "A fresh environment that sees the machine's packages, but lies apart from them: pip can change none of them."
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv'], check=True)
    [site] = tmp_path.glob('venv/lib/python*/site-packages')
    (site/'colab.pth').write_text(f'{machine/"packages"}\n')
    argv = [str(tmp_path/'venv/bin/python'), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    (tmp_path/'kernels/python3').mkdir(parents=True)
    kernel = {'argv': argv, 'display_name': 'Colab', 'language': 'python'}
    (tmp_path/'kernels/python3/kernel.json').write_text(json.dumps(kernel))
    return tmp_path/'venv'


def run(notebook, machine, venv, folder, repository):
    "Run a notebook in a folder, in the environment, with that place behind the repository's address."
    env = {k: v for k, v in os.environ.items() if k.endswith('_NUM_THREADS')} | {
        'PATH': f'{venv/"bin"}:{os.defpath}', 'HOME': str(machine/'home'), 'PYTHONPATH': str(machine/'stub'),
        'LANG': 'C.UTF-8', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1',
        'PIP_NO_INDEX': '1', 'PIP_CONFIG_FILE': os.devnull, 'PIP_NO_BUILD_ISOLATION': '0',   # '0' is no isolation
        'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': f'url.{Path(repository).as_uri()}.insteadOf',
        'GIT_CONFIG_VALUE_0': SETTINGS['git_url']}
    specs = KernelSpecManager(kernel_dirs=[str(folder.parent/'kernels')])
    kernels = AsyncKernelManager(kernel_name='python3', kernel_spec_manager=specs)
    client = NotebookClient(notebook, km=kernels, timeout=1800, resources={'metadata': {'path': str(folder)}})
    client.execute(env=env, cleanup_kc=True)   # else a kernel whose manager is given goes on


@pytest.mark.parametrize('name', NAMES)
def test_notebook_as_colab_runs_it(name, machine, venv, tmp_path):
    "It installs the package and nothing else, leaves torch as it is, and runs to its end."
    (folder := tmp_path/'content').mkdir()
    notebook = nbformat.read(NBS/f'{name}.ipynb', 4)
    notebook.cells.append(nbformat.v4.new_code_cell(LOOK))
    run(notebook, machine, venv, folder, machine/'repo')
    seen = json.loads(notebook.cells[-1].outputs[0].text)
    [site] = venv.glob('lib/python*/site-packages')
    installed = ['colab.pth', 'unlearn_nb', f"unlearn_nb-{SETTINGS['version']}.dist-info"]
    assert sorted(p.name for p in site.iterdir()) == installed, 'pip installed more than the package'
    assert seen['package'] == str(site/'unlearn_nb/__init__.py')
    assert seen['torch'] == [version('torch'), str(machine/'packages/torch/__init__.py')]
    assert not [p for p in seen['path'] if Path(p).is_relative_to(ROOT)]
    if name in TO_DOWNLOAD:
        with ZipFile(folder/TO_DOWNLOAD[name]) as file:
            assert {'hotfix.safetensors', 'card.json'} <= set(file.namelist())


def test_an_installation_that_fails_says_what_to_do(machine, venv, tmp_path):
    "The repository cannot be reached, and no index has the package: one sentence, and no further cell runs."
    (folder := tmp_path/'content').mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in (setup(), 'after = 1')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError): run(notebook, machine, venv, folder, tmp_path/'nothing')
    [error] = [o for o in notebook.cells[0].outputs if o.output_type == 'error']
    assert error.ename == 'SystemExit' and error.evalue.startswith('unlearn_nb could not be installed: choose Runtime')
    assert notebook.cells[1].execution_count is None


def test_every_notebook_has_this_setup_cell():
    "What two of them show holds for all: their setup cells are one."
    found = {''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][2]['source']) for p in NOTEBOOKS}
    assert found == {setup()}
