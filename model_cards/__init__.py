"""The template of model cards, and the model cards of finished runs."""
