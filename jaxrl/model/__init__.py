"""The decoder: one parameter table and one set of functions for training and for rollout."""
