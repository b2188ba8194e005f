"""Training losses: noise prediction, the teacher, and what block outputs and Jacobians add."""
