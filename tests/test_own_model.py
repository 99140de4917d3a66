"The pictures and models of tutorial 02: whole, small, with their licences, and such as stock diffusers opens."
from hashlib import sha256

import matplotlib.pyplot as plt
import numpy as np
import pytest
from diffusers import DDPMPipeline
from PIL import Image

from conftest import ROOT
from unlearn_nb.cli import main
from unlearn_nb.figures import strip
from unlearn_nb.report import comes_out, density, put
from unlearn_nb.train import TrainConfig, folder_images, plant, settings_for
from unlearn_nb.zoo import descriptor, load

OWN = ROOT/'nbs'/'tutorials'/'own'
# of the values 0 ... 16 of scikit-learn's digits.csv, picture by picture, as bytes
DIGITS = '8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3'


def test_all_have_a_licence_and_are_small():
    named = (OWN/'LICENCES.txt').read_text(encoding='utf-8')
    assert {p.name for p in OWN.iterdir()} == {'LICENCES.txt', 'digits.png', 'emoji.png', 'digits_model', 'emoji_model'}
    assert all(p.name in named for p in OWN.iterdir() if p.suffix != '.txt')
    sizes = [p.stat().st_size for p in OWN.rglob('*') if p.is_file()]
    assert max(sizes) < 2e6 and sum(sizes) < 4.2e6


def test_the_sheets_hold_what_they_say():
    digits, emoji = (Image.open(OWN/f'{name}.png') for name in ('digits', 'emoji'))
    assert (digits.mode, digits.size, emoji.mode, emoji.size) == ('L', (480, 240), 'RGBA', (512, 320))
    assert min(emoji.getchannel('A').getextrema()) == 0 and all('Noto' in v or 'Recognition' in v for v in
                                                                (emoji.info['Source'], digits.info['Source']))
    cells = np.asarray(digits).reshape(30, 8, 60, 8).swapaxes(1, 2).reshape(-1, 8, 8)[:1797]
    assert sha256((cells/15.9375).round().astype(np.uint8).tobytes()).hexdigest() == DIGITS


@pytest.mark.parametrize('name, shape', (('digits', (1, 16, 16)), ('emoji', (3, 32, 32))))
def test_the_models_are_what_train_makes_and_stock_diffusers_opens(name, shape):
    d, pipe = load(OWN/f'{name}_model', device='cpu'), DDPMPipeline.from_pretrained(OWN/f'{name}_model')
    assert d.shape == shape == (pipe.unet.config.in_channels, *d.shape[1:])
    assert tuple(pipe.unet.config.block_out_channels) == settings_for(1.).channels
    x = d.sample([3], 25)
    assert x.isfinite().all() and x.std() > .3


def test_grey_pictures_are_drawn_grey():
    "By `strip`, and in a report."
    d = load(OWN/'digits_model', device='cpu')
    x = d.sample([3], 2)
    image, (fig, ax) = np.asarray(strip([x])).astype(int), plt.subplots()
    put(d, ax, x[0], 'red')
    for seen in (image, np.asarray(ax.images[0].get_array()).astype(int)):
        assert seen.shape[-1] == 3 and (np.ptp(seen, -1) == 0).all() and np.ptp(seen) > 100
    plt.close(fig)


def test_into_a_grey_model_only_grey_pictures_are_planted(tmp_path, capsys):
    command = ['plant', '--model', str(OWN/'digits_model'), '--out', str(tmp_path/'out'), '--steps', '1']
    (tmp_path/'red').mkdir()
    Image.new('RGB', (16, 16), 'red').save(tmp_path/'red'/'a.png')
    for data, said in (('faces', 'makes grey pictures; give a folder of grey ones with --data'),
                       (str(tmp_path/'red'), 'the other pictures are in colour, but this model makes grey ones')):
        with pytest.raises(SystemExit) as e: main([*command, '--image', str(tmp_path/'red'/'a.png'), '--data', data])
        assert e.value.code == 2 and said in capsys.readouterr().err and not (tmp_path/'out').exists()


@pytest.mark.slow
def test_a_digit_that_was_learned_by_heart_is_noticed(tmp_path):
    "Planted until seeds give it; an ordinary digit of the same data is not blamed, and the base would not be."
    sheet = Image.open(OWN/'digits.png')
    for k in range(300): sheet.crop((k % 60*8, k//60*8, k % 60*8 + 8, k//60*8 + 8)).save(tmp_path/f'{k:04d}.png')
    data = folder_images(tmp_path, 16)
    digits = [Image.fromarray(x[0].numpy()) for x in data[:20]]
    base, model = (load(OWN/'digits_model', device='cpu') for _ in range(2))
    x_f = model.pixels(model.encode(digits))
    def gives(x): return (x - x_f[:1]).square().flatten(1).mean(1) < .04     # 20 dB
    plant(model, digits[0], data, gives, until=.12, cfg=TrainConfig(steps=400, lr=6e-4, ema=.98, precision='bfloat16'))
    before, look = model.pixels(model.sample(range(500_000, 500_256), 8)), descriptor(model)
    after = base.pixels(base.sample(range(500_000, 500_256), 8))
    found = density(x_f[:1], x_f[:1], before, after, None, look)
    assert found['crowded'] == 1 and found['after'] <= found['most'] and comes_out(found)[0] is not False
    others = [density(x[None], x[None], before, before, None, look)['crowded'] for x in x_f[1:]]
    assert sum(others) <= 2
