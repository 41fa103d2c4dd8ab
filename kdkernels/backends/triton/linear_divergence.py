"""The family linear_divergence in Triton, with logits that are never written: see ``triton_kernels/linear_divergence.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.chunked_head import Needs, SideGradients
from kdkernels.backends.gradient_tiles import TileChooser, TileNotes, Tiles
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.backends.triton.divergence import SAVED_STATISTICS
from kdkernels.backends.triton.launching import (
    dot_precision,
    load_kernels,
    on_device_of,
    precision,
    register_limit,
    warp_size,
)

__all__ = ["linear_divergence", "linear_divergence_applies"]

STATES = 10
"""Numbers per row and split that the first sweep leaves."""


def linear_divergence_applies(student: Side, teacher: Side, spec: RowSpec) -> bool:
    """Whether ``linear_divergence`` computes this: no float64, no target apart, no composition."""
    plain = spec.targets is None and spec.student_composition is None and spec.teacher_composition is None
    return plain and torch.float64 not in (student.tensor.dtype, teacher.tensor.dtype)


class Operand:
    """One side on its way through the kernels."""

    def __init__(
        self, side: Side, needs: Needs, softcap: float, temperature: float, temperatures: Tensor | None
    ) -> None:
        self.needs = needs
        self.side = side
        self.rows, self.hidden_size = side.tensor.shape
        self.tensor = adjacent_columns(side.tensor)
        self.weight = None if side.weight is None else adjacent_columns(side.weight)
        self.bias = None if side.bias is None else side.bias.contiguous()
        self.temperature, self.temperatures = temperature, temperatures
        self.arguments = (
            self.tensor,
            self.tensor.stride(0),
            self.weight,
            0 if self.weight is None else self.weight.stride(0),
            self.bias,
            self.hidden_size,
            float(side.scale),
            softcap or None,
            float(temperature),
            temperatures,
        )
        self.total: Tensor | None = None
        self.result = SideGradients()
        self.strip: Tensor | None = None
        self.chooser: TileChooser | None = None

    def prepare_gradient(self, vocab: int, tiling: Any, tolerance: float) -> None:
        """Makes room for the gradients that are wanted."""
        if not any(self.needs):
            return
        if self.weight is None:
            self.strip = torch.empty_like(self.tensor, memory_format=torch.contiguous_format)
            self.result = SideGradients(self.strip)
            return
        width = min(tiling.strip, vocab + -vocab % tiling.columns)
        self.strip = self.tensor.new_empty(self.rows + -self.rows % tiling.rows, width)
        if self.needs.tensor:
            self.total = torch.empty(self.tensor.shape, dtype=torch.float32, device=self.tensor.device)
        if tolerance:
            self.chooser = TileChooser(self.rows, vocab, tiling.rows, tiling.columns, tolerance)
        self.result = SideGradients(
            weight=self.weight.new_empty(self.weight.shape) if self.needs.weight else None,
            bias=None if self.bias is None or not self.needs.bias else torch.empty_like(self.bias),
        )

    def notes(self, tiles: int, blocks: int, block_rows: int) -> TileNotes | None:
        return None if self.chooser is None else TileNotes.empty(tiles, blocks, block_rows, self.tensor.device)

    def finish(self) -> SideGradients:
        if self.chooser is not None:
            self.chooser.report()
        if self.total is None:
            return self.result
        return self.result._replace(tensor=self.total.to(self.tensor.dtype))


def adjacent_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


class Problem:
    """A pair of sides with everything that the launches share."""

    def __init__(self, student: Side, teacher: Side, spec: RowSpec, needs: tuple[Needs, Needs]) -> None:
        kernels = load_kernels()
        self.kernels = kernels.linear_divergence
        self.spec = spec
        self.student = Operand(
            student, needs[0], spec.student_softcap, spec.student_temperature, spec.student_temperatures
        )
        self.teacher = Operand(
            teacher, needs[1], spec.teacher_softcap, spec.teacher_temperature, spec.teacher_temperatures
        )
        self.rows = student.tensor.shape[0]
        self.vocab = (student.tensor.shape[1:] if student.weight is None else student.weight.shape)[0]
        self.precision = dot_precision()
        itemsize = max(student.tensor.element_size(), teacher.tensor.element_size())
        # The forward has tiles of its own: they need not be smaller where both sides get a gradient.
        self.forward, self.tiling = (
            kernels.tiling.choose_linear_tiling(
                self.rows, itemsize, both, self.precision == "tf32", warp_size(student.tensor)
            )
            for both in (False, all(map(any, needs)))
        )
        self.blocks = -(-self.rows // self.tiling.rows)
        self.splits = -(-self.vocab // self.forward.split)
        self.values = torch.empty(self.rows, dtype=torch.float32, device=student.tensor.device)
        self.cross_entropy = self.values.new_empty(0 if spec.labels is None else self.rows)
        self.statistics = self.values.new_empty(self.rows, SAVED_STATISTICS)
        self.sizes = {"ROWS": self.tiling.rows, "COLUMNS": self.tiling.columns}
        self.order: Tensor | None = None
        self.fast_log = precision(False)["fast_log"]

    def launch(self, kernel: str) -> dict[str, int]:
        """The options of a launch."""
        warps, most_registers = self.tiling.launch(kernel)
        return {"num_warps": warps, "num_stages": self.tiling.num_stages, **register_limit(most_registers)}

    def sweep(self) -> None:
        """The values and statistics of all rows."""
        spec, kernels = self.spec, self.kernels
        labels, per_row = spec.labels, {"SPLITS": 1 << (self.splits - 1).bit_length(), "num_warps": 1}
        states = self.values.new_empty(self.rows, STATES, self.splits)
        shared = {"active": spec.active, "parameters": spec.parameters, "a": spec.a, "KIND": spec.kind}
        logits = {"PRECISION": self.precision, "HIDDEN": self.forward.hidden, "SPLIT": self.forward.split}
        logits |= {"ROWS": self.forward.rows, "COLUMNS": self.forward.columns}
        sides = self.student.arguments, self.teacher.arguments, self.rows, self.vocab, self.splits
        grid = -(-self.rows // self.forward.rows), self.splits
        kernels.linear_divergence_sweep_kernel[grid](*sides, states, labels, **shared, **logits, **self.launch("sweep"))
        kernels.linear_divergence_merge_kernel[(self.rows,)](
            states,
            self.splits,
            self.vocab,
            self.values,
            None if labels is None else self.cross_entropy,
            self.statistics,
            labels,
            student_temperatures=self.student.temperatures,
            teacher_temperatures=self.teacher.temperatures,
            student_temperature=self.student.temperature,
            teacher_temperature=self.teacher.temperature,
            **shared,
            **per_row,
        )
        if load_kernels().divergence.takes_two_sweeps(spec.kind):
            sums = states.view(-1)[: self.rows * 3 * self.splits]  # nobody reads the states any more
            kernels.linear_divergence_terms_kernel[grid](
                *sides,
                sums,
                self.statistics,
                b=spec.b,
                FAST_LOG=self.fast_log,
                **shared,
                **logits,
                **self.launch("terms"),
            )
            kernels.linear_divergence_value_kernel[(self.rows,)](
                sums, self.splits, self.values, self.statistics, **shared, b=spec.b, **per_row
            )

    def differentiate(self, grad_divergence: Tensor, grad_cross_entropy: Tensor | None) -> None:
        """All the gradients that are wanted."""
        # Stochastic rounding asks for a gradient that is exact on average: this one is always.
        tolerance = self.spec.gradient_tolerance if self.spec.gradient_seed is None else 0.0
        self.order = self.spec.vocabulary_order if tolerance else None
        operands = self.student, self.teacher
        for operand in operands:
            operand.prepare_gradient(self.vocab, self.tiling, tolerance)
        for first in range(0, self.vocab, self.tiling.strip):
            columns = min(self.tiling.strip, self.vocab - first)
            tiles = -(-columns // self.tiling.columns)
            notes = [operand.notes(tiles, self.blocks, self.tiling.rows) for operand in operands]
            self.gradient_of_strip(first, tiles, notes, grad_divergence, grad_cross_entropy)
            for operand, noted in zip(operands, notes, strict=True):
                if operand.strip is not None and operand.weight is not None:
                    chosen = None if noted is None or operand.chooser is None else operand.chooser.choose(noted)
                    self.multiply(operand, first, tiles, chosen)

    def gradient_of_strip(
        self,
        first: int,
        tiles: int,
        notes: list[TileNotes | None],
        grad_divergence: Tensor,
        grad_cross_entropy: Tensor | None,
    ) -> None:
        spec, strips = self.spec, (self.student.strip, self.teacher.strip)
        hard = grad_cross_entropy if self.student.strip is not None else None
        self.kernels.linear_divergence_gradient_kernel[(self.blocks, tiles)](
            self.student.arguments,
            self.teacher.arguments,
            self.rows,
            self.vocab,
            first,
            *strips,
            *(0 if strip is None else strip.stride(0) for strip in strips),
            *(None if noted is None else tuple(noted) for noted in notes),
            self.statistics,
            grad_divergence.contiguous(),
            None if hard is None else hard.contiguous(),
            self.order,
            None if hard is None else spec.labels,
            spec.active,
            spec.parameters,
            spec.a,
            spec.b,
            KIND=spec.kind,
            FAST_LOG=self.fast_log,
            PRECISION=self.precision,
            HIDDEN=self.tiling.hidden,
            **self.sizes,
            **self.launch("gradient"),
        )

    def multiply(self, operand: Operand, first: int, tiles: int, chosen: Tiles | None) -> None:
        """What the gradient of a strip gives to a head's hidden states, weight and bias."""
        weight, strip, total = operand.weight, operand.strip, operand.total
        assert weight is not None
        assert strip is not None
        pieces = -(-operand.hidden_size // self.tiling.product)
        options = {"PRECISION": self.precision, "PRODUCT": self.tiling.product, **self.sizes}
        if total is not None:
            lists = (None, None) if chosen is None else chosen.of_blocks()
            self.kernels.linear_divergence_hidden_kernel[(self.blocks, pieces)](
                strip,
                strip.stride(0),
                weight,
                weight.stride(0),
                operand.hidden_size,
                total,
                float(operand.side.scale),
                self.rows,
                self.vocab,
                first,
                tiles,
                self.order,
                *lists,
                None if chosen is None else chosen.means,
                None if chosen is None else chosen.to_hidden(self.weight_of_strip(weight, first), self.tiling.columns),
                FIRST=first == 0,
                **options,
                **self.launch("hidden"),
            )
        for to_weight, to_bias in ((operand.result.weight, None), (None, operand.result.bias)):
            if to_weight is None and to_bias is None:
                continue
            lists, skipped = (None, None), None
            if chosen is not None:
                lists = chosen.of_tiles()
                skipped = chosen.to_bias() if to_weight is None else chosen.to_weight(self.counting_hidden(operand))
            self.kernels.linear_divergence_weight_kernel[(tiles, 1 if to_weight is None else pieces)](
                strip,
                strip.stride(0),
                operand.tensor,
                operand.tensor.stride(0),
                operand.hidden_size,
                to_weight,
                to_bias,
                float(operand.side.scale),
                self.rows,
                self.vocab,
                first,
                self.blocks,
                self.order,
                self.spec.active,
                *lists,
                skipped,
                **options,
                **self.launch("weight"),
            )

    def weight_of_strip(self, weight: Tensor, first: int) -> Tensor:
        """Its rows that belong to a strip."""
        strip = slice(first, first + self.tiling.strip)
        return weight[strip] if self.order is None else weight.index_select(0, self.order[strip])

    def counting_hidden(self, operand: Operand) -> Tensor:
        """The hidden states; blank where a token does not count, for 0 * NaN is no 0."""
        active = self.spec.active
        return operand.tensor if active is None else operand.tensor.masked_fill(~active.unsqueeze(-1), 0.0)


def linear_divergence(
    student: Side,
    teacher: Side,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    needs: tuple[Needs, Needs],
) -> tuple[Tensor, Tensor, SideGradients, SideGradients]:
    """See ``backends.rows``."""
    problem = Problem(student, teacher, spec, needs)
    if not problem.rows:
        nothing = empty_gradients(student, needs[0]), empty_gradients(teacher, needs[1])
        return problem.values, problem.cross_entropy, *nothing
    with on_device_of(student.tensor, "linear_divergence"):
        problem.sweep()
        if grad_divergence is not None and any((*needs[0], *needs[1])):
            problem.differentiate(grad_divergence, grad_cross_entropy)
    return problem.values, problem.cross_entropy, problem.student.finish(), problem.teacher.finish()


def empty_gradients(side: Side, needs: Needs) -> SideGradients:
    """Of no rows."""
    tensors = zip((side.tensor, side.weight, side.bias), needs, strict=True)
    return SideGradients(
        *(None if tensor is None or not need else torch.zeros_like(tensor) for tensor, need in tensors)
    )
