"""The families linear_divergence, sorted_l1, token_statistics and topk over any row backend.

The tokens are cut into chunks whose logits fit a memory budget. In linear_divergence, per chunk, one GEMM per head makes the
logits, the row kernel turns them into their gradient in place, two GEMMs carry it to the hidden states and the weight.
Nothing of size tokens x vocabulary exists. The weight gradient is accumulated in float32 across chunks. Under a gradient
tolerance the row kernel leaves lists of the large entries instead, which products of their own carry on, see
``gradient_entries``. Where the budget is too small for efficient products, a backend may have a linear_divergence of its own,
which makes the logits on the chip and never writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import HAVE_LISTS, HAVE_LOGITS_FREE_HEADS, row_backend
from kdkernels.backends.gradient_entries import ENTRY_BYTES, LARGEST_SHARE, EntryLists, ListProducts, report_lists
from kdkernels.backends.rows import RowSpec, Side, Tempering, compute_dtype

__all__ = [
    "DEFAULT_BUDGET",
    "Needs",
    "SideGradients",
    "divergence",
    "divergence_with_gradients",
    "sample",
    "sorted_l1",
    "statistics",
    "topk",
]

DEFAULT_BUDGET = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Bytes of temporary logits by device type. Larger chunks on the CPU bring no speed."""


class Needs(NamedTuple):
    """Which gradients of a side are wanted: to its logits or hidden states, its weight, its bias."""

    tensor: bool
    weight: bool = False
    bias: bool = False


class SideGradients(NamedTuple):
    """The gradients of a side, None where not wanted."""

    tensor: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def spread(self, index: Tensor, rows: int) -> SideGradients:
        """From those of some of the rows to those of all, where the others have none."""
        return self if self.tensor is None else self._replace(tensor=spread(self.tensor, index, rows))


def budget_of(side: Side, memory_budget: int | None) -> int:
    return DEFAULT_BUDGET.get(side.tensor.device.type, 1 << 30) if memory_budget is None else memory_budget


def logits_bytes(sides: list[Side]) -> int:
    """Of the temporary logits of a row."""
    return sum(side.weight.shape[0] * side.tensor.element_size() for side in sides if side.weight is not None)


