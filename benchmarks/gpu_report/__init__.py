"""What is known of the GPU kernels without a GPU: `make gpu-report` writes it to ``docs/gpu.md`` and ``docs/gpu/``.

``calls`` lists what is launched, ``compilation`` compiles it for every target and ``interpretation`` counts what it moves and
computes; ``cuda_traffic`` counts what the divergence in CUDA C++ moves, on the device of ``emulation``; ``objects`` and
``cuda_extension`` read compiled code, ``occupancy`` and ``roofline`` say what follows from it for the GPUs in ``hardware``,
``peers`` counts other libraries' kernels alike. ``tables`` are the CSV files; ``page`` and ``picture`` show them.
"""
