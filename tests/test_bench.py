"The bench: what it times is the loop's own step, and its counts are exact. No test looks at a clock's value."
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unlearn import TINY, request_of, same, tiny
from test_zoo import CELEBA_NET
from torch.testing import assert_close

from unlearn_nb import bench, surgery
from unlearn_nb.cli import main
from unlearn_nb.files import fingerprint
from unlearn_nb.states import generate
from unlearn_nb.unlearn import Config, unlearn

SMALL = replace(TINY, retain_batch=6)


@pytest.fixture(scope="module")
def loop():
    model = tiny()
    return bench.Loop(model, [request_of(model)], generate(model, range(4), 4), SMALL)


@pytest.mark.parametrize("more", [{}, {"damping": 0.}, {"surgery": "one_sided"}, {"rank": 2}, {"micro_batch": 3}], ids=str)
def test_the_timed_step_is_the_loops_step(more):
    model, cfg = tiny(), replace(SMALL, steps=1, **more)
    request, retain = request_of(model), generate(model, range(4), 4)
    fix = unlearn(model, [request], retain, cfg)
    loop = bench.Loop(model, [request], retain, cfg)
    loop.step(0)
    delta = loop.parametrization.delta()
    loop.parametrization.restore()
    assert same(delta, fix.delta) and fingerprint(model) == fix.card["base"]["sha256"]


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_one_joint_batch_has_the_summed_gradient(loop, n, m, k):
    some = loop.but(forget_batch=n, retain_batch=m, micro_batch=n + m)
    forget, retain = some.batches(k)
    joint = some.gradient(*bench.together(forget, retain, some.w_f, some.w_r))
    for a, b in zip(joint, surgery.plain(some.gradient(forget, some.w_f), some.gradient(retain, some.w_r))): assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_summed_step_moves_as_a_plain_step(loop):
    "Same batches, no surgery: Adam's first step is the same in both."
    after = []
    for move in (bench.summed_step, lambda some: some.step()):
        model = tiny()
        some = bench.Loop(model, [request_of(model)], loop.retain, replace(SMALL, surgery="plain", lr=1e-4))
        move(some)
        after.append(torch.cat([p.grad.flatten() for p in some.parametrization.params]))
    assert_close(*after, rtol=1e-3, atol=1e-5)


# --- counts ---

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_flops_of_a_product_and_of_its_gradient(n, m, k):
    a, b = torch.ones(n, m, requires_grad=True), torch.ones(m, k, requires_grad=True)
    assert bench.flops(lambda: a @ b) == 2 * n * m * k
    assert bench.flops(lambda: torch.autograd.grad((a @ b).sum(), (a, b))) == 3 * 2 * n * m * k


def test_backward_costs_two_forwards_and_a_step_all_states_once(loop):
    x, t = torch.zeros(1, *loop.denoiser.shape), torch.zeros(1, dtype=torch.long)
    weights = [w for w in loop.denoiser.net.parameters() if w.dim() > 1]
    with torch.no_grad(): forward = bench.flops(lambda: loop.denoiser(x, t))
    both = bench.flops(lambda: torch.autograd.grad(loop.denoiser(x, t).sum(), weights))
    assert 2.8 * forward < both <= 3 * forward
    states = SMALL.forget_batch + SMALL.retain_batch
    assert bench.flops(lambda: bench.bare_step(loop)) == states * both
    products = 2 * sum(w.numel() * (len(B.outputs) + len(B.places) + len(B.inputs)) for w, B in zip(loop.parametrization.weights, loop.parametrization.bases))
    assert bench.flops(loop.step) == states * both + 3 * products and bench.flops(lambda: bench.summed_step(loop)) == states * both + 2 * products


# --- memory ---

@given(st.integers(1, 300), st.integers(2, 12))
def test_a_chain_holds_two_links(n, length):
    x = torch.ones(n)
    def chain():
        y = x + 1
        for _ in range(length): y = y * 2
    assert bench.peak_memory(chain) == 2 * 4 * n


