"""Environments: the tools that a policy may call, and the text it reads in return."""
