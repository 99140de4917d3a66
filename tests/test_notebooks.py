"The form of every notebook, and the notebooks' own checks (`nbdev_test`)."
import json
import os
import re
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from conftest import ROOT

NBS = ROOT/'nbs'
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
REPO, BRANCH = f"{SETTINGS['user']}/{SETTINGS['repo']}", SETTINGS['branch']
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'
COLAB = f"https://colab.research.google.com/github/{REPO}/blob/{BRANCH}/{SETTINGS['nbs_path']}/"
SETUP = '''#| hide
try:
    import google.colab  # on Colab, and only there, install the package; torch is already present and stays as it is
    %pip install -q unlearn_nb
except ImportError:
    pass'''

PATHS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
every_notebook = pytest.mark.parametrize('path', PATHS, ids=lambda p: p.relative_to(NBS).with_suffix('').as_posix())


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def cells(path, kind): return [c for c in read(path)['cells'] if c['cell_type'] == kind]
def sources(path, kind): return [source(c) for c in cells(path, kind)]
def is_lesson(path): return path.parent == NBS and re.match(r'\d\d_', path.name) is not None
def targets(text): return re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)


@every_notebook
def test_place_and_name(path):
    place = path.relative_to(NBS).as_posix()
    assert re.fullmatch(r'(index|method_on_one_page)\.ipynb|(tutorials/)?\d\d_[a-z0-9_]+\.ipynb', place), place


def test_page_names_differ():
    pages = [re.sub(r'^\d\d_', '', p.stem) for p in PATHS]  # the site drops the numbers
    assert len(set(pages)) == len(pages), pages


@every_notebook
def test_first_three_cells(path):
    title, badge, setup = read(path)['cells'][:3]
    assert [c['cell_type'] for c in (title, badge, setup)] == ['markdown', 'markdown', 'code']
    assert re.fullmatch(r'# \S[^\n]*\n+> \S[^\n]*', source(title).strip()), 'the first cell is `# Title` and `> description`, nothing else'
    assert source(badge).strip() == f'[![Open In Colab]({BADGE})]({COLAB}{path.relative_to(NBS).as_posix()})'
    assert source(setup).strip() == SETUP and not setup['outputs']


@every_notebook
def test_installs_in_the_setup_cell_only(path):
    assert not [s for s in sources(path, 'code')[1:] if re.search(r'^\s*[%!]?\s*pip install|subprocess.*\bpip\b', s, re.M)]


@every_notebook
def test_default_exp(path):
    named = [m for s in sources(path, 'code') for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', s, re.M)]
    assert named == ([path.stem[3:]] if is_lesson(path) else [])
    if not is_lesson(path): assert not [s for s in sources(path, 'code') if re.search(r'^#\|\s*exports?\b', s, re.M)]


@every_notebook
def test_outputs_are_saved_and_good(path):
    code = cells(path, 'code')
    outputs = [o for c in code for o in c['outputs']]
    assert not [o for o in outputs if o['output_type'] == 'error'], 'a stored error'
    assert not [o for o in outputs if o.get('name') == 'stderr' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {})], 'stored warnings or progress'
    assert len(code) == 1 or outputs, 'run the notebook and save its outputs'
    assert 'widgets' not in read(path)['metadata'], 'stored widgets, which GitHub cannot show'

@every_notebook
def test_every_code_cell_that_shows_something_has_its_output(path):
    "A cell that prints, plots or ends in an expression has something stored, or the notebook was not run as it is."
    silent = []
    for c in cells(path, 'code'):
        s = source(c).strip()
        if s.startswith('#|') or c['outputs']: continue
        if re.search(r'\bplt\.subplots\(|^print\(', s, re.M): silent.append(s.split('\n', 1)[0])
    assert not silent, f'run the notebook: {silent}'


@every_notebook
def test_what_it_took_is_near_the_top(path):
    if path.stem == 'index': return
    top = '\n'.join(source(c) for c in read(path)['cells'][:6] if c['cell_type'] == 'markdown')
    took = re.findall(r'\*\*Measured\*\* on 2 CPU cores: (\d+) s[,.]', top)
    assert len(took) == 1 and int(took[0]) > 0, 'run: python tests/run_notebooks.py ' + path.name


@every_notebook
def test_file_is_small(path): assert path.stat().st_size < 2_000_000


@every_notebook
def test_metadata_asks_colab_for_a_gpu(path):
    metadata = read(path)['metadata']
    assert metadata.get('accelerator') == 'GPU' and metadata.get('colab', {}).get('gpuType') == 'T4'
    assert metadata.get('kernelspec', {}).get('name') == 'python3'


@every_notebook
def test_nothing_that_fails_on_colab(path):
    code = '\n'.join(sources(path, 'code'))
    assert not re.search(r'\bshow_doc\b|\bnbdev_export\(|eval:\s*false', code)


@every_notebook
def test_code_cells_are_short(path):
    long = [s.split('\n', 1)[0] for s in sources(path, 'code') if len(s.strip().split('\n')) > 40]
    assert not long, f'cells of more than 40 lines: {long}'


@every_notebook
def test_images_are_in_the_repository(path):
    for cell in cells(path, 'markdown'):
        images = re.findall(r'!\[[^\]]*\]\(([^)\s]+)', source(cell)) + re.findall(r'<img[^>]*\bsrc="([^"]+)"', source(cell))
        for image in images:
            if image.startswith('attachment:'): assert image[11:] in cell.get('attachments', {}), image
            else: assert image == BADGE or (path.parent/image).is_file(), f'{image}: an attachment, an output or a file of the repository'


@every_notebook
def test_links_lead_somewhere(path):
    for target in (t for s in sources(path, 'markdown') for t in targets(s)):
        if target.startswith(COLAB): assert (NBS/target.removeprefix(COLAB)).is_file(), target
        elif not re.match(r'[a-z]+:|#', target): assert (path.parent/target.split('#')[0]).exists(), target
        assert target == target.strip() and 'colab.research.google.com/github/' not in target.replace(COLAB, ''), f'{target}: a badge of another repository'


def test_nbdev_test(copy):
    "All notebooks run from top to bottom, two at a time, and their asserts hold."
    command = [Path(sys.executable).parent/'nbdev_test', '--n_workers', '2', '--timing', '--do_print']
    env = {**os.environ, 'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 2)//2))}
    run = subprocess.Popen(command, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = run.communicate(timeout=3300)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail('nbdev_test ran for more than 55 minutes:\n' + run.communicate()[0])
    assert run.returncode == 0, out
