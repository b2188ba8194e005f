"""Training losses: noise prediction, distillation, block outputs and Jacobian matching."""
