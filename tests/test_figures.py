"module `figures`: colours that everybody can tell apart, pixels that stay pixels, films, tables."
from io import BytesIO, StringIO
from xml.etree import ElementTree

import IPython
import matplotlib
import matplotlib_inline.backend_inline
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import rgb2lab

from unlearn_nb.figures import (BASE, EDITED, FORGET, RETAIN, SURROGATE, Lines, Table, gif, moving, png_bytes, progress,
                                strip, to_image, use)

COLOURS = np.array([to_rgb(c) for c in (FORGET, SURROGATE, RETAIN, BASE, EDITED)])
BLIND = {   # Machado, Oliveira and Fernandes 2009, severity 1, in linear light
    'long': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    'middle': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.01182, .04294, .968881]],
    'short': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .3039]]}


def seen_by(matrix):
    "The colours as an eye sees them that lacks one kind of cones."
    linear = np.where(COLOURS <= .04045, COLOURS/12.92, ((COLOURS + .055)/1.055)**2.4)
    linear = (linear @ np.array(matrix).T).clip(0, 1)
    return np.where(linear <= .0031308, 12.92*linear, 1.055*linear**(1/2.4) - .055)


# --- colours and style ---

def test_no_two_colours_look_alike_to_any_eye_or_in_print():
    "In CIELAB, where 2.3 is just noticed."
    for eye, matrix in {'all': np.eye(3), **BLIND}.items():
        lab = rgb2lab(seen_by(matrix)[None])[0]
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(5, 1)]
        assert apart.min() > 25, eye
    lightness = np.sort(rgb2lab(COLOURS[None])[0, :, 0])
    assert np.diff(lightness).min() > 10 and lightness.max() < 90   # the lightest still shows on white


def test_use_sets_the_style_and_makes_no_shell(monkeypatch):
    "Twice as many pixels in a notebook; outside there is no shell, and none is made."
    asked, before = [], InteractiveShell.initialized()
    monkeypatch.setattr(matplotlib_inline.backend_inline, 'set_matplotlib_formats', lambda *a: asked.append(a))
    for shell, formats in ((None, []), (object(), [('retina',)])):
        monkeypatch.setattr(IPython, 'get_ipython', lambda shell=shell: shell)
        with matplotlib.rc_context():
            use()
            assert matplotlib.rcParams['axes.prop_cycle'].by_key()['color'][0] == EDITED
            assert not matplotlib.rcParams['axes.spines.top']
        assert asked == formats and InteractiveShell.initialized() == before


# --- rows of pictures ---

@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.booleans(),
       st.integers(0, 99))
@settings(max_examples=40)
def test_pixels_stay_pixels(columns, rows, w, h, zoom, words, seed):
    x = torch.rand(rows, columns, 3, h, w, generator=torch.Generator().manual_seed(seed))*2 - 1
    titles, labels = (range(columns), ['a\nb']*rows) if words else ((), ())
    sheet = np.array(strip(x, titles, labels, zoom))
    top, left = sheet.shape[0] - rows*(h*zoom + 6), sheet.shape[1] - columns*(w*zoom + 6)
    for r in range(rows):
        for c in range(columns):
            y, z = top + r*(h*zoom + 6), left + c*(w*zoom + 6)
            found = sheet[y:y + h*zoom, z:z + w*zoom]
            expected = ((x[r, c].permute(1, 2, 0).numpy() + 1)*127.5).round().astype(np.uint8)
            assert (found == expected.repeat(zoom, 0).repeat(zoom, 1)).all()


def test_words_make_room_for_themselves_and_gaps_are_white():
    dot = Image.new('RGB', (4, 4), 'black')
    plain, told = strip([[dot, None]]), strip([[dot, None]], ['title'], ['a long label'])
    assert told.width > plain.width + 40 and told.height > plain.height + 8
    assert np.array(plain)[:, -18:].min() == 255
    ink = np.argwhere(np.array(told.convert('L')) < 128)
    assert ink.min() > 0   # nothing is cut off at the top or the left


