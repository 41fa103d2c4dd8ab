"""The catalogue to read: as a page in Markdown, and searched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kdkernels.catalogue import ENTRIES
from kdkernels.catalogue.entry import CHAPTERS, CONFIDENCES, KINDS, Entry
from kdkernels.catalogue.prelude import PRELUDE

__all__ = ["calls", "markdown", "search"]

SOURCES = {"kd.LMHead", "kd.Logits", "kd.TopKLogits", "kd.SampledLogits", "kd.PackedLogits"}
"""What losses are given, which says nothing about what to call."""

INTRODUCTION = """\
# The catalogue of losses

*This page is written by `make docs` from `kdkernels.catalogue`; `kdkernels losses` shows the same in a terminal.*

Every published objective of knowledge distillation that there is a way to compute here. `kd.losses.get(key)` is the class
of a loss, `kd.losses.describe(key)` what stands below. Which one to take: [which_loss.md](which_loss.md).

- **Kind**: {kinds}.
- **Confidence**: {confidences}.
- **Cost**: sweeps over the vocabulary, and memory beside inputs and gradients. A sweep reads each side's logits once, or makes
  them once from hidden states; on the CPU and from heads it makes value and gradient together. The forward KL takes 1 (on a GPU,
  of dense logits, another for the gradient), with the cross-entropy of `ce_weight=` included; JSD and skewed forms take 2.
- In formulas p is the teacher and q the student; the lines start from the names of the [prelude](#prelude), and are run in
  the tests.
"""


def calls(entry: Entry) -> list[str]:
    """The names of this library that an entry's lines use, in their order; of a loss the classes alone."""
    names = dict.fromkeys(re.findall(r"\bkd(?:\.\w+)+", entry.use))
    if entry.kind == "loss":
        return [name for name in names if re.match(r"kd\.losses\.[A-Z]", name)]
    return [name for name in names if name not in SOURCES] or ["plain PyTorch"]


def search(words: Iterable[str], entries: Iterable[Entry] | None = None) -> list[Entry]:
    """The entries in which all words occur, wherever and in whichever case."""
    wanted = [word.lower() for word in words]

    def text(entry: Entry) -> str:
        parts = (entry.key, entry.title, entry.source, entry.formula, entry.use, entry.notes, CHAPTERS[entry.chapter])
        return "\n".join(parts).lower()

    return [
        entry
        for entry in (ENTRIES.values() if entries is None else entries)
        if all(word in text(entry) for word in wanted)
    ]


def markdown(entries: Sequence[Entry] | None = None) -> str:
    """The page of all entries, or without its head that of some."""
    if entries is not None:
        return "\n".join(section(entry) for entry in entries)
    listed = list(ENTRIES.values())
    parts = [
        INTRODUCTION.format(kinds=explained(KINDS), confidences=explained(CONFIDENCES)),
        *table(listed),
        "",
        "## Prelude",
        "",
        f"```python\n{PRELUDE}```",
        "",
    ]
    for chapter, title in CHAPTERS.items():
        members = [entry for entry in listed if entry.chapter == chapter]
        if members:
            parts += [f"## {title}", "", *(section(entry) for entry in members)]
    return "\n".join(parts)


def explained(meanings: dict[str, str]) -> str:
    return "; ".join(f"*{name}*, {meaning}" for name, meaning in meanings.items())


def table(entries: Sequence[Entry]) -> list[str]:
    lines = ["| key | paper | call | kind | confidence | cost |", "|---|---|---|---|---|---|"]
    for entry in entries:
        names = ", ".join(f"`{name}`" if name.startswith("kd.") else name for name in calls(entry))
        paper = f"{entry.title} ({entry.source})"
        cells = (f"[`{entry.key}`](#{entry.key})", paper, names, entry.kind, entry.confidence, entry.cost)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def section(entry: Entry) -> str:
    lines = [
        f"### `{entry.key}`",
        "",
        f"{entry.title}. {entry.source}. *{entry.kind}, {entry.confidence}*",
        "",
        f"    {entry.formula}",
        "",
        f"```python\n{entry.use}\n```",
        "",
        f"Cost: {entry.cost}.",
    ]
    if entry.notes:
        lines += ["", entry.notes]
    return "\n".join([*lines, ""])
