"""Test an adapter of your own: the conformance suite that the adapters of this project pass, too.

    from ckpt_tools.testing import Case, parametrize_checks
    from my_package.ckpt import MyZooAdapter

    @parametrize_checks(Case(MyZooAdapter, "small_model"))
    def test_conformance(check, case):
        check(case)

The checks themselves need no pytest: `for check in CHECKS: check(case)` raises AssertionError with
what was expected and what was found.
"""

from ckpt_tools.testing.conformance import CHECKS, Case, Check, parametrize_checks

__all__ = ["CHECKS", "Case", "Check", "parametrize_checks"]
