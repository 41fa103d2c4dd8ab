"""Launch sizes that were measured: ``table`` keeps them per device, ``measurement`` finds them (``kdkernels tune``)."""
