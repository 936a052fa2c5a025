"""Observers: callables that are given every event of a run and watch. What they see, they do not change."""
