"""How steps that put something back are carried out: all of them, whatever one of them raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# An interrupt can hit a step while it runs, and a second one can hit the repetition.
_MAX_TRIES = 3


def run_all_steps(steps: Iterable[Callable[[], object]]) -> None:
    """Call every step, and repeat those that fail or are interrupted.

    A step must work when it is called a second time.

    Raises:
        BaseException: once all steps have been carried out: the first interrupt (anything that is
            no ``Exception``), else the error of the first step that failed every time.
    """
    interrupt: BaseException | None = None
    failure: Exception | None = None
    for step in steps:
        error: BaseException | None = None
        for _ in range(_MAX_TRIES):
            error = _error_of(step)
            if error is None:
                break
            if not isinstance(error, Exception):
                interrupt = interrupt or error
        if isinstance(error, Exception):
            failure = failure or error
    if interrupt is not None:
        raise interrupt
    if failure is not None:
        raise failure


def _error_of(step: Callable[[], object]) -> BaseException | None:
    try:
        step()
    except BaseException as error:  # noqa: BLE001 - raised by the caller, after the other steps
        return error
    return None
