"""Mend what nbdev hands to Quarto, which runs this before it renders (_quarto.yml): `python tests/mend_pages.py _proc`

nbdev takes exported code out of the pages and shows signatures instead, and this is a course about that code: it is put
back, once, where the lesson has it, and the places that links lead to stay. nbdev links every word in backticks that is
the name of any function, a private one of another module too. And an image that stands alone becomes a figure with a
caption: a badge is none."""
import json
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = re.compile(r'^#\|\s*exporti?\s*\n', re.M)
DOC_LINK = re.compile(r'\[(`[^`]+`)\]\(([^()\s]*/([\w/]+\.html)#([\w.]+))\)')
NESTED = re.compile(r'\[\[(`[^`]+`)\]\([^()\s]*\)\]\(')   # a link of nbdev's inside one of ours
BADGE = re.compile(r'^\[!\[([^\]]*)\]\((\S+)\)\]\((\S+)\)$')


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def shown(cell):
    "The name that a cell documents, if it documents one: `name` or `Class.name`."
    found = re.search(r'^show_doc\(([\w.]+)\)', ''.join(cell['source']), re.M)
    return found and found[1]


def is_exported(cell): return cell['cell_type'] == 'code' and EXPORTED.search(''.join(cell['source'])) is not None


def places(names, before):
    "A cell without anything to see before another, at which links to the names arrive."
    spans = ''.join(f'<span id="{escape(name.lower())}"></span>' for name in names)
    return {'cell_type': 'markdown', 'id': f"at-{before['id']}", 'metadata': {}, 'source': [spans]}


def with_code(cells, original):
    "The cells of a page, with each exported cell of its notebook in the place of the documentation of what it defines."
    left, kept, out = list(cells), {c['id'] for c in cells}, []
    for cell in original:
        code = ''.join(cell['source'])
        if cell['id'] in kept:
            while left[0]['id'] != cell['id']: out.append(left.pop(0))
            out.append(left.pop(0))
        elif is_exported(cell):
            names = re.findall(r'^(?:def|class) (\w+)', code, re.M)
            told = [shown(c) for c in left if (shown(c) or '').split('.')[-1] in names]
            left = [c for c in left if shown(c) not in told or not shown(c)]
            source = EXPORTED.sub('', code, count=1).splitlines(keepends=True)
            if told: out.append(places(told, cell))
            out.append({**cell, 'execution_count': None, 'outputs': [], 'source': source})
    return out + left


def mend(text, page, documented):
    "Markdown of a page with links to documented names only, the page's own first, and its badge as one."
    if badge := BADGE.match(text.strip()):
        return f'<p class="badge-colab"><a href="{badge[3]}"><img src="{badge[2]}" alt="{badge[1]}"></a></p>'
    text = NESTED.sub(r'[\1](', text)
    def link(m):
        if m[4] in documented[page]: return f'[{m[1]}](#{m[4]})'
        return m[0] if m[4] in documented.get(m[3].rsplit('/', 1)[-1], ()) else m[1]
    return DOC_LINK.sub(link, text)


def mend_pages(folder, sources=ROOT/'nbs'):
    notebooks = {path: read(path) for path in sorted(Path(folder).rglob('*.ipynb'))}
    pages = {path: re.sub(r'^\d+_', '', path.stem) + '.html' for path in notebooks}
    documented = {pages[path]: {shown(c).lower() for c in nb['cells'] if shown(c)} for path, nb in notebooks.items()}
    for path, notebook in notebooks.items():
        cells = with_code(notebook['cells'], read(Path(sources)/path.relative_to(folder))['cells'])
        for cell in cells:
            if cell['cell_type'] != 'markdown': continue
            cell['source'] = mend(''.join(cell['source']), pages[path], documented).splitlines(keepends=True)
        path.write_text(json.dumps(notebook | {'cells': cells}, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': mend_pages(sys.argv[1])
