"""Pictures of optimal transport: plans, what epsilon and the reach do to them, and how fast the iterations converge.

    python examples/transport_gallery.py                   # about half a minute; pictures in out/gallery
    python examples/transport_gallery.py --no-tokens       # without the real models, a few seconds

    epsilon.png       the plan between two distributions on a line, ever closer to the optimal map
    reach.png         the same with relaxed marginals: mass that has too far to go stays
    convergence.png   the marginal error by iterations, for several epsilons, with annealing, and from a warm start
    tokens.png        one sentence in the tokens of two tokenizers, aligned by what two models make of it

The last one takes SmolLM2-135M and a copy of it that reads Mistral's vocabulary (see ``mistral_vocabulary.py``); the cost
is the cosine distance of their hidden states.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import mistral_vocabulary
import smollm2
import torch
import typer
from distill_lm import prepare_folder
from results import row_of_axes
from rich.console import Console
from torch import Tensor

import kdkernels as kd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SENTENCE = "The naïve user's tokenization isn't the teacher's: 1024 = 2**10."
POINTS = 160
EPSILONS = (0.1, 0.01, 0.001)
REACHES = (None, 0.3, 0.03)
ITERATIONS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
LARGEST_ERROR = 2.0  # of two distributions; while epsilon is annealed there is more
console = Console()


def bumps(points: Tensor, centres: tuple[float, ...], widths: tuple[float, ...], masses: tuple[float, ...]) -> Tensor:
    """A mixture of Gaussians on ``points``, its masses summing to 1."""
    each = [
        mass * torch.exp(-0.5 * ((points - centre) / width) ** 2) / width
        for centre, width, mass in zip(centres, widths, masses, strict=True)
    ]
    density = torch.stack(each).sum(0)
    return density / density.sum()


def line_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(points, cost, a, b)``: two distributions on [0, 1], squared distances."""
    points = torch.linspace(0, 1, POINTS)
    a = bumps(points, (0.2, 0.5), (0.06, 0.04), (0.6, 0.4))
    b = bumps(points, (0.45, 0.85), (0.05, 0.07), (0.35, 0.65))
    return points, kd.pairwise_sqeuclidean(points.unsqueeze(-1), points.unsqueeze(-1)), a, b


def draw_plan(axes: Axes, plan: Tensor, a: Tensor, b: Tensor, title: str) -> None:
    """A plan on the unit square; the marginals asked for along its sides (filled) and those it has (lines)."""
    points = torch.linspace(0, 1, len(a))
    density = plan / plan.amax(1, keepdim=True).clamp_min(1e-12) * a.unsqueeze(1).sqrt()
    axes.imshow(density.sqrt(), origin="lower", extent=(0, 1, 0, 1), cmap="magma", aspect="auto")
    top = 0.2 / max(float(a.max()), float(b.max()))
    axes.fill_betweenx(points, -top * a, 0, color="tab:blue", alpha=0.4)
    axes.plot(-top * plan.sum(1), points, color="tab:blue", linewidth=1)
    axes.fill_between(points, -top * b, 0, color="tab:orange", alpha=0.4)
    axes.plot(points, -top * plan.sum(0), color="tab:orange", linewidth=1)
    axes.set(title=title, xlim=(-0.22, 1), ylim=(-0.22, 1), xticks=[], yticks=[], xlabel="to", ylabel="from")


def epsilon_picture(file: Path) -> None:
    _, cost, a, b = line_problem()
    with row_of_axes(file, len(EPSILONS), width=4.2, height=4.2) as panels:
        for axes, epsilon in zip(panels, EPSILONS, strict=True):
            found = kd.sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=5000, tolerance=1e-5, epsilon_start=1.0)
            title = f"epsilon = {epsilon:g}: distance {found.distance.item():.4f}"
            draw_plan(axes, found.plan(), a, b, f"{title}\n{found.iterations.item()} iterations")


def reach_picture(file: Path) -> None:
    _, cost, a, b = line_problem()
    with row_of_axes(file, len(REACHES), width=4.2, height=4.2) as panels:
        for axes, reach in zip(panels, REACHES, strict=True):
            found = kd.sinkhorn(cost, a, b, epsilon=0.003, max_iterations=5000, tolerance=1e-5, unbalanced=reach)
            plan = found.plan()
            name = "both marginals kept" if reach is None else f"reach = {reach:g}"
            draw_plan(axes, plan, a, b, f"{name}\nmass moved {plan.sum().item():.2f}")


