"The wheel: it installs alone, and holds the package, its weights, its licence and its papers."
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PathDistribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, source_files

SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']


@pytest.fixture(scope='module')
def bare(wheel, tmp_path_factory):
    "An environment with nothing in it but the wheel."
    venv = tmp_path_factory.mktemp('bare')/'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    pip = [sys.executable, '-m', 'pip', '--python', venv/'bin/python', 'install', '--no-index', '--no-deps', wheel]
    run = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return venv


@pytest.fixture(scope='module')
def site(bare):
    [site] = bare.glob('lib/python*/site-packages')
    return site


@pytest.fixture(scope='module')
def papers(site):
    "The distribution's own account of itself."
    [folder] = site.glob('*.dist-info')
    return PathDistribution(folder)


def test_every_file_of_the_package_is_there_byte_for_byte(site):
    expected = {p: (ROOT/p).read_bytes() for p in source_files() if p.parts[0] == 'unlearn_nb'}
    assert {p.suffix for p in expected} == {'.py', '.json', '.safetensors', '.typed'}
    files = [p for p in (site/'unlearn_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    found = {p.relative_to(site): p.read_bytes() for p in files if p.suffix != '.pyi'}
    assert sorted(found) == sorted(expected)
    assert not [str(p) for p in found if found[p] != expected[p]]


def test_it_brings_its_types(site):
    "A stub for every module, made when the wheel is built, and the file that says that they count."
    modules = {p.stem for p in (site/'unlearn_nb').glob('*.py')} - {'_modidx', '__main__'}
    assert {p.stem for p in (site/'unlearn_nb').glob('*.pyi')} == modules and (site/'unlearn_nb'/'py.typed').is_file()
    stub = (site/'unlearn_nb'/'denoiser.pyi').read_text()
    assert 'def sample(self' in stub and 'def save_pretrained(self' in stub   # one patched here, one elsewhere


def test_nothing_else_is_installed(site):
    assert sorted(p.name for p in site.iterdir()) == ['unlearn_nb', f"unlearn_nb-{SETTINGS['version']}.dist-info"]


def test_it_imports_and_has_its_command_without_any_requirement(bare, site):
    code = 'import unlearn_nb; print(unlearn_nb.__version__, unlearn_nb.__file__)'
    run = subprocess.run([bare/'bin/python', '-I', '-c', code], capture_output=True, text=True)
    assert run.stdout.split() == [SETTINGS['version'], str(site/'unlearn_nb/__init__.py')], run.stderr
    assert (bare/'bin/unlearn_nb').is_file()


def test_licence(site, papers):
    assert [p.read_bytes() for p in site.glob('*.dist-info/**/LICENSE')] == [(ROOT/'LICENSE').read_bytes()]
    assert 'Apache-2.0' in (papers.metadata['License-Expression'], papers.metadata['License'])


def test_metadata_says_what_settings_say(papers):
    metadata = papers.metadata
    told = [canonicalize_name(metadata['Name']), metadata['Version'], metadata['Summary']]
    assert told == [canonicalize_name(SETTINGS['lib_name']), SETTINGS['version'], SETTINGS['description']]
    urls = dict(line.split(', ') for line in metadata.get_all('Project-URL'))
    assert urls['Source'] == SETTINGS['git_url'] and urls['Documentation'].startswith(SETTINGS['doc_host'])
    assert metadata['Requires-Python'] == f">={SETTINGS['min_python']}"
    def plain(rs): return sorted((canonicalize_name(r.name), str(r.specifier)) for r in rs)
    requires = [Requirement(r) for r in papers.requires]
    assert plain(r for r in requires if not r.marker) == plain(map(Requirement, SETTINGS['requirements'].split()))
    dev = [r for r in requires if r.marker and r.marker.evaluate({'extra': 'dev'})]
    assert plain(dev) == plain(map(Requirement, SETTINGS['dev_requirements'].split()))
    assert {(e.group, e.name, e.value) for e in papers.entry_points} == {
        ('console_scripts', 'unlearn_nb', 'unlearn_nb.cli:main'), ('nbdev', 'unlearn_nb', 'unlearn_nb._modidx:d')}


def test_readme_is_the_description_and_its_links_lead_out(papers):
    "A page on an index has no files beside it: every link is whole."
    metadata = papers.metadata
    text = metadata.get_payload() or metadata['Description']
    said = (ROOT/'README.md').read_text(encoding='utf-8')
    assert metadata['Description-Content-Type'] == 'text/markdown' and text.count('\n## ') == said.count('\n## ')
    links = re.findall(r'\]\(([^)\s]+)', text)
    assert len(links) > 50 and not [l for l in links if not re.match('https://|#', l)]
    repo = f"{SETTINGS['user']}/{SETTINGS['repo']}"
    assert f"](https://raw.githubusercontent.com/{repo}/{SETTINGS['branch']}/nbs/images/hero.png)" in text
