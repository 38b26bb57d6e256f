"""The mathematics of reinforcement learning: pure functions on arrays, unaware of models, devices and tools."""
