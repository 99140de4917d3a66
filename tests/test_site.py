"The site: its pages as nbdev makes them, links, pictures, how they look. A stand-in for Quarto is on PATH."
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
from make_setup import NBS, NOTEBOOKS, SETTINGS
from test_project import MODULES

QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
EXPORTING = [p for p in NOTEBOOKS if '#| default_exp' in p.read_text(encoding='utf-8')]

pytestmark = pytest.mark.site


# --- pages, as Quarto would make them ---

def heading_id(text, taken):
    "The id that pandoc gives a heading, and so the site."
    found = re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text.lower()).strip())) or 'section'
    n = taken[found] = taken.get(found, -1) + 1
    return f'{found}-{n}' if n else found


def as_quarto_shows(cell):
    "A code cell without its directives; documentation as the markdown that it is, without attributes of links."
    if cell.source.startswith('#| echo: false'):
        told = '\n\n'.join(o['data']['text/markdown'] for o in cell.outputs)
        return nbformat.v4.new_markdown_cell(re.sub(r'\{target=[^}]*\}', '', told))
    return nbformat.v4.new_code_cell(re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M), outputs=cell.outputs)


def read_page(path):
    "(front matter, notebook) of a page made by nbdev, or of a markdown page."
    if path.suffix == '.md': text, cells = path.read_text(encoding='utf-8'), []
    else: text, *cells = nbformat.read(path, 4).cells
    text = text if path.suffix == '.md' else text.source + '\n'
    matter, rest = re.fullmatch(r'---\n(.*?)\n---\n(.*)', text, re.S).groups()
    matter = yaml.safe_load(matter)
    top = nbformat.v4.new_markdown_cell(f"# {matter['title']}\n\n{matter.get('description', '')}\n\n{rest}")
    def shown(c): return as_quarto_shows(c) if c.cell_type == 'code' else nbformat.v4.new_markdown_cell(c.source)
    cells = [shown(c) for c in cells if c.source or c.get('outputs')]
    return matter, nbformat.v4.new_notebook(cells=[top, *cells], metadata={'title': matter['title']})


def render(processed, out):
    "One HTML page for each page of the folder that nbdev made, with the ids and links that Quarto gives them."
    shutil.copytree(processed, out, ignore=shutil.ignore_patterns('*.ipynb', '*.md', '*.yml'))
    pages = {p: read_page(p) for p in sorted(processed.rglob('*')) if p.suffix in ('.ipynb', '.md')}
    def page_of(p, matter): return p.with_name(matter.get('output-file', p.stem + '.html')).relative_to(processed)
    names, website = {p: page_of(p, matter) for p, (matter, _) in pages.items()}, QUARTO['website']
    exporter = HTMLExporter(exclude_anchor_links=True, exclude_input_prompt=True, exclude_output_prompt=True)
    for path, (matter, notebook) in pages.items():
        taken, up = {}, '../'*(len(names[path].parts) - 1)
        html, _ = exporter.from_notebook_node(notebook)
        def heading(m): return f'<h{m[1]} id="{heading_id(re.sub("<[^>]*>", "", m[2]), taken)}">{m[2]}</h{m[1]}>'
        html = re.sub(r'<h([1-6])(?: id="[^"]*")?>(.*?)</h\1>', heading, html, flags=re.S)
        def to_page(m):
            target = (path.parent/m[1]).resolve()
            if target not in names: return m[0]
            return f'href="{os.path.relpath(processed/names[target], (processed/names[path]).parent)}{m[2] or ""}"'
        html = re.sub(r'href="([^":#]+\.(?:ipynb|md))(#[^"]*)?"', to_page, html)
        head = (f'<link rel="stylesheet" href="{up}styles.css"><link rel="icon" href="{up}{website["favicon"]}">'
                f'<meta property="og:image" content="{website["open-graph"]["image"]}">')
        (out/names[path]).parent.mkdir(parents=True, exist_ok=True)
        (out/names[path]).write_text(html.replace('</head>', head + '</head>', 1), encoding='utf-8')
    return out


