"""Measurements: MACs, speed, samples and their quality, step losses."""
