"""Validates the kernels of a backend on the device at hand: ``cases`` makes awkward inputs, ``comparison`` judges the answers.

The truth is ``kdkernels.reference`` in float64 on the very same inputs. A backend may be as wrong as the reference is in the
inputs' own dtype, and a little more.
"""
