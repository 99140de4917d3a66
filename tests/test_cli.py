"The command: what it writes, and what it says to bad input."
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from unlearn_nb.cli import cli, main
from unlearn_nb.hotfix import Hotfix
from unlearn_nb.zoo import load

FILES = ["before_after.png", "card.json", "hotfix.safetensors", "report.json"]


def fails(capsys, *args):
    "The one sentence on stderr of a command that ends with exit code 2."
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and err.startswith("unlearn_nb: ") and "\n" not in err and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A demo of two steps: whole in everything but its length."
    out = tmp_path_factory.mktemp("cli") / "demo"
    main(["demo", "--seed", "101", "--steps", "2", "--out", str(out)])
    return out


def test_demo_writes_all_four_files(demo):
    assert sorted(p.name for p in demo.iterdir()) == FILES and not list(demo.parent.glob(".*"))
    report, card = (json.loads((demo / name).read_text()) for name in ("report.json", "card.json"))
    assert report["schema"] == 1 and report["requests"][0]["seed"] == 101 and report["config"]["steps"] == 2
    assert [row["t"] for row in report["forget"]["reconstruction"]] == [100, 250, 400]
    assert card["base"] == report["base"] and card["base"]["id"] == "faces"
    with Image.open(demo / "before_after.png") as image: assert min(image.size) > 400
    model = load("faces")
    Hotfix.load(demo).apply(model)


def test_sample_with_and_without_the_hotfix(demo, tmp_path):
    for name, more in (("base", []), ("edited", ["--hotfix", demo])):
        main([str(a) for a in ["sample", "--model", "faces", *more, "--seeds", "101,5", "--steps", 5, "--out", tmp_path/f"{name}.png"]])
    a, b = (np.asarray(Image.open(tmp_path/f"{n}.png")).astype(int) for n in ("base", "edited"))
    assert a.shape == b.shape == (128, 256, 3) and (a != b).any()


def test_forget_a_picture_with_a_surrogate_of_ones_own_in_a_model_of_ones_own(tmp_path):
    from test_unlearn import request_of, tiny
    from diffusers import DDPMPipeline
    model = tiny()
    r = request_of(model)
    DDPMPipeline(model.net, model.scheduler).save_pretrained(tmp_path/"model")
    r.image.save(tmp_path/"f.png")
    r.surrogate.save(tmp_path/"s.png")
    main([str(a) for a in ["forget", "--model", tmp_path/"model", "--image", tmp_path/"f.png", "--surrogate", tmp_path/"s.png", "--steps", 1, "--out", tmp_path/"fix"]])
    assert sorted(p.name for p in (tmp_path/"fix").iterdir()) == FILES
    assert json.loads((tmp_path/"fix/report.json").read_text())["forget"]["same_seed"] is None
    main([str(a) for a in ["sample", "--model", tmp_path/"model", "--hotfix", tmp_path/"fix", "--seeds", "0:2", "--steps", 2, "--out", tmp_path/"x.png"]])


def test_one_request_on_top_of_another_and_a_lora_and_a_checkpoint(tmp_path):
    "A second hotfix knows what it lies on and what must stay forgotten; a run that was complete but for its report goes on from its checkpoint, which then goes."
    from diffusers import DDPMPipeline

    from test_unlearn import tiny
    model = tiny()
    DDPMPipeline(model.net, model.scheduler).save_pretrained(tmp_path/"model")
    def forget(*args): main([str(a) for a in ["forget", "--model", tmp_path/"model", "--steps", 2, "--cache", tmp_path/"kept", *args]])
    forget("--seed", 1, "--out", tmp_path/"one")
    forget("--seed", 2, "--hotfix", tmp_path/"one", "--rank", 2, "--checkpoint", tmp_path/"state", "--out", tmp_path/"two")
    first, second = (Hotfix.load(tmp_path/name) for name in ("one", "two"))
    assert second.card["on"] == [first.id] and second.card["base"] == first.card["base"] and any("lora_A" in k for k in second.delta)
    assert [row["seed"] for row in json.loads((tmp_path/"two/report.json").read_text())["earlier"]] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "model", "one", "two"] and len(list((tmp_path/"kept").iterdir())) == 4   # 64 paths and the pool, without and with the first hotfix
    grids = {}
    for name, fixes in (("none", []), ("both", ["one", "two"]), ("second", ["two"])):
        more = [a for f in fixes for a in ("--hotfix", tmp_path/f)]
        main([str(a) for a in ["sample", "--model", tmp_path/"model", *more, "--seeds", "0:4", "--steps", 3, "--out", tmp_path/f"{name}.png"]])
        grids[name] = np.asarray(Image.open(tmp_path/f"{name}.png"))
    assert (grids["none"] != grids["both"]).any() and (grids["both"] != grids["second"]).any()


