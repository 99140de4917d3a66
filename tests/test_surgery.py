"Surgery: what each rule promises, for gradients of any size and dtype, and torchjd as an independent judge."
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import GradVac, PCGrad

from unlearn_nb import surgery
from unlearn_nb.files import name_of
from unlearn_nb.surgery import (RULES, cagrad, combine, cosine, get, gram, munba, one_sided, per_tensor, plain,
                                products, subspace, symmetric, vaccine)

def fresh_subspace(g_f, g_r): return subspace()(g_f, g_r)
def subspace_of_one(g_f, g_r): return subspace(m=1)(g_f, g_r)

EVERY = [plain, one_sided, symmetric, per_tensor, vaccine, cagrad, fresh_subspace]   # as long as the gradients
ALL = [*EVERY, munba]
SHAPES = [(3,), (2, 2), (1, 1, 2)]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}   # a direction is rounded to its dtype once


def flat(g): return torch.cat([x.double().flatten() for x in g])
def dot(u, v): return (flat(u) @ flat(v)).item()
def size(u): return flat(u).norm().item()


def tensors(numbers):
    out, numbers = [], list(numbers)
    for shape in SHAPES:
        n = math.prod(shape)
        out.append(torch.tensor(numbers[:n]).reshape(shape)); numbers = numbers[n:]
    return out


numbers = st.lists(st.floats(-1, 1, width=32).map(lambda x: round(x, 4)), min_size=9, max_size=9)
gradients = numbers.map(tensors)
exponents = st.integers(-30, 30)   # as float32 inner products these would be 0 or infinite


def scaled(g, exponent): return [x * 10.**exponent for x in g]


def harm(d, g, other):
    "How far the step d works against g, in units of what rounding may do: at most 1 is no harm."
    return -dot(d, g) / (max(size(g), size(other)) * size(g) * 1e-6 + 1e-300)


# --- the promises ---

@given(gradients, gradients, exponents, exponents)
def test_symmetric_harms_neither(f, r, i, j):
    f, r = scaled(f, i), scaled(r, j)
    d = symmetric(f, r)
    assert harm(d, f, r) <= 1 and harm(d, r, f) <= 1


@given(gradients, gradients, exponents, exponents)
def test_per_tensor_harms_neither_in_any_tensor(f, r, i, j):
    f, r = scaled(f, i), scaled(r, j)
    for d, x, y in zip(per_tensor(f, r), f, r, strict=True):
        assert harm([d], [x], [y]) <= 1 and harm([d], [y], [x]) <= 1


@given(f=gradients, r=gradients, i=exponents, j=exponents)
def test_one_sided_and_subspace_never_harm_retain(f, r, i, j):
    f, r = scaled(f, i), scaled(r, j)
    for rule in (one_sided, fresh_subspace, subspace_of_one): assert harm(rule(f, r), r, f) <= 1


@given(gradients, gradients, st.floats(1.1, 100))
def test_one_sided_reverses_forgetting_beyond_alpha_star(f, r, factor):
    "<d, g_f> = |g_f'|^2 - alpha |<g_f, g_r>| in conflict; symmetric forgets as fast for every alpha."
    assume(cosine(f, r) < -.05 and size(f) > .1 and size(r) > .1)
    kept = dot(f, f) - dot(f, r)**2 / dot(r, r)     # |g_f'|^2
    assume(kept > .01 * dot(f, f))
    star = kept / -dot(f, r)
    more, less = ([x * (star * k) for x in r] for k in (factor, 1/factor))
    assert dot(one_sided(f, more), f) < 0 < dot(one_sided(f, less), f)
    assert dot(symmetric(f, more), f) == pytest.approx(kept, rel=1e-2)


@given(f=gradients, r=gradients)
def test_no_conflict_no_change(f, r):
    assume(dot(f, r) > 1e-6)
    for rule in (plain, one_sided, symmetric, fresh_subspace, partial(vaccine, rho=0.)):
        for d, x, y in zip(rule(f, r), f, r, strict=True): assert torch.equal(d, x + y)


