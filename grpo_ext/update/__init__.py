"""A micro-batch's way to its gradient, whoever owns the training loop: layouts, filling, skipping, guard, loss."""
