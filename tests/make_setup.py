"Write the Colab badge and the setup cell, the same in all notebooks: `python tests/make_setup.py`"
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'
REPO = f"{SETTINGS['user']}/{SETTINGS['repo']}"
COLAB = f"https://colab.research.google.com/github/{REPO}/blob/{SETTINGS['colab_ref']}/nbs/"


def badge(path): return f'[![Open In Colab]({BADGE})]({COLAB}{path.relative_to(NBS).as_posix()})'


def setup():
    "On Colab it installs the package from the repository and looks whether that worked; elsewhere it does nothing."
    return f'''#| hide
try: import google.colab   # on Colab, and only there, install the package; torch is already present and stays as it is
except ImportError: pass
else:
    %pip install -q "unlearn_nb @ git+{SETTINGS['git_url']}@{SETTINGS['colab_ref']}"
    try: import unlearn_nb
    except ImportError: raise SystemExit("unlearn_nb could not be installed: choose Runtime > Restart session, then "
                                         "Run all; if it fails again, look for an outage of GitHub.") from None'''


if __name__ == '__main__':
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding='utf-8'))
        for cell, text in zip(notebook['cells'][1:3], (badge(path), setup())):
            cell['source'] = text.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8', newline='\n')
    print(f'{len(NOTEBOOKS)} notebooks: badge and setup cell written')
