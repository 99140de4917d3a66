"Links, anchors and pictures of a built site lead somewhere, pages have titles: `python tests/check_site.py _docs`"
import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
SITE = SETTINGS['doc_host'] + SETTINGS['doc_baseurl'] + '/'
REPO = f"{SETTINGS['user']}/{SETTINGS['repo']}"
CODE = (   # files of this repository, seen elsewhere
    f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/",
    f"https://colab.research.google.com/github/{REPO}/blob/{SETTINGS['colab_ref']}/")


class Page(HTMLParser):
    "The title, the ids and the targets of one page."
    def __init__(self, html):
        super().__init__()
        self.title, self.ids, self.targets, self.in_title = '', set(), [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.in_title = tag == 'title'
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k) and (k == 'id' or tag == 'a')}
        self.targets += [a[k] for k in ('href', 'src', 'poster') if a.get(k)]
        if (a.get('property') or a.get('name')) in ('og:image', 'twitter:image'):
            self.targets.append(a.get('content') or '')

    def handle_data(self, data):
        if self.in_title: self.title += data

    def handle_endtag(self, tag): self.in_title = False


def leads_to(target, page, folder):
    "(file, anchor) of a target that must exist; None if it lies elsewhere."
    for prefix in CODE:
        if target.startswith(prefix): return ROOT/unquote(target[len(prefix):].split('#')[0].split('?')[0]), ''
    if target.startswith(SITE): target = '/' + target[len(SITE):]
    elif re.match(r'[a-z][a-z0-9+.-]*:|//', target, re.I): return None
    path, _, anchor = target.partition('#')
    path = unquote(path.split('?')[0])
    file = folder/path[1:] if path.startswith('/') else page.parent/path if path else page
    return file/'index.html' if file.is_dir() else file, unquote(anchor)


def broken(folder):
    "What is wrong with the HTML pages of a folder, one line each."
    folder = Path(folder).resolve()
    files = [path for path in sorted(folder.rglob('*.html')) if 'site_libs' not in path.parts]
    pages = {path: Page(path.read_text(encoding='utf-8')) for path in files}
    wrong = [f'{path.relative_to(folder)}: no title' for path, page in pages.items() if not page.title.strip()]
    for path, page in pages.items():
        for target in dict.fromkeys(page.targets):
            if (found := leads_to(target, path, folder)) is None: continue
            file, anchor = found[0].resolve(), found[1]
            if not file.is_file(): wrong.append(f'{path.relative_to(folder)}: {target} is not there')
            elif anchor and file in pages and anchor not in pages[file].ids:
                wrong.append(f'{path.relative_to(folder)}: {target} has no such place')
    return wrong if pages else [f'{folder}: no page']


if __name__ == '__main__':
    wrong = broken(sys.argv[1])
    print('\n'.join(wrong) or 'every link and picture leads somewhere')
    sys.exit(bool(wrong))
