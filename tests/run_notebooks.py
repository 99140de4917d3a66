"""Run notebooks from top to bottom, keep what they show, and write near the top of each what it took.

python tests/run_notebooks.py [FILE ...] (default: all)"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
MEASURED = re.compile(r'\*\*Measured\*\*[^:\n]*: \d+ s(, [\d.]+ GB)?\.')
# of the kernel, at its highest, in kB
MEMORY = 'import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'
VIEW = 'application/vnd.jupyter.widget-view+json'


def run(path):
    "Run one notebook and write it back, without progress bars and warnings; its Measured sentence is of this run."
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(MEMORY))
    start = time.monotonic()
    where = {'metadata': {'path': path.parent}}
    NotebookClient(notebook, timeout=3600, resources=where, store_widget_state=False).execute()
    seconds, memory = time.monotonic() - start, int(notebook.cells.pop().outputs[0].text)
    took = f'**Measured** on {len(os.sched_getaffinity(0))} CPU cores: {seconds:.0f} s, {memory/1e6:.1f} GB.'
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': cell.source = MEASURED.sub(took, cell.source)
        else: cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and VIEW not in o.get('data', {})]
    lines = nbformat.v4.rwbase.split_lines(notebook)
    path.write_text(json.dumps(lines, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', path], cwd=ROOT, check=True)
    print(path.name, took, flush=True)


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:] or sorted((ROOT/'nbs').rglob('*.ipynb'))): run(path.resolve())
