"""Runs pytest on the test files that are named; Bazel's py_test starts a program, and a test file is none."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
