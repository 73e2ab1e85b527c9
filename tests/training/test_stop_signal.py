"""Signals as a request to stop: at once while nothing is to be saved, afterwards as an answer."""

import os
import signal

import pytest

from stf_diffusers.training.stop_signal import REQUEUE_EXIT_CODE, StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_at_once_and_deferred(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, StopSignal():
        os.kill(os.getpid(), number)
    assert stopped.value.code == REQUEUE_EXIT_CODE == os.EX_TEMPFAIL
    with StopSignal() as stop:
        stop.defer()
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.received == number
    assert signal.getsignal(number) == before
