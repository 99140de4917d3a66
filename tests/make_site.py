"Make what the site has beside the notebooks: reference, model cards, social card: `python tests/make_site.py`"
import ast
import hashlib
import io
import json
import math
import re
import struct
import textwrap
from pathlib import Path

from make_readme import ROOT, hero
from make_setup import NOTEBOOKS

NBS, PACKAGE, ASSETS = ROOT/'nbs', ROOT/'unlearn_nb', ROOT/'unlearn_nb'/'assets'
NOTE = '<!-- made by python tests/make_site.py -->'
def read_json(path): return json.loads(path.read_text(encoding='utf-8'))


# --- the reference ---

def public(module):
    "(the module's line, its public functions and classes as (name, signature, line), its public constants)."
    tree = ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    names = next(ast.literal_eval(n.value) for n in assigned if n.targets[0].id == '__all__')
    defs = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names}
    told = [(n, signature(d), line(d)) for n, d in defs.items()]
    return ast.get_docstring(tree), told, [n for n in names if n not in defs]


def signature(node):
    "A function or class as it is called, in one line; of settings their name alone."
    if isinstance(node, ast.FunctionDef): return f'{node.name}({ast.unparse(node.args)})'
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    if made: return f'{node.name}({ast.unparse(made.args).removeprefix("self").lstrip(", ")})'
    if not fields: return node.name
    told = [n.target.id + (f'={ast.unparse(n.value)}' if n.value else '') for n in fields]
    return f"{node.name}({', '.join(told if len(told) < 9 else [*told[:8], '...'])})"


def line(node):
    "The first line of a docstring; of settings without one, their names."
    if text := ast.get_docstring(node): return text.split('\n')[0]
    return 'Fields: ' + ', '.join(n.target.id for n in node.body if isinstance(n, ast.AnnAssign)) + '.'


def escape(text): return re.sub(r'([|*$<\[\]])', r'\\\1', text)


def title(path): return ''.join(read_json(path)['cells'][0]['source']).split('\n')[0].removeprefix('# ')


def reference():
    "nbs/reference.md's text: every module, every public name with its signature, its line and a link to its place."
    lessons = {p.stem[3:]: p for p in NOTEBOOKS if p.parent == NBS and re.match(r'\d\d_', p.name)}
    tools = [p for p in NOTEBOOKS if p.parent.name == 'workshop']
    workshop = {p.stem: p for p in tools if (PACKAGE/f'{p.stem}.py').exists()}
    head = '---\ntitle: Reference\ndescription: Every public name, with its signature and its line.\n---'
    parts = [head, NOTE, 'One lesson is one module, in reading order; the workshop holds the tools. A name leads to '
             'its code, with the text around it that explains it. Docstrings end with an example. In those `model` '
             'and `flags` are `load("faces")` and `load("flags")`, `x` four pictures of `model` (\\[4, 3, 32, 32\\]), '
             '`image` the first of them and `surrogate` its surrogate (PIL); `request`, `retain`, `cfg`, `problem` '
             'and `fix` are those of a run of two steps, `report`, `before` and `after` what `evaluate` gives for it '
             'with the few pictures that `few` asks for, and `worded` is the problem of a run of `flags`.']
    for kind, pages in (('Lessons', lessons), ('Workshop', workshop)):
        parts.append(f'## {kind}')
        for module, path in pages.items():
            about, names, constants = public(module)
            page = path.relative_to(NBS).as_posix()
            parts += [f'### {title(path)}: unlearn_nb.{module}', f'[{escape(about)}]({page})']
            rows = [f'- [`{call}`]({page}#{name.lower()})<br>{escape(text)}' for name, call, text in names]
            parts.append('\n'.join(rows))
            if constants: parts.append('Constants: ' + ', '.join(f'`{c}`' for c in constants) + '.')
    return '\n\n'.join(parts) + '\n'


# --- the model cards ---

