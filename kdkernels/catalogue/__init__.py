"""Every published distillation objective there is a way to compute here, and the lines that do it: one module per chapter."""

from kdkernels.catalogue import (
    building_blocks,
    cross_tokenizer,
    decoupled,
    divergences,
    features,
    optimal_transport,
    others,
    ranking,
    recipes,
    truncated,
    weighting,
)
from kdkernels.catalogue.entry import CHAPTERS, CONFIDENCES, KINDS, Entry
from kdkernels.catalogue.prelude import PRELUDE

__all__ = ["CHAPTERS", "CONFIDENCES", "ENTRIES", "KINDS", "PRELUDE", "Entry"]

ENTRIES: dict[str, Entry] = {
    entry.key: entry
    for module in (
        building_blocks,
        divergences,
        decoupled,
        truncated,
        optimal_transport,
        cross_tokenizer,
        ranking,
        features,
        weighting,
        recipes,
        others,
    )
    for entry in module.ENTRIES
}
"""By key, in the order of the chapters."""