@given(gradients, gradients)
def test_per_tensor_changes_the_tensors_in_conflict_alone(f, r):
    for d, x, y in zip(per_tensor(f, r), f, r, strict=True):
        if dot([x], [y]) >= 0: assert torch.equal(d, x + y)
        elif cosine([x], [y]) < -.01 and min(size([x]), size([y])) > .1: assert (d - x - y).norm() > 1e-4


@given(gradients, gradients)
def test_conflict_changes_the_sum(f, r):
    assume(cosine(f, r) < -.01 and size(f) > .1 and size(r) > .1)
    summed = flat(plain(f, r))
    assert (flat(one_sided(f, r)) - summed).norm() > 1e-4 and (flat(symmetric(f, r)) - summed).norm() > 1e-4


@given(g=gradients, exponent=exponents)
def test_a_zero_gradient_leaves_the_other_as_it_is(g, exponent):
    g, zero = scaled(g, exponent), [torch.zeros(s) for s in SHAPES]
    for rule in ALL:
        for d in (rule(g, zero), rule(zero, g)): assert all(torch.equal(x, y) for x, y in zip(d, g, strict=True))
        assert not flat(rule(zero, zero)).any()
    assert cosine(g, zero) == 0 == cosine(zero, zero)


@given(gradients, gradients, st.sampled_from([1e-3, 1., 1e4]), st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=30)
def test_half_precision_is_as_good_as_its_rounding(f, r, big, dtype):
    f, r = ([(x * big).to(dtype) for x in g] for g in (f, r))
    tolerance = ROUNDING[dtype] * (size(f) + size(r)) + 1e-7   # 1e-7: the smallest steps of float16
    for rule in EVERY:
        d, wide = rule(f, r), rule([x.float() for x in f], [x.float() for x in r])
        assert all(x.dtype == dtype and x.isfinite().all() for x in d)
        assert (flat(d) - flat(wide)).norm() <= tolerance, rule


@given(f=gradients, r=gradients, exponent=exponents)
@settings(max_examples=30)
def test_only_lengths_scale(f, r, exponent):
    "Both gradients times one number: the direction times that number. Tiny and huge gradients get the same surgery."
    assume(size(f) > .01 and size(r) > .01 and abs(cosine(f, r)) < .99)
    for rule in EVERY[2:]:
        d, big = flat(rule(f, r)), flat(rule(scaled(f, exponent), scaled(r, exponent))) / 10.**exponent
        assert_close(big, d, rtol=0, atol=1e-5 * (size(f) + size(r)))


def test_a_non_finite_gradient_stays_visible():
    for bad in (float('nan'), float('inf')):
        good, broken = [torch.ones(3), torch.ones(2)], [-torch.ones(3), torch.tensor([-1., bad])]
        for rule in ALL[1:]:
            for d in (rule(good, broken), rule(broken, good)): assert not flat(d).isfinite().all(), rule
        assert cosine(good, broken).isnan()


def test_inner_products_run_over_all_tensors_together():
    "Conflict in one tensor, agreement in another: overall agreement, so nothing may change."
    f, r = [torch.tensor([1.]), torch.tensor([2.])], [torch.tensor([-1.]), torch.tensor([2.])]
    assert [x.item() for x in symmetric(f, r)] == [0., 4.]


def test_many_weights_are_summed_in_float32():
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(400, 1000, generator=g) for _ in range(3)]
    for dtype, rounding in ROUNDING.items():
        r = [(torch.randn(400, 1000, generator=g) - .5 * x).to(dtype) for x in exact]
        f = [x.to(dtype) for x in exact]
        assert cosine(f, r).item() == pytest.approx(dot(f, r) / (size(f) * size(r)), abs=1e-5)
        d = symmetric(f, r)
        assert dot(d, f) / dot(f, f) > -rounding and dot(d, r) / dot(r, r) > -rounding


