"""Measures ours beside others: time in alternated runs, peak memory in processes of their own.

``workloads`` says what is computed and on which tensors, ``contenders`` who computes it, ``timing`` and ``memory`` measure,
``results`` and ``figures`` show.
"""
