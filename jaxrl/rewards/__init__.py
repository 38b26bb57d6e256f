"""Grading: what the policy answered, and whether it is right."""
