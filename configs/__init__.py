"""The recipes. Installed as the package ``jaxrl_configs``, so that a recipe resolves by name from a wheel too."""
