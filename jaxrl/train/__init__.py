"""Training: the cold start, the reinforcement loop, and what makes both resumable."""
