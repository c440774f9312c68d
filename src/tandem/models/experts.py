"""Mixtures of experts: which layers have one, how many experts there are, and how a router chooses among them.

Source: "Switch Transformers" (arXiv 2101.03961); Qwen3's router: transformers, `modeling_qwen3_moe.py`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError

MOST_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model. Names are Megatron's where it has one, and otherwise Hugging Face's.

    A sparse layer's router gives each token a probability for every expert (softmax). The token goes through the
    `moe_router_topk` experts of the largest ones, and their outputs are summed with the probabilities as factors.

    Attributes:
        moe_ffn_hidden_size: inner width of one expert.
        norm_topk_prob: the factors of a token are divided by their sum. This equals a softmax over the chosen experts
            alone, which is Megatron's router without `--moe-router-pre-softmax`.
        decoder_sparse_step: every layer whose number, counted from 1, is a multiple of it is sparse.
        mlp_only_layers: numbers, from 0, of layers that have an MLP all the same.
        router_aux_loss_coef: what `config.json` says. Training takes its coefficient from its settings.
    """

    num_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        for name in ("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "decoder_sparse_step"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"{name} {value!r}: expected a whole number, at least 1")
        if self.moe_router_topk > self.num_experts:
            raise UserError(
                f"moe_router_topk (num_experts_per_tok) {self.moe_router_topk}: expected at most the "
                f"{self.num_experts} experts (num_experts)"
            )
        if type(self.norm_topk_prob) is not bool:
            raise UserError(f"norm_topk_prob {self.norm_topk_prob!r}: expected true or false")
        if any(type(layer) is not int or layer < 0 for layer in self.mlp_only_layers):
            raise UserError(f"mlp_only_layers {list(self.mlp_only_layers)}: expected numbers of layers, from 0")
        if type(coef := self.router_aux_loss_coef) not in (int, float) or not 0 <= coef < math.inf:
            raise UserError(f"router_aux_loss_coef {coef!r}: expected a number, at least 0")

    def are_in(self, layer: int) -> bool:
        """Whether a layer is sparse: it has experts in place of an MLP.

        >>> some = Experts(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=4, norm_topk_prob=True,
        ...     decoder_sparse_step=2, mlp_only_layers=(1,))
        >>> [layer for layer in range(6) if some.are_in(layer)]
        [3, 5]
        """
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Experts:
        """The inverse of `dataclasses.asdict`, also when JSON has turned tuples into lists."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


def sparse_layers(
    every: int | Sequence[int], dense: int, num_slots: int, noop_layers: Collection[int] = ()
) -> list[bool] | None:
    """Whether each layer has experts, as Megatron says it; None if a list does not mark each of `num_slots`.

    Args:
        every: a step: the first layer has experts, and every n-th after it. Or a mark for each layer.
        dense: so many layers at the beginning have none all the same.
        num_slots: the layers, with those that stay empty.
        noop_layers: these stay empty, and are not in the result.

    >>> sparse_layers([0, 1, 1], 0, 3)
    [False, True, True]
    """
    if isinstance(every, int):
        every = [int(slot % max(every, 1) == 0) for slot in range(num_slots)]
    if len(every) != num_slots:
        return None
    marks = [bool(mark) for slot, mark in enumerate(every) if slot not in noop_layers]
    return [mark and layer >= dense for layer, mark in enumerate(marks)]


def parse_layer_freq(text: str) -> int | list[int]:
    """A step, or a list of 0 and 1 as Megatron takes it, with `+` and `*`. Nothing is executed.

    >>> parse_layer_freq("([0]*1+[1]*2)*2")
    [0, 1, 1, 0, 1, 1]

    Raises:
        UserError: it is neither.
    """
    try:
        value: int | list[int] = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = []
    if isinstance(value, int) or (value and all(mark in (0, 1) for mark in value)):
        return value
    raise UserError(f"--moe-layer-freq {text}: expected a number, or a list such as '[0]*1+[1]*47'")


def _value(node: ast.expr) -> Any:
    """The value of an expression of whole numbers and lists of them."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _value(left) + _value(right)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return _product(_value(left), _value(right))
    raise ValueError("no list of numbers")


def _product(left: Any, right: Any) -> Any:
    """A product of bounded size: a flag makes no list that fills the memory."""
    sizes = [value if isinstance(value, int) else len(value) for value in (left, right)]
    if sizes[0] * sizes[1] > MOST_LAYERS:
        raise ValueError("too long")
    return left * right