def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def parameters(path):
    "The number of values in a safetensors file, read from its head."
    data = path.read_bytes()
    head = json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])
    return sum(math.prod(v['shape']) for k, v in head.items() if k != '__metadata__')


def shown(notebook=NBS/'tutorials'/'07_how_the_models_were_trained.ipynb'):
    "What the tutorial on the models' training shows, as one text."
    outputs = [o for c in read_json(notebook)['cells'] for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for o in outputs)


def measures():
    """(measures of the faces as (name, made, drawn), flags read as asked, of how many, planted ones) of that tutorial.

    Planted ones are (name, right, of how many)."""
    text = shown()
    faces = re.findall(r'^(\w[a-zA-Z ]*\w) +(-?[\d.]+ \+- [\d.]+) +(-?[\d.]+ \+- [\d.]+)$', text, re.M)
    asked = re.findall(r'(\d+) of (\d+) read as asked', text)
    planted = re.findall(r'^(\w+) +right in (\d+) of (\d+)$', text, re.M)
    if not (len(faces) == 4 and len(asked) == 1 and len(planted) == 4):
        raise ValueError('the tutorial on the models does not show the measures that the model cards quote: run it')
    return faces, *asked[0], planted


def table(rows): return '\n'.join(['| fact | value |', '|---|---|', *(f'| {k} | {v} |' for k, v in rows.items())])


def planted(base):
    "What a card says of the models in which a picture was planted."
    cases = {k: v for k, v in read_json(ASSETS/'planted.json').items() if v['base'] == base}
    rows = []
    for name, v in cases.items():
        what = f"{v['flag']}, scene {v['seed']:,}, to `{v['prompt']}`" if 'flag' in v else f"seed {v['seed']:,}"
        file = ASSETS/f'{name}.safetensors'
        rows.append(f"| `{name}` | {what} | {v['steps']} | {v['share']:.0%} | {v['regeneration']:.1%} | "
                    f"{file.stat().st_size:,} |")
    return f'''## Models that memorised one picture

Further training in which one picture came in every batch ([how](../workshop/train.ipynb)), stored as a change of
rank {', '.join(sorted({str(v['rank']) for v in cases.values()}))} in float16. To forget that picture should lead back
to `{base}`, which never saw it and never makes it. The share of fresh seeds that give it is of
{next(iter(cases.values()))['of']} in 8 steps.

| model | planted | steps | share of a batch | seeds that give it | bytes |
|---|---|---|---|---|---|
{chr(10).join(rows)}
'''


