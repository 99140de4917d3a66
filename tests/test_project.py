"The rules of the house: generated files are current, imports go down only, versions and lists agree."
import ast
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, source_files
from make_readme import film, hero, readme
from make_setup import NBS, NOTEBOOKS, SETTINGS

PACKAGE = ROOT/'unlearn_nb'
LESSONS = {p.stem[3:]: p for p in NOTEBOOKS if p.parent == NBS and re.match(r'\d\d_', p.name)}   # in reading order
WORKSHOP = {p.stem: p for p in NOTEBOOKS if p.parent.name == 'workshop' and '#| default_exp' in p.read_text('utf-8')}
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if p.stem not in ('__init__', '__main__', '_modidx'))
DEV_ONLY = 'nbdev fastcore execnb ghapi fastgit'.split()
RUNTIME, DEV = ([Requirement(r) for r in SETTINGS[key].split()] for key in ('requirements', 'dev_requirements'))


def tree_of(module): return ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))


def imports(tree):
    "Every imported module as a dotted name; a relative import as one of unlearn_nb."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = '.'.join(filter(None, ['unlearn_nb' if node.level else '', node.module]))
            yield from (f'{module}.{a.name}' for a in node.names)


def used(tree):
    "The modules of this package that a tree imports."
    return {name.split('.')[1] for name in imports(tree) if name.startswith('unlearn_nb.')} & set(MODULES)


def notebook_tree(path):
    "The notebook's code cells as one syntax tree, magics left out."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    code = '\n'.join(s for s in sources if not s.startswith('%%'))
    return ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', code, flags=re.M))


# --- what is generated is current ---