def test_the_built_in_flags(tmp_path, capsys):
    "Which flag a picture shows is what the report compares by; all flags are kept; the hotfix is a LoRA."
    flags, prompt = load("flags"), "a photo of the flag of ireland"
    flags.decode(flags.sample([1], 4, prompt=prompt))[0].rotate(180).save(tmp_path/"other.png")
    main(["forget", "--model", "flags", "--seed", "1", "--prompt", prompt, "--surrogate", str(tmp_path/"other.png"), "--steps", "1", "--out", str(tmp_path/"fix")])
    out, err = capsys.readouterr()
    card = json.loads((tmp_path/"fix/card.json").read_text())
    assert "written to" in out and "descriptor" not in err and card["base"]["id"] == "flags" and card["config"]["rank"] > 0
    assert card["requests"][0]["prompt"] == prompt and all(k.startswith("transformer.") for k in load_file(tmp_path/"fix/hotfix.safetensors"))


def test_forget_and_sample_a_model_with_words(tmp_path, capsys):
    from small_pipelines import pipeline
    pipeline("sd3").save_pretrained(tmp_path/"model")
    Image.new("RGB", (16, 16), "red").save(tmp_path/"s.png")
    def run(*args): main([str(a) for a in args])
    run("forget", "--model", tmp_path/"model", "--seed", 3, "--prompt", "red flag", "--keep", "a", "--surrogate", tmp_path/"s.png", "--steps", 1, "--rank", 2, "--cache", tmp_path/"kept", "--out", tmp_path/"fix")
    assert sorted(p.name for p in (tmp_path/"fix").iterdir()) == FILES and "face descriptor" in capsys.readouterr().err
    assert json.loads((tmp_path/"fix/card.json").read_text())["requests"][0]["prompt"] == "red flag" == json.loads((tmp_path/"fix/report.json").read_text())["requests"][0]["prompt"]
    grids = {}
    for name, more in (("base", []), ("edited", ["--hotfix", tmp_path/"fix"])):
        run("sample", "--model", tmp_path/"model", *more, "--prompt", "red flag", "--seeds", "3,4", "--steps", 4, "--out", tmp_path/f"{name}.png")
        grids[name] = np.asarray(Image.open(tmp_path/f"{name}.png")).astype(int)
    assert grids["base"].shape == (128, 256, 3) and (grids["base"] != grids["edited"]).any()
    assert "pictures of words" in fails(capsys, "sample", "--model", tmp_path/"model", "--out", tmp_path/"x.png")
    assert "pictures of words" in fails(capsys, "forget", "--model", tmp_path/"model", "--seed", 1, "--surrogate", tmp_path/"s.png", "--out", tmp_path/"o")
    assert "without words" in fails(capsys, "forget", "--model", tmp_path/"model", "--seed", 1, "--prompt", "a", "--out", tmp_path/"o") and not (tmp_path/"o").exists()
    assert "without words" in fails(capsys, "forget", "--model", "faces", "--seed", 1, "--prompt", "a", "--out", tmp_path/"o")


@pytest.mark.parametrize("args, says", [
    ("demo --steps 0", "0"), ("demo --seed -1", "-1"), ("demo --seed x", "x"), ("demo --colour red", "--colour"), ("dance", "dance"),
    ("forget --model faces --out {}/o", "--seed or --image"), ("forget --model faces --seed 1 --image a.png --out {}/o", "--seed or --image"),
    ("forget --model nobody --seed 1 --out {}/o", "nobody"), ("forget --model {} --seed 1 --out {}/o", "unet"),
    ("forget --model faces --image {}/none.png --out {}/o", "none.png"), ("forget --model faces --image {}/text.png --out {}/o", "text.png"),
    ("forget --model faces --image {}/large.png --out {}/o", "64 x 64"), ("forget --model faces --image {}/right.png --surrogate {}/large.png --out {}/o", "surrogate is 64 x 64"),
    ("forget --model faces --seed 1 --out {}/full", "not an empty folder"), ("forget --model faces --seed 1 --out {}/text.png/o", "text.png"),
    ("forget --model faces --seed 1 --out {}/no/such/o", "no folder"), ("forget --model faces --seed 1", "--out"),
    ("sample --model faces --seeds 4:1 --out {}/o.png", "4:1"), ("sample --model faces --seeds -3 --out {}/o.png", "-3"), ("sample --model faces --out {}/o.gif", ".png"),
    ("sample --model faces --hotfix {} --out {}/o.png", "card.json"), ("sample --model faces --steps 0 --out {}/o.png", "0"),
    ("forget --model faces --seed 1 --rank -1 --out {}/o", "-1"), ("forget --model faces --seed 1 --hotfix {}/empty --out {}/o", "card.json"),
    ("forget --model faces --seed 1 --cache {}/text.png --out {}/o", "text.png"), ("forget --model faces --seed 1 --checkpoint {}/no/such/state --out {}/o", "folder that does not exist"),
    ("train --data {}/empty --out {}/o --minutes 1", "empty"), ("train --data faces --out {}/full --minutes 1", "full"), ("train --data faces --out {}/o --minutes 0", "0"),
    ("train --data faces --size 30 --out {}/o --minutes 1", "30"),
    ("leaderboard --methods nobody --out {}/o", "nobody"), ("leaderboard --seeds 200:202 --out {}/o", "200"), ("leaderboard --seeds x --out {}/o", "x"), ("leaderboard --budget 0 --out {}/o", "0"),
    ("leaderboard --out {}/full", "no board"), ("leaderboard --out {}/no/such/o", "no folder"), ("leaderboard --model nobody --out {}/o", "nobody")])
