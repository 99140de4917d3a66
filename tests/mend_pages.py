"""Mend what nbdev hands to Quarto, which runs this before it renders (_quarto.yml, pre-render): `python tests/mend_pages.py _proc`

nbdev takes exported code out of the pages, and this is a course about that code. It links every word in backticks that is the name of any function,
a private one of another room too. And it shows a command as an object of click."""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = re.compile(r'#\|\s*exporti?\s*\n')
DOC_LINK = re.compile(r'\[(`[^`]+`)\]\(([^()\s]*/([\w/]+\.html)#([\w.]+))\)')
SOURCE = re.compile(r'(\[source\]\([^()\s]*/)unlearn_nb/\w+\.py#L\w+')
COMMAND = re.compile(r'### (?:Command|Group)\n\n```python\n.*?```\n*', re.S)


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def markdown(cell):
    "Where a cell holds markdown: (holder, key) pairs."
    if cell['cell_type'] == 'markdown': yield cell, 'source'
    for output in cell.get('outputs', []):
        if 'text/markdown' in output.get('data', {}): yield output['data'], 'text/markdown'


def shown(cell):
    "The name that a cell documents, if it documents one: `name` or `Class.name`."
    found = re.search(r'^show_doc\(([\w.]+)\)', ''.join(cell['source']), re.M)
    return found and found[1]


def with_code(cells, original):
    "The cells of a page, and each exported cell of its notebook after the documentation of what it defines."
    left, kept, out = list(cells), {c['id'] for c in cells}, []
    for cell in original:
        code = ''.join(cell['source'])
        if cell['id'] in kept:
            while left[0]['id'] != cell['id']: out.append(left.pop(0))
            out.append(left.pop(0))
        elif cell['cell_type'] == 'code' and EXPORTED.match(code):
            names = re.findall(r'^(?:def|class) (\w+)', code, re.M)
            while left and (shown(left[0]) or '').split('.')[-1] in names: out.append(left.pop(0))
            out.append({**cell, 'execution_count': None, 'outputs': [], 'source': EXPORTED.sub('', code, 1).splitlines(keepends=True)})
    return out + left


def lines(room):
    "Where each function and class of a room begins."
    tree = ast.parse((ROOT/'unlearn_nb'/f'{room}.py').read_text(encoding='utf-8'))
    return {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def mend(text, page, name, room, documented):
    "Markdown of a page with links to documented names only, the page's own first; the documentation of `name` with its own source and heading."
    def link(m):
        if m[4] in documented[page]: return f'[{m[1]}](#{m[4]})'
        return m[0] if m[4] in documented.get(m[3], ()) else m[1]
    text = DOC_LINK.sub(link, text)
    if not name: return text
    text = SOURCE.sub(lambda m: f'{m[1]}unlearn_nb/{room}.py#L{lines(room)[name.split(".")[-1]]}', text)
    return COMMAND.sub(f'### {name}\n\n', text)


def mend_pages(folder, sources=ROOT/'nbs'):
    notebooks = {path: read(path) for path in sorted(Path(folder).rglob('*.ipynb'))}
    pages = {path: re.sub(r'^\d+_', '', path.stem) + '.html' for path in notebooks}
    documented = {pages[path]: {shown(c).lower() for c in nb['cells'] if shown(c)} for path, nb in notebooks.items()}
    for path, notebook in notebooks.items():
        for cell in notebook['cells']:
            for holder, key in markdown(cell):
                text = mend(''.join(holder[key]), pages[path], shown(cell), path.stem[3:], documented)
                holder[key] = text.splitlines(keepends=True)
        notebook['cells'] = with_code(notebook['cells'], read(sources/path.relative_to(folder))['cells'])
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': mend_pages(sys.argv[1])
