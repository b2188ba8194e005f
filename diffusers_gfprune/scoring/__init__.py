"""Scores of units: the criteria, and the derivatives that they take."""