def test_bad_input_is_one_sentence_and_leaves_nothing(args, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "empty"): (tmp_path/name).mkdir()
    (tmp_path/"full/keep").write_text("keep")
    (tmp_path/"text.png").write_text("no picture")
    for name, side in (("large", 64), ("right", 32)): Image.new("RGB", (side, side)).save(tmp_path/f"{name}.png")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert says in fails(capsys, *args.replace("{}", str(tmp_path)).split())
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["empty", "full"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a suite in the background may have it ignored
    p = subprocess.Popen([sys.executable, "-c", "from unlearn_nb.cli import main; main()", "demo", "--steps", "1000", "--out", str(tmp_path/"o")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=listen)
    try:
        for line in p.stdout:
            if line.startswith("2/4"): break
        time.sleep(1)
        assert list(tmp_path.iterdir())          # it is at work in a folder of another name
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 130
    finally: p.kill()
    assert not list(tmp_path.iterdir())


def test_a_board_from_the_command_line(tmp_path, monkeypatch, capsys):
    "Names with blanks, a folder to go on with; what is written is what the room writes."
    asked = []
    def fake(denoiser, folder, methods, seeds, tuning, budget, echo):
        asked.append((denoiser.name, folder.name, list(methods), list(seeds), list(tuning), budget))
        (folder/"rows").mkdir(parents=True, exist_ok=True)
        return {}
    monkeypatch.setattr("unlearn_nb.baselines.leaderboard", fake)
    for _ in range(2): main(["leaderboard", "--methods", "ours, SISS at t=999", "--seeds", "100:102", "--tuning", "200,201", "--budget", "3", "--out", str(tmp_path/"board")])
    assert asked == [("faces", "board", ["ours", "SISS at t=999"], [100, 101], [200, 201], 3)]*2 and "written to" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_of_every_command(command, capsys):
    "It says what the command does in a line of the list, and ends with an example that the command understands."
    main([command, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: unlearn_nb {command}") and "see Config" not in out and max(map(len, out.splitlines())) <= 80
    example = shlex.split(out.strip().rpartition("\n  Example: unlearn_nb ")[2])
    assert example[0] == command and cli.commands[command].make_context(command, example[1:])
    main(["--help"])
    assert [l for l in capsys.readouterr().out.splitlines() if l.startswith(f"  {command} ") and l.endswith(".") and not l.endswith("...")]


def test_help_names_the_defaults_of_config(capsys):
    from unlearn_nb.unlearn import Config
    for command in ("demo", "forget"):
        main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert f"Updates of the weights. [default: ({Config().steps}" in out
    assert f"({Config().steps}; for 'flags' {Config.flags().steps})" in out and f"({Config().rank}; for 'flags' and Stable Diffusion 3 {Config.flags().rank})" in out
    assert Config.t4().steps == Config.sd3().steps == Config().steps and Config.sd3().rank == Config.flags().rank


def test_python_m_is_the_command():
    by_module, by_name = (subprocess.run([*command, "--help"], capture_output=True, text=True) for command in ([sys.executable, "-m", "unlearn_nb"], [Path(sys.executable).parent/"unlearn_nb"]))
    assert by_module.returncode == by_name.returncode == 0 and by_module.stdout == by_name.stdout != "" == by_module.stderr