def test_inputs_are_left_alone_and_any_memory_layout_will_do():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, generator=g) for _ in range(2))
    y = y - x
    for rule in ALL:
        f, r = [torch.tensor([1., 0.])], [torch.tensor([-1., 1.])]
        d, = rule(f, r)
        assert f[0].tolist() == [1., 0.] and r[0].tolist() == [-1., 1.] and d is not f[0] and d is not r[0]
        d, = rule([x.contiguous(memory_format=torch.channels_last)], [y])
        assert_close(d, rule([x], [y])[0])


def test_results_of_autograd_are_welcome():
    "A tuple, with one tensor for two weights and an expanded one, which could not be written to."
    a, b, c = (torch.ones(3, requires_grad=True) for _ in range(3))
    g_f = torch.autograd.grad((a + b).sum() + (c * torch.tensor([1., -2., 3.])).sum(), (a, b, c))
    g_r = torch.autograd.grad(-(a + b).sum() - (c * torch.tensor([3., -2., 0.])).sum(), (a, b, c))
    for rule in ALL:
        d, expected = rule(g_f, g_r), rule([x.clone() for x in g_f], [x.clone() for x in g_r])
        assert isinstance(d, list) and all(torch.equal(x, y) for x, y in zip(d, expected, strict=True)), rule


def test_mixed_and_double_precision():
    g = torch.Generator().manual_seed(1)
    f, r = ([torch.randn(s, generator=g) for s in SHAPES] for _ in range(2))
    r = [y - 2 * x for x, y in zip(f, r)]
    dtypes = torch.bfloat16, torch.float32, torch.float64
    for rule in EVERY:
        d, mixed = rule(f, r), rule(*([x.to(t) for x, t in zip(v, dtypes)] for v in (f, r)))
        assert [x.dtype for x in mixed] == list(dtypes)
        assert (flat(mixed) - flat(d)).norm() <= 2e-2 * (size(f) + size(r))
        exact = rule([x.double() for x in f], [x.double() for x in r])
        assert_close(flat(exact), flat(d), rtol=1e-5, atol=1e-5)
    assert products([x.double() for x in f], [x.double() for x in r])[1] == pytest.approx(dot(f, r), rel=1e-14)


@given(gradients, gradients, exponents, exponents)
def test_gram_is_the_inner_products_of_each_tensor(f, r, i, j):
    f, r = scaled(f, i), scaled(r, j)
    for row, x, y in zip(gram(f, r), f, r, strict=True):
        a, b = size([x]), size([y])
        theirs = dot([x], [x]), dot([x], [y]), dot([y], [y])
        for ours, exact, unit in zip(row, theirs, (a * a, a * b, b * b)): assert abs(ours - exact) <= 1e-6 * unit
    ff, fr, rr = products(f, r)
    assert abs(fr - dot(f, r)) <= 1e-6 * size(f) * size(r)
    assert (ff, rr) == pytest.approx((size(f)**2, size(r)**2), rel=1e-6)


@given(gradients, gradients, st.floats(-2, 2), st.floats(-2, 2))
def test_combine_is_the_sum_it_says(f, r, c_f, c_r):
    assert_close(flat(combine(c_f, f, c_r, r)), c_f * flat(f) + c_r * flat(r), rtol=0, atol=1e-6)


# --- the rules with a parameter ---

@given(gradients, gradients, st.floats(-.9, .9))
def test_vaccine_turns_each_to_the_target(f, r, rho):
    "With |g_f| >> |g_r| d is g_f' to first order: its cosine with g_r is rho, or what it was if that is above."
    assume(size(f) > .1 and size(r) > .1 and abs(cosine(f, r)) < .99)
    f = scaled(f, 12)
    was, turned = cosine(f, r).item(), cosine(vaccine(f, r, rho), r).item()
    if was > rho + 1e-3: assert turned == pytest.approx(was, abs=1e-4)
    elif was < rho - 1e-3: assert turned == pytest.approx(rho, abs=1e-3)


