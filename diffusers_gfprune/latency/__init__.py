"""Budgets in measured time: times of layers, a model of time, and its calibration."""