@pytest.mark.parametrize('command', ['nbdev_clean', 'nbdev_export'])
def test_nbdev_command_leaves_no_diff(command, copy):
    def files():
        found = [p for p in copy.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
        return {p.relative_to(copy): p.read_bytes() for p in found}
    before = files()
    run = subprocess.run([Path(sys.executable).parent/command], cwd=copy, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    after = files()
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f'run {command}; it changes {changed}'


def test_every_module_comes_from_its_notebook():
    for module in MODULES:
        made_from = re.search(r'File to edit: (\S+?)\.?$', (PACKAGE/f'{module}.py').read_text(encoding='utf-8'), re.M)
        assert made_from and (PACKAGE/made_from[1]).is_file(), f'unlearn_nb/{module}.py comes from no notebook'
    assert MODULES == sorted([*LESSONS, *WORKSHOP])


def test_readme_is_made_from_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run: python tests/make_readme.py'


def test_the_pictures_of_the_readme_are_what_notebooks_show():
    now = {name: (NBS/'images'/name).read_bytes() for name in ('hero.png', 'path.gif')}
    assert now == {'hero.png': hero(), 'path.gif': film()}, 'run: python tests/make_readme.py'


def test_readme_has_the_two_commands():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    commands = ['git clone https://github.com/unlearn-nb/unlearn_nb && cd unlearn_nb',
                'pip install -c constraints.txt . && unlearn_nb demo',
                "pip install -c constraints.txt -e '.[dev]' && pytest"]
    assert [c for c in commands if f'\n{c}\n' in text] == commands


def test_readme_links_exist():
    links = re.findall(r'\]\(([^)#\s]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert not [l for l in links if '://' not in l and not (ROOT/l).exists()]


def first_line(path):
    return ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source']).split('\n')[0]


def entries(contents):
    "(page, text) of a part of the sidebar."
    return [(e, None) if isinstance(e, str) else (e['href'], e['text']) for e in contents]


def test_sidebar_index_and_titles_agree():
    "The same pages in the same order under the same names: in the sidebar, in the tables of the index, on the pages."
    place = {p.relative_to(NBS).as_posix(): p for p in NOTEBOOKS}
    def title(page): return first_line(place[page]).removeprefix('# ')
    sidebar = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = {section['section']: entries(section['contents']) for section in sidebar}
    assert list(listed) == ['Start', 'Lessons', 'Tutorials', 'Workshop', 'Reference']
    pages = {name: [page for page, _ in part] for name, part in listed.items()}
    assert pages['Start'] == ['index.ipynb', 'method_on_one_page.ipynb']
    assert pages['Lessons'] == [p for p in place if re.match(r'\d\d_', p)]
    assert pages['Tutorials'] == [p for p in place if p.startswith('tutorials/')]
    assert sorted(pages['Workshop']) == [p for p in place if p.startswith('workshop/')]
    assert pages['Reference'] == ['reference.md', 'models/faces.md', 'models/flags.md']
    named = [(page, text) for part in list(listed.values())[:-1] for page, text in part if text]
    assert not [(page, text, title(page)) for page, text in named if text != title(page)]
    cells = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']
    index = '\n'.join(''.join(c['source']) for c in cells)
    rows = re.findall(r'^\| \[([^\]]+)\]\(([^)]+)\)', index, re.M)
    assert [page for _, page in rows[:-len(pages['Workshop'])]] == [
        'method_on_one_page.ipynb', *pages['Lessons'], *pages['Tutorials']]
    assert sorted(page for _, page in rows[-len(pages['Workshop']):]) == sorted(pages['Workshop'])
    assert not [(page, text, title(page)) for text, page in rows if text != title(page)]


def test_quarto_include_is_one_line():
    text = (NBS/'_quarto.yml').read_text(encoding='utf-8')
    assert text == 'metadata-files: [../_quarto.yml, nbdev.yml]\n'


# --- the package ---

def test_pyflakes_is_silent():
    run = subprocess.run([sys.executable, '-m', 'pyflakes', PACKAGE], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stdout and not run.stderr, run.stdout + run.stderr


@pytest.fixture(scope='session')
def lone_imports():
    "Each module's import in an interpreter of its own, two at a time, without the tools that only developers have."
    hidden = DEV_ONLY + 'torchjd torchmetrics skimage hypothesis pytest'.split()
    def run(module):
        code = f'import sys; sys.modules.update(dict.fromkeys({hidden!r})); import {module}'
        return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    with ThreadPoolExecutor(2) as pool:
        yield {m: pool.submit(run, m) for m in ['unlearn_nb', *(f'unlearn_nb.{m}' for m in MODULES)]}


@pytest.mark.slow
def test_every_module_imports_alone(lone_imports):
    for module, future in lone_imports.items():
        run = future.result()
        assert run.returncode == 0 and not run.stdout, f'{module}: {run.stdout}{run.stderr}'


def needs(module, seen=()):
    "All modules that a module imports, and those that these import."
    assert module not in seen, f'{module} imports itself by way of {seen}'
    direct = used(tree_of(module)) - {module}
    return direct.union(*(needs(m, (*seen, module)) for m in direct)) if direct else direct


def test_number_order_is_import_order_is_reading_order():
    """A lesson uses what earlier lessons taught: its module by all that it needs, its shown cells by what they import.

    Modules of the workshop are tools. Cells may call any; a module may need one that stands on earlier lessons."""
    number = {name: n for n, name in enumerate(LESSONS)}
    wrong = []
    for lesson, path in LESSONS.items():
        later = {m for m in needs(lesson) | used(notebook_tree(path)) if number.get(m, -1) > number[lesson]}
        if later: wrong.append(f'{path.name} uses {sorted(later)}')
    assert not wrong, '\n'.join(wrong)


def test_no_private_name_crosses_a_border():
    "What one module takes from another is public there, or at least has no underscore; what is public is little."
    for module in MODULES:
        tree = tree_of(module)
        ours = [n for n in imports(tree) if n.startswith('unlearn_nb.')]
        taken = [n for n in ours if n.split('.')[-1].startswith('_') and '__' not in n]
        assert not taken, f'{module} imports {taken}'
        assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
        names = [ast.literal_eval(n.value) for n in assigned if getattr(n.targets[0], 'id', '') == '__all__']
        assert len(names) == 1 and len(names[0]) <= 16, f'{module}: {names}'


def test_package_and_notebooks_need_no_nbdev():
    trees = {module: tree_of(module) for module in MODULES} | {p.name: notebook_tree(p) for p in NOTEBOOKS}
    assert not {name for name, tree in trees.items() if any(n.split('.')[0] in DEV_ONLY for n in imports(tree))}


def test_lines_are_narrow():
    "At most 120 characters in modules and tests (the notebooks have a rule of their own)."
    files = [*(PACKAGE/f'{m}.py' for m in MODULES), *(ROOT/'tests').glob('*.py')]
    lines = [(f'{f.name}:{n}', l) for f in files for n, l in enumerate(f.read_text(encoding='utf-8').split('\n'), 1)]
    made = ('#|', '__all__ = ')   # words for figures, which stay on one line; and what nbdev writes
    wide = [where for where, l in lines if len(l) > 120 and not l.startswith(made)]
    assert not wide, wide


def test_assets_are_small_and_shipped():
    assets = [p for p in (PACKAGE/'assets').rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in assets) <= 15e6
    assert not [p.name for p in assets if p.suffix not in ('.safetensors', '.json')], 'setup.py ships these two only'


# --- versions ---

def test_version_is_one():
    assert f'__version__ = "{SETTINGS["version"]}"' in (PACKAGE/'__init__.py').read_text(encoding='utf-8')


def test_requirements_are_lower_bounds():
    assert all([s.operator for s in r.specifier] == ['>='] for r in RUNTIME)
    assert not [r.name for r in RUNTIME if r.name in DEV_ONLY]


def test_constraints_satisfy_settings():
    text = (ROOT/'constraints.txt').read_text(encoding='utf-8')
    lines = [l for l in text.splitlines() if l and not l.startswith('#')]
    pins = [Requirement(l) for l in lines]
    def odd(p): return p.url or p.extras or not re.fullmatch(r'==[\w.]+', str(p.specifier))
    assert not [str(p) for p in pins if odd(p)], 'one name==version a line'
    version = {canonicalize_name(p.name): str(p.specifier)[2:] for p in pins}
    assert len(version) == len(lines)
    for r in RUNTIME + DEV:
        assert canonicalize_name(r.name) in version, f'constraints.txt has no line for {r.name}'
        pinned = version[canonicalize_name(r.name)]
        assert r.specifier.contains(pinned, prereleases=True), f'constraints.txt does not satisfy {r}'


# --- nothing of the writer's machine ---

def test_no_file_names_a_machine_path():
    path = re.compile(r'(?<![\w.])/' + r'(?:work/|root\b|tmp/author|tmp/ipykernel|home/\w+/)')
    found = []
    for file in source_files():
        try: text = (ROOT/file).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{file}: {text[max(m.start() - 20, 0):m.end() + 20]!r}' for m in path.finditer(text)]
    assert not found, found


# --- the project's texts ---

def test_citation_names_this_version_and_the_paper():
    cite = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    told = cite['cff-version'], cite['version'], cite['repository-code']
    assert told == ('1.2.0', SETTINGS['version'], SETTINGS['git_url'])
    [paper] = cite['references']
    assert paper['url'] == 'https://arxiv.org/abs/2603.10445'
    assert [i['value'] for i in paper['identifiers']] == ['arXiv:2603.10445']
    told = re.search(r'\*(.+)\* by ([\w, ]+)\n\(\[arXiv ([\d.]+)\]\((\S+?)\)\)', text).groups()   # the README's paper
    *first, last = [a['family-names'] for a in paper['authors']]
    assert told == (paper['title'], f"{', '.join(first)} and {last}", '2603.10445', paper['url'])


def test_changelog_has_this_version():
    versions = re.findall(r'^## \[?([\w.]+)\]?', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert SETTINGS['version'] in versions[:2]


def test_contributing_names_what_exists():
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    named = set(re.findall(r'(?:tests|nbs|unlearn_nb|\.github|\.ci)/[\w./]+\w', text)) - {'tests/test_MODULE.py'}
    assert named and not [name for name in named if not (ROOT/name).exists()]
    tests = {f'tests/{p.name}' for p in (ROOT/'tests').glob('*.py')} - {f'tests/test_{module}.py' for module in MODULES}
    assert not tests - named, 'say what each file of tests/ is for'