@given(gradients, gradients)
def test_vaccine_zero_is_symmetric_and_cagrad_zero_is_plain(f, r):
    assume(size(f) > .01 and size(r) > .01)
    tolerance = dict(rtol=0, atol=1e-5 * (size(f) + size(r)))
    assert_close(flat(vaccine(f, r, 0.)), flat(symmetric(f, r)), **tolerance)
    assert_close(flat(cagrad(f, r, 0.)), flat(plain(f, r)), **tolerance)


@given(gradients, gradients, exponents, exponents)
def test_munba_is_a_bargain(f, r, i, j):
    "Length sqrt 2, the same gain sqrt(1 + cos) for both, of whatever lengths; and Nash's condition G'G a = 1/a."
    assume(size(f) > .1 and size(r) > .1 and cosine(f, r) > -.99)
    d, c = munba(scaled(f, i), scaled(r, j)), dot(f, r) / (size(f) * size(r))
    assert size(d) == pytest.approx(2 ** .5, rel=1e-4)
    for g in (f, r): assert dot(d, g) / size(g) == pytest.approx(math.sqrt(1 + c), rel=1e-4)
    assert_close(flat(d), flat(munba(f, r)), rtol=0, atol=2e-5 / math.sqrt(1 + c))
    G = torch.stack([flat(f), flat(r)], 1)
    a = torch.linalg.lstsq(G, flat(d)[:, None]).solution[:, 0] if abs(c) < .99 else None
    if a is not None: assert_close(G.T @ G @ a, 1 / a, rtol=1e-2, atol=1e-3)


@given(gradients, gradients)
def test_munba_is_the_closed_form_of_its_code(f, r):
    "Which is 0/0 for orthogonal and for parallel gradients."
    assume(size(f) > .1 and size(r) > .1 and .05 < abs(cosine(f, r)) < .95)
    g1, g2, g3 = dot(r, r), dot(r, f), dot(f, f)
    a_r = math.sqrt((g1 * g3 - g2 * math.sqrt(g1 * g3)) / (g1 ** 2 * g3 - g1 * g2 ** 2))
    a_f = (1 - g1 * a_r ** 2) / (g2 * a_r)
    assert_close(flat(munba(f, r)), a_f * flat(f) + a_r * flat(r), rtol=1e-3, atol=1e-4)


def test_munba_of_opposite_gradients_is_zero_and_of_halves_has_its_length():
    f = [torch.tensor([3., -4.]), torch.tensor([1.])]
    assert not flat(munba(f, [-2 * x for x in f])).any()
    for dtype, rounding in ROUNDING.items():
        d = munba([x.to(dtype) for x in f], [torch.ones(2, dtype=dtype), torch.ones(1, dtype=dtype)])
        assert all(x.dtype == dtype for x in d) and size(d) == pytest.approx(2 ** .5, rel=2 * rounding + 1e-5)


@given(st.lists(st.tuples(gradients, gradients), min_size=1, max_size=7), st.integers(1, 4))
def test_subspace_harms_none_of_the_last_m(run, m):
    "What is added to g_r works against none of the m last retain gradients, and is g_f itself unless g_f did."
    rule, past = subspace(m), []
    for f, r in run:
        assume(size(f) > .1 and size(r) > .1)
        d = rule(f, r)
        past = ([r] + past)[:m]
        part = [x - y for x, y in zip(d, r)]
        for old in past: assert dot(part, old) >= -2e-3 * size(f) * size(old)
        assert dot(d, r) >= -1e-5 * size(r) * (size(f) + size(r))
        least = min(dot(f, old) / (size(f) * size(old)) for old in past)
        if least > 1e-5: assert torch.equal(flat(d), flat(plain(f, r)))


