"""Weights, schedules and selection around a loss: small objects that take statistics or losses and can be saved."""

__all__: list[str] = []
