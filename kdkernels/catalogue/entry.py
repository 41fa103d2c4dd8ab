"""What the catalogue says of a distillation objective."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHAPTERS", "CONFIDENCES", "KINDS", "Entry"]

CHAPTERS = {
    "blocks": "Building blocks",
    "A": "Divergences over the vocabulary, dense teacher",
    "A2": "Decoupled, normalised and sigmoid forms of logits",
    "B": "Truncated and stored teachers",
    "C": "Optimal transport",
    "D": "Across tokenizers",
    "E": "Ranking",
    "F": "Hidden states, attention, relations, contrast",
    "G": "Weights, schedules, choice of teachers and data",
    "H": "Recipes of standard losses",
    "I": "Other objectives of distillation",
}

KINDS = {
    "loss": "a class of kd.losses",
    "arguments": "arguments of a public function or of another loss",
    "helper": "a weight, schedule or selection around a loss",
    "recipe": "a few lines that put these together",
    "outside": "not a loss between a student and a teacher: plain PyTorch lines",
}

CONFIDENCES = {
    "code": "from the authors' code",
    "paper": "from the paper",
    "third-party": "from another implementation: the structure is the paper's, the defaults are not",
    "secondary": "from summaries of the paper: some constants were not available",
    "general": "general form: the paper's constants were not available",
}


@dataclass(frozen=True)
class Entry:
    """One published objective and how it is used here.

    ``use`` is Python that runs as it stands after the lines of ``kdkernels.catalogue.prelude``; it assigns the loss to
    ``loss`` (a 0-d tensor that ``backward()`` accepts) or, where there is none, does what the entry is about.
    """

    key: str
    title: str
    """Short name and what it stands for."""
    source: str
    """Authors or venue and year, arXiv number or DOI where known."""
    chapter: str
    kind: str
    confidence: str
    formula: str
    """In one or two lines of plain text, p teacher, q student."""
    use: str
    cost: str
    """Sweeps over the vocabulary, as ``kdkernels.catalogue.page`` counts them, and memory beside inputs and gradients."""
    notes: str = ""
    """Where paper and code differ, and what is deliberately not copied."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "use", self.use.strip("\n"))
        for name, allowed in (("chapter", CHAPTERS), ("kind", KINDS), ("confidence", CONFIDENCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{self.key}: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
