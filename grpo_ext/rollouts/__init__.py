"""From prompts to advantages: which prompts, their completions, their rewards."""
