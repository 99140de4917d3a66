"The command: what it writes, and what it says to bad input."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from small_pipelines import pipeline
from test_hotfix import noisy, secrets_of
from test_train import ONE_MACHINE
from test_unlearn import tiny
from unlearn_nb import zoo
from unlearn_nb.cli import SAID, cli, in_progress, main, new_folders, run_of, sampled_rows, sentence, tidy, words_of
from unlearn_nb.hotfix import Hotfix, card, private_folder, read_receipt
from unlearn_nb.metrics import check_pictures
from unlearn_nb.states import Request
from unlearn_nb.unlearn import PRESETS, Config, whole

PUBLIC = ["card.json", "hotfix.safetensors", "report.html", "report.json"]
PRIVATE = ["before_after.png", "forget_1.png", "receipt.json", "report.html", "report.json", "surrogate_1.png"]


def run(*args): main([str(a) for a in args])


def fails(capsys, *args):
    "The one sentence on stderr of a command that ends with exit code 2."
    with pytest.raises(SystemExit) as e: run(*args)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and err.startswith("unlearn_nb: ") and "\n" not in err and "Traceback" not in err, err
    return err


def read(file): return json.loads(Path(file).read_text())
def names(folder): return sorted(p.name for p in folder.iterdir())
def request_in(folder): return read_receipt(private_folder(folder)).requests[0]


def sampled(out, *args, seeds="101,5"):
    "The pictures that `sample` writes, as numbers."
    run("sample", *args, "--seeds", seeds, "--steps", 4, "--out", out)
    with Image.open(out) as image: return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "The folder of an untrained model of 8 x 8 pixels."
    folder, net = tmp_path_factory.mktemp("cli")/"model", tiny()
    DDPMPipeline(net.net, net.scheduler).save_pretrained(folder)
    return folder


def fake_audit(monkeypatch):
    "Instead of the audit: two rows at once; returns the list of what was asked."
    asked = []
    def fake(denoiser, hotfix, request, never, describe, attacks, quick, watch):
        asked.append((denoiser.name, request.seed, never, attacks, quick))
        watch("A1 reconstruction", 0, 1)
        return {"attacks": [{"name": "A1 reconstruction", "kind": "file", "verdict": "leaks", "score": .123},
                            {"name": "A8 word search", "verdict": "n/a: the model takes no words"}], "verdict": "leaks"}
    monkeypatch.setattr("unlearn_nb.audit.audit", fake)
    monkeypatch.setattr("unlearn_nb.audit.table", lambda result: "the table")
    monkeypatch.setattr("unlearn_nb.audit.figure", lambda result: Image.new("RGB", (8, 8)))
    return asked


# --- whole runs ---

def test_the_whole_path(model, tmp_path, capsys, monkeypatch):
    "Forget what a seed gives, with a surrogate of one's own: hotfix, card, report, picture; then sample with it."
    noisy(1).save(tmp_path/"s.png")
    run("forget", "--model", model, "--seed", 987654321, "--surrogate", tmp_path/"s.png", "--steps", 2,
        "--out", tmp_path/"fix")
    assert names(tmp_path/"fix") == PUBLIC and names(tmp_path/"fix-private") == PRIVATE
    assert names(tmp_path) == ["fix", "fix-private", "s.png"]   # nothing hidden is left
    said = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in said[:4]] == ["1/4 ", "2/4 ", "3/4 ", "4/4 "]
    assert said[-2].startswith("to give away: ") and said[-1].startswith("to keep: ")
    for line, files in zip(said[-2:], (PUBLIC, PRIVATE)): assert ", ".join(files) in line
    report, card = read(tmp_path/"fix-private/report.json"), read(tmp_path/"fix/card.json")
    assert report["config"]["steps"] == 2 and request_in(tmp_path/"fix").steps == Config().sampling_steps
    assert [row["t"] for row in report["forget"]["reconstruction"]] == [100, 250, 400, 550]
    assert card["base"] == report["base"] and card["base"]["id"] == str(model)
    fake_audit(monkeypatch)
    pages = [(tmp_path/name/"report.html") for name in ("fix", "fix-private")]
    before = [page.read_text().count("<img") for page in pages]
    for _ in range(2): run("audit", tmp_path/"fix")   # the second one takes the first one's place
    assert [page.read_text().count("<img") for page in pages] == [before[0], before[1] + 1]
    assert all("A1 reconstruction" in page.read_text() for page in pages)
    assert [read(page.with_name("report.json"))["audit"]["attacks"][1]["verdict"] for page in pages] == [
        "n/a", "n/a: the model takes no words"]
    public, secrets = b"".join(p.read_bytes() for p in (tmp_path/"fix").iterdir()), read_receipt(tmp_path/"fix-private")
    assert not [secret for secret in secrets_of(secrets) if secret in public]
    with Image.open(tmp_path/"fix-private/before_after.png") as image: assert min(image.size) > 400
    Hotfix.load(tmp_path/"fix").apply(zoo.load(str(model), device="cpu"))
    base = sampled(tmp_path/"base.png", "--model", model)
    edited = sampled(tmp_path/"edited.png", "--model", model, "--hotfix", tmp_path/"fix")
    assert base.shape == edited.shape == (128, 256, 3) and (base != edited).any()


