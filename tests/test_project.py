"The rules of the house: generated files are current, imports go down only, versions and lists agree."
import ast
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, source_files
from make_readme import film, picture, readme

PACKAGE, NBS = ROOT/'unlearn_nb', ROOT/'nbs'
FLOORS = [  # imports go from a later line to an earlier one, and never sideways
    ['faces', 'flags', 'figures'],
    ['denoiser', 'weights', 'surgery'],
    ['zoo', 'surrogates', 'retain', 'hotfix', 'metrics', 'train'],
    ['unlearn', 'audit', 'train_text'],
    ['report', 'bench'],
    ['baselines', 'erasers'],
    ['cli', 'studio'],
]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(p.stem for p in PACKAGE.glob('*.py') if p.stem not in ('__init__', '__main__', '_modidx'))
DEV_ONLY = 'nbdev fastcore execnb ghapi fastgit'.split()
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
RUNTIME, DEV = ([Requirement(r) for r in SETTINGS[key].split()] for key in ('requirements', 'dev_requirements'))


def notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
def room_tree(room): return ast.parse((PACKAGE/f'{room}.py').read_text(encoding='utf-8'))


def imports(tree):
    "Every imported module as a dotted name; a relative import as one of unlearn_nb."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = '.'.join(filter(None, ['unlearn_nb' if node.level else '', node.module]))
            yield from (f'{module}.{a.name}' for a in node.names)


def notebook_tree(path):
    "The notebook's code cells as one syntax tree, magics left out."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code' and not ''.join(c['source']).startswith('%%'))
    return ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', code, flags=re.M))


# --- what is generated is current ---

