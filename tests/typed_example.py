"What a program that builds on the package may write; mypy and pyright accept every line (test_types.py)."
from collections.abc import Sequence

import torch
from typing_extensions import assert_type

from unlearn_nb.audit import audit
from unlearn_nb.denoiser import Denoiser
from unlearn_nb.hotfix import Hotfix, merge, read_receipt, verify
from unlearn_nb.leaderboard import leaderboard
from unlearn_nb.report import evaluate
from unlearn_nb.states import Request, States, default_retain, generate
from unlearn_nb.surrogates import check, propose
from unlearn_nb.unlearn import Config, Problem, unlearn
from unlearn_nb.zoo import load


def gentle(snr: torch.Tensor) -> torch.Tensor: return snr / (1 + snr)


def rule(g_f: Sequence[torch.Tensor], g_r: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [f + r for f, r in zip(g_f, g_r)]


def method(problem: Problem):
    return lambda step, g: (problem.gradient(problem.forget_batch(g), gentle)[1], {})


def enough(step: int, seen: dict[str, float]) -> bool: return seen["norm"] < 1e-3


def forget(seed: int) -> Hotfix:
    model = load("faces")
    assert_type(model, Denoiser)
    image = model.decode(model.sample([seed], steps=25))[0]
    request = Request(image, propose(model, image), seed)
    print(check(model.encode([image]), model.encode([request.surrogate])))
    retain = default_retain(model, [request], n=8)
    assert_type(retain, list[tuple[float, States]])
    cfg = Config.of(model, weight=gentle, surgery=rule).many(1)
    assert_type(cfg, Config)
    fix = unlearn(model, request, retain, cfg, watch=[enough], cache="cache")
    other = unlearn(model, [request], generate(model, range(4)), earlier=[request], method=method)
    assert_type(fix, Hotfix)
    with fix.on(model) as edited, model.lock:
        assert_type(edited, Denoiser)
        edited.save_pretrained("merged")
    report, before, after = evaluate(model, fix, [request], model.sample(range(8)))
    print(fix.apply(model).hotfixes, fix == other, {fix: 1}, report, before, after)
    print(audit(fix.remove(model), fix, request, quick=True), leaderboard(model, "board", {"mine": (method, [{}])}))
    both = merge([fix, other])
    both.save("both")
    both.save_pretrained("both")
    print(verify(both, read_receipt("both-private")), Hotfix.from_pretrained("both").id[:12])
    both.push_to_hub("me/both", private=True)
    return Hotfix.load("both")
