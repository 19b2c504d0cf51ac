"""Stands in for CUDA graphs on the CPU: a recording runs its work again on every replay, with what it was recorded with."""

from __future__ import annotations

from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.graph import bind_runner


class FakeRecording:
    nbytes = 1_000_000

    def __init__(self, work, output):
        self.work, self.output = work, output
        self.released = False

    def replay(self):
        assert not self.released
        return self.output.copy_(self.work()).clone()

    def release(self):
        self.released = True


class FakeRecorder:
    """recordings: all that were made. warm_ups: how many calls ran to prepare one. error: raised instead of recording."""

    def __init__(self, error=None):
        self.recordings = []
        self.warm_ups = 0
        self.error = error

    def warm_up(self, work):
        self.warm_ups += 1
        return work()

    def record(self, work, output):
        if self.error is not None:
            raise self.error
        self.recordings.append(FakeRecording(work, output))
        return self.recordings[-1]

    @property
    def live(self):
        return [recording for recording in self.recordings if not recording.released]


def use_fake_graphs(patcher, error=None):
    """Give a quantized MODEL a runner that takes the CPU for a GPU. Returns its recorder."""
    recorder, state, unet = FakeRecorder(error), state_of(patcher), patcher.model.diffusion_model
    vars(unet).pop("_forward")
    state.runner = bind_runner(unet, state, lambda device: recorder)
    return recorder