@given(st.integers(1, 300), st.integers(1, 12))
def test_what_is_kept_adds_up_and_what_is_dropped_is_gone(n, length):
    x = torch.ones(n)
    with bench.Memory() as memory:
        kept = [x * k for k in range(length)]
        assert memory.now == memory.peak == 4 * n * length
        views = [y[:1].view(1) for y in kept]     # a view keeps the whole storage alive
        del kept
        assert memory.now == 4 * n * length
        del views
        assert memory.now == 0 and memory.peak == 4 * n * length
    assert torch.equal(x, torch.ones(n))


def test_what_was_there_before_does_not_count():
    x = torch.ones(100)
    def inside():
        x.mul_(2)
        x.view(10, 10).add_(1)
        torch.add(x, 1, out=x)
    assert bench.peak_memory(inside) == 0


def test_backward_is_watched_too():
    w = torch.ones(1000, requires_grad=True)
    def f(): torch.autograd.grad((w * 2).exp().sum(), w)   # both factors live when the gradient comes
    assert bench.peak_memory(f) >= 8000


def test_projecting_in_place_of_a_copy(loop):
    g = [torch.ones_like(w) for w in loop.parametrization.weights]
    size = sum(x.numel() * 4 for x in g)
    assert size <= bench.peak_memory(lambda: surgery.symmetric(g, g)) < 1.1 * size


def test_memory_on_cuda_is_the_allocators(monkeypatch):
    books = {"now": 100, "most": 400}
    def reset(device): books["most"] = books["now"]
    for name, f in dict(reset_peak_memory_stats=reset, memory_allocated=lambda device: books["now"], max_memory_allocated=lambda device: books["most"]).items(): monkeypatch.setattr(torch.cuda, name, f)
    def f(): books["most"] = 250
    assert bench.peak_memory(f, SimpleNamespace(type="cuda")) == 150


# --- times ---

