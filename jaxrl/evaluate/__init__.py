"""Evaluation: how often a policy is right, and how sure that figure is."""
