"""What a step stood still for, on the host's clock and on a device's."""

from __future__ import annotations

import time

import pytest

from jobs.own_time import OwnTime


class Device:
    """A host and the one stream of its device; until when that is busy."""

    def __init__(self) -> None:
        self.host_s = self.free_at_s = 0.0


class Event:
    """Comes when the stream has done all that was asked of it before."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = self.device.free_at_s = max(self.device.host_s, self.device.free_at_s)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at_s - self.at_s)


@pytest.mark.parametrize(("behind_s", "stood_s"), [(0.0, 2.0), (0.5, 1.5), (3.0, 0.0)])
def test_what_a_device_computes_meanwhile_is_no_standing_still(behind_s: float, stood_s: float) -> None:
    device = Device()
    clock = OwnTime(lambda: Event(device))

    def wait() -> None:
        device.host_s += 2.0

    for _ in range(2):  # events are used again
        clock.begin()
        device.free_at_s = device.host_s + behind_s
        clock.stall(wait)
        clock.end()
        assert clock.stalled_s == pytest.approx(stood_s)


def test_on_the_host_it_is_the_hosts_clock() -> None:
    clock = OwnTime()
    clock.begin()
    clock.stall(lambda: time.sleep(0.02))
    clock.end()
    assert 0.02 <= clock.stalled_s < 10
    clock.begin()
    clock.end()
    assert clock.stalled_s == 0
