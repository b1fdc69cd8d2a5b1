"""The conformance kit: for methods what scikit-learn's ``check_estimator`` is for estimators.

On the command line: ``plait check METHOD``. In a package's tests::

    from plait.testing import conformance

    test_conformance = conformance("my-method")

A method that needs more than the built-in example data gives its own :class:`Example`, a function
without arguments: as ``--example file.py:function`` or ``conformance(..., example=function)``; in the entry-point
group ``plait.examples`` under ``<hook>.<name>`` or ``<name>``; or as a static function ``example`` of the class.
"""

from plait.testing.checks import CHECKS, ConformanceError, Subject, conformance, run_checks
from plait.testing.examples import Example

__all__ = ["CHECKS", "ConformanceError", "Example", "Subject", "conformance", "run_checks"]