@pytest.mark.slow
def test_demo(tmp_path):
    "Of two steps: whole in everything but its length."
    run("demo", "--seed", 101, "--steps", 2, "--out", tmp_path/"demo")
    assert names(tmp_path/"demo") == PUBLIC and names(tmp_path) == ["demo", "demo-private"]
    card = read(tmp_path/"demo/card.json")
    assert card["base"]["id"] == "faces" and request_in(tmp_path/"demo").seed == 101 and card["config"]["steps"] == 2
    more = "--model", "faces", "--hotfix", tmp_path/"demo"
    assert (sampled(tmp_path/"a.png", *more) != sampled(tmp_path/"b.png", *more[:2])).any()


@pytest.mark.slow
def test_a_picture_that_came_as_a_file(model, tmp_path, capsys):
    "It has no seed; under a second hotfix it stays forgotten by its receipt; without that a note says that it may not."
    for name in ("red", "blue"): Image.new("RGB", (8, 8), name).save(tmp_path/f"{name}.png")
    common = "forget", "--model", model, "--surrogate", tmp_path/"blue.png", "--steps", 1
    run(*common, "--image", tmp_path/"red.png", "--out", tmp_path/"one")
    assert read(tmp_path/"one-private/report.json")["forget"]["same_seed"] is None
    run("verify", tmp_path/"one", tmp_path/"one-private", "--model", model)
    assert "there is no seed" in capsys.readouterr().out
    on_top = *common, "--seed", 1, "--hotfix", tmp_path/"one"
    def earlier(out): return read(private_folder(tmp_path/out)/"report.json")["earlier"]
    run(*on_top, "--out", tmp_path/"two")
    assert "stays forgotten" not in capsys.readouterr().err and len(earlier("two")) == 1
    (tmp_path/"one-private").rename(tmp_path/"safe")
    run(*on_top, "--receipt", tmp_path/"safe", "--out", tmp_path/"three")
    assert "stays forgotten" not in capsys.readouterr().err and len(earlier("three")) == 1
    assert Hotfix.load(tmp_path/"two").id == Hotfix.load(tmp_path/"three").id
    run(*on_top, "--out", tmp_path/"four")
    assert "stays forgotten" in capsys.readouterr().err and earlier("four") == []


def test_our_best_is_our_default(tmp_path, monkeypatch):
    "The demo runs the default, and the results that the tutorial shows were made with it."
    class Seen(Exception): pass
    def fake(denoiser, requests, retain, cfg, **kw): raise Seen(cfg)
    monkeypatch.setattr("unlearn_nb.unlearn.unlearn", fake)
    monkeypatch.setattr("unlearn_nb.states.default_retain", lambda *args, **kw: [])
    with pytest.raises(Seen) as seen: run("demo", "--out", tmp_path/"demo")
    assert seen.value.args == (Config(),)
    rows = read(zoo.ASSETS/"benchmark.json")
    shown = {(row["kind"], row.get("name")): row["config"] for row in rows}
    made = {("parts", "as it is"): Config(), ("steps", 50): Config(), ("stack", None): whole(Config())}
    made |= {("joint", n): Config().many(n) for n in (1, 2, 4, 8, 16)}
    assert {k: shown[k] for k in made} == {k: vars(cfg) for k, cfg in made.items()}


def test_an_earlier_request_is_read_and_not_made_again(model, tmp_path, monkeypatch):
    "Picture, seed, steps and prompt come from the receipt, whatever this run's own number of steps is."
    d, asked = zoo.load(str(model)), []
    image = d.decode(d.sample([5], 3))[0]
    request = Request(image, Image.new("RGB", (8, 8)), 5, None, 3, (7,))
    settings = SimpleNamespace(steps=0, sampling_steps=50)
    delta = {k: torch.zeros(v.shape).half() for k, v in d.net.named_parameters()}
    Hotfix(delta, *card(d, [request], settings, [], 0., tiny)).save(tmp_path/"one")
    class Seen(Exception): pass
    def fake(denoiser, requests, retain, cfg, earlier, **kw):
        asked.extend(earlier)
        raise Seen
    monkeypatch.setattr("unlearn_nb.unlearn.unlearn", fake)
    monkeypatch.setattr("unlearn_nb.states.default_retain", lambda *args, **kw: [])
    with pytest.raises(Seen):
        run("forget", "--model", model, "--seed", 1, "--hotfix", tmp_path/"one", "--out", tmp_path/"two")
    assert [(r.seed, r.steps, r.copies, r.image.tobytes()) for r in asked] == [(5, 3, (7,), image.tobytes())]
    assert names(tmp_path) == ["one", "one-private"]


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    "The folder of two hotfixes, `one` and `other`, with their receipts; nothing in them but their cards is true."
    home, d = tmp_path_factory.mktemp("two"), zoo.load(str(model))
    for name, seed in (("one", 5), ("other", 6)):
        delta = {"conv_in.bias": torch.full(d.net.conv_in.bias.shape, seed / 2 ** 12).half()}
        request = Request(d.decode(d.sample([seed], 3))[0], Image.new("RGB", (8, 8)), seed, None, 3)
        Hotfix(delta, *card(d, [request], SimpleNamespace(steps=0), [], 0., tiny)).save(home/name)
    return home


