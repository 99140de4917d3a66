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

settings.register_profile('patient', deadline=None, print_blob=True)  # a busy machine is no failure
if 'CI' not in os.environ: settings.load_profile('patient')


def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the tests marked slow too: some minutes')


def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow')


def pytest_collection_modifyitems(config, items):
    slow = [] if config.getoption('--slow') else [item for item in items if item.get_closest_marker('slow')]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = {'.git', '.venv', 'venv', 'build', 'dist', '_proc', '_docs', '__pycache__', '.pytest_cache', '.hypothesis', '.ipynb_checkpoints'}


def source_files():
    "Every file of the checkout that git has or would add, relative to the root; without git, all but the usual left-overs."
    git = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: found = [Path(p) for p in git.stdout.split('\0') if p]
    else: found = [p.relative_to(ROOT) for p in ROOT.rglob('*')]
    return sorted({p for p in found if (ROOT/p).is_file() and not any(s in NOT_SOURCE or s.endswith('.egg-info') for s in p.parts)})


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
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-index', '--no-deps', '--no-build-isolation', '--use-pep517', '-w', place/'dist', copy_to(place/'copy')]
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
    "Chromium, for pages and widgets as readers see them. It ends with the module: while it is open, no other loop can run."
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('no browser: apt-get install chromium')
    flags = '--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