def test_frames_have_their_colour_and_spare_the_picture():
    grey = Image.new('RGB', (8, 8), (10, 10, 10))
    framed, plain = (np.array(strip([[grey, grey]], zoom=4, frames=f)) for f in ({(0, 1): FORGET}, None))
    changed = (framed != plain).any(-1)
    assert (framed[changed] == Image.new('RGB', (1, 1), FORGET).getpixel((0, 0))).all()
    assert changed[:, 40:].any() and not changed[:, :36].any() and not changed[5:33, 43:69].any()


def test_figures_and_pictures_become_pixels_and_bytes():
    fig = Figure(figsize=(2, 1), dpi=50, facecolor=FORGET)
    image = to_image(fig)
    assert image.size == (100, 50) and image.convert('RGB').getcolors() == [(5000, (0xe0, 0x55, 0x5f))]
    with Image.open(BytesIO(png_bytes(image))) as again:
        assert again.format == 'PNG' and again.tobytes() == image.tobytes()


# --- films ---

@given(st.integers(2, 6), st.integers(2, 50))
@settings(max_examples=10)
def test_a_film_has_its_frames_and_times(n, hundredths):
    frames = [Image.new('RGB', (5, 4), (k*40, 0, 0)) for k in range(n)]
    with Image.open(BytesIO(gif(frames, 10*hundredths, 1000))) as film:
        assert film.n_frames == n and film.info['loop'] == 0
        for k in range(n):
            film.seek(k)
            assert film.info['duration'] == (1000 if k == n - 1 else 10*hundredths)
            assert abs(film.convert('RGB').getpixel((2, 2))[0] - 40*k) <= 8


def test_a_film_is_told_in_words():
    html = moving(gif([Image.new('RGB', (2, 2))]*2), 'before & "after"').data
    assert 'alt="before &amp; &quot;after&quot;"' in html and 'src="data:image/gif;base64,' in html


# --- tables ---

def test_a_table_says_the_same_in_a_terminal_and_in_a_notebook():
    "Numbers to the right, with the digits asked for; words to the left; what is not there is empty; markup is text."
    rows = [['ours', .98765, 3, None], ['<b> & "c"', float('nan'), 120, 1.25]]
    table = Table(['method', 'F', 'steps', 'dB'], rows, {'F': 3, 'dB': 1}, note='a < b')
    assert repr(table).splitlines() == ['method         F  steps   dB',
                                        'ours       0.988      3',
                                        '<b> & "c"           120  1.2',
                                        'a < b']
    html = ElementTree.fromstring(table._repr_html_())
    assert [cell.text for cell in html.iter('th')] == table.head and html.find('caption').text == 'a < b'
    cells = [[cell.text or '' for cell in row] for row in html.find('tbody')]
    assert cells == table._texts() == [['ours', '0.988', '3', ''], ['<b> & "c"', '', '120', '1.2']]
    sides = [cell.get('style').removeprefix('text-align:') for cell in html.find('tbody')[0]]
    assert sides == ['left', 'right', 'right', 'right']
    assert repr(Table(['a', 'bc'], [])) == 'a  bc' and 'caption' not in Table(['a'], [])._repr_html_()


def test_a_pipe_gets_plain_lines(capsys):
    "One for each tenth, none for what is soon done, none at all where diffusers is told to be quiet."
    from diffusers.utils.logging import disable_progress_bar, enable_progress_bar
    out = StringIO()
    how = dict(miniters=5, mininterval=0, bar_format='{desc}: {n_fmt}/{total_fmt}{postfix}')
    lines = Lines(range(50), 'x', file=out, **how)
    for k in lines: lines.set_postfix_str(str(k), refresh=False)
    said = out.getvalue()
    assert '\r' not in said
    assert [line.split(',')[0] for line in said.splitlines()] == [f'x: {k}/50' for k in range(5, 51, 5)]
    made = progress(range(50), 'x')
    assert isinstance(made, Lines) and made.miniters == 5 and list(made) == list(range(50))
    open_end = progress(name='x')
    open_end.update(), open_end.close()
    disable_progress_bar()
    try: assert progress(range(5)).disable
    finally: enable_progress_bar()
    assert progress(range(5), disable=True).disable and capsys.readouterr().err == ''
