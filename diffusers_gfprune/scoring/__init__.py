"""Scores of units: criteria and derivatives of the loss."""
