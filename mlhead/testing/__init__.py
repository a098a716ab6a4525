"""One case per op, and the comparison with the oracle: shared by tests, benchmarks and ahead-of-time checks."""

from .case import OpCase, Sample
from .cases import CASES
from .compare import check, grade, oracle, plain_torch

__all__ = ["CASES", "OpCase", "Sample", "check", "grade", "oracle", "plain_torch"]
