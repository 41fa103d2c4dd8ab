"""Weights, schedules and selection around a loss: small objects that take statistics or losses and can be saved."""

from kdkernels.weighting.interpolation import TAIDSchedule

__all__ = ["TAIDSchedule"]
