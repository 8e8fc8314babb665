"""Matrix products as index equations: every dimension of the output can be cut, the contracted ones can't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, rule
from fxstream.passes.operators.common import Piece, cut

aten = torch.ops.aten
ELLIPSIS = "0123456789"


def explicit(term: str, rank: int) -> str:
    """A term with one letter for each dimension: ``...`` stands for the missing ones, aligned at the right."""
    return term.replace("...", ELLIPSIS[len(ELLIPSIS) - (rank - len(term) + 3) :])


def contract(terms: Sequence[str], result: str, tensors: Sequence[torch.Tensor], out: Slice) -> list[Piece] | None:
    """The piece of each operand: the dimension that has the letter of the output's, whole without one."""
    letter = result[out.dim]
    pieces: list[Piece] = []
    for term, tensor in zip(terms, tensors, strict=True):
        term = explicit(term, tensor.dim())
        if len(term) != tensor.dim() or term.count(letter) > 1:
            return None
        dim = term.find(letter)
        pieces.append(None if dim < 0 or tensor.shape[dim] == 1 else out.at(dim))
    return pieces


def product(call: Call, out: Slice, terms: Mapping[str, str], result: str) -> Cut | None:
    """The cut of a product whose operands are named."""
    given = {name: call.arguments[name] for name in terms if call.arguments[name] is not None}
    rank = len(call.shape)
    pieces = contract([terms[name] for name in given], explicit(result, rank), list(given.values()), out)
    return None if pieces is None else cut(call, dict(zip(given, pieces, strict=True)))


@rule(aten.linear.default)
def linear(call: Call, out: Slice) -> Cut | None:
    return product(call, out, {"input": "...k", "weight": "nk", "bias": "n"}, "...n")


@rule(aten.mm.default)
def mm(call: Call, out: Slice) -> Cut | None:
    return product(call, out, {"self": "mk", "mat2": "kn"}, "mn")


@rule(aten.bmm.default)
def bmm(call: Call, out: Slice) -> Cut | None:
    return product(call, out, {"self": "bmk", "mat2": "bkn"}, "bmn")


@rule(aten.addmm.default)
def addmm(call: Call, out: Slice) -> Cut | None:
    added = "mn"[2 - call.arguments["self"].dim() :]
    return product(call, out, {"self": added, "mat1": "mk", "mat2": "kn"}, "mn")


@rule(aten.baddbmm.default)
def baddbmm(call: Call, out: Slice) -> Cut | None:
    added = "bmn"[3 - call.arguments["self"].dim() :]
    return product(call, out, {"self": added, "batch1": "bmk", "batch2": "bkn"}, "bmn")


@rule(aten.matmul.default)
def matmul(call: Call, out: Slice) -> Cut | None:
    left, right = call.arguments["self"].dim() > 1, call.arguments["other"].dim() > 1
    terms = {"self": "...mk" if left else "k", "other": "...kn" if right else "k"}
    return product(call, out, terms, "..." + "m" * left + "n" * right)


@rule(aten.outer.default)
def outer(call: Call, out: Slice) -> Cut | None:
    return product(call, out, {"self": "m", "vec2": "n"}, "mn")


@rule(aten.einsum.default)
def einsum(call: Call, out: Slice) -> Cut | None:
    tensors = call.arguments["tensors"]
    left, arrow, result = call.arguments["equation"].replace(" ", "").partition("->")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        once = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
        result = ("..." if "..." in left else "") + once
    pieces = contract(left.split(","), explicit(result, len(call.shape)), tensors, out)
    return None if pieces is None else cut(call, {"tensors": pieces})
