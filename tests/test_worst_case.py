"Methods that ask the worst first, and masks: each against a closed form, and what they leave as it was."
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_baselines import RAW, flat, gen, lists, norm, problem, request_of, seeds, setting   # noqa: F401
from torch import nn
from torch.testing import assert_close

from unlearn_nb.baselines import climb, climb_length, forget_image, retained, two
from unlearn_nb.directions import layers_of
from unlearn_nb.masks import at_level, largest, prune, sculpt, surrogate_beliefs, turn_over, uses, wanda
from unlearn_nb.surgery import combine
from unlearn_nb.surgery import munba as bargain
from unlearn_nb.unlearn import unlearn
from unlearn_nb.weights import unit_eps
from unlearn_nb.worst_case import dori, ends, moved, munba, neutral, of_length, replay, rosu, sam, smoothing

TRAINED = {"munba": munba, "dori": dori, "sam": sam, "smoothing": smoothing, "rosu": rosu, "sculpt": sculpt}
WIDE = replace(RAW, forget_batch=8, retain_batch=10)   # 18 states: what is shared by 3 is not what is shared by 2


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
def dot(u, v): return (flat(u).double() @ flat(v).double()).item()


class Quadratic:
    "What a step sees of a net: params x, and the loss .5 x'Hx with gradient Hx."
    def __init__(self, H, x): self.H, self.params, self.x = H, [x.clone()], x.clone()
    def write_weights(self): self.x = self.params[0].clone()
    def gradient(self, *_): return .5 * (self.x @ self.H @ self.x).item(), [self.H @ self.x]
    parametrization = property(lambda self: self)


# --- all of them ---

def work(model, cfg, method):
    "(the hotfix, evaluations of the net in step 2)."
    rows, after = [], []
    hook = model.net.register_forward_hook(lambda net, inputs, out: rows.append(len(inputs[0])))
    try: fix = unlearn(model, [request_of(model)], setting()[2], cfg, method=method,
                       watch=lambda step, seen: after.append(sum(rows)))
    finally: hook.remove()
    return fix, after[1] - after[0]


@pytest.mark.parametrize("paths, damping", [(False, 0.), (True, .01)])
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_runs_does_the_same_work_and_leaves_the_net(name, paths, damping):
    "18 evaluations in a step, as of all rivals; the net comes back bit for bit."
    model, cfg = setting()[0], replace(WIDE, steps=2, path_share=.5, damping=damping)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    fix, states = work(model, cfg, partial(TRAINED[name], paths=paths))
    assert states == 18 and len(fix.receipt.log) == 2 and any(v.any() for v in fix.delta.values())
    assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", ["dori", "sculpt"])
def test_states_may_go_through_in_pieces(name, problem):
    "The two with passes of their own: two states at a time give the same gradient."
    made = [TRAINED[name](replace(problem, cfg=replace(WIDE, micro_batch=few)))(0, gen())[0] for few in (2, 32)]
    assert_close(*map(flat, made), rtol=1e-3, atol=1e-4)


def test_sam_moves_a_lora_too():
    model, request, retain = setting()
    fix = unlearn(model, [request], retain, replace(RAW, steps=2, rank=2), method=sam)
    assert any(v.any() for v in fix.delta.values())


# --- the worst noise ---

def test_both_ends_of_the_same_states(problem):
    problem = replace(problem, cfg=replace(RAW, path_share=.5))
    x_t, t, x_f, x_s = ends(problem, True, 8)(gen(4))
    for goal, end in ((None, x_f), (problem.x_s, x_s)):
        theirs = forget_image(problem, True, goal, 8)(gen(4))
        assert same((x_t, t, end), theirs)


@pytest.mark.parametrize("k, bound", [(1, .05), (1, 1.), (3, .1), (4, 2.)])
def test_a_replay_stays_in_its_ball_and_agrees_more(problem, k, bound):
    model = problem.denoiser
    x_t, t, x_f, _ = ends(problem, False, 12)(gen(k))
    worst = replay(problem, x_t, t, x_f, k, bound)
    r = ((worst - x_t) / model.scales(t)[1]).flatten(1).norm(dim=1)
    assert (r <= bound * x_t[0].numel() ** .5 * (1 + 1e-3) + 1e-2).all() and not worst.requires_grad
    with torch.no_grad(): was, now = ((model.clean(v, model(v, t), t) - x_f).square().mean() for v in (x_t, worst))
    assert now < was


