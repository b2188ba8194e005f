"""The template of model cards, and the cards of runs that happened."""
