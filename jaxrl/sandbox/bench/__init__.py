"""``jaxrl sandbox bench``: what the sandbox costs and holds on this machine, each figure beside what is demanded of it.

Loads no jax. Helper processes import single modules of this folder, so nothing is imported here.
"""
