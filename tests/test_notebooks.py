"The form of every notebook, rule by rule over all of them, and the notebooks' own checks (`nbdev_test`)."
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from make_setup import COLAB, NBS, NOTEBOOKS, badge, setup
from test_colab import NAMES as ON_COLAB

WIDEST = 120
MEASURED = r'\*\*Measured\*\* on 2 CPU cores: (\d+) s[,.]'


def source(cell): return ''.join(cell['source'])
def place(path): return path.relative_to(NBS).as_posix()
def is_lesson(path): return path.parent == NBS and re.match(r'\d\d_', path.name) is not None
def is_workshop(path): return path.parent.name == 'workshop'
def targets(text): return re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)


class Notebook:
    "One notebook as the rules see it."
    def __init__(self, path):
        self.path, nb = path, json.loads(path.read_text(encoding='utf-8'))
        self.cells, self.metadata = nb['cells'], nb['metadata']
        self.code = [c for c in self.cells if c['cell_type'] == 'code']
        self.text = [source(c) for c in self.cells if c['cell_type'] == 'markdown']
        self.outputs = [o for c in self.code for o in c['outputs']]

    def found(self, pattern): return [m for c in self.code for m in re.findall(pattern, source(c), re.M)]


# Every rule takes a Notebook and yields what is wrong with it.

def it_lies_in_its_place(nb):
    places = r'(index|method_on_one_page|(tutorials/)?\d\d_[a-z0-9_]+|workshop/[a-z_]+)\.ipynb'
    if not re.fullmatch(places, place(nb.path)): yield 'no such place or name'


def it_begins_as_all_do(nb):
    title, its_badge, its_setup = nb.cells[:3]
    if not re.fullmatch(r'# \S[^\n]*\n+> \S[^\n]*(\n+- pagetitle: [^\n]*)?', source(title).strip()):
        yield 'the first cell is `# Title` and `> description`, nothing else (but a title for the browser)'
    if source(its_badge).strip() != badge(nb.path): yield 'run: python tests/make_setup.py (badge)'
    if source(its_setup).strip() != setup() or its_setup['outputs']:
        yield 'run: python tests/make_setup.py (setup cell)'


def its_title_carries_its_number(nb):
    number = re.match(r'\d\d(?=_)', nb.path.name)
    title = source(nb.cells[0]).split('\n')[0]
    if number and not title.startswith(f'# {number[0]} '): yield f'its title is {title!r}; it begins with # {number[0]}'
    if is_lesson(nb.path) and title != f'# {number[0]} {nb.path.stem[3:].replace("_", " ").capitalize()}':
        yield f'{title!r} is not its module'
    if not number and re.match(r'# \d', title): yield f'its title {title!r} has a number, its file none'


def it_exports_its_own_module(nb):
    named, exports = nb.found(r'^#\|\s*default_exp\s+(\S+)'), nb.found(r'^#\|\s*(exports?)\b')
    if is_lesson(nb.path) or is_workshop(nb.path) and (named or exports):
        if named != [re.sub(r'^\d\d_', '', nb.path.stem)]: yield f'default_exp is {named}'
    elif named or exports: yield 'it tells a story and exports nothing'


def its_outputs_are_saved_and_good(nb):
    for o in nb.outputs:
        if o['output_type'] == 'error': yield f"a stored error: {o.get('ename')}"
        if o.get('name') == 'stderr' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {}):
            yield 'a stored warning or progress bar'
    if len(nb.code) > 1 and not nb.outputs: yield 'run it and save its outputs'
    if 'widgets' in nb.metadata: yield 'stored widgets, which GitHub cannot show'
    for c in nb.code:   # what prints or plots has something stored, or the notebook was not run as it is
        s = re.sub(r'^#\|.*\n?', '', source(c), flags=re.M).strip()
        shows = re.search(r'^(fig, |_, )?\w* ?= ?plt\.subplots\(|^print\(', s, re.M) and 'def ' not in s
        if not c['outputs'] and shows:
            yield f"run it: no output of {s.split(chr(10))[0]!r}"


def it_says_near_the_top_what_it_took(nb):
    if nb.path.stem == 'index': return
    took = re.findall(MEASURED, '\n'.join(source(c) for c in nb.cells[:6] if c['cell_type'] == 'markdown'))
    if len(took) != 1 or int(took[0]) < 1: yield 'run: python tests/run_notebooks.py ' + place(nb.path)


def it_is_small(nb):
    if nb.path.stat().st_size >= 2_000_000: yield 'it is over 2 MB'


def it_asks_colab_for_a_gpu(nb):
    m = nb.metadata
    found = m.get('accelerator'), m.get('colab', {}).get('gpuType'), m['kernelspec']['name']
    if found != ('GPU', 'T4', 'python3'):
        yield 'its metadata name another accelerator, GPU or kernel'


def it_runs_on_colab(nb):
    for c in nb.code[1:]:
        if re.search(r'^\s*[%!]?\s*pip install|subprocess.*\bpip\b', source(c), re.M):
            yield 'it installs outside the setup cell'
    yield from nb.found(r'\bshow_doc\b|\bnbdev_export\(|eval:\s*false|from nbdev\b|import nbdev\b|\bfastcore\b')