def test_dori_without_steps_is_plain_fine_tuning(problem):
    "k = 0, bit for bit."
    for paths in (False, True):
        theirs = two(problem, forget_image(problem, paths, problem.x_s), lambda f, r: combine(.3, f, 1, r), paths=paths)
        assert same(dori(problem, k=0, c=.3, paths=paths)(1, gen(2))[0], theirs(1, gen(2))[0])
    assert not same(dori(problem, k=1)(1, gen(2))[0], dori(problem, k=0)(1, gen(2))[0])


# --- the worst weights ---

@given(seeds, st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_a_gradient_moved_up_a_quadratic(seed, rho):
    "l = .5 x'Hx: at x + rho Hx / |Hx| the gradient is Hx + rho H Hx / |Hx|; and x comes back bit for bit."
    g = gen(seed)
    A, x = torch.randn(5, 5, generator=g), torch.randn(5, generator=g)
    H = A @ A.T
    q, up = Quadratic(H, x), H @ x
    with moved(q, of_length([up], rho)): at = q.gradient()[1]
    assert_close(at[0], up + rho * H @ up / up.norm(), rtol=1e-4, atol=1e-4 * (1 + rho) * H.norm().item())
    assert torch.equal(q.x, x) and torch.equal(q.params[0], x)
    with pytest.raises(KeyError), moved(q, [1e3 * up]): raise KeyError
    assert torch.equal(q.x, x)


@given(seeds, st.floats(1e-3, 10))
def test_of_length(seed, length):
    g, _ = lists(seed)
    assert norm(of_length(g, length)).item() == pytest.approx(length, rel=1e-4)
    assert not flat(of_length([torch.zeros(3)], length)).any()


def test_no_move_is_the_plain_loss(problem):
    "sam with rho = 0, and smoothing: the mean of equal gradients."
    n = problem.size // 3
    states, kept = forget_image(problem, False, problem.x_s, n), retained(problem, problem.size - 2 * n, False)
    g = gen(2)
    _, g_f = problem.gradient(states(g), unit_eps)
    plain = combine(1, g_f, .5, kept(g)[1])
    assert same(sam(problem, rho=0., gamma=.5)(1, gen(2))[0], plain)
    assert not same(sam(problem, rho=.1, gamma=.5)(1, gen(2))[0], plain)
    n = problem.size // 4
    g = gen(2)
    batch = forget_image(problem, False, problem.x_s, n)(g)
    still = smoothing(problem, rho=0., gamma=0.)(1, gen(2))[0]
    assert_close(flat(still), flat(problem.gradient(batch, unit_eps)[1]), rtol=1e-4, atol=1e-6)


def test_sam_is_the_gradient_at_the_moved_weights(problem):
    "Against weights moved by hand."
    n, rho, form = problem.size // 3, .5, problem.parametrization
    g = gen(7)
    batch = forget_image(problem, False, problem.x_s, n)(g)
    _, g_f = problem.gradient(batch, unit_eps)
    size = norm(g_f)
    was = [w.detach().clone() for w in form.weights]
    with torch.no_grad():
        for w, v in zip(form.weights, g_f): w += (rho * v.double() / size).float()
    _, theirs = problem.gradient(batch, unit_eps)
    with torch.no_grad():
        for w, v in zip(form.weights, was): w.copy_(v)
    assert_close(flat(sam(problem, rho=rho, gamma=0.)(1, gen(7))[0]), flat(theirs), rtol=1e-3, atol=1e-5)
    assert same(form.weights, was)


@given(seeds, st.floats(1e-3, 10))
def test_the_neutral_move(seed, rho):
    "Of length rho, at a right angle to g_r, gain rho |g_f| sin(angle); no other neutral one of that length gains more."
    g_f, g_r, other = lists(seed, 3)
    d = neutral(g_f, g_r, rho)
    assert norm(d).item() == pytest.approx(rho, rel=1e-4)
    assert abs(dot(d, g_r)) <= 1e-5 * rho * norm(g_r)
    cos = dot(g_f, g_r) / (norm(g_f) * norm(g_r)).item()
    gain = rho * norm(g_f).item() * (1 - cos ** 2) ** .5
    assert dot(d, g_f) == pytest.approx(gain, rel=1e-3)
    assert dot(neutral(other, g_r, rho), g_f) <= gain * (1 + 1e-3)


def test_the_neutral_move_of_orthogonal_and_of_parallel_gradients():
    f, r = [torch.tensor([3., 0.]), torch.tensor([4.])], [torch.tensor([0., 2.]), torch.tensor([0.])]
    assert same(neutral(f, r, .1), of_length(f, .1))                       # the step of SAM
    assert same(neutral(f, [0 * x for x in r], .1), of_length(f, .1))      # nothing to keep
    for times in (2., -.5, 1e-6): assert not flat(neutral(f, [times * x for x in f], .1)).any()
    assert not flat(neutral([0 * x for x in f], r, .1)).any()


def test_rosu_without_a_move_is_retaining_and_a_neutral_climb(problem):
    n, up = problem.size // 3, climb_length(problem, .2)
    g = gen(3)
    _, g_f = problem.gradient(forget_image(problem, False, n=problem.size - 2 * n)(g), unit_eps)
    _, g_r = retained(problem, n, False)(g)
    theirs = climb(g_r, neutral(g_f, g_r, 1.), up)
    d = rosu(problem, rho=0., c=.2)(1, gen(3))[0]
    assert same(d, theirs) and dot(d, g_f) < dot(g_r, g_f)   # against d is up the loss of the image
    assert not same(rosu(problem, rho=.5, c=.2)(1, gen(3))[0], theirs)


def test_munba_bargains(problem):
    def states(g): return forget_image(problem, False, problem.x_s)(g)
    theirs = two(problem, states, bargain)
    d = munba(problem)(1, gen(5))[0]
    assert same(d, theirs(1, gen(5))[0]) and norm(d).item() == pytest.approx(2 ** .5, rel=1e-4)


# --- masks ---

@given(seeds, st.floats(0, 1), st.sampled_from([(7, 5), (4, 6, 3, 3)]))
def test_wanda_marks_what_the_picture_needs_more(seed, share, shape):
    g = gen(seed)
    W, n_f, n_r = torch.randn(shape, generator=g), *torch.rand(2, shape[1], generator=g)
    cols = W[0].numel()
    mask = wanda(W, n_f, n_r, share)
    assert mask.shape == W.shape and (mask.flatten(1).sum(1) <= int(share * cols)).all()
    assert not wanda(W, n_f, n_f, share).any()                     # equal norms: an empty mask
    more = (n_f > n_r).view(1, -1, *[1] * (W.dim() - 2)).expand_as(W)
    assert torch.equal(wanda(W, n_f, n_r, 1.), more)               # all of a row: where more enters
    assert not (mask & ~more).any()


def test_uses_are_what_enters_a_layer(problem):
    "Against a net of one convolution's inputs by hand: the first layer of the net sees x_t itself."
    x_t = torch.randn(6, *problem.denoiser.shape, generator=gen())
    found = uses(problem, x_t, 500)
    rows = nn.functional.normalize(x_t.movedim(1, -1).flatten(0, -2), dim=1)
    assert_close(found["conv_in.weight"], rows.square().mean(0).sqrt())
    assert found.keys() <= layers_of(problem.denoiser.net).keys()
    assert same(uses(replace(problem, cfg=replace(RAW, micro_batch=6)), x_t, 500).values(), found.values())
    assert all(v.square().sum().item() == pytest.approx(1, abs=1e-3) for v in found.values())   # rows of length 1


def test_states_at_one_level(problem):
    t = problem.own.timesteps[1].item()
    of_image, kept = at_level(problem, t, 5, gen(), True)
    assert same(of_image, problem.own.x_t[:, 1]) and same(kept, problem.retain.x_t[:, 1])
    of_image, kept = at_level(problem, t, 5, gen(), False)
    assert of_image.shape == kept.shape == (5, *problem.denoiser.shape)


@pytest.mark.parametrize("paths", [False, True])
def test_pruning_sets_its_weights_to_zero_and_trains_nothing(paths):
    model, request, retain = setting()
    seen, base = [], {k: v.detach().clone() for k, v in model.net.named_parameters()}
    def watch(step, log): seen.append({k: v.detach().clone() for k, v in model.net.named_parameters()})
    method = partial(prune, share=.05, levels=3, paths=paths)
    fix = unlearn(model, [request], retain, replace(RAW, lr=1.), method=method, watch=watch)
    assert all(same(seen[0].values(), later.values()) for later in seen[1:])
    changed = {k: seen[0][k] != w for k, w in base.items()}
    assert all((seen[0][k][where] == 0).all() for k, where in changed.items())
    share = sum(v.sum() for v in changed.values()) / sum(v.numel() for v in changed.values())
    assert 0 < share.item() == pytest.approx(fix.receipt.log[0]["pruned"], abs=1e-6)
    assert all(torch.equal(v, base[k]) for k, v in model.net.named_parameters())
    for wrong in (dict(damping=.01), dict(rank=2)):
        with pytest.raises(ValueError, match="set damping and rank to 0"):
            unlearn(model, [request], retain, replace(RAW, **wrong), method=method)


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_a_mask_turns_over_and_stays_as_large(seed, share, f):
    A, B = torch.randn(2, 6, 7, generator=gen(seed))
    mask = largest(A, share)
    assert mask.sum() == round(share * A.numel()) and set(mask.flatten().tolist()) <= {0., 1.}
    later = turn_over(mask, B, f)
    assert later.sum() == mask.sum() and later.shape == mask.shape
    assert torch.equal(turn_over(mask, B, 0.), mask)
    n = min(int(f * mask.sum().item()), int((1 - mask).sum().item()))
    assert (mask - later).clamp(min=0).sum() == n == (later - mask).clamp(min=0).sum()
    if n and later.sum() > n:
        dropped, stayed = ((mask > later), (mask + later == 2))
        assert B[dropped].abs().max() <= B[stayed].abs().min()


def test_the_goal_is_what_the_net_believes_of_the_surrogate(problem):
    x_t, t, goal = surrogate_beliefs(problem, False, 6)(gen(1))
    a, s = problem.denoiser.scales(t)
    noise = (x_t - a * problem.x_f) / s
    there = problem.denoiser.noise(problem.x_s.expand_as(x_t), noise, t)
    with torch.no_grad(): believed = problem.denoiser.clean(there, problem.denoiser(there, t), t)
    assert_close(goal, believed, rtol=1e-3, atol=1e-3)
    assert not goal.requires_grad


def test_sculpting_moves_what_its_mask_says(problem):
    "Masked weights are bit-equal after a fresh step of Adam; the mask changes on the way, its size does not."
    step = sculpt(problem, share=.3)
    masks = [step.memory[f"mask.{k}"] for k in range(len(problem.parametrization.params))]
    params = [torch.randn_like(p) for p in problem.parametrization.params]
    was = [p.clone() for p in params]
    opt = torch.optim.Adam(params, lr=1e-2)
    for p, d in zip(params, step(0, gen())[0]): p.grad = d
    opt.step()
    for p, v, mask in zip(params, was, masks): assert torch.equal(p[mask == 0], v[mask == 0])
    assert any((p != v).any() for p, v in zip(params, was))
    step(1, gen(1))   # 3 steps: chosen anew before each but the first
    later = [step.memory[f"mask.{k}"] for k in range(len(masks))]
    assert [m.sum() for m in later] == [m.sum() for m in masks] and not same(later, masks)


@pytest.mark.parametrize("method", [sculpt, prune, sam])
def test_they_go_on_bit_for_bit(method, tmp_path):
    "Stopped at step 11 of 12, a run goes on from its checkpoint."
    model, request, retain = setting()
    cfg = replace(RAW, steps=12)
    def stop(step, seen):
        if step == 10: raise KeyboardInterrupt
    straight = unlearn(model, [request], retain, cfg, method=method)
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, [request], retain, cfg, method=method, watch=stop, checkpoint=tmp_path / "run")
    resumed = unlearn(model, [request], retain, cfg, method=method, checkpoint=tmp_path / "run")
    assert all(torch.equal(straight.delta[k], v) for k, v in resumed.delta.items())
