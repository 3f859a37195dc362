"""Compute the output layer and the log-probabilities of the labelled tokens together, on CPU ranks.

TRL's fused head has Triton kernels for GPUs. On a CPU it reads the logits about twenty times in plain torch,
which took more time than all its matrix products. Here a block of logits is read five times. If all tokens
have the same weight (the likelihood of sft), the gradient of a block is computed while its logits are in
memory, not in a second pass: three matrix products instead of four. Neither of the two ever stores the logits
of a full micro-batch.

Computing the gradient in the forward follows Liger's fused linear cross-entropy (arXiv 2410.10989,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trainers.rank.library_patches import replace_in

LOGITS = 2**24  # in a block: 64 MiB in float32; two blocks are in memory at a time

_equal_weights = False


@contextmanager
def equal_weights() -> Iterator[None]:
    """Declare that the loss is a multiple of the sum of the log-probabilities computed in the context.

    This is only a hint. A loss that weighs them differently also gets the right gradient, with more work.
    """
    global _equal_weights
    before, _equal_weights = _equal_weights, True
    try:
        yield
    finally:
        _equal_weights = before


def replace_trls_head() -> None:
    """Let TRL's trainers use Head, and score only the tokens in the loss.

    TRL's fused head scores only these where it uses Triton (on GPUs). Elsewhere it scores all positions, for
    compilers that need fixed shapes. A CPU does not need them, so prompts and padding cost nothing there
    either.
    """
    replace_in(trl_utils, "_use_triton", lambda device: True)
    replace_in(trl_utils, "_ChunkedLogProbFunction", Head)


class Head:
    """A replacement for TRL's ChunkedLogProbFunction, with the same arguments and results."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> Any:
        """Return log p(target), entropy, log of the sum of p squared, mean logit, and is_top1.

        hidden: (tokens, width); weight: (vocabulary, width); bias: (vocabulary,); targets: (tokens,).
        is_top1: whether the target is the most likely token. Each result is (tokens,), or None if it is not
        in `outputs` (log p is always computed). On a CPU only log p has a gradient, and the size of a block
        is LOGITS, not chunk_size.
        """
        if hidden.device.type != "cpu":
            return ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
        early = _equal_weights and torch.is_grad_enabled()
        shape = _Shape(scale, softcap, temperature)
        with torch.autocast("cpu", enabled=False):
            return _HeadOnCPU.apply(hidden, weight, bias, targets, shape, outputs, early)


class _Shape:
    """How a model changes its logits x: scale * x / temperature.

    With a cap: cap * tanh(scale * x / cap) / temperature.
    """

    def __init__(self, scale: float, cap: float | None, temperature: float) -> None:
        self.scale, self.cap, self.temperature = scale, cap, temperature

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        if self.cap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def backward_(self, gradient: torch.Tensor, shaped: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the plain logits, from that of the shaped logits. Works in place."""
        factor = self.scale / self.temperature
        if self.cap is not None:
            gradient.mul_(shaped.mul_(self.temperature / self.cap).square_().neg_().add_(1.0))
        return gradient if factor == 1.0 else gradient.mul_(factor)


class _Gradients:
    """The gradients of the output layer and its input, summed over blocks of tokens."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: torch.Tensor, weight: torch.Tensor, bias: Any
    ) -> None:
        sources = (hidden, weight, bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros(source.shape) if source is not None and asked else None
            for source, asked in zip(sources, needed, strict=True)
        )

    def add(self, part: slice, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a block. `logits`: the gradient of its logits; `hidden`: its input."""
        if self.hidden is not None:
            torch.mm(logits, weight, out=self.hidden[part])
        if self.weight is not None:
            self.weight.addmm_(logits.t(), hidden)
        if self.bias is not None:
            self.bias += logits.sum(0)

    def all(self) -> tuple[torch.Tensor | None, ...]:
        return self.hidden, self.weight, self.bias


class _HeadOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        shape: _Shape,
        outputs: tuple[str, ...],
        early: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        found = {name: torch.empty(len(targets)) for name in ("log_probs", "log_z", *outputs)}
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias) if early else None
        matrix = weight.float()
        for part, states, logits, scratch in _blocks(hidden, matrix, bias, shape):
            target = targets[part, None]
            top, of_target = logits.amax(-1), logits.gather(-1, target)[:, 0]
            p = torch.softmax(logits, -1, out=scratch)
            log_z = top - p.amax(-1).log()
            found["log_z"][part] = log_z
            found["log_probs"][part] = of_target - log_z
            if "entropy" in outputs:
                found["entropy"][part] = log_z - _dot(p, logits)
            if "log_sum_sq_probs" in outputs:
                found["log_sum_sq_probs"][part] = _dot(p, p).log()
            if "mean_logits" in outputs:
                found["mean_logits"][part] = logits.mean(-1)
            if "is_top1" in outputs:  # if two logits are equal, TRL takes the first
                found["is_top1"][part] = of_target == top
            if gradients is not None:
                gradients.add(part, _slope_(p, target, shape, logits), states, matrix)
        ctx.gradients, ctx.shape = gradients, shape
        ctx.save_for_backward(hidden, weight, bias, targets, found.pop("log_z"))
        log_probs = found.pop("log_probs")
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].bool()
        ctx.mark_non_differentiable(*found.values())
        rest = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return log_probs, *(found.get(name) for name in rest)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: Any) -> Any:
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        if gradient is None:
            return (None,) * 7
        gradient = gradient.float()
        if ctx.gradients is not None and (gradient == gradient[:1]).all():
            found, ctx.gradients = ctx.gradients, None
            factor = gradient[:1].sum()  # 0 if there is no token
            parts = tuple(part if part is None else part.mul_(factor) for part in found.all())
        else:
            with maybe_gather_lm_head_ctx(weight, bias), torch.autocast("cpu", enabled=False):
                parts = _again(ctx, gradient, hidden, weight, bias, targets, log_z)
        sources = (hidden, weight, bias)
        cast = (part if part is None else part.to(s.dtype) for part, s in zip(parts, sources, strict=True))
        return (*cast, None, None, None, None)


def _again(
    ctx: Any,
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    log_z: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients if the tokens have different weights. Computes the logits a second time."""
    gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
    matrix = weight.float()
    for part, states, logits, scratch in _blocks(hidden, matrix, bias, ctx.shape):
        p = torch.sub(logits, log_z[part, None], out=scratch).exp_()
        slope = _slope_(p, targets[part, None], ctx.shape, logits).mul_(gradient[part, None])
        gradients.add(part, slope, states, matrix)
    return gradients.all()


def _blocks(
    hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, shape: _Shape
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield blocks of tokens: their slice, their states, their logits, and scratch memory of the same size.

    The next block reuses the memory of the logits and the scratch.
    """
    size = max(1, LOGITS // len(matrix))
    buffers = torch.empty(2, min(size, len(hidden)), len(matrix))
    for begin in range(0, len(hidden), size):
        states = hidden[begin : begin + size].float()
        logits, scratch = buffers[:, : len(states)]
        torch.mm(states, matrix.t(), out=logits)
        if bias is not None:
            logits += bias.float()
        yield slice(begin, begin + len(states)), states, shape.apply_(logits), scratch


def _slope_(p: torch.Tensor, target: torch.Tensor, shape: _Shape, logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of log p(target) with respect to the plain logits: 1 at the target, minus p.

    Works in place.
    """
    p.neg_().scatter_add_(-1, target, torch.ones(len(p), 1))
    return shape.backward_(p, logits)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each row with its counterpart, without a temporary of the full size."""
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0, 0]