def test_runs_take_turns_and_the_first_round_does_not_count():
    order = []
    times = bench.race({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4)
    assert "".join(order) == "abc" * 5 and [len(row) for row in times.values()] == [4] * 3


@given(st.lists(st.floats(.1, 10), min_size=1, max_size=9), st.floats(.1, 10))
def test_a_ratio_forgets_what_hits_both_and_a_disturbed_round(slow, r):
    "Every round has its own speed; the ratio does not. One wild round of three or more changes nothing."
    times = {"a": [r * s for s in slow], "b": slow}
    assert bench.ratio(times, "a", "b") == pytest.approx(r) and bench.ratio(times, "b", "a") == pytest.approx(1 / r)
    if len(slow) > 2:
        times["a"][0] *= 100
        assert bench.ratio(times, "a", "b") == pytest.approx(r)


# --- the whole ---

KEYS = dict(result=["schema", "model", "million_weights", "device", "threads", "precision", "forget_batch", "retain_batch", "rounds", "step", "sampling", "cost", "aims", "versions"],
            step=["seconds", "steps_per_second", "gflop", "gflop_per_second_at_peak", "share_of_peak", "time_over_summed", "memory_over_summed", "time_over_bare", "peak_memory_mb", "parts"],
            sampling=["steps", "seconds_per_image", "over_diffusers"], cost=["batch", "requests", "width"])


def positive(v): return all(map(positive, v.values() if isinstance(v, dict) else v)) if isinstance(v, (dict, list)) else isinstance(v, str) or v > 0


@pytest.fixture(scope="module")
def run():
    "A bench with the settings that CUDA gets, of a tiny model on the CPU: (weights before, model, result)."
    model = tiny()
    return fingerprint(model), model, bench.bench(model, replace(SMALL, precision="bf16", damping=0.), rounds=1)


def test_the_bench_of_a_tiny_model(run):
    before, model, result = run
    assert json.loads(json.dumps(result)) == result and list(result) == KEYS["result"] and result["schema"] == 1
    for name in ("step", "sampling", "cost"): assert list(result[name]) == KEYS[name]
    assert positive({k: v for k, v in result["step"].items() if k != "parts"}) and positive(result["cost"]) and positive(result["sampling"])
    assert sum(result["step"]["parts"].values()) == pytest.approx(1) and result["precision"] == "bf16"
    assert [(r["forget"], r["retain"]) for r in result["cost"]["batch"]] == [(1, 2), (2, 3), (4, 6), (8, 12)]
    assert [r["requests"] for r in result["cost"]["requests"]] == [1, 4, 16]
    widths = result["cost"]["width"]
    assert [r["million_weights"] for r in widths] == sorted(r["million_weights"] for r in widths) and widths[-1]["work"] == 1 > widths[0]["work"]
    assert fingerprint(model) == before and not model.hotfixes


def test_a_lora_can_be_timed(loop):
    model = tiny()
    before = fingerprint(model)
    lora = bench.Loop(model, [request_of(model)], loop.retain, replace(SMALL, rank=2, damping=0.))
    result = bench.measure_step(lora, rounds=1)
    lora.parametrization.restore()
    assert positive({k: v for k, v in result.items() if k != "parts"}) and fingerprint(model) == before


def test_aims_are_judged(run):
    result = run[2]
    for name, aim in result["aims"].items():
        value = (result["step"] | result["sampling"])[name]
        assert aim["met"] == (value <= aim["at most"])
    assert "share_of_peak" not in result["aims"] and bench.aims(torch.device("cuda"))["share_of_peak"] == ("at least", .4)
    missed = result | {"aims": {"share_of_peak": {"at least": .4, "met": False}}}
    assert "(aim: at least 0.4; MISSED)" in bench.table(missed) and bench.table(missed).count("aim") == 1
    assert all(f"{result['step'][k]:.2f}  " in bench.table(result) for k in ("share_of_peak", "time_over_summed", "memory_over_summed"))


@pytest.mark.parametrize("cuda, bf16, model, precision, batch", [(False, False, None, "fp32", 8), (True, True, None, "bf16", 4), (True, False, None, "fp16", 4), (True, True, "faces", "bf16", 8)])
def test_what_is_timed(cuda, bf16, model, precision, batch, monkeypatch):
    "On CUDA the same code gets another net: the plan of CelebA-HQ, here narrower and on the CPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(bench, "random_model", lambda config, scheduler, device, name: SimpleNamespace(name=name, device=device, prediction="epsilon", net=torch.nn.Linear(5000, 5000)))
    monkeypatch.setattr(bench, "load", lambda name: SimpleNamespace(name=name, prediction="epsilon", net=torch.nn.Linear(2, 2)))
    denoiser, cfg = bench.subject(model)
    assert (cfg.precision, cfg.forget_batch) == (precision, batch)
    assert denoiser.name == ("ddpm-celebahq-256, random weights" if cuda and not model else "faces")
    if denoiser.name != "faces": assert denoiser.device == "cuda"


def test_the_plan_is_that_of_celebahq():
    with torch.device("meta"): ours, published = UNet2DModel(**bench.PLAN), UNet2DModel.from_config({k: v for k, v in CELEBA_NET.items() if not k.startswith("_")})
    assert sum(p.numel() for p in ours.parameters()) == 113_673_219
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in published.state_dict().items()}
    assert all(list(v) == list(published.config[k]) if isinstance(v, (list, tuple)) else v == published.config[k] for k, v in ours.config.items() if not k.startswith("_"))


# --- Stable Diffusion 3 without its weights ---

SMALL_SD3 = bench.SD3 | dict(num_layers=4, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=32, pos_embed_max_size=32)


@pytest.mark.parametrize("plan, weights", [("SD3", 2_028_328_000), ("SD35", 2_243_171_520)])
def test_the_published_plans_have_the_published_counts(plan, weights):
    d = bench.on_meta(getattr(bench, plan))
    assert sum(p.numel() for p in d.net.parameters()) == weights and {p.dtype for p in d.net.parameters()} == {torch.bfloat16}
    assert d.shape == (16, 128, 128) and d.prediction == "flow" and {p.device.type for p in d.net.parameters()} == {"meta"}


