"""Freeze the weights that text does not reach: a vision tower, an audio encoder, what joins them to the text.

The rows of a run are text. A weight that no row reaches gets no gradient. DDP would wait for it, FSDP's
optimiser would have no state for it, and ZeRO would still apply weight decay to it. Frozen, it keeps the
value of the base model.

A second model says what text reaches. Its weights are zeros that need no memory, and the graph of one forward
is followed from the output back to the weights. So it does not matter whether this rank has the weights of
the real model, and in which form.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from trainers.config.text import first_line
from trainers.rank.process import rank
from trainers.rank.say import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENS = 4  # of the text that is computed


def freeze_unreached(model: PreTrainedModel) -> list[str]:
    """Freeze the weights that text does not reach. Return their modules, and weights outside of these.

    Only a model of several kinds of data, or the part of one that is for text, has such weights. Others are
    not computed. Call it before peft or a backend wraps the model.
    """
    if not (model.config.sub_configs or model.config.base_config_key):
        return []
    try:
        found = unreached(model)
    except Exception as error:  # a forward of any model: it may need more than ids
        if rank() == 0:
            why = f"{type(error).__name__}: {first_line(error)}"
            say("note", f"all weights are trained: what text does not reach could not be found ({why})")
        return []
    for name, weight in model.named_parameters():
        if any(is_below(name, part) for part in found):
            weight.requires_grad_(False)
    if found and rank() == 0:
        count = sum(found.values()) / 1e6
        say("frozen", f"{', '.join(found)}, {count:.1f}M weights: text does not reach them")
    return list(found)


def is_below(name: str, part: str) -> bool:
    """Return whether a name is a part's, or that of something in it."""
    return name == part or name.startswith(f"{part}.")


def below_any(parts: Sequence[str]) -> str:
    """Return a regular expression for the full names of these parts and of all that is in them."""
    return rf"({'|'.join(map(re.escape, parts))})(\..*)?"


def unreached(model: PreTrainedModel) -> dict[str, int]:
    """Return the largest modules that text does not reach, and single weights outside of these.

    Each has the number of its weights.
    """
    import torch

    ids = torch.arange(TOKENS)[None]
    with torch.enable_grad(), without_weights(model) as empty:
        output = empty(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        reached = {id(weight) for weight in _leaves(output.logits)}
        return dict(_largest(empty, "", lambda part: any(id(w) in reached for w in _weights_of(part))))


def _weights_of(part: Any) -> Iterator[torch.nn.Parameter]:
    """Yield the weights of a module, or the weight itself."""
    if hasattr(part, "parameters"):
        yield from part.parameters()
    else:
        yield part


@contextmanager
def without_weights(model: PreTrainedModel) -> Iterator[Any]:
    """Yield a model of the same config on the CPU, in training mode. Its weights are zeros without memory.

    Its linear layers compute one number for each row while the block runs: the values do not matter, and a
    product would first need memory for the weights.
    """
    import torch

    # The constructor draws random values, and so does dropout.
    with torch.random.fork_rng(devices=[]), _quick_linear():
        yield _build_empty(model)


def _build_empty(model: PreTrainedModel) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers.modeling_utils import set_zero3_state

    config = copy.deepcopy(model.config)
    # Kernels refuse expanded weights. What is reached does not depend on the implementation.
    config._attn_implementation = config._experts_implementation = "eager"
    # ZeRO-3 would shard the parts that the constructor makes.
    with set_zero3_state(), init_empty_weights(include_buffers=False):
        empty: Any = type(model)(config)
    for module in empty.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros, zeros.is_floating_point()))
    empty.tie_weights()
    return empty


def _quick_linear() -> AbstractContextManager[Any]:
    """Replace the product of each linear layer by a number for each row, while the block runs."""
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class QuickLinear(TorchFunctionMode):
        def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if called is not linear:
                return called(*args, **kwargs or {})
            return one_number_a_row(*args, **kwargs or {})

    def one_number_a_row(input: Any, weight: Any, bias: Any = None) -> Any:
        number = input.sum(-1, keepdim=True) * weight[0, 0] + (0 if bias is None else bias[0])
        return number.expand(*input.shape[:-1], len(weight)).contiguous()

    return QuickLinear()


def _leaves(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that an output was computed from, as far as they take a gradient."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [earlier for earlier, _ in node.next_functions]


def _largest(module: Any, path: str, is_reached: Callable[[Any], bool]) -> Iterator[tuple[str, int]]:
    """Yield the largest parts of a module that are not reached, and the number of their weights.

    Which experts of a layer a token reaches depends on the token. So in a list, what has a reached sibling of
    its class counts as reached.
    """
    from torch import nn

    parts = [*module.named_children(), *module.named_parameters(recurse=False)]
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    siblings = {type(part) for _, part in parts if is_list and is_reached(part)}
    for name, part in parts:
        if is_reached(part):
            if isinstance(part, nn.Module):
                yield from _largest(part, f"{path}{name}.", is_reached)
        elif type(part) not in siblings and (count := sum(weight.numel() for weight in _weights_of(part))):
            yield path + name, count
