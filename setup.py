"""Which folders become which packages; everything else is in pyproject.toml.

A pyproject table can either find packages below one root or rename folders, not both, and three roots meet here.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["jaxrl", "jaxrl.*"]),
        *find_packages("kernels", include=["jaxrl_kernels", "jaxrl_kernels.*"]),
        "jaxrl_configs",
    ],
    package_dir={"jaxrl_kernels": "kernels/jaxrl_kernels", "jaxrl_configs": "configs"},
    package_data={"jaxrl_configs": ["*.gin"], "jaxrl_kernels": ["*.json"]},
)
