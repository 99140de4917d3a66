"""The studio in JupyterLab, in a real browser, with a mouse and a keyboard.

The whole way: from the gallery to the hotfix that comes off again."""
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from PIL import Image

from conftest import ROOT
from unlearn_nb.hotfix import Hotfix

pytestmark = pytest.mark.browser
PATIENCE = 60_000   # ms, for what takes a few seconds on a machine that is not busy
PICTURES = """async () => {
    const coded = bytes => btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''))
    const bytes = async e => new Uint8Array(await (await fetch(e.src)).arrayBuffer())
    const visible = [...document.querySelectorAll('.jp-OutputArea img.widget-image')].filter(e => e.offsetParent)
    return Promise.all(visible.map(async e => coded(await bytes(e)))) }"""
CELL = """from unlearn_nb.files import fingerprint
from unlearn_nb.studio import studio
from unlearn_nb.unlearn import Config

cfg = Config(steps=80, forget_batch=2, retain_batch=2, retain_images=2, near_images=0, sampling_steps=5, damping=0.,
             lr=1e-3, pool=32)
view = studio("faces", seed=100, cfg=cfg)
base = fingerprint(view.studio.model)
view"""
WIDER = """() => {   // what stands out at the right of the output of the notebook
    const out = document.querySelector('.jp-OutputArea-output.jupyter-widgets-view, .jp-OutputArea-output')
    const edge = Math.min(out.getBoundingClientRect().right, innerWidth) + 1
    const shown = [...out.querySelectorAll('*')].filter(e => e.offsetParent && e.getBoundingClientRect().width)
    const wide = shown.filter(e => e.getBoundingClientRect().right > edge && !e.closest('.noUi-target'))
    const able = e => /auto|scroll/.test(getComputedStyle(e).overflowX)
    const scrolls = shown.filter(e => e.scrollWidth > e.clientWidth + 1 && able(e))
    return [...wide, ...scrolls].map(e => `${e.tagName} ${e.className}`.slice(0, 80)) }"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def settings_of_lab(folder):
    "No news, no look for updates; another theme if LAB_THEME says so."
    theme = os.environ.get("LAB_THEME", "JupyterLab Light")
    for name, settings in (("notification", {"fetchNews": "false", "checkForUpdates": False}),
                           ("themes", {"theme": theme})):
        file = folder/"@jupyterlab/apputils-extension"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))


@pytest.fixture
def lab(tmp_path):
    """JupyterLab with settings of its own, in an empty folder with one notebook.

    (address, folder, where its kernels leave their addresses)"""
    folder, home, port = tmp_path/"work", tmp_path/"home", free_port()
    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)],
                                        metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(notebook, folder/"play.ipynb")
    settings_of_lab(home/"lab/user-settings")
    places = {"HOME": home, "JUPYTER_CONFIG_DIR": home/"config", "JUPYTER_DATA_DIR": home/"data",
              "JUPYTER_RUNTIME_DIR": home/"runtime", "IPYTHONDIR": home/"ipython",
              "JUPYTERLAB_SETTINGS_DIR": home/"lab/user-settings",
              "JUPYTERLAB_WORKSPACES_DIR": home/"lab/workspaces", "PYTHONPATH": ROOT}
    env = os.environ | {k: str(v) for k, v in places.items()} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with open(tmp_path/"lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try: urllib.request.urlopen(f"{address}/api", timeout=5)
            except OSError: time.sleep(.1)
            else: break
            assert server.poll() is None, (tmp_path/"lab.log").read_text()
        yield address, folder, home/"runtime"
    finally:
        server.terminate()   # and with it its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 700, "height": 1400})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


class Reader:
    "Somebody who reads and clicks in the output of the notebook's cell."
    def __init__(self, page, shots): self.page, self.out, self.shots = page, page.locator(".jp-OutputArea"), shots
    def said(self): return self.out.locator(".widget-html b").first.inner_text()
    def reads(self, text): self.out.get_by_text(re.compile(text)).first.wait_for(state="visible", timeout=180_000)

    def button(self, name):
        exactly = re.compile(rf"^\s*{re.escape(name)}\s*$")   # before it stands its icon
        return self.out.locator("button:visible").filter(has_text=exactly)

    def click(self, name): self.button(name).click()
    def tab(self, name): self.out.get_by_role("tab", name=name).click()
    def field(self, name): return self.out.get_by_label(name, exact=True)

    def press(self, name, *keys):
        "Press keys on the first handle of a slider."
        slider = self.out.locator(".widget-hslider").filter(has_text=name)
        handle = slider.locator(".noUi-handle, .ui-slider-handle").first   # of ipywidgets 8, of 7
        for key in keys: handle.press(key)

    def pictures(self):
        "What the visible images show."
        return [Image.open(BytesIO(b64decode(data))).convert("RGB") for data in self.page.evaluate(PICTURES)]

    def changes(self, k, act):
        "Do it, and wait until visible picture k is another one: before, after."
        was = self.pictures()[k].tobytes()
        act()
        until(lambda: self.pictures()[k].tobytes() != was, f"picture {k} does not change")

    def shot(self, name):
        "A picture of the cell's output; nothing in it is wider than the page."
        assert not (wide := self.page.evaluate(WIDER)), (name, wide)
        self.out.first.screenshot(path=self.shots/f"{name}.png")


def until(true, what, seconds=PATIENCE/1000):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(.2)


class Kernel:
    "The notebook's kernel, asked from outside, while the page is open."
    def __init__(self, runtime):
        [file] = runtime.glob("kernel-*.json")
        self.client = BlockingKernelClient(connection_file=str(file))
        self.client.load_connection_file()
        self.client.start_channels()

    def __call__(self, expression):
        message = self.client.execute_interactive("", silent=True, user_expressions={"x": expression},
                                                  timeout=PATIENCE/1000)
        answer = message["content"]["user_expressions"]["x"]
        assert answer["status"] == "ok", answer
        return answer["data"]["text/plain"]


def opened(page, lab):
    "The notebook, alone on the page, with its cell run and the studio's first pictures made: (reader, kernel)."
    address, folder, runtime = lab
    shots = Path(os.environ.get("SCREENSHOTS", folder.parent))
    page.goto(f"{address}/doc/tree/play.ipynb?reset")
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('li[data-command="runmenu:run-all"]').click()
    reader = Reader(page, shots)
    reader.reads("choose the picture to forget")
    return reader, Kernel(runtime)


def paints(page, reader, kernel):
    "By a click, a drag, and keys."
    reader.field("mask").select_option("brush")
    reader.reads("no cell is on")
    cells = reader.out.locator("button[title^='row ']:visible")
    assert cells.count() == 144
    cells.nth(5*12 + 2).click()
    until(lambda: kernel("sum(map(sum, view.board.rows))") == "1", "a click does not paint")
    boxes = [cells.nth(6*12 + k).bounding_box() for k in (2, 9)]
    (x, y), (x2, _) = ((b["x"] + b["width"]/2, b["y"] + b["height"]/2) for b in boxes)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x2, y, steps=40)
    page.mouse.up()
    until(lambda: kernel("view.board.rows[6]") == str([2 <= k < 10 for k in range(12)]), "a drag does not paint")
    cells.nth(7*12 + 3).focus()
    for key in ("ArrowRight", "ArrowDown", "Space"): page.keyboard.press(key)
    until(lambda: kernel("view.board.rows[8][4]") == "True", "the keyboard does not paint")
    assert kernel("view.studio.mask.getbbox() is not None") == "True"


def test_the_whole_path(page, lab, tmp_path):
    reader, kernel = opened(page, lab)
    folder = lab[1]
    reader.tab("4 run")   # too early
    reader.click("run")
    reader.reads("no picture is chosen yet")

    reader.tab("1 model")
    reader.shot("1_model")
    reader.field("model").select_option("my own: a folder, or from the hub")
    reader.field("name").fill("nobody/nothing")
    reader.click("load")
    reader.reads("neither a local folder nor in the cache")

    reader.tab("2 picture")
    reader.changes(0, lambda: reader.click("show others"))
    reader.reads("seeds 108 to 115")
    reader.click("forget 109")
    reader.reads("seed 109 is to be forgotten")
    Image.new("RGB", (90, 60), "#4080c0").save(tmp_path/"mine.png")
    with page.expect_file_chooser() as chooser: reader.click("a file (0)")
    chooser.value.set_files(tmp_path/"mine.png")
    reader.reads("its middle of 60 x 60 was cut out")
    reader.shot("2_picture")
    assert kernel("view.studio.seed") == "109"   # nothing is taken that nobody took

    reader.tab("3 surrogate")
    reader.changes(0, lambda: reader.press("across", "ArrowLeft", "ArrowLeft"))
    reader.changes(0, lambda: reader.field("mask").select_option("rectangle"))
    paints(page, reader, kernel)
    reader.click("make the surrogate")
    until(lambda: len(reader.pictures()) == 2, "no surrogate is shown")
    reader.reads("similarity")
    reader.shot("3_brush")
    reader.field("mask").select_option("ellipse")
    reader.changes(1, lambda: reader.click("make the surrogate"))
    reader.shot("3_surrogate")

    reader.tab("4 run")
    reader.out.get_by_text("settings, for those who know them").click()
    reader.changes(0, lambda: reader.press("weight", "ArrowLeft"))
    assert kernel("view.studio.cfg.weight") == "'p2'"
    reader.click("run")
    reader.reads(r"what must stay \(1 of 4\): \d+ s left")
    reader.reads(r"unlearning \(2 of 4\), step [2-9]\d* of 80: \d+ s left")
    until(lambda: len(reader.pictures()) == 3, "no preview is shown")
    steps = int(kernel("len(view.studio.log)"))   # the kernel answers while it works
    assert steps < int(kernel("view.studio.cfg.steps")) and kernel("view.worker.thread.is_alive()") == "True"
    assert reader.button("run").is_disabled()
    reader.shot("4_running")
    reader.click("stop")
    reader.reads("stopped; the model is as it was")
    assert kernel("fingerprint(view.studio.model) == base, view.studio.hotfix") == "(True, None)"

    reader.press("steps", "Home", *["ArrowRight"]*4)
    until(lambda: kernel("view.studio.cfg.steps") == "5", "the slider does not move the steps")
    reader.click("run")
    reader.reads(r"report \(4 of 4\): \d+ s left")
    reader.reads("this hotfix is kept|apply the hotfix, or save it")
    reader.reads("fresh seeds")   # of the verdicts
    reader.shot("5_result")
    the_result(page, reader, kernel, folder)


def the_result(page, reader, kernel, folder):
    "Apply, remove, the seam, the report, save."
    off = reader.pictures()[0].tobytes()
    reader.changes(0, lambda: reader.click("apply"))
    reader.reads("the hotfix is ON")
    assert kernel("fingerprint(view.studio.model) == base, view.studio.applied") == "(False, True)"
    assert kernel("[x.tobytes() for x in view.studio.now] == [x.tobytes() for x in view.studio.after]") == "True"
    reader.shot("5_on")
    reader.click("remove")
    reader.reads("the base is back")
    until(lambda: reader.pictures()[0].tobytes() == off, "the row of now does not go back")
    assert kernel("fingerprint(view.studio.model) == base, view.studio.applied") == "(True, False)"

    reader.out.get_by_text("look closer").click()
    for key in ("Home", "End"): reader.changes(1, lambda: reader.press("seam", key))
    reader.changes(1, lambda: reader.field("picture").select_option("110"))
    reader.field("folder").fill("mine")
    reader.click("save")
    reader.reads("written to mine, which may be given away .* mine-private, which must be kept")
    assert Hotfix.load(folder/"mine").card["config"]["weight"] == "p2"
    for name in ("mine.zip", "report.html"):
        with page.expect_download() as download: reader.out.get_by_text(f"download {name}").click()
        if name == "mine.zip": names = zipfile.ZipFile(download.value.path()).namelist()
    assert sorted(names) == ["card.json", "hotfix.safetensors", "report.html", "report.json"]
    reader.shot("5_end")
    page.set_viewport_size({"width": 1200, "height": 1400})
    reader.shot("5_wide")
    for wrong in (page.locator('[data-mime-type="application/vnd.jupyter.stderr"]'), page.get_by_text("Traceback")):
        assert not wrong.count()