@pytest.mark.parametrize('command', ['nbdev_clean', 'nbdev_export'])
def test_nbdev_command_leaves_no_diff(command, copy):
    files = lambda: {p.relative_to(copy): p.read_bytes() for p in copy.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    before = files()
    run = subprocess.run([Path(sys.executable).parent/command], cwd=copy, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    after = files()
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f'run {command}; it changes {changed}'


@pytest.mark.parametrize('room', ROOMS)
def test_room_comes_from_a_notebook_that_exists(room):
    made_from = re.search(r'File to edit: (\S+?)\.?$', (PACKAGE/f'{room}.py').read_text(encoding='utf-8'), re.M)
    assert made_from and (PACKAGE/made_from[1]).is_file(), f'unlearn_nb/{room}.py comes from no notebook: delete it, or write the notebook'


def test_readme_is_made_from_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run: python tests/make_readme.py'


def test_the_pictures_of_the_readme_are_those_of_the_first_tutorial():
    assert (NBS/'images/before_after.png').read_bytes() == picture() and (NBS/'images/path.gif').read_bytes() == film(), 'run: python tests/make_readme.py'


def test_readme_has_the_two_commands():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for command in ('pip install -c constraints.txt . && unlearn_nb demo', "pip install -c constraints.txt -e '.[dev]' && pytest"):
        assert f'\n{command}\n' in text


def test_readme_links_exist():
    links = re.findall(r'\]\(([^)#\s]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert not [l for l in links if '://' not in l and not (ROOT/l).exists()]


def test_sidebar_lists_the_notebooks_that_exist():
    "Start, the lessons and the tutorials in number order, and what is made for reference."
    sidebar = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = {section['section']: section['contents'] for section in sidebar}
    there = sorted(p.relative_to(NBS).as_posix() for p in notebooks())
    assert list(listed) == ['Start', 'Lessons', 'Tutorials', 'Reference']
    assert listed['Start'] == ['index.ipynb', 'method_on_one_page.ipynb']
    assert listed['Lessons'] == [p for p in there if re.match(r'\d\d_', p)] and listed['Tutorials'] == [p for p in there if '/' in p]
    assert not set(there) - {p for pages in listed.values() for p in pages}
    assert listed['Reference'] == ['reference.md', 'models/faces.md', 'models/flags.md']


def test_quarto_include_is_one_line():
    assert (NBS/'_quarto.yml').read_text(encoding='utf-8').split('\n', 1) == ['metadata-files: [../_quarto.yml, nbdev.yml]', '']


# --- the package ---

def test_pyflakes_is_silent():
    run = subprocess.run([sys.executable, '-m', 'pyflakes', PACKAGE], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stdout and not run.stderr, run.stdout + run.stderr


@pytest.fixture(scope='session')
def lone_imports():
    "Each module's import in an interpreter of its own, two at a time, with the tools that only developers have made unimportable."
    hidden = DEV_ONLY + 'torchjd torchmetrics skimage hypothesis pytest'.split()
    def run(module):
        code = f'import sys; sys.modules.update(dict.fromkeys({hidden!r})); import {module}'
        return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    with ThreadPoolExecutor(2) as pool:
        yield {m: pool.submit(run, m) for m in ['unlearn_nb', *(f'unlearn_nb.{r}' for r in ROOMS)]}


@pytest.mark.parametrize('module', ['unlearn_nb', *(f'unlearn_nb.{r}' for r in ROOMS)])
def test_module_imports_alone(module, lone_imports):
    run = lone_imports[module].result()
    assert run.returncode == 0, run.stderr
    assert not run.stdout, f'importing {module} prints: {run.stdout}'


@pytest.mark.parametrize('room', ROOMS)
def test_imports_go_down(room):
    assert room in FLOOR, f'{room} has no floor: add it to the table of rooms'
    used = {name.split('.')[1] for name in imports(room_tree(room)) if name.startswith('unlearn_nb.')} & (FLOOR.keys() | set(ROOMS))
    wrong = {r: FLOOR.get(r) for r in used if FLOOR.get(r, 99) >= FLOOR[room]}
    assert not wrong, f'{room} is on floor {FLOOR[room]} and imports {wrong}'


@pytest.mark.parametrize('room', ROOMS)
def test_public_names_are_few(room):
    names = [ast.literal_eval(n.value) for n in room_tree(room).body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__']
    assert len(names) == 1 and len(names[0]) <= 16, names


@pytest.mark.parametrize('room', ROOMS)
def test_package_needs_no_nbdev(room):
    assert not [n for n in imports(room_tree(room)) if n.split('.')[0] in DEV_ONLY]


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)
def test_notebook_needs_no_nbdev(path):
    assert not [n for n in imports(notebook_tree(path)) if n.split('.')[0] in DEV_ONLY]


def test_assets_are_small_and_shipped():
    assets = [p for p in (PACKAGE/'assets').rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in assets) <= 10e6
    assert not [p.name for p in assets if p.suffix not in ('.safetensors', '.json')], 'setup.py ships .safetensors and .json'


# --- versions ---

def test_version_is_one():
    assert f'__version__ = "{SETTINGS["version"]}"' in (PACKAGE/'__init__.py').read_text(encoding='utf-8')


def test_requirements_are_lower_bounds():
    assert all([s.operator for s in r.specifier] == ['>='] for r in RUNTIME)
    assert not [r.name for r in RUNTIME if r.name in DEV_ONLY]


def test_constraints_satisfy_settings():
    lines = [l for l in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if l and not l.startswith('#')]
    pins = [Requirement(l) for l in lines]
    assert not [str(p) for p in pins if p.url or p.extras or not re.fullmatch(r'==[\w.]+', str(p.specifier))], 'one name==version a line'
    version = {canonicalize_name(p.name): str(p.specifier)[2:] for p in pins}
    assert len(version) == len(lines)
    for r in RUNTIME + DEV:
        assert canonicalize_name(r.name) in version, f'constraints.txt has no line for {r.name}'
        assert r.specifier.contains(version[canonicalize_name(r.name)], prereleases=True), f'constraints.txt does not satisfy {r}'


# --- nothing of the writer's machine ---

def test_no_file_names_a_machine_path():
    path = re.compile(r'(?<![\w.])/' + r'(?:work/|root\b|tmp/author|tmp/ipykernel|home/\w+/)')
    found = []
    for file in source_files():
        try: text = (ROOT/file).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{file}: {text[max(m.start() - 20, 0):m.end() + 20]!r}' for m in path.finditer(text)]
    assert not found, found