@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    "The folder of pages that nbdev hands to Quarto. Cells with imports and exported cells run, once for all tests."
    place = tmp_path_factory.mktemp('site')
    checkout = copy_to(place/'copy')
    (place/'bin').mkdir()
    (place/'bin'/'quarto').write_text('#!/bin/sh\n')
    (place/'bin'/'quarto').chmod(0o755)
    env = {**os.environ, 'PATH': f"{place/'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [Path(sys.executable).parent/'nbdev_proc_nbs', '--n_workers', '2']
    run = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=600)
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
    targets = '#here', 'b.html#there', 'b.html#nowhere', f'{SITE}c.html', 'https://example.org/none', 'd.ipynb'
    links = ''.join(f'<a href="{t}">x</a>' for t in targets)
    (tmp_path/'a.html').write_text(f'<title>a</title><h2 id="here">x</h2><img src="none.png">{links}')
    (tmp_path/'b.html').write_text('<p id="there">x</p>')
    assert broken(tmp_path) == [
        'b.html: no title', 'a.html: none.png is not there', 'a.html: b.html#nowhere has no such place',
        f'a.html: {SITE}c.html is not there', 'a.html: d.ipynb is not there']
    assert broken(tmp_path/'empty')


def test_the_sidebar_lists_pages_that_nbdev_makes(processed):
    listed = [page for section in QUARTO['website']['sidebar']['contents'] for page in section['contents']]
    made = {p.relative_to(processed).as_posix() for p in processed.rglob('*') if p.suffix in ('.ipynb', '.md', '.qmd')}
    assert sorted(listed) == sorted(made - {'404.md'})


def code_of(file):
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def test_the_code_of_a_lesson_is_on_its_page_once(processed):
    "All of it, in the order of the notebook, and a place for every public name; no signature beside it."
    for path in EXPORTING:
        page = processed/path.relative_to(NBS)
        on_page, made = code_of(page), iter(code_of(page))
        marked = [c for c in code_of(path) if re.search(r'^#\|\s*exporti?\s*$', c, re.M)]
        exported = [re.sub(r'#\|\s*exporti?\s*\n', '', c, count=1) for c in marked]
        assert exported and all(c in made for c in exported), path.name
        assert not [c for c in exported if on_page.count(c) != 1], path.name
        assert not [c for c in on_page if 'show_doc(' in c], path.name
        text = page.read_text(encoding='utf-8')
        module = re.sub(r'^\d\d_', '', path.stem)
        missing = [name for name, _, _ in public(module)[1] if f'<span id=\\"{name.lower()}\\">' not in text]
        assert not missing, f'{module}: {missing}'


def test_pages_are_mended(tmp_path):
    "A name of two modules leads to the page's own, a private one nowhere; a badge is no figure; code stands once."
    def doc(name):
        told = nbformat.v4.new_output('execute_result', {'text/markdown': name})
        return nbformat.v4.new_code_cell(f'show_doc({name})', outputs=[told])
    def at(page, name): return f'[`{name}`]({SITE}{page}.html#{name})'
    code = nbformat.v4.new_code_cell('#| export\n#| code-fold: true\ndef draw(): pass')
    badge = nbformat.v4.new_markdown_cell('[![Open In Colab](https://x.org/b.svg)](https://x.org/n.ipynb)')
    names = ('faces', 'draw'), ('faces', 'grid'), ('flags', 'spoil'), ('workshop/zoo', 'load')
    nested = f'[{at("faces", "draw")}](00_faces.ipynb)'
    said = nbformat.v4.new_markdown_cell(' '.join([*(at(*name) for name in names), nested]))
    pages = {'00_faces': [doc('draw'), doc('grid')], '14_flags': [badge, said, doc('draw')],
             'workshop/zoo': [doc('load')]}
    for folder, of in ((tmp_path/'_proc', pages), (tmp_path/'nbs', pages | {'14_flags': [badge, said, code]})):
        for name, cells in of.items():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(nbformat.v4.new_notebook(cells=cells), folder/f'{name}.ipynb')
    mend_pages(tmp_path/'_proc', tmp_path/'nbs')
    badge, said, place, drawn = nbformat.read(tmp_path/'_proc'/'14_flags.ipynb', 4).cells
    links = f'[`draw`](#draw) {at("faces", "grid")} `spoil` {at("workshop/zoo", "load")}'
    assert said.source == f'{links} [`draw`](00_faces.ipynb)'
    assert place.source == '<span id="draw"></span>' and drawn.source == '#| code-fold: true\ndef draw(): pass'
    assert badge.source.startswith('<p class="badge-colab"><a href="https://x.org/n.ipynb">')


