"""The machine: devices, precision, random generators, processes."""
