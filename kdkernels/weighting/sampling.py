"""Where the next batch comes from: domains, fresh generations of the student, or those of before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kdkernels.checks import check_choice, check_count, check_dense, check_real, check_share

__all__ = ["AdaptiveStudentShare", "DomainSampler", "ReplayBuffer"]

SHARES = ("decreasing", "increasing", "constant")

Batch = TypeVar("Batch")


class DomainSampler:
    """Domains of text drawn by how much worse the student is at them than the teacher (DDK).

    ``r_i = softmax(ppl_S / ppl_T)_i`` at the first update; at every later one ``psi_i = r_i exp(ppl_S,i / ppl_T,i)`` and
    ``r = mixing psi / sum psi + (1 - mixing) / N``. Computed from logarithms, so that large ratios do no harm.

    Source: Liu et al. 2024 (NeurIPS; arXiv 2407.16154). Confidence: from the paper, which updates every 1000 steps from 500
    samples of each of 10 domains.

    Args:
        domains: N, how many there are.
        mixing: alpha, the rest of the probability is spread evenly.
        generator: of the draws; None: torch's own.
    """

    def __init__(self, domains: int, *, mixing: float = 0.5, generator: torch.Generator | None = None) -> None:
        self.mixing = check_share("mixing", mixing)
        self.generator = generator
        self.probabilities = torch.full((check_count("domains", domains),), 1 / domains, dtype=torch.float64)
        """Float64 ``[N]``, on the device of the last update's perplexities; even before the first."""
        self.updates = 0

    def update(self, student_perplexities: Tensor, teacher_perplexities: Tensor) -> Tensor:
        """The probabilities ``[N]`` after a validation with these perplexities ``[N]``, each at least 1."""
        for name, tensor in (
            ("student_perplexities", student_perplexities),
            ("teacher_perplexities", teacher_perplexities),
        ):
            check_dense(name, tensor, (torch.float32, torch.float64))
            if tensor.shape != self.probabilities.shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(self.probabilities.shape)}, got {tuple(tensor.shape)}"
                )
        ratio = (student_perplexities.detach().double()) / teacher_perplexities.detach().double()
        if self.updates == 0:
            self.probabilities = ratio.softmax(0)
        else:
            grown = (self.probabilities.to(ratio.device).log() + ratio).softmax(0)
            self.probabilities = self.mixing * grown + (1 - self.mixing) / len(ratio)
        self.updates += 1
        return self.probabilities

    def sample(self, count: int) -> Tensor:
        """int64 ``[count]``, the domains of the next samples."""
        return self.probabilities.multinomial(check_count("count", count), replacement=True, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes; the generator has a state of its own."""
        return {"probabilities": self.probabilities.clone(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        probabilities = state["probabilities"]
        if probabilities.shape != self.probabilities.shape:
            raise ValueError(
                f"state_dict: probabilities must be of {len(self.probabilities)} domains, got {len(probabilities)}"
            )
        self.probabilities = probabilities.to(torch.float64, copy=True)
        self.updates = check_count("state_dict: updates", state["updates"], 0)


class ReplayBuffer(Generic[Batch]):
    """The last so many batches, of which one is drawn at a time.

    Args:
        capacity: 1000 in DistiLLM; the oldest batch goes when another comes.
        seed: of the draws.
    """

    def __init__(self, capacity: int = 1000, *, seed: int = 0) -> None:
        self.capacity = check_count("capacity", capacity)
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: list[Batch] = []
        self.oldest = 0

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, batch: Batch) -> None:
        """Keeps a batch."""
        if len(self.batches) < self.capacity:
            self.batches.append(batch)
            return
        self.batches[self.oldest] = batch
        self.oldest = (self.oldest + 1) % self.capacity

    def draw(self) -> Batch:
        """One of those kept, all equally likely.

        Raises:
            IndexError: there is none.
        """
        if not self.batches:
            raise IndexError("the buffer holds no batch: add one before drawing")
        return self.batches[int(torch.randint(len(self.batches), (), generator=self.generator))]

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes, the batches with it."""
        return {"batches": list(self.batches), "oldest": self.oldest, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        batches = state["batches"]
        if len(batches) > self.capacity:
            raise ValueError(f"state_dict: batches must be at most {self.capacity}, got {len(batches)}")
        self.batches = list(batches)
        self.oldest = check_count("state_dict: oldest", state["oldest"], 0)
        self.generator.set_state(state["generator"])


class AdaptiveStudentShare:
    """How often to train on the student's own generations, and how often to make new ones (DistiLLM).

    A share ``phi`` of the batches are the student's; whenever the validation loss is ``epsilon`` above the last one kept, phi
    grows by 0.1, and that loss is kept. Of the batches a share ``phi (1 - step / steps)`` is generated anew and goes to a
    replay buffer, the rest of phi is drawn from the buffer; until that is full, all of phi is generated.

    Source: Ko et al. 2024 (ICML; arXiv 2402.03898). Confidence: from the authors' code.

    Args:
        steps: of the whole training.
        share: phi at the start.
        increase: what is added to phi, up to 1.
        epsilon: how much worse the validation loss must be.
        fresh: "decreasing" as above, "increasing" ``phi step / steps``, or "constant" ``phi / 2``.
        seed: of the draws.
    """

    def __init__(
        self,
        steps: int,
        *,
        share: float = 0.0,
        increase: float = 0.1,
        epsilon: float = 0.1,
        fresh: str = "decreasing",
        seed: int = 0,
    ) -> None:
        self.steps = check_count("steps", steps)
        self.share = check_share("share", share)
        self.increase = check_share("increase", increase)
        self.epsilon = check_real("epsilon", epsilon)
        self.fresh = check_choice("fresh", fresh, SHARES)
        self.generator = torch.Generator().manual_seed(seed)
        self.last: float | None = None

    def update(self, validation_loss: float) -> float:
        """phi after a validation; the first one only sets what later ones are compared with."""
        loss = check_real("validation_loss", validation_loss)
        if self.last is None:
            self.last = loss
        elif loss >= self.last + self.epsilon:
            self.share = min(1.0, self.share + self.increase)
            self.last = loss
        return self.share

    def fresh_share(self, step: float) -> float:
        """The share of batches to generate anew at a step."""
        if self.fresh == "constant":
            return self.share / 2
        done = min(1.0, max(0.0, step / self.steps))
        return self.share * (done if self.fresh == "increasing" else 1 - done)

    def draw(self, step: float, replay: ReplayBuffer[Any]) -> str:
        """Where the batch of a step comes from: "data", "fresh" (generate it, and add it to the buffer) or "replay"."""
        drawn = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        if drawn >= self.share:
            return "data"
        return "fresh" if drawn < self.fresh_share(step) or len(replay) < replay.capacity else "replay"

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes."""
        return {"share": self.share, "last": self.last, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.share = check_share("state_dict: share", state["share"])
        self.last = None if state["last"] is None else check_real("state_dict: last", state["last"])
        self.generator.set_state(state["generator"])