def test_verify_says_which_request_a_hotfix_answers(two, model, tmp_path, capsys):
    run("verify", two/"one", two/"one-private", "--model", model)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "request 1: the commitment on the card matches" and "seed 5" in second and "byte for byte" in second
    assert "NOT" not in second
    with pytest.raises(SystemExit) as e: run("verify", two/"one", two/"other-private")
    assert e.value.code == 1 and capsys.readouterr().out == "request 1: the commitment on the card does NOT match\n"
    assert "holds no receipt" in fails(capsys, "verify", two/"one", two/"one")
    assert "made for the base" in fails(capsys, "verify", two/"one", two/"one-private", "--model", "faces")
    shutil.copytree(two/"one-private", tmp_path/"hurt")
    shutil.copy(two/"other-private"/"forget_1.png", tmp_path/"hurt"/"forget_1.png")
    assert "not the picture" in fails(capsys, "verify", two/"one", tmp_path/"hurt")


def test_merge_makes_one_of_two(two, tmp_path, capsys):
    run("merge", two/"one", two/"other", "--out", tmp_path/"both")
    assert "2 hotfixes as one, 2 commitments in all" in capsys.readouterr().out
    run("verify", tmp_path/"both", tmp_path/"both-private")
    assert capsys.readouterr().out.count("matches") == 2
    assert Hotfix.load(tmp_path/"both").card["merged"] == [Hotfix.load(two/name).id for name in ("one", "other")]
    shutil.copytree(two/"one", tmp_path/"lone")
    merge = "merge", tmp_path/"lone", two/"other", "--out", tmp_path/"again"
    assert "needs the receipts of all" in fails(capsys, *merge)
    assert "exists" in fails(capsys, *merge[:4], tmp_path/"both")
    assert "two hotfixes or more" in fails(capsys, "merge", two/"one", "--out", tmp_path/"again")
    assert names(tmp_path) == ["both", "both-private", "lone"]
    run(*merge, "--receipt", two/"one-private")
    assert names(tmp_path) == ["again", "again-private", "both", "both-private", "lone"]


def test_audit_fills_both_reports(two, tmp_path, capsys, monkeypatch):
    "Numbers into the private one, a word for each attack into the public one."
    for name in ("one", "one-private"): shutil.copytree(two/name, tmp_path/name)
    (tmp_path/"one-private/report.json").write_text('{"passed": true}')
    asked = fake_audit(monkeypatch)
    run("audit", tmp_path/"one", "--attacks", "A1, A8", "--quick")
    out, err = capsys.readouterr()
    assert "1/1  A1 reconstruction" in out and "the table" in out and "pictures of other seeds" in err
    assert asked == [(read(two/"one"/"card.json")["base"]["id"], 5, None, ["A1", "A8"], True)]
    public, private = (read(tmp_path/name/"report.json") for name in ("one", "one-private"))
    assert private["passed"] and private["audit"]["attacks"][0]["score"] == .123
    assert public == {"audit": {"verdict": "leaks", "attacks": [
        {"name": "A1 reconstruction", "verdict": "leaks"}, {"name": "A8 word search", "verdict": "n/a"}]}}
    assert "is not that of the hotfix" in fails(capsys, "audit", tmp_path/"one", "--receipt", two/"other-private")


def test_receipts_that_do_not_belong_are_refused(two, model, tmp_path, capsys):
    forget = "forget", "--model", model, "--seed", 1, "--hotfix", two/"one", "--out", tmp_path/"o"
    assert "belongs to none" in fails(capsys, *forget, "--receipt", two/"other-private")
    for name in ("one", "other-private"): shutil.copytree(two/name, tmp_path/name)
    (tmp_path/"other-private").rename(tmp_path/"one-private")
    beside = *forget[:5], "--hotfix", tmp_path/"one", "--out", tmp_path/"o"
    assert "is not that of the hotfix" in fails(capsys, *beside)
    assert names(tmp_path) == ["one", "one-private"]


@pytest.mark.slow
def test_one_request_on_top_of_another_and_a_lora_and_a_checkpoint(model, tmp_path):
    "A second hotfix knows what it lies on and what must stay forgotten; the checkpoint of a run that is done goes."
    forget = partial(run, "forget", "--model", model, "--steps", 2, "--cache", tmp_path/"kept")
    forget("--seed", 1, "--out", tmp_path/"one")
    forget("--seed", 2, "--hotfix", tmp_path/"one", "--rank", 2, "--checkpoint", tmp_path/"state",
           "--out", tmp_path/"two")
    first, second = (Hotfix.load(tmp_path/name) for name in ("one", "two"))
    assert second.card["on"] == [first.id] and second.card["base"] == first.card["base"]
    assert any("lora_A" in k for k in second.delta)
    assert [row["seed"] for row in read(tmp_path/"two-private/report.json")["earlier"]] == [1]
    assert names(tmp_path) == ["kept", "one", "one-private", "two", "two-private"]
    assert len(names(tmp_path/"kept")) == 4   # of the base beneath both: 64 paths, the pool, near paths of each
    none, both, alone = (
        sampled(tmp_path/"x.png", "--model", model, *(a for name in fixes for a in ("--hotfix", tmp_path/name)))
        for fixes in ((), ("one", "two"), ("two",)))
    assert (none != both).any() and (both != alone).any()