@given(gradients, st.lists(gradients, min_size=1, max_size=3))
def test_subspace_takes_away_the_projection_on_the_span(f, past):
    "Against an orthonormal basis by QR, where the stored gradients are well apart."
    R = torch.stack([flat(r) for r in past], 1)
    assume(size(f) > .1 and (R.norm(dim=0) > .1).all() and torch.linalg.cond(R / R.norm(dim=0)) < 20)
    assume(min((flat(f) @ R / R.norm(dim=0)).tolist()) < -1e-3)
    rule, zero = subspace(m=3), [torch.zeros(s) for s in SHAPES]
    for r in past[:-1]: rule(zero, r)
    q = torch.linalg.qr(R).Q
    expected = flat(f) - q @ (q.T @ flat(f)) + flat(past[-1])
    assert_close(flat(rule(f, past[-1])), expected, rtol=0, atol=1e-4)


@given(gradients, gradients)
def test_subspace_of_one_is_one_sided(f, r):
    assert_close(flat(subspace_of_one(f, r)), flat(one_sided(f, r)), rtol=0, atol=1e-5 * (1 + size(f) + size(r)))


def test_subspace_forgets_what_is_older_than_m_and_ignores_zero():
    x, y, zero = ([torch.tensor(v)] for v in ([1., 0.], [0., 1.], [0., 0.]))
    rule = subspace(m=1)
    rule(x, [-v for v in y])
    rule(x, zero)                                             # says nothing, so y is still the last
    assert rule(y, zero)[0].tolist() == [0., 0.]              # y works against -y
    rule(zero, x)                                             # now x is the only one
    assert rule(y, zero)[0].tolist() == [0., 1.]


# --- judged by others ---

@given(gradients, gradients, st.integers(-3, 3))
def test_symmetric_is_pcgrad_of_torchjd(f, r, exponent):
    assume(size(f) > .01 and size(r) > .01)
    r = scaled(r, exponent)
    theirs = PCGrad()(torch.stack([flat(f), flat(r)]))
    assert_close(flat(symmetric(f, r)), theirs, rtol=0, atol=1e-5 * (size(f) + size(r)))


@given(gradients, gradients, st.integers(-3, 3))
def test_per_tensor_is_pcgrad_of_torchjd_on_each_tensor(f, r, exponent):
    r = scaled(r, exponent)
    for d, x, y in zip(per_tensor(f, r), f, r, strict=True):
        if min(size([x]), size([y])) < .01 * min(1., 10.**exponent): continue
        theirs = PCGrad()(torch.stack([flat([x]), flat([y])]))
        assert_close(flat([d]), theirs, rtol=0, atol=1e-5 * (size([x]) + size([y])))


@given(gradients, gradients, st.integers(-3, 3), st.floats(0, .9))
def test_vaccine_is_gradvac_of_torchjd_with_that_target(f, r, exponent, rho):
    "Their target is a running mean. A first pair with the cosine rho sets it, and then it is kept."
    assume(size(f) > .01 and size(r) > .01 and abs(cosine(f, r)) < .9999)
    r = scaled(r, exponent)
    theirs = GradVac(beta=1., eps=0.)
    theirs(torch.tensor([[1., 0.], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64))
    theirs.beta = 0.
    tolerance = 3e-5 * (size(f) + size(r)) / math.sqrt(1 - rho**2)
    assert_close(flat(vaccine(f, r, rho)), theirs(torch.stack([flat(f), flat(r)])), rtol=0, atol=tolerance)


@given(gradients, gradients, st.integers(-2, 2), st.floats(.05, .95))
def test_cagrad_solves_its_problem(f, r, exponent, c):
    "No direction of |d - g_0| <= c |g_0| is better for the worse-off: 2001 candidates of the dual, and random ones."
    assume(size(f) > .1 and size(r) > .1 and abs(cosine(f, r)) < .99)
    F, R = flat(f), flat(r) * 10.**exponent
    d, g_0 = flat(cagrad(f, scaled(r, exponent), c)) / 2, (F + R) / 2
    g_w = torch.lerp(R, F, torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None])
    others = torch.cat([g_w, torch.randn(500, len(F), dtype=torch.float64, generator=torch.Generator().manual_seed(0))])
    candidates = g_0 + c * g_0.norm() * others / others.norm(dim=1, keepdim=True)
    best = torch.minimum(candidates @ F, candidates @ R).max().item()
    unit = F.norm() * R.norm() + g_0.norm() * (F.norm() + R.norm())
    assert (d - g_0).norm() <= c * g_0.norm() * (1 + 1e-4) + 1e-6
    assert torch.minimum(d @ F, d @ R).item() >= best - 1e-4 * unit
    assert d @ g_0 >= (1 - c) * g_0 @ g_0 - 1e-5 * unit        # its own promise: the mean of both never gets worse


