"""A request to stop is answered by one line at once."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from vitarium.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_announced_once(number, caplog):
    def interrupted() -> None:
        with StopSignals("stopping after this step") as stop:
            os.kill(os.getpid(), number)
            assert stop.requested
            assert [record.getMessage() for record in caplog.records] == ["stopping after this step"]
            os.kill(os.getpid(), signal.SIGTERM)  # a further one says nothing new
            assert len(caplog.records) == 1

    with caplog.at_level(logging.WARNING, "vitarium"), pytest.raises(KeyboardInterrupt):
        interrupted()