@pytest.mark.slow
def test_a_model_with_words(tmp_path, capsys):
    model, fix = tmp_path/"model", tmp_path/"fix"
    pipeline("sd3").save_pretrained(model)
    Image.new("RGB", (16, 16), "red").save(tmp_path/"s.png")
    red = "--model", model, "--prompt", "red flag"
    run("forget", *red, "--seed", 3, "--keep", "a", "--surrogate", tmp_path/"s.png", "--steps", 1, "--rank", 2,
        "--cache", tmp_path/"kept", "--out", fix)
    assert names(fix) == PUBLIC and "own features" in capsys.readouterr().err
    assert request_in(fix).prompt == "red flag"
    for name in ("card", "report"): assert "red flag" not in (fix/f"{name}.json").read_text()
    base, edited = sampled(tmp_path/"a.png", *red), sampled(tmp_path/"b.png", *red, "--hotfix", fix)
    assert base.shape == (128, 256, 3) and (base != edited).any()


def test_classes_are_asked_for_by_number():
    "--class N, or --prompt with the number; whatever else is asked, the option that asked is named."
    classes = SimpleNamespace(prompts={"0": 0}, others=("0", "1", "2"))
    guided, words = SimpleNamespace(prompts={"": 0}, others=("0", "1")), SimpleNamespace(prompts={"": 0}, others=("",))
    assert [words_of(classes, number=2), words_of(classes, "1"), words_of(guided, ""), words_of(words, "a")] == [
        "2", "1", "", "a"] and words_of(SimpleNamespace(prompts={})) is None
    for asked, says in (((classes,), "of classes, 0 to 2; give --class N"), ((classes, None, 3), "--class '3' was"),
                        ((classes, "red"), "--prompt 'red' was given"), ((classes, ""), "--prompt '' was given"),
                        ((classes, "x", None, "--keep"), "--keep 'x' was given"), ((words,), "give --prompt WORDS"),
                        ((words, None, 1), "--class was given, but"), ((words, "a", 1), "not both")):
        with pytest.raises(ValueError, match=says): words_of(*asked)


@pytest.mark.slow
def test_the_built_in_flags(tmp_path, capsys):
    "Which flag a picture shows is what the report compares by; all flags are kept; the hotfix is a LoRA."
    flags, prompt = zoo.load("flags"), "a photo of the flag of ireland"
    flags.decode(flags.sample([1], 4, prompt=prompt))[0].rotate(180).save(tmp_path/"other.png")
    run("forget", "--model", "flags", "--seed", 1, "--prompt", prompt, "--surrogate", tmp_path/"other.png",
        "--steps", 1, "--out", tmp_path/"fix")
    out, err = capsys.readouterr()
    card = read(tmp_path/"fix/card.json")
    assert "written to" in out and "descriptor" not in err and card["base"]["id"] == "flags"
    assert card["config"]["rank"] == PRESETS["transformer"]["rank"] and request_in(tmp_path/"fix").prompt == prompt
    assert all(k.startswith("transformer.") for k in load_file(tmp_path/"fix/hotfix.safetensors"))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a suite in the background may have it ignored
    command = [sys.executable, "-m", "unlearn_nb", "demo", "--steps", "1000", "--out", tmp_path/"o"]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        for line in p.stdout:
            if line.startswith("2/4"): break
        time.sleep(1)
        assert list(tmp_path.iterdir())          # it is at work in a folder of another name
        p.send_signal(signal.SIGINT)
        assert p.communicate(timeout=60)[1].splitlines()[-1].startswith("unlearn_nb: stopped; nothing was written")
        assert p.returncode == 130
    finally: p.kill()
    assert not list(tmp_path.iterdir())


def test_a_board(tmp_path, monkeypatch, capsys):
    "Names with blanks, a folder to go on with; what is written is what the module writes."
    asked = []
    def fake(denoiser, folder, methods, blocks, seeds, tuning, planted, budget, echo):
        asked.append((denoiser.name, folder.name, list(methods), blocks, list(seeds), list(tuning), planted, budget))
        (folder/"rows").mkdir(parents=True, exist_ok=True)
        return {}
    monkeypatch.setattr("unlearn_nb.leaderboard.leaderboard", fake)
    for _ in range(2):
        run("leaderboard", "--methods", "ours, SISS at t=999", "--seeds", "100:102", "--tuning", "200,201",
            "--budget", 3, "--blocks", "our keeping,everything", "--planted", "planted-2", "--out", tmp_path/"board")
    assert asked == [("faces", "board", ["ours", "SISS at t=999"], ["our keeping", "everything"], [100, 101],
                      [200, 201], ["planted-2"], 3)]*2
    assert "written to" in capsys.readouterr().out


def test_single_pictures_can_be_named(model, tmp_path, capsys, monkeypatch):
    "`sample --each` writes them at the model's size; the command that it gives forgets just that picture."
    sampling = "sample", "--model", model, "--seeds", "7,5", "--steps", 9
    run(*sampling, "--each", tmp_path/"each", "--out", tmp_path/"all.png")
    said = capsys.readouterr().out
    assert names(tmp_path/"each") == ["seed_5.png", "seed_7.png"] and "--sampling-steps 9" in said
    with Image.open(tmp_path/"all.png") as sheet: assert sheet.size == (256, 128)
    class Seen(Exception): pass
    def fake(denoiser, requests, retain, cfg, **kw): raise Seen(requests[0], cfg)
    monkeypatch.setattr("unlearn_nb.unlearn.unlearn", fake)
    monkeypatch.setattr("unlearn_nb.states.default_retain", lambda *args, **kw: [])
    command = shlex.split(said.rpartition("`unlearn_nb ")[2].rpartition("`")[0].replace("NAME", str(tmp_path/"o")))
    with pytest.raises(Seen) as seen: run(*command)
    request, cfg = seen.value.args
    with Image.open(tmp_path/"each"/"seed_7.png") as image: assert image.tobytes() == request.image.tobytes()
    assert (request.seed, request.steps, cfg.sampling_steps) == (7, 9, 9)
    before, _ = (tmp_path/"each"/"seed_5.png").read_bytes(), capsys.readouterr()
    assert "holds seed_5.png already" in fails(capsys, *sampling[:4], "5,6", "--each", tmp_path/"each")
    assert names(tmp_path/"each") == ["seed_5.png", "seed_7.png"]
    assert (tmp_path/"each"/"seed_5.png").read_bytes() == before