def its_code_is_short_and_narrow(nb):
    for c in nb.code:
        lines = source(c).strip().split('\n')
        if len(lines) > 40: yield f'a cell of {len(lines)} lines: {lines[0]}'
        wide = [l for l in lines if len(l) > WIDEST and not l.startswith('#|')]
        yield from (f'a line of {len(l)} characters: {l[:60]} ...' for l in wide)


def its_imports_stand_alone(nb):
    "nbdev runs cells with imports whole for the site, without the cells between them."
    for c in nb.code:
        s = source(c)
        exported = re.search(r'^#\|\s*(exports?|exporti|hide)\b', s, re.M)
        if 'view = studio(' in s: continue   # one cell opens the studio
        if exported or not re.search(r'^(from|import) ', s, re.M): continue
        rest = re.sub(r'^(from \S+ )?import (\([^)]*\)|[^\n]*(\\\n[^\n]*)*)$', '', s, flags=re.M)
        if re.sub(r'^#.*$', '', rest, flags=re.M).strip():
            yield f'give the imports a cell of their own: {s.split(chr(10))[0]}'


def its_figures_are_told_in_words(nb):
    for c in nb.code:
        pictured = any('image/png' in o.get('data', {}) for o in c['outputs'])
        if pictured and not re.search(r'^#\| fig-alt: ".{20}', source(c), re.M):
            yield f"a picture without fig-alt: {source(c).strip().split(chr(10))[-1][:60]}"


def its_links_and_images_are_there(nb):
    for target in (t for s in nb.text for t in targets(s)):
        if target.startswith(COLAB): there = (NBS/target.removeprefix(COLAB)).is_file()
        else: there = bool(re.match(r'[a-z]+:|#', target)) or (nb.path.parent/target.split('#')[0]).exists()
        foreign = 'colab.research.google.com/github/' in target.replace(COLAB, '')
        if not there or foreign: yield f'{target} leads nowhere'


def its_numbers_are_those_of_the_files(nb):
    link = r'\[(?:[Ll]essons? |[Tt]utorial )?(\d\d)\]\((?:\.\./|tutorials/)*(\d\d)_'
    for said, file in re.findall(link, '\n'.join(nb.text)):
        if said != file: yield f'a link says {said} and leads to {file}'


def it_names_no_old_word(nb):
    for s in nb.text + [source(c) for c in nb.code]:
        yield from (f'{m!r} has another name now' for m in re.findall(OLD, s))


OLD = (r'\b(?:whiten|own_share|way_share|own_states|form_of|at_once|free_text)\b'
       r'|\broom `|\b(?:this|a|each|every) room\b')
RULES = [f for f in list(globals().values()) if getattr(f, '__code__', None) and f.__code__.co_varnames[:1] == ('nb',)]


@pytest.fixture(scope='module')
def notebooks(): return [Notebook(p) for p in NOTEBOOKS]


@pytest.mark.parametrize('rule', RULES, ids=lambda f: f.__name__)
def test_form(rule, notebooks):
    wrong = [f'{place(nb.path)}: {what}' for nb in notebooks for what in rule(nb)]
    assert not wrong, '\n'.join(wrong)


def test_page_names_differ():
    pages = [re.sub(r'\d\d_', '', place(p)) for p in NOTEBOOKS]   # the site drops the numbers
    assert len(set(pages)) == len(pages), pages


def test_numbers_have_no_gaps():
    for folder in (NBS, NBS/'tutorials'):
        numbers = [int(p.name[:2]) for p in NOTEBOOKS if p.parent == folder and re.match(r'\d\d_', p.name)]
        first = 0 if folder == NBS else 1
        assert numbers == list(range(first, first + len(numbers)))


def test_next_leads_to_the_next():
    "A lesson's last link under Next is the lesson with the next number; the last one leads to a tutorial."
    lessons = [p for p in NOTEBOOKS if is_lesson(p)]
    wrong = []
    for path, after in zip(lessons, lessons[1:]):
        last = Notebook(path).text[-1]
        found = re.search(r'\*\*Next\W*\*\*.*?\]\(([^)#]+)', last, re.S)
        if not found or found[1] != after.name: wrong.append(f'{path.name}: {found and found[1]}, not {after.name}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.notebooks
def test_nbdev_test(copy):
    "All notebooks run from top to bottom, two at a time, and their asserts hold; two run as on Colab instead."
    there = '|'.join(Path(name).name for name in ON_COLAB)
    command = [Path(sys.executable).parent/'nbdev_test', '--n_workers', '2', '--timing', '--do_print',
               '--skip_file_re', rf'^([_.]|({there})\.ipynb$)']
    env = {**os.environ, 'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 2)//2))}
    run = subprocess.Popen(command, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True)
    try: out, _ = run.communicate(timeout=4500)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail('nbdev_test ran for more than 75 minutes:\n' + run.communicate()[0])
    assert run.returncode == 0, out
