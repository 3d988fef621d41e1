import signal
from dataclasses import replace

import pytest

from mnist_dist.launch.group import Failure
from mnist_dist.launch.supervise import Restarts


def failure(code, step=5, message="why"):
    return Failure(code=code, step=step, message=message)


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 8, 141])
def test_what_would_fail_again_is_not_started_again(code):
    assert Restarts(limit=3).refusal(failure(code)) is not None


@pytest.mark.parametrize("code", [1, 7, -signal.SIGKILL, -signal.SIGSEGV])
def test_what_may_go_better_is_started_again(code):
    assert Restarts(limit=3).refusal(failure(code)) is None


def test_restarts_count_anew_after_each_new_checkpoint():
    saved = iter([None, None, 10, 10, 20, 20, 20])
    restarts = Restarts(limit=2, saved_step=lambda: next(saved))
    for _ in range(6):
        assert restarts.refusal(failure(-signal.SIGKILL)) is None
    assert "2 times without coming as far as another checkpoint" in restarts.refusal(failure(-signal.SIGKILL))


def test_the_same_error_at_the_same_step_twice_is_the_last():
    restarts = Restarts(limit=9)
    assert restarts.refusal(failure(1, step=5)) is None
    assert restarts.refusal(failure(1, step=6)) is None
    assert restarts.refusal(failure(1, step=6, message="another")) is None
    assert "The same error recurred at the same step" in restarts.refusal(failure(1, step=6, message="another"))


def test_a_failure_of_which_nothing_is_known_is_not_taken_for_the_same():
    restarts = Restarts(limit=2)
    unknown = replace(failure(1, step=-1), knows_why=False)
    assert restarts.refusal(unknown) is None
    assert restarts.refusal(unknown) is None
    assert "2 times" in restarts.refusal(unknown)


def test_a_kill_at_the_same_step_may_be_an_accident():
    restarts = Restarts(limit=9)
    assert restarts.refusal(failure(-signal.SIGKILL)) is None
    assert restarts.refusal(failure(-signal.SIGKILL)) is None