def errors(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, **options: object) -> list[float]:
    """The marginal error after each number of ``ITERATIONS``; NaN, which is not drawn, where it is 0 or no plan is reached yet."""
    found = (kd.sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=count, **options) for count in ITERATIONS)
    values = (result.marginal_error.item() for result in found)
    return [value if 0 < value <= LARGEST_ERROR else math.nan for value in values]


def convergence_picture(file: Path) -> None:
    _, cost, a, b = line_problem()
    with row_of_axes(file, 2, width=5.4, height=4.2) as (by_epsilon, tricks):
        for epsilon, color in zip(EPSILONS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            by_epsilon.loglog(
                ITERATIONS, errors(cost, a, b, epsilon), "o-", color=color, label=f"epsilon = {epsilon:g}"
            )
        small = EPSILONS[-1]
        tricks.loglog(ITERATIONS, errors(cost, a, b, small), "o-", color="tab:green", label="from zero")
        annealed = errors(cost, a, b, small, epsilon_start=1.0, epsilon_decay=0.7)
        tricks.loglog(ITERATIONS, annealed, "s-", color="tab:purple", label="annealed from epsilon = 1")
        moved = torch.roll(b, 1)  # the problem of the next step, a little different
        before = kd.sinkhorn(cost, a, b, epsilon=small, max_iterations=3000)
        tricks.loglog(
            ITERATIONS, errors(cost, a, moved, small, warm_start=before), "^-", color="tab:red", label="warm start"
        )
        by_epsilon.set_title("Convergence by epsilon")
        tricks.set_title(f"epsilon = {small:g}")
        for axes in (by_epsilon, tricks):
            axes.set(xlabel="iterations", ylabel="marginal error (L1)")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)


def token_states() -> tuple[list[str], Tensor, list[str], Tensor]:
    """The sentence's tokens and hidden states ``[tokens, H]``, of SmolLM2 and of its copy with Mistral's vocabulary."""
    teacher, tokenizer = smollm2.load_teacher(torch.device("cpu"))
    own = mistral_vocabulary.MistralTokenizer()
    copied = mistral_vocabulary.revocabulate(teacher, own, mistral_vocabulary.spellings(own, tokenizer)).eval()
    sides = []
    ids = tokenizer(SENTENCE)["input_ids"]
    labels = [tokenizer.decode([token]) for token in ids]
    for model, tokens in ((teacher, ids), (copied, own.encode(SENTENCE).ids)):
        with torch.no_grad():
            sides.append(model.model(torch.tensor([tokens])).last_hidden_state[0])
    pieces = [own.piece_bytes(token).decode(errors="replace") for token in own.encode(SENTENCE).ids]
    return labels, sides[0], pieces, sides[1]


def tokens_picture(file: Path) -> None:
    labels, teacher, pieces, copied = token_states()
    cost = kd.pairwise_cosine(teacher, copied)
    found = kd.sinkhorn(cost, epsilon=0.02, max_iterations=2000, tolerance=1e-5)
    with row_of_axes(file, 2, width=7.5, height=7) as (costs, plans):
        for axes, values, title in (
            (costs, cost, "Cost: 1 - cosine of the hidden states"),
            (plans, found.plan(), f"Transport plan, epsilon = 0.02, distance {found.distance.item():.3f}"),
        ):
            axes.imshow(values, cmap="magma_r" if axes is costs else "magma", aspect="auto")
            axes.set_xticks(range(len(pieces)), [repr(piece)[1:-1].replace(" ", "·") for piece in pieces], rotation=90)
            axes.set_yticks(range(len(labels)), [repr(label)[1:-1].replace(" ", "·") for label in labels])
            axes.set(title=title, xlabel=mistral_vocabulary.NAME, ylabel="SmolLM2 (byte-level BPE, 49,152 tokens)")


def main(
    *,
    tokens: Annotated[bool, typer.Option(help="Draw tokens.png too, which loads real models.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/gallery"),
) -> None:
    """Draw transport plans and the convergence of Sinkhorn's iterations."""
    prepare_folder(out)
    pictures = {"epsilon": epsilon_picture, "reach": reach_picture, "convergence": convergence_picture}
    if tokens:
        pictures["tokens"] = tokens_picture
    try:
        for name, draw in pictures.items():
            file = out / f"{name}.png"
            with console.status(f"Drawing {file}"):
                draw(file)
            console.print(f"written: {file}", highlight=False)
    except smollm2.MissingRequirementError as error:
        console.print(f"error: {error}", style="red")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