# --- what is made, and what the configuration names ---

def test_what_is_made_is_current():
    for name, make in MADE.items():
        assert (NBS/name).read_text(encoding='utf-8') == make(), f'{name} is old; run: python tests/make_site.py'


def test_the_card_shows_the_picture_of_the_readme():
    with Image.open(NBS/'images'/'card.png') as found: found = found.convert('RGB')
    assert found.size == (1200, 630) and (NBS/'images'/'card.png').stat().st_size < 1_000_000
    apart = np.abs(np.asarray(found).astype(int) - np.asarray(card())).mean()
    assert apart < 1, 'run: python tests/make_site.py'   # fonts differ a little between versions


def test_the_reference_has_every_module_and_name():
    text = (NBS/'reference.md').read_text(encoding='utf-8')
    for module in MODULES:
        _, names, constants = public(module)
        part = text.split(f': unlearn_nb.{module}\n', 1)[1].split('\n##')[0]
        assert not [n for n, call, line in names if f'[`{call}`]' not in part or not line], module
        assert not [n for n in constants if f'`{n}`' not in part], module


@pytest.mark.parametrize('model', ['faces', 'flags'])
def test_the_model_card_tells_the_facts(model):
    "Of the weights as they are shipped, and of what the run wrote down."
    text = (NBS/'models'/f'{model}.md').read_text(encoding='utf-8')
    facts = json.loads((ASSETS/f'{model}.json').read_text())['training']
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
    texts = [(NBS/name).read_text(encoding='utf-8') for name in themes]
    assert all(f'/*-- scss:{layer} --*/' in text for text in texts for layer in ('defaults', 'rules'))
    assert [item['href'] for item in website['navbar']['right']] == [SETTINGS['git_url']]


def test_nbdev_yml_is_that_of_the_settings(processed):
    assert (NBS/'nbdev.yml').read_bytes() == (processed/'nbdev.yml').read_bytes(), 'run: nbdev_proc_nbs'


# --- in a browser ---

PAGES = ['index', 'reference', 'models/flags', 'unlearn', 'tutorials/forget_a_face', 'workshop/leaderboard']


@pytest.mark.browser
@pytest.mark.parametrize('width', [390, 1280, 1920])
@pytest.mark.parametrize('page', PAGES)
def test_page_fits_the_screen(page, width, site, browser):
    tab = browser.new_page(viewport={'width': width, 'height': 900})
    try:
        tab.route(re.compile('^https?:'), lambda route: route.abort())   # no network
        tab.goto((site/f'{page}.html').as_uri(), wait_until='load')
        if folder := os.environ.get('SCREENSHOTS'):
            tab.screenshot(path=Path(folder)/f'{page.replace("/", "-")}-{width}.png', full_page=True)
        empty = '[...document.images].filter(i => !i.src.startsWith("http") && !i.naturalWidth).map(i => i.src)'
        assert not [src[:80] for src in tab.evaluate(empty)]
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
    finally: tab.close()
