"""Grading on a pool: programs x tests, with the expected answers out of the programs' reach."""

from jaxrl.sandbox.grading.cases import CallTest, CodeTest, StdioTest, Test
from jaxrl.sandbox.grading.grade import Grade, PassMatrix
from jaxrl.sandbox.grading.grader import Grader, NotHidden

__all__ = ["CallTest", "CodeTest", "Grade", "Grader", "NotHidden", "PassMatrix", "StdioTest", "Test"]