@given(gradients, gradients)
def test_one_sided_is_the_closest_harmless_forget_gradient(f, r):
    "A-GEM's problem: of all v with <v, g_r> >= 0, g_f' is closest to g_f. By the conditions of optimality."
    assume(size(f) > .01 and size(r) > .01)
    projected = flat(one_sided(f, r)) - flat(r)
    moved = projected - flat(f)
    along = (moved @ flat(r)).item() / dot(r, r)               # the multiplier of the constraint: never negative
    tolerance = 1e-5 * (size(f) + size(r))
    assert along * size(r) >= -tolerance and (moved - along * flat(r)).norm() <= tolerance
    assert (projected @ flat(r)).item() / size(r) >= -tolerance
    if dot(f, r) > 1e-4: assert moved.norm() <= tolerance
    elif dot(f, r) < 0: assert abs((projected @ flat(r)).item()) / size(r) <= tolerance


@given(gradients, gradients, exponents, exponents)
def test_cosine_is_the_cosine(f, r, i, j):
    assume(size(f) > .01 and size(r) > .01)
    c = cosine(scaled(f, i), scaled(r, j))
    assert c.dtype == torch.float32 and c.shape == () and -1 <= c <= 1
    assert c.item() == pytest.approx(dot(f, r) / (size(f) * size(r)), abs=1e-5)


# --- choosing ---

def test_get_by_name_or_callable():
    for name in ('plain', 'one_sided', 'symmetric', 'per_tensor', 'vaccine', 'cagrad', 'munba'):
        assert get(name) is getattr(surgery, name) and get(name).__name__ == name
    for paper, rule in (('pcgrad', symmetric), ('agem', one_sided), ('gradvac', vaccine)):
        assert get(paper) is rule is RULES[paper]
    own = lambda g_forget, g_retain: g_forget
    assert get(own) is own


def test_get_makes_a_fresh_subspace():
    f, r = [torch.tensor([0., 1.])], [torch.tensor([-1., 0.])]
    used = get('subspace')
    used(f, [torch.tensor([0., -1.])])
    assert get('subspace') is not used and get(subspace).__name__ == 'subspace(m=8)'
    assert get('subspace')(f, r)[0].tolist() == [-1., 1.] and used(f, r)[0].tolist() == [-1., 0.]


def test_names_for_the_card():
    "A rule with parameters says so by name, and still does when a run's settings are copied."
    rule = partial(vaccine, rho=.5)
    assert get(rule) is rule and not vars(rule) and name_of(rule) == 'vaccine(rho=0.5)'
    assert subspace(m=3).__name__ == 'subspace(m=3)'


def test_what_cannot_be_is_refused_in_one_sentence():
    g = [torch.ones(2)]
    table = [(partial(vaccine, g, g, rho=1.), ['rho is 1.0']), (partial(vaccine, g, g, rho=-1.), ['rho is -1.0']),
             (partial(cagrad, g, g, c=-.1), ['c is -0.1']), (partial(subspace, 0), ['m is 0'])]
    table += [(partial(get, wrong), [repr(wrong), *RULES]) for wrong in ('pc-grad', '', None, 1, ['plain'], {})]
    table += [(partial(rule, g, g * 2), []) for rule in ALL]   # lists of other lengths
    for act, words in table:
        with pytest.raises(ValueError) as error: act()
        assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), act
