"Make README.md from nbs/index.ipynb, without Quarto, and its pictures: `python tests/make_readme.py`"
import base64
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- made from nbs/index.ipynb by python tests/make_readme.py -->'
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')
FENCE = re.compile(r'(^```.*?^```[^\n]*$|`[^`\n]+`)', re.M | re.S)


def from_root(target):
    "A link as written in nbs/, as the README at the root must write it."
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.I): return target
    return posixpath.normpath(posixpath.join('nbs', target))


def relink(markdown):
    "Rewrite the relative links outside code."
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: m[1] + from_root(m[2]), part) for part in parts[::2]]
    return ''.join(parts)


def fenced(text, language=''): return f'```{language}\n{text.rstrip()}\n```'


def output(out, alt):
    "One output of a code cell as markdown. A picture becomes the README's own, nbs/images/hero.png."
    if out['output_type'] == 'stream': return fenced(''.join(out['text']))
    data = out.get('data', {})
    if 'text/markdown' in data: return relink(''.join(data['text/markdown']))
    if 'image/png' in data: return f'![{alt}](nbs/images/hero.png)'
    if 'text/plain' in data: return fenced(''.join(data['text/plain']))
    raise ValueError(f"nbs/index.ipynb: the README cannot hold an output of type {out['output_type']} {list(data)}")


def cell_blocks(cell):
    "The markdown blocks of one cell; a cell marked `#| hide` has none."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return [relink(re.sub(r'\n+- pagetitle: .*', '', source))]
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide\s*$', source, re.M): return []
    code, alt = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip(), re.search(r'^#\| fig-alt: "(.*)"', source, re.M)
    return ([fenced(code, 'python')] if code else []) + [output(o, alt and alt[1]) for o in cell['outputs']]


def readme(notebook=ROOT/'nbs'/'index.ipynb'):
    "README.md's text."
    cells = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    return '\n\n'.join([NOTE, *(b.strip() for c in cells for b in cell_blocks(c))]) + '\n'


def shown(notebook, call, kind):
    "What a notebook shows, as this MIME type, in the one cell whose last expression is this call."
    cells = json.loads((ROOT/'nbs'/notebook).read_text(encoding='utf-8'))['cells']
    last = re.compile(rf'^{re.escape(call)}[^\n]*(\n +[^\n]*)*\Z', re.M)
    code = [c for c in cells if c['cell_type'] == 'code' and last.search(''.join(c['source']).strip())]
    found = [o['data'][kind] for c in code for o in c['outputs']]
    if len(found) != 1: raise ValueError(f'{notebook} shows {len(found)} outputs of {call}; expected one: run it')
    return ''.join(found[0])


def hero(): return base64.b64decode(shown('index.ipynb', 'strip(', 'image/png'))   # before and after


def film():
    "A GIF of the seed's path."
    html = shown('tutorials/01_forget_a_face.ipynb', 'moving(', 'text/html')
    return base64.b64decode(re.search(r'base64,([^"]+)', html)[1])


if __name__ == '__main__':
    (ROOT/'nbs'/'images'/'hero.png').write_bytes(hero())
    (ROOT/'nbs'/'images'/'path.gif').write_bytes(film())
    (ROOT/'README.md').write_text(readme(), encoding='utf-8', newline='\n')
    print('README.md written')
