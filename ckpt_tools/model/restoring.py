"""Carrying out steps that put something back: all of them, whatever one of them raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_MOST_TRIES = 3  # an interrupt can hit a step in its midst, and a second one its repetition


def run_all_steps(steps: Iterable[Callable[[], object]]) -> None:
    """Call every step, and call one again that was interrupted; a step must bear being called twice.

    Raises:
        BaseException: the first interrupt (anything that is no ``Exception``), else the error of the first step that
            failed every time, once all other steps have been carried out.
    """
    interrupt: BaseException | None = None
    failure: Exception | None = None
    for step in steps:
        error: BaseException | None = None
        for _ in range(_MOST_TRIES):
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
