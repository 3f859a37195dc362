"""The fused head of CPU ranks gives the same values and gradients as the full logits."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import log_softmax

from trainers.model import cpu_head

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
VOCABULARY, WIDTH, TOKENS = 37, 8, 23


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use five tokens per block: several blocks, of which the last one is smaller."""
    monkeypatch.setattr(cpu_head, "LOGITS", 5 * VOCABULARY)


def inputs(tokens=TOKENS, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (tokens,))


def plain(hidden, weight, bias, targets, temperature, cap, scale):
    """Compute the same from the full matrix of logits."""
    logits = scale * (hidden @ weight.t() + bias)
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
    log_p = log_softmax(logits, -1)
    of_target = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return of_target, entropy, (2 * log_p).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets


def gradients(log_probs, weights, sources):
    return torch.autograd.grad((log_probs * weights).sum(), sources)


@pytest.mark.parametrize("hint", [True, False], ids=["hint", "no-hint"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
@pytest.mark.parametrize(
    ("temperature", "cap", "scale"), [(1.0, None, 1.0), (0.7, None, 1.3), (1.0, 4.0, 1.0), (0.7, 4.0, 1.3)]
)
def test_values_and_gradients_are_those_of_the_full_logits(hint, equal, temperature, cap, scale):
    *sources, targets = inputs()
    weights = torch.full((TOKENS,), -0.25) if equal else torch.linspace(-1, 1, TOKENS)
    with cpu_head.equal_weights() if hint else nullcontext():
        found = cpu_head.Head.apply(*sources, targets, temperature, 0, cap, scale, ALL)
    expected = plain(*sources, targets, temperature, cap, scale)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    pairs = zip(gradients(found[0], weights, sources), gradients(expected[0], weights, sources), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_only_requested_outputs_are_returned():
    *sources, targets = inputs()
    log_probs, *rest = cpu_head.Head.apply(*sources, targets, 1.0, 0, None, 1.0, ("log_probs", "mean_logits"))
    assert log_probs.shape == (TOKENS,)
    assert [part is None for part in rest] == [True, True, False, True]


def test_the_hint_saves_the_second_computation(monkeypatch):
    again = []
    monkeypatch.setattr(cpu_head, "_again", lambda *_: again.append(1) or (None,) * 3)
    *sources, targets = inputs()
    for hint in (True, False):
        with cpu_head.equal_weights() if hint else nullcontext():
            log_probs = cpu_head.Head.apply(*sources, targets, 1.0, 0, None, 1.0, ALL)[0]
        log_probs.sum().backward()
        assert len(again) == (0 if hint else 1)


def test_a_frozen_layer_gets_no_gradient():
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with cpu_head.equal_weights():
        cpu_head.Head.apply(hidden, weight, bias, targets, 1.0, 0, None, 1.0, ALL)[0].sum().backward()
    assert weight.grad is None and bias.grad is None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("hint", [True, False], ids=["hint", "no-hint"])
def test_without_labelled_tokens_the_gradient_is_zero(hint):
    *sources, targets = inputs(tokens=0)
    with cpu_head.equal_weights() if hint else nullcontext():
        cpu_head.Head.apply(*sources, targets, 1.0, 0, None, 1.0, ALL)[0].sum().backward()
    assert sources[1].grad.abs().sum() == 0


def test_half_precision_is_computed_in_float32_and_its_gradients_are_half_precision():
    *sources, targets = inputs(dtype=torch.bfloat16)
    with cpu_head.equal_weights(), torch.autocast("cpu", torch.bfloat16):
        log_probs = cpu_head.Head.apply(*sources, targets, 1.0, 0, None, 1.0, ALL)[0]
    full = plain(*(source.float() for source in sources), targets, 1.0, None, 1.0)[0]
    torch.testing.assert_close(log_probs, full)
    log_probs.sum().backward()
    assert {source.grad.dtype for source in sources} == {torch.bfloat16}
