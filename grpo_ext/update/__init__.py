"""From a micro-batch to its gradient, for any training loop: layouts, filling, skipping, loss, backward, guard."""
