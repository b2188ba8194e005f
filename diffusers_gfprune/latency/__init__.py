"""Latency budgets: layer times, the latency model and its calibration."""
