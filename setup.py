"Everything here is read from settings.ini; edit that file, not this one."
import re
from configparser import ConfigParser
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

LICENSES = {'apache2': 'Apache-2.0'}
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature']
SITE, CODE = cfg['doc_host'] + cfg['doc_baseurl'], cfg['git_url']


def readme():
    "README.md with whole links: it is read where the repository's files are not beside it."
    text = (here/'README.md').read_text(encoding='utf-8')
    raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/"
    def whole(m): return f"{m[1]}{m[2]}({raw if m[1] else f'{CODE}/blob/' + cfg['branch'] + '/'}"
    return re.sub(r'(!?)(\[[^\[\]]*\])\((?![a-z]+:|#)', whole, text)


class WithStubs(build_py):
    "What editors and type checkers read is made when the package is built."
    def run(self):
        super().run()
        if self.editable_mode: return
        write_stubs = run_path(str(here/'tests'/'make_stubs.py'))['write_stubs']
        write_stubs(here/'unlearn_nb', Path(self.build_lib)/'unlearn_nb')


setup(
    cmdclass={'build_py': WithStubs},
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme() if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=CODE,
    project_urls={'Documentation': SITE, 'Source': CODE, 'Issues': f'{CODE}/issues',
                  'Changelog': f"{CODE}/blob/{cfg['branch']}/CHANGELOG.md", 'Paper': 'https://arxiv.org/abs/2603.10445'},
    license=LICENSES[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        'Intended Audience :: Science/Research',
        f"Natural Language :: {cfg['language']}",
        'Operating System :: OS Independent',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Framework :: Jupyter',
        *(f'Programming Language :: Python :: {v}' for v in cfg['pythons'].split()),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['unlearn_nb*']),
    package_data={'unlearn_nb': ['py.typed', *(f'assets/{folder}*.{kind}' for folder in ('', '*/', '*/*/')
                                 for kind in ('safetensors', 'json'))]},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],  # lets the docs link `names` to their pages
    },
    zip_safe=False,
)
