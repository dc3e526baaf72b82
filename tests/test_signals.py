import os
import signal
import threading
import unittest.signals

import pytest

from ringrl.signals import STOPPING, Stopped, handled, stop


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_handled_inside_the_block_only(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    with handled(stop), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert signal.signal(number, before) is signal.SIG_DFL


def test_nohup_and_handlers_of_other_libraries_stay() -> None:
    other = unittest.signals._InterruptHandler(signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR2)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, other)
        with handled(stop):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR2) is other
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_set_no_handler() -> None:
    found: list[object] = []

    def look() -> None:
        with handled(stop):
            found.append(signal.getsignal(signal.SIGUSR1))

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
