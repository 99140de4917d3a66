"What all tests share. Tests need no network and no screen."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# The same examples in every run, so that a failure is one of the code; a busy machine is no failure.
settings.register_profile('same', deadline=None, print_blob=True, derandomize=True)
settings.load_profile('same')

MARKERS = {  # what only `pytest --all` runs
    'slow': 'takes more than about three seconds',
    'notebooks': 'runs whole notebooks: all of them by nbdev_test, and some as Colab would',
    'site': 'builds the pages of the site',
    'browser': 'needs Chromium: pages and widgets as readers see them',
}


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run all tests, those of the markers, too')


def pytest_configure(config):
    for name, what in MARKERS.items():
        config.addinivalue_line('markers', f'{name}: {what}; runs with --all, or by -m {name}')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--all') or config.getoption('-m'): return
    later = [item for item in items if any(item.get_closest_marker(name) for name in MARKERS)]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = {'.git', '.venv', 'venv', 'build', 'dist', '_proc', '_docs', '__pycache__', '.pytest_cache', '.hypothesis',
              '.ipynb_checkpoints'}


def source_files():
    "Every file of the checkout that git has or would add, relative to the root; without git, all but left-overs."
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: found = [Path(p) for p in git.stdout.split('\0') if p]
    else: found = [p.relative_to(ROOT) for p in ROOT.rglob('*')]
    def left_over(part): return part in NOT_SOURCE or part.endswith('.egg-info')
    return sorted({p for p in found if (ROOT/p).is_file() and not any(map(left_over, p.parts))})


def copy_to(folder):
    "The checkout's source files, copied into `folder`."
    for path in source_files():
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/path, folder/path)
    return folder


@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout's source files, so that no test changes the checkout."
    return copy_to(tmp_path/'copy')


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The wheel, alone in its folder, built from a copy of the checkout."
    place = tmp_path_factory.mktemp('wheel')
    how = '--no-index --no-deps --no-build-isolation --use-pep517'.split()
    command = [sys.executable, '-m', 'pip', 'wheel', *how, '-w', place/'dist', copy_to(place/'copy')]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    [built] = (place/'dist').iterdir()
    return built


@pytest.fixture
def one_thread():
    "Sums in one order only: what is compared bit for bit is computed on one thread, here and in subprocesses."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def browser():
    "Chromium, for pages and widgets as readers see them. It ends with the module: meanwhile no other loop can run."
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('no browser: apt-get install chromium')
    flags = ('--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run '
             '--disable-background-networking --disable-component-update --disable-sync').split()
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
