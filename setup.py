"Everything here is read from settings.ini; edit that file, not this one."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

PYTHONS = '3.10 3.11 3.12'.split()
LICENSES = {'apache2': 'Apache-2.0'}
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']


def readme():
    "README.md with whole links: it is read where the repository's files are not beside it."
    text = (here/'README.md').read_text(encoding='utf-8')
    raw, page = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/", f"{cfg['git_url']}/blob/{cfg['branch']}/"
    return re.sub(r'(!?)(\[[^\[\]]*\])\((?![a-z]+:|#)', lambda m: f'{m[1]}{m[2]}({raw if m[1] else page}', text)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme() if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license=LICENSES[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: {v}' for v in PYTHONS[PYTHONS.index(cfg['min_python']):]),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['unlearn_nb*']),
    package_data={'unlearn_nb': [f'assets/{folder}*.{kind}' for folder in ('', '*/', '*/*/') for kind in ('safetensors', 'json')]},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],  # lets the docs link `names` to their pages
    },
    zip_safe=False,
)
