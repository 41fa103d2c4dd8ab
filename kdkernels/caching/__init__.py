"""A teacher over text into a store: what ``kdkernels cache`` and the examples run."""
