"""State on disk: weights and checkpoints, written so that a crash never costs a good one; no file can run code."""