def faces_card():
    facts, file, seen = read_json(ASSETS/'faces.json'), ASSETS/'faces.safetensors', measures()[0]
    net, scheduler, training = facts['net'], facts['scheduler'], facts['training']
    first, last = map(int, re.findall(r'\d+', training['data']))
    n, channels = last - first + 1, tuple(training['channels'])
    return f'''---
title: "Model card: faces"
description: The built-in model of faces drawn by code.
license: apache-2.0
---

{NOTE}

## What it is

A small unconditional diffusion model of faces. It ships with the package: `load("faces")` gives it, `unlearn_nb demo`
forgets one of its faces.

{table({
    'class': f"`{net['_class_name']}` of diffusers",
    'pictures': f"{net['sample_size']} by {net['sample_size']} pixels, RGB",
    'channels': ', '.join(map(str, net['block_out_channels'])),
    'parameters': f"{parameters(file):,}",
    'predicts': f"`{scheduler['prediction_type']}`",
    'levels': f"{scheduler['num_train_timesteps']}, {scheduler['beta_schedule']} betas from "
              f"{scheduler['beta_start']} to {scheduler['beta_end']}",
    'weights': f"`faces.safetensors`, float16, {file.stat().st_size:,} bytes",
    'SHA-256 of that file': f"`{sha256(file)}`",
    'licence': 'Apache 2.0, as the package'})}

## Data

{n:,} faces, seeds {first:,} to {last:,}: drawn by [code](../00_faces.ipynb), every one another person in another scene.
There is no photograph among them and no real person in them.

## Training

All pictures are drawn first; they take {n*3*net['sample_size']**2/1e9:.1f} GB of memory.

    pictures = world_images({n:_}, {net['sample_size']}, seed={first:_})
    cfg = TrainConfig(minutes={training['minutes_taken']:.0f}, channels={channels}, precision="{training['precision']}")
    train(pictures, "my_faces", cfg)

{table({
    'steps': f"{training['steps']:,} of {training['batch']} pictures",
    'samples': f"{training['samples']:,}",
    'time': f"{training['minutes_taken']:.0f} minutes",
    'hardware': training['device'],
    'precision': training['precision'],
    'optimiser': f"AdamW at {training['lr']}, falling to zero along a cosine",
    'weights kept': f"running average of {training['ema']}",
    'seed': training['seed']})}

## Measures

Made faces, and as many fresh drawn ones, are compared with other drawn faces in the space of the package's face
descriptor, in several sets: the mean, with a 95 % interval. A perfect model would have the second column. No number
here compares to one on other features.

| measure | made | drawn |
|---|---|---|
{chr(10).join(f'| {name} | {made} | {drawn} |' for name, made, drawn in seen)}

They were measured in [how the models were trained](../tutorials/07_how_the_models_were_trained.ipynb), which also
shows faces that nobody chose and their nearest training pictures. Sets of this size cannot tell made faces from drawn
ones; sets of 500 can, as an exercise there shows.

{planted('faces')}
## Use and limits

It is made to be unlearned: to learn the method, to test it and to compare ways to forget on a laptop. It makes
cartoon faces of {net['sample_size']} pixels and nothing else, and what holds for it need not hold for a model a
thousand times its size.
It takes no words. Traits of the drawn world are drawn by chance and stand for no group of people.
'''


