"Surgery: what each rule promises, for gradients of any size and dtype, and torchjd as an independent judge."
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchjd.aggregation import PCGrad

from unlearn_nb import surgery
from unlearn_nb.surgery import cosine, get, one_sided, plain, symmetric

RULES = [plain, one_sided, symmetric]
every_rule = pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
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
def test_one_sided_never_harms_retain(f, r, i, j):
    f, r = scaled(f, i), scaled(r, j)
    assert harm(one_sided(f, r), r, f) <= 1


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


@every_rule
@given(f=gradients, r=gradients)
def test_no_conflict_no_change(rule, f, r):
    assume(dot(f, r) > 1e-6)
    for d, x, y in zip(rule(f, r), f, r, strict=True): assert torch.equal(d, x + y)


@given(gradients, gradients)
def test_conflict_changes_the_sum(f, r):
    assume(cosine(f, r) < -.01 and size(f) > .1 and size(r) > .1)
    summed = flat(plain(f, r))
    assert (flat(one_sided(f, r)) - summed).norm() > 1e-4 and (flat(symmetric(f, r)) - summed).norm() > 1e-4


@every_rule
@given(g=gradients, exponent=exponents)
def test_a_zero_gradient_leaves_the_other_as_it_is(rule, g, exponent):
    g, zero = scaled(g, exponent), [torch.zeros(s) for s in SHAPES]
    for d in (rule(g, zero), rule(zero, g)): assert all(torch.equal(x, y) for x, y in zip(d, g, strict=True))
    assert not flat(rule(zero, zero)).any() and cosine(g, zero) == 0 == cosine(zero, zero)


@every_rule
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@given(f=gradients, r=gradients, big=st.sampled_from([1e-3, 1., 1e4]))
def test_half_precision_is_as_good_as_its_rounding(rule, dtype, f, r, big):
    f, r = ([(x * big).to(dtype) for x in g] for g in (f, r))
    d, wide = rule(f, r), rule([x.float() for x in f], [x.float() for x in r])
    assert all(x.dtype == dtype and x.isfinite().all() for x in d)
    tolerance = ROUNDING[dtype] * (size(f) + size(r)) + 1e-7   # 1e-7: the smallest steps of float16
    assert (flat(d) - flat(wide)).norm() <= tolerance


@given(gradients, gradients, exponents)
def test_only_lengths_scale(f, r, exponent):
    "Both gradients times one number: the direction times that number. Tiny and huge gradients get the same surgery."
    assume(size(f) > .01 and size(r) > .01)
    d, big = flat(symmetric(f, r)), flat(symmetric(scaled(f, exponent), scaled(r, exponent))) / 10.**exponent
    torch.testing.assert_close(big, d, rtol=0, atol=1e-5 * (size(f) + size(r)))


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('rule', [one_sided, symmetric], ids=lambda r: r.__name__)
def test_a_non_finite_gradient_stays_visible(rule, bad):
    good, broken = [torch.ones(3), torch.ones(2)], [-torch.ones(3), torch.tensor([-1., bad])]
    for d in (rule(good, broken), rule(broken, good)): assert not flat(d).isfinite().all()
    assert cosine(good, broken).isnan()


def test_inner_products_run_over_all_tensors_together():
    "Conflict in one tensor, agreement in another: overall agreement, so nothing may change."
    f, r = [torch.tensor([1.]), torch.tensor([2.])], [torch.tensor([-1.]), torch.tensor([2.])]
    assert [x.item() for x in symmetric(f, r)] == [0., 4.]


@pytest.mark.parametrize('dtype', ROUNDING, ids=str)
def test_many_weights_are_summed_in_float32(dtype):
    g = torch.Generator().manual_seed(0)
    f = [torch.randn(400, 1000, generator=g) for _ in range(3)]
    r = [(torch.randn(400, 1000, generator=g) - .5 * x).to(dtype) for x in f]
    f = [x.to(dtype) for x in f]
    assert cosine(f, r).item() == pytest.approx(dot(f, r) / (size(f) * size(r)), abs=1e-6)
    d = symmetric(f, r)
    assert dot(d, f) / dot(f, f) > -ROUNDING[dtype] and dot(d, r) / dot(r, r) > -ROUNDING[dtype]


@every_rule
def test_inputs_are_left_alone(rule):
    f, r = [torch.tensor([1., 0.])], [torch.tensor([-1., 1.])]
    d, = rule(f, r)
    assert f[0].tolist() == [1., 0.] and r[0].tolist() == [-1., 1.] and d is not f[0] and d is not r[0]


@every_rule
def test_any_memory_layout(rule):
    g = torch.Generator().manual_seed(0)
    f, r = (torch.randn(2, 3, 4, 5, generator=g) for _ in range(2))
    r = r - f
    d, = rule([f.contiguous(memory_format=torch.channels_last)], [r])
    torch.testing.assert_close(d, rule([f], [r])[0])


@every_rule
def test_lists_of_other_lengths_are_refused(rule):
    with pytest.raises(ValueError): rule([torch.ones(2)], [torch.ones(2), torch.ones(2)])


# --- judged by others ---

@given(gradients, gradients, st.integers(-3, 3))
def test_symmetric_is_pcgrad_of_torchjd(f, r, exponent):
    assume(size(f) > .01 and size(r) > .01)
    r = scaled(r, exponent)
    theirs = PCGrad()(torch.stack([flat(f), flat(r)]))
    torch.testing.assert_close(flat(symmetric(f, r)), theirs, rtol=0, atol=1e-5 * (size(f) + size(r)))


@given(gradients, gradients)
def test_one_sided_is_the_closest_harmless_forget_gradient(f, r):
    "A-GEM's problem: of all v with <v, g_r> >= 0, g_f' is the one closest to g_f. Its solution by the conditions of optimality."
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
    for name in ('plain', 'one_sided', 'symmetric'): assert get(name) is getattr(surgery, name)
    own = lambda g_forget, g_retain: g_forget
    assert get(own) is own


@pytest.mark.parametrize('wrong', ['pcgrad', '', None, 1, ['plain'], {}])
def test_get_names_the_value_and_the_choices(wrong):
    with pytest.raises(ValueError) as error: get(wrong)
    message = str(error.value)
    assert repr(wrong) in message and '\n' not in message
    assert all(name in message for name in ('plain', 'one_sided', 'symmetric'))
