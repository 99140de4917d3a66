"The site: its pages as nbdev makes them, every link and picture of them, and how they look in a browser. Quarto is not needed: a stand-in is on PATH."
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter
from PIL import Image

from check_site import SITE, broken
from conftest import ROOT, copy_to
from make_site import ASSETS, MADE, card, parameters, public, sha256
from mend_pages import mend_pages
from test_project import NBS, ROOMS, SETTINGS

QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
LESSONS = sorted(NBS.glob('[0-9][0-9]_*.ipynb'))


# --- pages, as Quarto would make them ---

def heading_id(text, taken):
    "The id that pandoc gives a heading, and so the site."
    found = re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text.lower()).strip())) or 'section'
    n = taken[found] = taken.get(found, -1) + 1
    return f'{found}-{n}' if n else found


def as_quarto_shows(cell):
    "A code cell without its directives; documentation as the markdown that it is, without attributes of links."
    if cell.source.startswith('#| echo: false'):
        return nbformat.v4.new_markdown_cell(re.sub(r'\{target=[^}]*\}', '', '\n\n'.join(o['data']['text/markdown'] for o in cell.outputs)))
    return nbformat.v4.new_code_cell(re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M), outputs=cell.outputs)


def read_page(path):
    "(front matter, notebook) of a page made by nbdev, or of a markdown page."
    if path.suffix == '.md': text, cells = path.read_text(encoding='utf-8'), []
    else: text, *cells = nbformat.read(path, 4).cells
    matter, rest = re.fullmatch(r'---\n(.*?)\n---\n(.*)', text if path.suffix == '.md' else text.source + '\n', re.S).groups()
    matter = yaml.safe_load(matter)
    top = nbformat.v4.new_markdown_cell(f"# {matter['title']}\n\n{matter.get('description', '')}\n\n{rest}")
    cells = [as_quarto_shows(c) if c.cell_type == 'code' else nbformat.v4.new_markdown_cell(c.source) for c in cells if c.source or c.get('outputs')]
    return matter, nbformat.v4.new_notebook(cells=[top, *cells], metadata={'title': matter['title']})


def render(processed, out):
    "One HTML page for each page of the folder that nbdev made, with the ids and links that Quarto gives them."
    shutil.copytree(processed, out, ignore=shutil.ignore_patterns('*.ipynb', '*.md', '*.yml'))
    pages = {p: read_page(p) for p in sorted(processed.rglob('*')) if p.suffix in ('.ipynb', '.md')}
    names = {p: p.with_name(matter.get('output-file', p.stem + '.html')).relative_to(processed) for p, (matter, _) in pages.items()}
    exporter, website = HTMLExporter(exclude_anchor_links=True, exclude_input_prompt=True, exclude_output_prompt=True), QUARTO['website']
    for path, (matter, notebook) in pages.items():
        taken, up = {}, '../'*(len(names[path].parts) - 1)
        html, _ = exporter.from_notebook_node(notebook)
        html = re.sub(r'<h([1-6])(?: id="[^"]*")?>(.*?)</h\1>', lambda m: f'<h{m[1]} id="{heading_id(re.sub("<[^>]*>", "", m[2]), taken)}">{m[2]}</h{m[1]}>', html, flags=re.S)
        def to_page(m):
            target = (path.parent/m[1]).resolve()
            return f'href="{os.path.relpath(processed/names[target], (processed/names[path]).parent)}{m[2]}"' if target in names else m[0]
        html = re.sub(r'href="([^":#]+\.(?:ipynb|md))(#[^"]*)?"', lambda m: to_page({1: m[1], 2: m[2] or '', 0: m[0]}), html)
        head = f'<link rel="stylesheet" href="{up}styles.css"><link rel="icon" href="{up}{website["favicon"]}"><meta property="og:image" content="{website["open-graph"]["image"]}">'
        (out/names[path]).parent.mkdir(parents=True, exist_ok=True)
        (out/names[path]).write_text(html.replace('</head>', head + '</head>', 1), encoding='utf-8')
    return out