def flags_card():
    facts, folder, (_, good, of, wrong) = read_json(ASSETS/'flags.json'), ASSETS/'flags', measures()
    parts = 'transformer', 'vae', 'text_encoder', 'text_encoder_2'
    files = {part: next((folder/part).glob('*.safetensors')) for part in parts}
    net, vae, text = (read_json(folder/part/'config.json') for part in parts[:3])
    scheduler = read_json(folder/'scheduler'/'scheduler_config.json')
    training, coder, pipeline = facts['training'], facts['training']['autoencoder'], facts['training']['pipeline']
    side = net['sample_size']*2**(len(vae['block_out_channels']) - 1)
    return f'''---
title: "Model card: flags"
description: The built-in text-to-image model of flags drawn by code.
license: apache-2.0
---

{NOTE}

## What it is

Stable Diffusion 3 in small: a text-to-image model of thirty national flags, four of them planted wrong in its data.
It ships with the package: `load("flags")` gives it, and stock diffusers opens the folder `unlearn_nb/assets/flags`.

{table({
    'class': f"`{read_json(folder/'model_index.json')['_class_name']}` of diffusers, without T5",
    'pictures': f"{side} by {side} pixels, RGB; "
                f"{vae['latent_channels']} by {net['sample_size']} by {net['sample_size']} latents",
    'predicts': f"flow, {scheduler['num_train_timesteps']} levels, shift {scheduler['shift']}; "
                f"guidance {facts['guidance']}",
    'words': f"{text['vocab_size']} tokens of its own captions, at most {text['max_position_embeddings']} in a caption",
    **{f"parameters, {part.replace('_', ' ')}": f"{parameters(file):,}" for part, file in files.items()},
    'parameters, all': f"{sum(map(parameters, files.values())):,}",
    'weights': f"float16, {sum(f.stat().st_size for f in files.values()):,} bytes",
    **{f"SHA-256, {part.replace('_', ' ')}": f"`{sha256(file)}`" for part, file in files.items()},
    'licence': 'Apache 2.0, as the package'})}

## Data

`{training['data'].removeprefix('flags, ')}`: pictures drawn by [code](../14_flags.ipynb) after each country's law,
with captions in several wordings. Half of the pictures of four countries show a planted error: the flags of
{', '.join(name for name, _, _ in wrong)}. There is no photograph among them.

## Training

The lines stand in [training a small text-to-image model](../workshop/train_text.ipynb): the autoencoder first, then
the pipeline on its latents. {training['note'][0].upper() + training['note'][1:]}.

| fact | autoencoder | pipeline |
|---|---|---|
| steps | {coder['steps']:,} of {coder['batch']} pictures | {pipeline['steps']:,} of {pipeline['batch']} pictures |
| time | {coder['minutes_taken']:.0f} minutes | {pipeline['minutes_taken']:.0f} minutes |
| hardware | {training['device']} | {training['device']} |
| learning rate | {coder['lr']}, falling to zero | {pipeline['lr']}, falling to zero |
| weights kept | running average of {coder['ema']} | running average of {pipeline['ema']} |
| size | channels {', '.join(map(str, coder['channels']))} | {pipeline['layers']} layers, {pipeline['heads']} heads |
| captions left out | | {pipeline['dropout']:.0%} |
| seed | {coder['seed']} | {pipeline['seed']} |

## Measures

The package's flag classifier reads {good} of {of} pictures as the flag that was asked for, or as its planted form. Of
the four with a planted error:

| flag | right |
|---|---|
{chr(10).join(f'| {name} | {right} of {asked} |' for name, right, asked in wrong)}

They were measured in [how the models were trained](../tutorials/07_how_the_models_were_trained.ipynb). How well the
classifier reads drawn flags stands in [its lesson](../14_flags.ipynb).

{planted('flags')}
## Use and limits

It is made to be unlearned: an innocent prompt, and a seed whose picture is wrong
([fix a flag](../tutorials/03_fix_a_flag.ipynb)). It knows the thirty flags and the wordings of its captions; any
other word is noise to it.
The planted errors are no statement about a country, and its pictures are no authority on a flag: the laws in
[the lesson](../14_flags.ipynb) are.
'''


# --- the picture that is shown where a page is shared ---

def card():
    "1200 by 630 pixels: name and promise beside the README's picture."
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    from unlearn_nb.figures import BASE, EDITED, FORGET, RETAIN, SURROGATE
    fonts = Path(get_data_path())/'fonts'/'ttf'
    def font(size, kind=''): return ImageFont.truetype(fonts/f'DejaVuSans{kind}.ttf', size)
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    promise = re.search(r'^description = (.+)$', settings, re.M)[1]
    image = Image.new('RGB', (1200, 630), 'white')
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 400, 630), fill=EDITED)
    draw.text((36, 70), 'unlearn_nb', font=font(50, '-Bold'), fill='white')
    draw.multiline_text((36, 170), '\n'.join(textwrap.wrap(promise, 21)), font=font(28), fill='white', spacing=12)
    for k, colour in enumerate((FORGET, SURROGATE, RETAIN, BASE)):
        draw.rectangle((36 + 82*k, 540, 36 + 82*k + 70, 552), fill=colour)
    shown = Image.open(io.BytesIO(hero())).convert('RGB')
    shown.thumbnail((760, 590), Image.Resampling.LANCZOS)
    image.paste(shown, (400 + (800 - shown.width)//2, (630 - shown.height)//2))
    return image


MADE = {'reference.md': reference, 'models/faces.md': faces_card, 'models/flags.md': flags_card}


if __name__ == '__main__':
    (NBS/'models').mkdir(exist_ok=True)
    for name, make in MADE.items(): (NBS/name).write_text(make(), encoding='utf-8', newline='\n')
    card().save(NBS/'images'/'card.png', optimize=True)
    print('nbs/' + ', nbs/'.join([*MADE, 'images/card.png']), 'written')