def chunks(
    sides: list[Side], memory_budget: int | None, *, extra_row_bytes: int = 0, share: float = 1.0
) -> Iterator[slice]:
    """Equal runs of rows whose logits, and what else a row takes, fit a share of the budget, at least one row each."""
    rows = sides[0].tensor.shape[0]
    budget = int(share * budget_of(sides[0], memory_budget))
    row_bytes = logits_bytes(sides) + extra_row_bytes
    fitting = max(1, budget // max(1, row_bytes))
    count = -(-rows // fitting)
    size = -(-rows // count) if count else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


EFFICIENT_ROWS = 512
"""Of a chunk: with fewer, making the logits twice on the chip is estimated to cost less than the traffic of every chunk.

A chunk of n rows reads both weights and, for dH, the student's again, and its dW is rounded, read and added to float32 sums:
some 18 bytes per weight entry, for 8 n operations. A GPU does about 300 operations of bfloat16 in the time it moves a byte
(A100: 156, H100: 295, B200: 281, MI300X: 247), so that the traffic takes 18 * 300 / 8 n = 675 / n of the time of the four products.
Without logits there are six products, in kernels that may reach 0.7 of the library's speed: about as much at n = 600. An
estimate, to be replaced by a timing.
"""


def without_logits(student: Side, teacher: Side, spec: RowSpec, memory_budget: int | None, backend: str) -> bool:
    """Whether a backend's ``linear_divergence`` is to be taken: it has one for this, and the budget is for few rows."""
    if backend not in HAVE_LOGITS_FREE_HEADS:
        return False
    kernels, sides = row_backend(backend), [student, teacher]
    fitting = budget_of(student, memory_budget) // max(1, logits_bytes(sides))
    few = fitting < min(EFFICIENT_ROWS, max(1, student.tensor.shape[0]))
    return few and bool(kernels.linear_divergence_applies(student, teacher, spec))


class ListSettings(NamedTuple):
    """Of heads whose gradients come as lists: how the memory budget is shared out."""

    backend: str
    share_of_logits: float
    bytes_per_head: int


LEAST_SHARE_OF_LISTS = 1 / 8
"""Of the memory budget: with less, lists are multiplied so often that reading the weights for it shows."""


def list_settings(
    sides: list[Side], needs: Sequence[Needs], spec: RowSpec, memory_budget: int | None, backend: str
) -> ListSettings | None:
    """How lists are kept, or None where the gradient is exact: without a tolerance, and in float64."""
    listed = [side.weight for side, need in zip(sides, needs, strict=True) if side.weight is not None and any(need)]
    double = any(side.tensor.dtype == torch.float64 for side in sides)
    if spec.gradient_tolerance == 0 or backend not in HAVE_LISTS or double or not listed:
        return None
    # Lists as long as they may be, of as many rows as there are logits of.
    longest = sum(LARGEST_SHARE * ENTRY_BYTES * weight.shape[0] for weight in listed)
    share = max(LEAST_SHARE_OF_LISTS, longest / (longest + logits_bytes(sides)))
    return ListSettings(backend, 1 - share, int(share * budget_of(sides[0], memory_budget)) // len(listed))


class Head:
    """One side while its chunks go by: makes logits, takes their gradient."""

    def __init__(self, side: Side, needs: Needs, active: Tensor | None, lists_for: ListSettings | None = None) -> None:
        self.side = side
        self.lists_for = lists_for if side.weight is not None and any(needs) else None
        self.products: ListProducts | None = None
        self.needs = needs
        self.active = active
        self.tensor_gradient: Tensor | None = None
        if needs.tensor:
            donated = side.donate and side.weight is None
            self.tensor_gradient = side.tensor if donated else side.tensor.new_empty(side.tensor.shape)
        self.weight_sum: Tensor | None = None
        self.bias_sum: Tensor | None = None
        self.buffer: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return any(self.needs)

    def hidden(self, chunk: slice) -> Tensor:
        """The hidden states of a chunk; blank where a token does not count, for 0 * NaN is no 0 in a GEMM."""
        rows = self.side.tensor[chunk]
        return rows if self.active is None else rows.masked_fill(~self.active[chunk].unsqueeze(-1), 0.0)

    def logits(self, chunk: slice) -> Tensor:
        if self.side.weight is None:
            return self.side.tensor[chunk]
        rows = self.hidden(chunk)
        if self.buffer is None:  # the first chunk is the longest
            vocab = self.side.weight.shape[0]
            # Lists lie in the storage of the rows: on boundaries of four bytes.
            width = vocab + vocab % 2 if self.lists_for and rows.element_size() == 2 else vocab
            self.buffer = rows.new_empty(rows.shape[0], width)[:, :vocab]
        out = self.buffer[: rows.shape[0]]
        scale = self.side.scale
        if self.side.bias is None:
            return torch.addmm(out, rows, self.side.weight.t(), beta=0, alpha=scale, out=out)
        return torch.addmm(self.side.bias, rows, self.side.weight.t(), beta=scale, alpha=scale, out=out)

    def gradient_buffer(self, logits: Tensor, chunk: slice) -> Tensor | None:
        """Where the row kernel writes the gradient of the logits: over them, if they are ours."""
        if not self.wanted:
            return None
        if self.side.weight is not None:
            return logits
        return None if self.tensor_gradient is None else self.tensor_gradient[chunk]

    def lists(self, chunk: slice) -> EntryLists | None:
        """Where the row kernel notes the lists of a chunk, if lists are wanted of it."""
        return None if self.lists_for is None else EntryLists.empty(chunk.stop - chunk.start)

    def take(self, gradient: Tensor | None, chunk: slice, lists: EntryLists | None = None) -> None:
        """Carries the gradient of a chunk's logits on to hidden states, weight and bias."""
        if gradient is None or self.side.weight is None:
            return
        if lists is None:
            self.take_dense(gradient, chunk)
        else:
            self.take_lists(gradient, chunk, lists)

    def take_lists(self, gradient: Tensor, chunk: slice, lists: EntryLists) -> None:
        weight, settings = self.side.weight, self.lists_for
        assert weight is not None
        assert settings is not None
        vocab = weight.shape[0]
        report_lists(lists, vocab)
        if self.products is None:  # the first chunk is the longest
            self.products = ListProducts(settings.backend, weight, gradient.shape[0], settings.bytes_per_head)
        sparse = lists.sparse(vocab)
        if not sparse or not self.products.fits(lists):
            self.multiply_lists()
        if sparse:
            self.products.add(gradient, lists, chunk.start)
        else:
            row_backend(settings.backend).expand_entries(gradient, lists)
            self.take_dense(gradient, chunk)

    def multiply_lists(self) -> None:
        """The products of the lists gathered so far."""
        weight, products = self.side.weight, self.products
        if weight is None or products is None or not products.counts:
            return
        if self.needs.weight and self.weight_sum is None:
            self.weight_sum = torch.zeros(weight.shape, dtype=torch.float32)
        if self.needs.bias and self.bias_sum is None:
            self.bias_sum = torch.zeros(weight.shape[0], dtype=torch.float32)
        rows = products.rows
        part = products.multiply(
            self.hidden(rows).float(), self.side.scale, self.needs.tensor, self.weight_sum, self.bias_sum
        )
        if part is not None:
            assert self.tensor_gradient is not None
            self.tensor_gradient[rows] = part

    def take_dense(self, gradient: Tensor, chunk: slice) -> None:
        weight, scale = self.side.weight, self.side.scale
        assert weight is not None
        if self.tensor_gradient is not None:
            out = self.tensor_gradient[chunk]
            torch.addmm(out, gradient, weight, beta=0, alpha=scale, out=out)
        if self.needs.weight:
            hidden = self.hidden(chunk)
            if hidden.element_size() >= 4:
                first = self.weight_sum is None
                if self.weight_sum is None:
                    self.weight_sum = torch.empty_like(weight, memory_format=torch.contiguous_format)
                self.weight_sum.addmm_(gradient.t(), hidden, beta=0 if first else 1, alpha=scale)
            else:
                part = gradient.t() @ hidden
                self.weight_sum = (
                    part.float().mul_(scale) if self.weight_sum is None else self.weight_sum.add_(part, alpha=scale)
                )
        if self.needs.bias:
            part = gradient.sum(0, dtype=torch.float64 if gradient.dtype == torch.float64 else torch.float32)
            self.bias_sum = part.mul_(scale) if self.bias_sum is None else self.bias_sum.add_(part, alpha=scale)

    def finish(self) -> SideGradients:
        self.multiply_lists()
        weight, bias = self.side.weight, self.side.bias

        def summed(total: Tensor | None, like: Tensor | None, wanted: bool) -> Tensor | None:
            if not wanted or like is None:
                return None
            return torch.zeros_like(like) if total is None else total.to(like.dtype)

        return SideGradients(
            self.tensor_gradient,
            summed(self.weight_sum, weight, self.needs.weight),
            summed(self.bias_sum, bias, self.needs.bias),
        )


def only_active(side: Side, index: Tensor) -> Side:
    return side._replace(tensor=side.tensor[index])


def pair_of_active(student: Side, teacher: Side | None, spec: RowSpec, index: Tensor) -> tuple[Side, Any, RowSpec]:
    """Both sides and the specification of some rows, where what was the same source remains the same."""
    sides = [side for side in (student, teacher) if side is not None]
    taken = [only_active(side, index) for side in sides]
    part = spec.take(index)._replace(active=None)
    composition = part.teacher_composition
    if composition is not None and spec.teacher_composition is not None:
        others = list(composition.others)
        for place, other in enumerate(spec.teacher_composition.others):
            for side, side_taken in zip(sides, taken, strict=True):
                if same_source(side, other):
                    others[place] = others[place]._replace(tensor=side_taken.tensor)
        part = part._replace(teacher_composition=composition._replace(others=tuple(others)))
    if teacher is not None and same_source(student, teacher):
        taken[1] = taken[1]._replace(tensor=taken[0].tensor)
    return taken[0], taken[1] if len(taken) > 1 else None, part


def same_source(one: Side, other: Side) -> bool:
    """Whether two sides have the same logits before the softcap, for being the same memory."""

    def memory(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())

    return one.scale == other.scale and all(
        memory(mine) == memory(theirs) for mine, theirs in zip(one[:3], other[:3], strict=True)
    )


class Heads:
    """All the sources of a pair while its chunks go by: student, teacher and what the teacher is composed of."""

    def __init__(
        self,
        student: Side,
        teacher: Side | None,
        spec: RowSpec,
        needs: tuple[Needs, Needs] = (Needs(False), Needs(False)),
        settings: ListSettings | None = None,
    ) -> None:
        self.spec = spec
        composition = spec.teacher_composition
        others = () if composition is None else composition.others
        pair = [student] if teacher is None else [student, teacher]
        self.heads = [
            Head(side, need, spec.active, settings) for side, need in zip(pair, needs[: len(pair)], strict=True)
        ]
        # A source that is there already is not multiplied again.
        self.sources = list(self.heads)
        for side in others:
            known = next((head for head in self.sources if same_source(head.side, side)), None)
            self.sources.append(known or Head(side, Needs(False), spec.active))
        if len(pair) == 2 and not any(needs[1]) and same_source(student, pair[1]):
            self.sources[1] = self.heads[0]
        self.sides = list({id(head): head.side for head in self.sources}.values())

    def read(self, chunk: slice) -> tuple[list[Tensor], RowSpec]:
        """The logits of student and teacher in a chunk, and its specification."""
        made: dict[int, Tensor] = {}
        for head in self.sources:
            if id(head) not in made:
                made[id(head)] = head.logits(chunk)
        logits = [made[id(head)] for head in self.sources]
        spec, count = self.spec.take(chunk), len(self.heads)
        composition = spec.teacher_composition
        if composition is not None and composition.others:
            others = tuple(
                Side(part, softcap=other.softcap)
                for part, other in zip(logits[count:], composition.others, strict=True)
            )
            spec = spec._replace(teacher_composition=composition._replace(others=others))
        return logits[:count], spec


def spread(part: Tensor, index: Tensor, rows: int) -> Tensor:
    """The rows of ``part`` at ``index`` among ``rows`` rows of zeros."""
    whole = part.new_zeros((rows, *part.shape[1:]))
    whole[index] = part
    return whole


def active_index(sides: list[Side], spec: RowSpec) -> Tensor | None:
    """The rows that count, if leaving the others out saves work: on the CPU (elsewhere it would synchronise), for heads."""
    if spec.active is None or spec.active.device.type != "cpu" or any(side.weight is None for side in sides):
        return None
    index = spec.active.nonzero().squeeze(1)
    return None if index.shape[0] == spec.active.shape[0] else index


@torch.no_grad()
def divergence(
    student: Side, teacher: Side, spec: RowSpec, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])``."""
    if without_logits(student, teacher, spec, memory_budget, backend):
        none = Needs(False), Needs(False)
        return row_backend(backend).linear_divergence(student, teacher, spec, None, None, none)[:2]  # type: ignore[no-any-return]
    index = active_index([student, teacher], spec)
    if index is not None:
        values = divergence(*pair_of_active(student, teacher, spec, index), memory_budget, backend)
        rows = student.tensor.shape[0]
        return spread(values[0], index, rows), values[1] if spec.labels is None else spread(values[1], index, rows)
    kernels = row_backend(backend)
    values = empty_values(student, teacher, spec)
    heads = Heads(student, teacher, spec)
    for chunk in chunks(heads.sides, memory_budget):
        logits, part_spec = heads.read(chunk)
        store_values(values, kernels.divergence_forward(*logits, part_spec), chunk)
    return values


@torch.no_grad()
def divergence_with_gradients(
    student: Side,
    teacher: Side,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    needs: tuple[Needs, Needs],
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, SideGradients, SideGradients]:
    """The values, and the gradients of sum(grad_divergence * divergence + grad_cross_entropy * cross_entropy)."""
    if without_logits(student, teacher, spec, memory_budget, backend):
        return row_backend(backend).linear_divergence(  # type: ignore[no-any-return]
            student, teacher, spec, grad_divergence, grad_cross_entropy, needs
        )
    index = active_index([student, teacher], spec)
    if index is not None:
        divergence, cross_entropy, to_student, to_teacher = divergence_with_gradients(
            *pair_of_active(student, teacher, spec, index),
            grad_divergence[index],
            None if grad_cross_entropy is None else grad_cross_entropy[index],
            needs,
            memory_budget,
            backend,
        )
        rows = student.tensor.shape[0]
        if spec.labels is not None:
            cross_entropy = spread(cross_entropy, index, rows)
        return (
            spread(divergence, index, rows),
            cross_entropy,
            to_student.spread(index, rows),
            to_teacher.spread(index, rows),
        )
    kernels = row_backend(backend)
    values = empty_values(student, teacher, spec)
    settings = list_settings([student, teacher], needs, spec, memory_budget, backend)
    sources = Heads(student, teacher, spec, needs, settings)
    heads = sources.heads
    for chunk in chunks(sources.sides, memory_budget, share=settings.share_of_logits if settings else 1.0):
        logits, part_spec = sources.read(chunk)
        gradients = [head.gradient_buffer(part, chunk) for head, part in zip(heads, logits, strict=True)]
        lists = tuple(head.lists(chunk) for head in heads)
        part = kernels.divergence_fused(
            *logits,
            part_spec,
            grad_divergence[chunk],
            None if grad_cross_entropy is None else grad_cross_entropy[chunk],
            *gradients,
            **({"lists": lists} if settings else {}),
        )
        store_values(values, part, chunk)
        for head, gradient, listed in zip(heads, gradients, lists, strict=True):
            head.take(gradient, chunk, listed)
    return *values, heads[0].finish(), heads[1].finish()


@torch.no_grad()
def sorted_l1(
    student: Side,
    teacher: Side,
    spec: RowSpec,
    error_bound: float,
    grad_values: Tensor | None,
    needs: tuple[Needs, Needs],
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, SideGradients, SideGradients]:
    """``sorted_l1`` of a row backend for any sources: values, what was omitted, and the gradients that are needed."""
    index = active_index([student, teacher], spec)
    if index is not None:
        values, omitted, to_student, to_teacher = sorted_l1(
            only_active(student, index),
            only_active(teacher, index),
            spec.take(index)._replace(active=None),
            error_bound,
            None if grad_values is None else grad_values[index],
            needs,
            memory_budget,
            backend,
        )
        rows = student.tensor.shape[0]
        return (
            spread(values, index, rows),
            spread(omitted, index, rows),
            to_student.spread(index, rows),
            to_teacher.spread(index, rows),
        )
    kernels = row_backend(backend)
    values = student.tensor.new_empty(student.tensor.shape[0], dtype=compute_dtype(student.tensor, teacher.tensor))
    omitted = torch.empty_like(values)
    heads = [Head(side, need, spec.active) for side, need in zip((student, teacher), needs, strict=True)]
    for chunk in chunks([student, teacher], memory_budget):
        logits = [head.logits(chunk) for head in heads]
        gradients = [head.gradient_buffer(part, chunk) for head, part in zip(heads, logits, strict=True)]
        values[chunk], omitted[chunk] = kernels.sorted_l1(
            *logits, spec.take(chunk), error_bound, None if grad_values is None else grad_values[chunk], *gradients
        )
        for head, gradient in zip(heads, gradients, strict=True):
            head.take(gradient, chunk)
    return values, omitted, heads[0].finish(), heads[1].finish()


@torch.no_grad()
def statistics(
    student: Side, teacher: Side | None, spec: RowSpec, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """``token_statistics`` of a row backend, for any sources."""
    kernels = row_backend(backend)
    heads = Heads(student, teacher, spec)
    parts = []
    for chunk in chunks(heads.sides, memory_budget):
        logits, part_spec = heads.read(chunk)
        parts.append(kernels.token_statistics(logits[0], logits[1] if len(logits) > 1 else None, part_spec))
    if not parts:
        vocab = student.tensor.new_empty(
            0, student.tensor.shape[1] if student.weight is None else student.weight.shape[0]
        )
        return kernels.token_statistics(vocab, None if teacher is None else vocab, spec)  # type: ignore[no-any-return]
    values, argmax = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(argmax)


@torch.no_grad()
def by_chunks(
    source: Side, memory_budget: int | None, kernel: Callable[[Tensor, slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The results of a row kernel of logits and of which rows they are, put together."""
    head = Head(source, Needs(False), None)
    parts = [kernel(head.logits(chunk), chunk) for chunk in chunks([source], memory_budget)]
    if not parts:
        vocab = (source.tensor if source.weight is None else source.weight.t()).shape[1]
        return kernel(source.tensor.new_empty(0, vocab), slice(0, 0))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def topk(
    source: Side, k: int, tempering: Tempering, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``topk`` of a row backend, for any source."""
    kernels = row_backend(backend)
    return by_chunks(source, memory_budget, lambda logits, _: kernels.topk(logits, k, tempering))  # type: ignore[return-value]


def sample(
    source: Side, uniforms: Tensor, tempering: Tempering, memory_budget: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``sample`` of a row backend, for any source."""
    kernels = row_backend(backend)
    return by_chunks(source, memory_budget, lambda logits, rows: kernels.sample(logits, uniforms[rows], tempering))  # type: ignore[return-value]


def empty_values(student: Side, teacher: Side, spec: RowSpec) -> tuple[Tensor, Tensor]:
    rows = student.tensor.shape[0]
    dtype = compute_dtype(student.tensor, teacher.tensor)
    divergence = torch.empty(rows, dtype=dtype, device=student.tensor.device)
    return divergence, divergence.new_empty(rows if spec.labels is not None else 0)


def store_values(values: tuple[Tensor, Tensor], part: Any, chunk: slice) -> None:
    values[0][chunk] = part[0]
    if values[1].numel():
        values[1][chunk] = part[1]