def by_hand(plan, side):
    "Operations of the matrix products in one forward pass of a Stable Diffusion 3 net."
    N, T, D, C = (side // 16) ** 2, bench.TOKENS, plan["num_attention_heads"] * plan["attention_head_dim"], 4 * plan["in_channels"]
    ends = N * D * C * 2 + T * plan["joint_attention_dim"] * D + (256 + plan["pooled_projection_dim"] + 2 * D) * D + 2 * D * D
    picture, words = N * 12 * D * D + 6 * D * D, T * 12 * D * D + 6 * D * D       # q, k, v, out, and a hidden layer of four times the width; scales and shifts
    last = T * 3 * D * D + 2 * D * D                                              # the last block gives no words back
    return 2 * (ends + plan["num_layers"] * (picture + 2 * (N + T) ** 2 * D) + (plan["num_layers"] - 1) * words + last)


@pytest.fixture(scope="module")
def small_sd3(): return bench.counted(SMALL_SD3, Config.sd3(), 256)


def test_the_counter_counts_what_a_hand_counts(small_sd3):
    "Attention is among it."
    assert small_sd3["forward"] == pytest.approx(by_hand(SMALL_SD3, 256), rel=.02)
    assert by_hand(bench.SD3, 1024) / 1e12 == pytest.approx(8.9, rel=.02)


def test_checkpointing_trades_operations_for_memory(small_sd3):
    assert small_sd3["peak"][True] < .6 * small_sd3["peak"][False]
    a, b = small_sd3["learning"][False], small_sd3["learning"][True]
    assert 2 * small_sd3["forward"] < a < 3.2 * small_sd3["forward"] and a + .7 * small_sd3["forward"] < b < a + 1.2 * small_sd3["forward"]
    assert 12 * small_sd3["forward"] < small_sd3["step"][False] < small_sd3["step"][True]
    assert small_sd3["adam"] == 2 * small_sd3["lora"] < small_sd3["weights"]


def test_two_and_three_blocks_say_what_all_take(small_sd3):
    direct = bench.count(SMALL_SD3, Config.sd3(), 256)
    for k, v in direct.items(): assert small_sd3[k] == pytest.approx(v, rel=1e-2), k


def test_the_count_leaves_functions_as_they_were():
    before = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        with bench.as_on_cuda(torch.bfloat16): 1 / 0
    assert before == (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)


@pytest.mark.parametrize("width", [.25, .5])
def test_a_narrow_net_is_of_the_same_plan_and_leaves_the_random_state(width):
    model = tiny()
    state = torch.get_rng_state()
    narrow = bench.narrow(model, width)
    assert torch.equal(torch.get_rng_state(), state) and narrow.shape == model.shape
    assert narrow.net.state_dict().keys() == model.net.state_dict().keys()
    assert list(narrow.net.config.block_out_channels) == [round(width * n) for n in model.net.config.block_out_channels]
    assert narrow(torch.zeros(2, *model.shape), torch.zeros(2, dtype=torch.long)).isfinite().all()


def test_the_command(tmp_path, monkeypatch, capsys):
    model = tiny()
    DDPMPipeline(model.net, model.scheduler).save_pretrained(tmp_path / "model")
    whole = bench.bench
    monkeypatch.setattr(bench, "bench", lambda denoiser, cfg: whole(denoiser, cfg, rounds=1))
    main(["bench", "--model", str(tmp_path / "model"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == KEYS["result"] and result["model"] == str(tmp_path / "model")
    monkeypatch.setattr(bench, "bench", lambda denoiser, cfg: result)
    main(["bench", "--model", str(tmp_path / "model")])
    assert capsys.readouterr().out == bench.table(result) + "\n"


def test_the_command_refuses_what_is_no_model(capsys):
    with pytest.raises(SystemExit) as e: main(["bench", "--model", "nobody"])
    assert e.value.code == 2 and "nobody" in capsys.readouterr().err
