"""What the two C++ backends, ``cpu`` and ``cuda``, do alike: results are made, addresses handed to an extension."""
