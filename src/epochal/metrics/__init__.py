"""Metrics as sums that stay on the device until somebody asks for their values.

``metric.py`` holds what a metric is (``Metric``), the mean of a scalar (``Mean``), and the running state of
several metrics (``Stream``). ``named.py`` holds those with a name (``accuracy``, ``r2``, ...) and turns what
a user may write as ``metrics=`` into them (``resolve``).
"""
