"""Rollouts: the order of prompts, completions, rewards and advantages."""