def test_a_dry_run_says_what_a_run_takes(model, tmp_path, capsys, monkeypatch):
    "It writes nothing, and its exit code says whether the run fits."
    noisy(1).save(tmp_path/"s.png")
    dry = "forget", "--model", model, "--seed", 5, "--surrogate", tmp_path/"s.png", "--dry-run", "--out", tmp_path/"o"
    run(*dry, "--steps", 7, "--checkpoint", tmp_path/"c", "--cache", tmp_path/"k")
    said = capsys.readouterr().out
    for word in ("seed 5 gives in 25 steps", "7 steps of 12 + 20 states", "time: about", "FLOP", "memory: ", "disk: ",
                 "it fits; nothing was written"): assert word in said
    monkeypatch.setattr("unlearn_nb.cli.trial", lambda run: dict.fromkeys(
        ("step", "state", "once", "step flops", "state flops", "hotfix", "checkpoint"), 1e5))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1e5))
    with pytest.raises(SystemExit) as e: run(*dry)
    assert e.value.code == 1 and "it does not fit: too little disk" in capsys.readouterr().out
    monkeypatch.setattr("unlearn_nb.cli.held", lambda: 1e18)
    with pytest.raises(SystemExit) as e: run(*dry)
    assert e.value.code == 1 and "too little memory and disk" in capsys.readouterr().out
    assert names(tmp_path) == ["s.png"]


@pytest.mark.slow
def test_a_dry_run_counts_what_a_run_does(model, tmp_path, monkeypatch):
    "The states that the net samples: what the dry run says, and what a run does, within a sixth."
    counted, load = [], zoo.load
    def counting(*args, **kw):
        d = load(*args, **kw)
        def count(net, args, out): counted.append(0 if torch.is_grad_enabled() else len(args[0]))
        d.net.register_forward_hook(count)
        return d
    said = sampled_rows(run_of(model=str(model), seed=5, sampling_steps=10), dict(seed=5, image=None, surrogate=None))
    monkeypatch.setattr(zoo, "load", counting)
    run("forget", "--model", model, "--seed", 5, "--steps", 5, "--sampling-steps", 10, "--out", tmp_path/"o")
    assert abs(said - sum(counted)) < sum(counted) / 6