@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    "The folder of pages that nbdev hands to Quarto. Cells with imports and exported cells run, once for all tests here."
    place = tmp_path_factory.mktemp('site')
    checkout = copy_to(place/'copy')
    (place/'bin').mkdir()
    (place/'bin'/'quarto').write_text('#!/bin/sh\n')
    (place/'bin'/'quarto').chmod(0o755)
    env = {**os.environ, 'PATH': f"{place/'bin'}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run([Path(sys.executable).parent/'nbdev_proc_nbs', '--n_workers', '2'], cwd=checkout, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    python, *mend = shlex.split(QUARTO['project']['pre-render'])   # what Quarto runs first
    assert python == 'python'
    subprocess.run([sys.executable, *mend], cwd=checkout/'_proc', check=True)
    return (checkout/'_proc').resolve()


@pytest.fixture(scope='session')
def site(processed, tmp_path_factory): return render(processed, tmp_path_factory.mktemp('html')/'site')


# --- every page ---

def test_every_link_and_picture_leads_somewhere(site):
    wrong = broken(site)
    assert not wrong, '\n'.join(wrong)


def test_the_check_sees_what_is_broken(tmp_path):
    (tmp_path/'a.html').write_text('<title>a</title><h2 id="here">x</h2><a href="#here">x</a><a href="b.html#there">x</a>'
        f'<a href="b.html#nowhere">x</a><img src="none.png"><a href="{SITE}c.html">x</a><a href="https://example.org/none">x</a><a href="d.ipynb">x</a>')
    (tmp_path/'b.html').write_text('<p id="there">x</p>')
    assert broken(tmp_path) == ['b.html: no title', 'a.html: b.html#nowhere has no such place', 'a.html: none.png is not there',
        f'a.html: {SITE}c.html is not there', 'a.html: d.ipynb is not there']
    assert broken(tmp_path/'empty')


def test_the_sidebar_lists_pages_that_nbdev_makes(processed):
    listed = [page for section in QUARTO['website']['sidebar']['contents'] for page in section['contents']]
    made = {p.relative_to(processed).as_posix() for p in processed.rglob('*') if p.suffix in ('.ipynb', '.md', '.qmd')}
    assert sorted(listed) == sorted(made)


def test_every_public_name_is_documented_on_its_page(processed):
    missing = []
    for lesson in LESSONS:
        room = lesson.stem[3:]
        outputs = [o for c in json.loads((processed/lesson.name).read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
        shown = {m for o in outputs for m in re.findall(r'^### (\S+)$', ''.join(o.get('data', {}).get('text/markdown', '')), re.M)}
        missing += [f'{room}.{name}' for name, _ in public(room)[1] if name not in shown]
    assert not missing


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_the_code_of_a_lesson_is_on_its_page(path, processed):
    "All of it, in the order of the notebook: nbdev leaves out what is exported."
    def code(file): return [''.join(c['source']) for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    made = iter(code(processed/path.name))
    exported = [re.sub(r'^#\|.*\n', '', c) for c in code(path) if re.match(r'#\|\s*exporti?\s*\n', c)]
    assert exported and all(c in made for c in exported)


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_cells_with_imports_hold_nothing_else(path):
    "nbdev runs them whole for the site, without the cells between them."
    mixed = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.search(r'^#\|\s*(exports?|exporti|hide)\b', source, re.M): continue
        tree = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M))
        is_import = lambda node: isinstance(node, (ast.Import, ast.ImportFrom))
        if any(map(is_import, ast.walk(tree))) and not all(map(is_import, tree.body)): mixed.append(source.split('\n')[0])
    assert not mixed, f'give the imports a cell of their own: {mixed}'


def test_links_are_mended(tmp_path):
    "A name that two rooms have leads to the page's own, a private one nowhere, a command is shown by its name."
    show = lambda name, text: nbformat.v4.new_code_cell(f'show_doc({name})', outputs=[nbformat.v4.new_output('execute_result', {'text/markdown': text})])
    source = f"[source]({SETTINGS['git_url']}/blob/main/unlearn_nb/faces.py#L1)"
    said = nbformat.v4.new_markdown_cell(f'[`draw`]({SITE}faces.html#draw) [`grid`]({SITE}faces.html#grid) [`spoil`]({SITE}flags.html#spoil)')
    for name, cells in {'00_faces': [show('draw', ''), show('grid', '')], '01_flags': [said, show('draw', f'{source}\n\n### draw')],
            '16_cli': [show('demo', '### Command\n\n```python\ndef Command.__call__()\n```\n\n*Forget.*')]}.items():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/f'{name}.ipynb')
    shutil.copytree(tmp_path, tmp_path.with_name('nbs'))   # no exported code in them
    mend_pages(tmp_path, tmp_path.with_name('nbs'))
    said, drawn = nbformat.read(tmp_path/'01_flags.ipynb', 4).cells
    assert said.source == f'[`draw`](#draw) [`grid`]({SITE}faces.html#grid) `spoil`'
    where, n = re.search(r'/main/(.*)#L(\d+)', drawn.outputs[0].data['text/markdown']).groups()
    assert where == 'unlearn_nb/flags.py' and (ROOT/where).read_text(encoding='utf-8').split('\n')[int(n) - 1].startswith('def draw(')
    assert nbformat.read(tmp_path/'16_cli.ipynb', 4).cells[0].outputs[0].data['text/markdown'] == '### demo\n\n*Forget.*'


# --- what is made, and what the configuration names ---

@pytest.mark.parametrize('name', MADE)
def test_what_is_made_is_current(name): assert (NBS/name).read_text(encoding='utf-8') == MADE[name](), 'run: python tests/make_site.py'


def test_the_card_shows_the_picture_of_the_readme():
    with Image.open(NBS/'images'/'card.png') as found: found = found.convert('RGB')
    assert found.size == (1200, 630) and (NBS/'images'/'card.png').stat().st_size < 1_000_000
    assert np.abs(np.asarray(found).astype(int) - np.asarray(card())).mean() < 1, 'run: python tests/make_site.py'   # fonts differ a little between versions


def test_the_reference_has_every_room_and_name():
    text = (NBS/'reference.md').read_text(encoding='utf-8')
    for room in ROOMS:
        _, names, constants = public(room)
        part = text.split(f'### [unlearn_nb.{room}](', 1)[1].split('\n##')[0]
        assert not [n for n in [name for name, _ in names] + constants if f'`{n}`' not in part]
        assert not [n for n, line in names if not line]


@pytest.mark.parametrize('model', ['faces', 'flags'])
def test_the_model_card_tells_the_facts(model):
    "Of the weights as they are shipped, and of what the run wrote down."
    text, facts = (NBS/'models'/f'{model}.md').read_text(encoding='utf-8'), json.loads((ASSETS/f'{model}.json').read_text())['training']
    files = [ASSETS/'faces.safetensors'] if model == 'faces' else sorted((ASSETS/'flags').rglob('*.safetensors'))
    assert all(f'`{sha256(f)}`' in text for f in files)
    assert f'{sum(map(parameters, files)):,} |' in text
    for part in [facts] if model == 'faces' else [facts['autoencoder'], facts['pipeline']]:
        assert f"{part['steps']:,}" in text and f"{part['minutes_taken']:.0f} minutes" in text
    assert facts['device'] in text and 'no photograph among them' in text


def test_the_configuration_names_files_that_exist():
    website, html = QUARTO['website'], QUARTO['format']['html']
    themes = [name for pair in html['theme'].values() for name in pair if name.endswith('.scss')]
    images = {website['open-graph']['image'], website['twitter-card']['image']}
    assert len(themes) == 2 and set(html['theme']) == {'light', 'dark'} and len(images) == 1
    card_file = images.pop().removeprefix(SITE)
    assert card_file in QUARTO['project']['resources']
    assert not [name for name in [*themes, html['css'], website['favicon'], card_file] if not (NBS/name).is_file()]
    assert all(f'/*-- scss:{layer} --*/' in (NBS/name).read_text(encoding='utf-8') for name in themes for layer in ('defaults', 'rules'))
    assert [item['href'] for item in website['navbar']['right']] == [SETTINGS['git_url']]


def test_nbdev_yml_is_that_of_the_settings(processed):
    assert (NBS/'nbdev.yml').read_bytes() == (processed/'nbdev.yml').read_bytes(), 'run: nbdev_proc_nbs'


# --- in a browser ---

@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('page', ['index', 'reference', 'models/flags', 'unlearn', 'tutorials/forget_a_face'])
def test_page_fits_the_screen(page, width, site, browser):
    tab = browser.new_page(viewport={'width': width, 'height': 900})
    try:
        tab.route(re.compile('^https?:'), lambda route: route.abort())   # no network
        tab.goto((site/f'{page}.html').as_uri(), wait_until='load')
        if folder := os.environ.get('SCREENSHOTS'): tab.screenshot(path=Path(folder)/f'{page.replace("/", "-")}-{width}.png', full_page=True)
        assert not tab.evaluate("[...document.images].filter(i => !i.src.startsWith('http') && !i.naturalWidth).map(i => i.src.slice(0, 80))")
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
    finally: tab.close()


# --- the project's texts ---

def test_citation_names_this_version_and_the_paper():
    cite, readme = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')), (ROOT/'README.md').read_text(encoding='utf-8')
    assert (cite['cff-version'], cite['version'], cite['repository-code']) == ('1.2.0', SETTINGS['version'], SETTINGS['git_url'])
    [paper] = cite['references']
    assert paper['url'] == 'https://arxiv.org/abs/2603.10445' and [i['value'] for i in paper['identifiers']] == ['arXiv:2603.10445']
    told = re.search(r'\*(.+)\* by ([\w, ]+)\n\(\[arXiv ([\d.]+)\]\((\S+?)\)\)', readme).groups()   # the README tells of the same paper
    assert told == (paper['title'], paper['authors'][0]['name'], '2603.10445', paper['url'])


def test_changelog_has_this_version():
    versions = re.findall(r'^## \[?([\w.]+)\]?', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert SETTINGS['version'] in versions[:2]


def test_contributing_names_what_exists():
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    named = set(re.findall(r'(?:tests|nbs|unlearn_nb|\.github|\.ci)/[\w./]+\w', text)) - {'tests/test_ROOM.py'}
    assert named and not [name for name in named if not (ROOT/name).exists()]
    tests = {f'tests/{p.name}' for p in (ROOT/'tests').glob('*.py')} - {f'tests/test_{room}.py' for room in ROOMS}
    assert not tests - named, 'say what each file of tests/ is for'