def test_what_a_killed_run_left_is_named(model, tmp_path, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (each := tmp_path/"board").mkdir(), (each/"rows").mkdir()
    old, alive = each/f".x.json.{gone.pid}.part", each/f".x.json.{os.getpid()}.part"
    for file in (old, alive, each/".hidden"): file.write_text("half")
    tidy(each, None)
    assert names(each) == sorted([alive.name, ".hidden", "rows"]) and old.name in capsys.readouterr().err
    old.write_text("half")
    in_progress(each)   # who only looks removes nothing
    assert old.exists() and old.name in capsys.readouterr().err
    for name, files in (("o", ["card.json"]), ("p", []), ("q", None)):   # killed late, early, not at all
        part = tmp_path/f".{name}.part"
        if files is not None: part.mkdir()
        for file in files or (): (part/file).write_text("half")
        with new_folders(tmp_path/name) as folder: (folder/"a").write_text("a")
        assert (part.name in capsys.readouterr().err) == (files is not None) and names(tmp_path/name) == ["a"]


# --- two folders, whole or not at all ---

def test_two_folders_appear_together(tmp_path):
    out = tmp_path/"o"
    with new_folders(out) as part:
        (part/"a").write_text("a"), (private_folder(part)/"b").write_text("b")
        assert not out.exists() and not private_folder(out).exists()
        with pytest.raises(ValueError, match="another run writes"):   # a second run is refused before it begins
            with new_folders(out): pass
        assert names(part) == ["a"]
    assert names(tmp_path) == ["o", "o-private"] and names(out) == ["a"] and names(private_folder(out)) == ["b"]
    if os.name == "posix": assert private_folder(out).stat().st_mode & 0o777 == 0o700


def test_what_was_put_in_the_place_meanwhile_costs_nothing(tmp_path):
    out = tmp_path/"o"
    with pytest.raises(ValueError, match="the result is whole and lies in"):
        with new_folders(out) as part:
            (part/"a").write_text("a")
            out.mkdir(), (out/"foreign").write_text("x")
    assert names(part) == ["a"] and names(out) == ["foreign"]


KILLED = """
import os, signal, sys
from pathlib import Path
from unlearn_nb import cli
place, seen = cli.place, []
def until(*args):   # killed after so many of the two folders have their names
    if len(seen) == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    seen.append(args), place(*args)
cli.place = until
with cli.new_folders(sys.argv[1]) as part:
    for folder in (part, part.with_name(part.name + "-private")): (folder/"file").write_text("x")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.slow
def test_killed_between_the_folders(tmp_path, capsys):
    "Nothing public without what proves it; the next run goes over what was left hidden, or says what is in its way."
    for done in (0, 1):
        out = tmp_path/str(done)
        killed = subprocess.run([sys.executable, "-c", KILLED, out, str(done)], capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not out.exists()
        assert private_folder(out).exists() == bool(done)
    with new_folders(tmp_path/"0") as part: assert names(part) == []
    assert ".0.part" in capsys.readouterr().err   # it says what it removed
    said = fails(capsys, "forget", "--model", "faces", "--seed", 1, "--out", tmp_path/"1")
    assert "1-private" in said and "not an empty folder" in said


# --- bad input ---

BAD = [line.split(" | ") for line in """
demo --steps 0 | 0
demo --seed -1 | -1
demo --seed x | x
demo --seed 9223372036854775808 | 9223372036854775808
demo --colour red | --colour
demo --out {}/taken | taken-private
dance | dance
forget --model faces --out {}/o | --seed or --image
forget --model faces --seed 1 --image a.png --out {}/o | --seed or --image
forget --model faces --seed 1 | --out
forget --model nobody --seed 1 --out {}/o | nobody
forget --model {} --seed 1 --out {}/o | unet
forget --model {}/text.png --seed 1 --out {}/o | text.png
forget --model {}/empty --seed 1 --out {}/o | empty
forget --model faces --image {}/none.png --out {}/o | none.png
forget --model faces --image {}/empty --out {}/o | empty
forget --model faces --image {}/text.png --out {}/o | text.png
forget --model faces --image {}/zero.png --out {}/o | zero.png
forget --model faces --image {}/half.png --out {}/o | half.png
forget --model faces --image {}/large.png --out {}/o | --image '{}/large.png' is 64 x 64
forget --model faces --image {}/right.png --surrogate {}/large.png --out {}/o | --surrogate '{}/large.png' is 64 x 64
forget --model faces --image {}/right.png --surrogate {}/none.png --out {}/o | none.png
forget --model faces --image {}/right.png --surrogate {}/right.png --out {}/o | is the picture to forget
forget --model faces --seed 1 --prompt a --out {}/o | leave it out
forget --model faces --seed 1 --class 1 --out {}/o | --class '1' was given, but this model
forget --model faces --seed 1 --keep a --out {}/o | --keep 'a' was given, but this model
forget --model faces --seed 1 --out {}/full | not an empty folder
forget --model faces --seed 1 --out {}/text.png/o | text.png
forget --model faces --seed 1 --out {}/no/such/o | no folder
forget --model faces --seed 1 --out {}/link | is a link
forget --model faces --seed 1 --out {}/nowhere | is a link
forget --model faces --seed 1 --out {}/taken | taken-private
forget --model faces --seed 1 --out . | not an empty folder
forget --model faces --seed 1 --rank -1 --out {}/o | -1
forget --model faces --seed 1 --rank 10000 --out {}/o | --rank 10000 is more than
forget --model faces --seed 1 --lr 0 --out {}/o | --lr
forget --model faces --seed 1 --sampling-steps 0 --out {}/o | --sampling-steps
forget --model faces --seed 1 --hotfix {}/empty --out {}/o | card.json
forget --model faces --seed 1 --hotfix {}/started --out {}/o | .started.part
forget --model faces --seed 1 --receipt {}/empty --out {}/o | receipt.json
forget --model faces --seed 1 --cache {}/text.png --out {}/o | text.png
forget --model faces --seed 1 --cache {}/o/kept --out {}/o | the run itself writes
forget --model faces --seed 1 --checkpoint {}/no/such/state --out {}/o | folder that does not exist
forget --model faces --seed 1 --checkpoint {}/bare/state --out {}/bare | the run itself writes
forget --model faces --seed 1 --checkpoint {}/o --out {}/o | the run itself writes
forget --model faces --seed 1 --checkpoint {}/o-private --out {}/o | the run itself writes
forget --model faces --seed 1 --checkpoint {}/text.png --out {}/o | is no checkpoint
forget --model faces --seed 1 --checkpoint {}/empty --out {}/o | empty
forget --model faces --seed 1 --dry-run --out {}/full | not an empty folder
forget --model faces --seed 1 --descriptor eyes --out {}/o | 'eyes'
forget --model faces --seed 1 --descriptor sscd:{}/none --out {}/o | none
forget --model faces --seed 1 --mask box:1,2,3 --out {}/o | mask 'box:1,2,3' does not name four numbers
forget --model faces --seed 1 --mask box:.8,0,.1,1 --out {}/o | covers nothing
forget --model faces --seed 1 --mask {}/none.png --out {}/o | none.png
forget --model faces --seed 1 --mask {}/text.png --out {}/o | text.png
forget --model faces --seed 1 --mask {}/right.png --out {}/o | is dark everywhere
forget --model flags --seed 1 --surrogate {}/large.png --out {}/o | give --prompt WORDS, or --prompt ""
forget --model flags --seed 1 --prompt a --class 1 --out {}/o | not both
forget --model flags --seed 1 --class 1 --out {}/o | give --prompt WORDS
verify {}/full {}/full | card.json
verify {}/started {}/full | .started.part
verify {} | RECEIPT
audit {}/full | card.json
audit {}/full --receipt {}/full | card.json
audit {}/full --attacks A99 | --attacks 'A99' is not known; expected some of A1
audit {}/full --attacks , | --attacks ''
audit {}/full --attacks a1,A1 | twice
audit {}/full --attacks A1,A1 | twice
merge {}/full --out {}/o | card.json
merge --out {}/o | HOTFIXES
sample --model faces --seeds 0:4 | give --out FILE, for a sheet
sample --model flags --out {}/o.png | give --prompt WORDS, or --prompt ""
sample --model faces --prompt a --out {}/o.png | --prompt 'a' was given, but this model
sample --model faces --seeds 4:1 --out {}/o.png | 4:1
sample --model faces --seeds -3 --out {}/o.png | -3
sample --model faces --seeds 1,1 --out {}/o.png | twice
sample --model faces --seeds 1.5 --out {}/o.png | 1.5
sample --model faces --seeds 0:99999999999 --out {}/o.png | are 99999999999 seeds; give 10000 at most
sample --model faces --seeds 9223372036854775808 --out {}/o.png | 9223372036854775808
sample --model faces --out {}/o.gif | .png
sample --model faces --out {}/no/such/o.png | no folder
sample --model faces --out {}/folder.png | is a folder
sample --model faces --each {}/text.png | is a file
sample --model faces --each {}/no/such | no folder
sample --model faces --each {}/seen | holds seed_7.png already
sample --model faces --hotfix {} --out {}/o.png | card.json
sample --model faces --steps 0 --out {}/o.png | 0
train --data {}/empty --out {}/o --minutes 1 | empty
train --data {}/text.png --out {}/o --minutes 1 | text.png
train --data faces --out {}/full --minutes 1 | full
train --data faces --out {}/no/such/o --minutes 1 | no folder
train --data faces --out {}/o --minutes 0 | 0
train --data faces --out {}/o --minutes nan | --minutes nan
train --data faces --out {}/o --minutes inf | --minutes inf
train --data faces --size 30 --out {}/o --minutes 1 | 30
plant --out {}/o | --image or --seed
plant --image {}/right.png --seed 1 --out {}/o | --image or --seed
plant --image {}/large.png --out {}/o | --image '{}/large.png' is 64 x 64
plant --image {}/none.png --out {}/o | none.png
plant --seed 1 --model flags --out {}/o | makes pictures of words
plant --seed 1 --until 1 --out {}/o | --until
plant --seed 1 --data {}/empty --out {}/o | empty
plant --seed 1 --out {}/full | not an empty folder
plant --seed 1 --out {}/no/such/o | no folder
leaderboard --methods nobody --out {}/o | --methods 'nobody' is not known; expected some of naive
leaderboard --methods ours,ours --out {}/o | twice
leaderboard --methods ours, --out {}/o | --methods ''
leaderboard --blocks nothing --out {}/o | --blocks 'nothing' is not known; expected some of as published
leaderboard --planted faces --out {}/o | --planted 'faces' is not known; expected some of planted-1
leaderboard --seeds 200:202 --out {}/o | the seed 200 is in --tuning and in --seeds
leaderboard --seeds x --out {}/o | --seeds 'x'
leaderboard --tuning x --out {}/o | --tuning 'x'
leaderboard --budget 0 --out {}/o | 0
leaderboard --out {}/full | no board
leaderboard --out {}/no/such/o | no folder
leaderboard --model nobody --out {}/o | nobody
leaderboard --model flags --out {}/o | makes pictures of words
bench --model nobody | nobody""".strip().splitlines()]


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load", lru_cache(zoo.load))   # a refusal leaves the model as it was
    for name in ("full", "empty", "bare", "taken-private", ".started.part", "folder.png", "seen"):
        (tmp_path/name).mkdir()
    for name in ("full/keep", "taken-private/keep", "text.png", "seen/seed_7.png"): (tmp_path/name).write_text("keep")
    (tmp_path/"link").symlink_to("empty"), (tmp_path/"nowhere").symlink_to("o")
    for name, side in (("large", 64), ("right", 32)): Image.new("RGB", (side, side)).save(tmp_path/f"{name}.png")
    whole = (tmp_path/"large.png").read_bytes()
    (tmp_path/"zero.png").write_bytes(b""), (tmp_path/"half.png").write_bytes(whole[:len(whole) // 2])
    def state(): return {p: p.is_file() and p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    before = state()
    for args, says in BAD:
        args, says = (text.replace("{}", str(tmp_path)) for text in (args, says))
        assert says in fails(capsys, *args.split()), args
        assert state() == before, args


def test_a_sentence_arrives_whole():
    "Whatever stands in it; only the number of an error of the system says nothing to people."
    with pytest.raises(ValueError, match="expected .B, 3, H, W") as e: check_pictures(np.zeros((2, 1, 8, 8)))
    brackets = "[a, b] cannot be described; expected [B, 3, H, W] in [-1, 1]"
    for error, said, code in ((ValueError(brackets), brackets, 2), (e.value, str(e.value), 2),
                              (ValueError("[Errno 28] is said here"), "[Errno 28] is said here", 2),
                              (OSError(28, "No space left on device"), "No space left on device", 2),
                              (FileNotFoundError(2, "a] b"), "a] b", 2), (OSError("no number"), "no number", 2),
                              (OSError(13, "'x' could not be written", ".x.part"), "'x' could not be written", 2),
                              (OSError(13, "Permission denied", "/x"), "Permission denied: '/x'", 2),
                              (ConnectionError("no network"), "no network", 2),
                              (FloatingPointError("nan"), "nan", 1), (click.UsageError("how"), "how", 2),
                              (ValueError("give that; leave the prompt out"), "give that; leave --prompt out", 2)):
        assert sentence(error) == (said, code)
    said, code = sentence(click.Abort())
    assert said.startswith("stopped; ") and code == 130


def test_what_is_said_in_other_words_is_said_somewhere():
    "Each phrase in the words of Python stands in a module, so that the list does not outlive them."
    source = " ".join(re.sub(r'"\s+f?"|\s+', " ", p.read_text()) for p in (ROOT/"unlearn_nb").glob("*.py")
                      if p.name != "cli.py")
    source = re.sub(r"\s+", " ", source)
    for python, option in SAID:
        assert python in source.replace("'", "").replace('" "', "") or python in source, python
        assert "--" in option and "`" not in option


def test_full_memory_is_a_sentence(tmp_path, capsys, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                  torch.OutOfMemoryError("CUDA out of memory")):
        def full(*args, error=error, **kw): raise error
        monkeypatch.setattr("unlearn_nb.zoo.load", full)
        with pytest.raises(SystemExit) as e: run("sample", "--model", "faces", "--out", tmp_path/"x.png")
        assert e.value.code == 1 and "the memory is full" in capsys.readouterr().err
    monkeypatch.setattr("unlearn_nb.zoo.load", lambda *args: {}["a bug"])
    with pytest.raises(KeyError): run("sample", "--model", "faces", "--out", tmp_path/"x.png")   # no bug is hidden


def test_a_full_disk_is_a_sentence(tmp_path, capsys, monkeypatch):
    def full(path, data): raise OSError(28, f"{str(path)!r} could not be written (No space left on device)")
    monkeypatch.setattr("unlearn_nb.files.write", full)
    said = fails(capsys, "sample", "--model", "faces", "--seeds", "0:1", "--steps", 1, "--out", tmp_path/"x.png")
    assert said == f"unlearn_nb: '{tmp_path}/x.png' could not be written (No space left on device)"


# --- help ---

@pytest.mark.slow
def test_two_processes_write_one_hotfix(model, tmp_path):
    "As `accelerate launch -m unlearn_nb` starts them: one voice, one pair of folders, nearly the same change."
    def launched(out):
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, *ONE_MACHINE]
        command = ["-m", "unlearn_nb", "forget", "--model", model, "--seed", 5, "--steps", 3, "--out", out]
        done = subprocess.run([sys.executable, "-m", *map(str, launch + command)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    code, out, err = launched(tmp_path/"two")
    assert code == 0 and out.count("3/4  unlearn") == 1 and out.count("to keep: written to") == 1, err
    run("forget", "--model", model, "--seed", 5, "--steps", 3, "--out", tmp_path/"one")
    assert names(tmp_path/"two") == names(tmp_path/"one") == PUBLIC and names(tmp_path) == [
        "one", "one-private", "two", "two-private"]
    one, two = (Hotfix.load(tmp_path/name).delta for name in ("one", "two"))
    far = sum((one[k].float() - two[k].float()).square().sum() for k in one) ** .5
    assert far < .05 * sum(v.float().square().sum() for v in one.values()) ** .5
    code, out, err = launched(tmp_path/"two")
    assert code and err.count("exists and is not an empty folder") == 1


def test_help_of_every_command(capsys):
    "It says what the command does in a line of the list, and ends with an example that the command understands."
    run("--help")
    listed = capsys.readouterr().out.splitlines()
    for command in cli.commands:
        run(command, "--help")
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: unlearn_nb {command}") and max(map(len, out.splitlines())) <= 80, command
        example = shlex.split(out.strip().rpartition("\n  Example: unlearn_nb ")[2])
        assert example[0] == command and cli.commands[command].make_context(command, example[1:])
        [line] = [line for line in listed if line.startswith(f"  {command} ")]
        assert line.endswith(".") and not line.endswith("..."), line


def test_help_names_the_defaults_of_config(capsys):
    cfg, words = Config(), PRESETS["unet"]
    for command in ("demo", "forget"):
        run(command, "--help")
        out = " ".join(capsys.readouterr().out.split())
        assert f"Updates of the weights. [default: ({cfg.steps}" in out
    for name in ("steps", "rank"):
        assert f"({getattr(cfg, name)}; of words, classes or latents {words[name]})" in out
        assert PRESETS["transformer"][name] == PRESETS["latents"][name] == words[name] and name not in PRESETS["pixels"]
    rates = [PRESETS[name]["lr"] for name in ("unet", "transformer", "latents")]
    assert (cfg.lr, *rates) == (3e-3, 1e-2, 1e-2, 1.5e-2) and "(3e-3; words 1e-2, latents 1.5e-2)" in out


def test_python_m_is_the_command():
    by_module, by_name = (subprocess.run([*command, "--help"], capture_output=True, text=True) for command in
                          ([sys.executable, "-m", "unlearn_nb"], [Path(sys.executable).parent/"unlearn_nb"]))
    assert by_module.returncode == by_name.returncode == 0
    assert by_module.stdout == by_name.stdout != "" == by_module.stderr
