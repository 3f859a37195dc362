"""Plant a fault in a real rank: at a chosen rank and step, once. A run finds this file by PYTHONPATH.

PHALANX_FAULT is a JSON object, which a rank reads at each step:
    what    one of FAULTS, or absent
    rank    the rank with the fault
    step    the fault happens before this optimiser step (1 is the first)
    once    a file, created when the fault happens; while it exists, the fault does not happen again
    always  true: the fault happens each time
    pause   seconds that each step takes longer, so that a test can act during a run
"""

import contextlib
import errno
import importlib.machinery
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def hold_the_interpreter():
    import ctypes

    ctypes.PyDLL(None).sleep(1000)  # a C function called with the GIL held


def wait_for_a_server():
    """Wait in a system call without the GIL, as a read from a file server that is gone."""
    reader, _ = os.pipe()
    os.read(reader, 1)


def run_out_of_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (planted)")


def poison(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(float("nan"))


def fail():
    raise RuntimeError("planted fault")


def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def fill_the_file_system():
    """Fill the disk of `folder`, but for `left` bytes, by a file there."""
    fault = json.loads(os.environ["PHALANX_FAULT"])
    with open(Path(fault["folder"], "filler"), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(fault["folder"]).free - fault["left"])


def mistake():
    raise TypeError("planted mistake")


def set_the_clock_back():
    """Set the clock back for this process only; a test must not set the machine's clock."""
    clock = time.time
    time.time = lambda: clock() - 7200


FAULTS = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda _: os.kill(os.getpid(), signal.SIGUSR1),
    "hold": lambda _: hold_the_interpreter(),
    "wait": lambda _: wait_for_a_server(),
    "oom": lambda _: run_out_of_memory(),
    "nan": poison,
    "fail": lambda _: fail(),
    "full": lambda _: fill_the_disk(),
    "fill": lambda _: fill_the_file_system(),
    "mistake": lambda _: mistake(),
    "clock": lambda _: set_the_clock_back(),
}


def strike(fault, step, model):
    """Pause, and let the fault happen if it is due. Each rank calls it before each step."""
    time.sleep(fault.get("pause", 0))
    mine = fault.get("rank") == int(os.environ.get("RANK", "0")) and fault.get("step") == step
    if mine and fault.get("what") in FAULTS and (fault.get("always") or not Path(fault["once"]).exists()):
        Path(fault["once"]).touch()
        FAULTS[fault["what"]](model)


def plant_in_boundary(module):
    begin = module.StepBoundary.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        strike(json.loads(os.environ["PHALANX_FAULT"]), state.global_step + 1, kwargs["model"])
        return begin(self, args, state, control, **kwargs)

    module.StepBoundary.on_step_begin = on_step_begin
    predict = module.StepBoundary.on_prediction_step

    def on_prediction_step(self, args, state, control, **kwargs):
        """`evaluation`: the fault happens during the evaluation after this step."""
        fault = json.loads(os.environ["PHALANX_FAULT"])
        if fault.get("evaluation") == state.global_step:
            strike({**fault, "step": 0}, 0, None)
        return predict(self, args, state, control, **kwargs)

    module.StepBoundary.on_prediction_step = on_prediction_step


def plant_in_batches(module):
    """`worker`: collating the step's batch fails, in a worker process of the data loader."""
    call = module.CountSamples.__call__
    seen = [0]

    def collate(self, samples):
        fault = json.loads(os.environ["PHALANX_FAULT"])
        seen[0] += 1
        if (
            fault.get("what") == "worker"
            and fault["rank"] == int(os.environ["RANK"])
            and seen[0] == fault["step"]
        ):
            raise ValueError("planted in a data worker")
        return call(self, samples)

    module.CountSamples.__call__ = collate


def plant_in_training_step(module):
    """`small device`: from the step on, the rank has memory for no more than `fits` rows."""
    step = module.Durable.training_step

    def training_step(self, model, inputs, *rest, **named):
        fault = json.loads(os.environ["PHALANX_FAULT"])
        if fault.get("what") == "small device":
            if fault["step"] > 1:
                time.sleep(0.3)  # gives FSDP the time to write its shards while training continues
            mine = fault["rank"] == int(os.environ.get("RANK", "0"))
            late = self.state.global_step + 1 >= fault["step"]
            if mine and late and inputs["input_ids"].shape[0] > fault["fits"]:
                run_out_of_memory()
        return step(self, model, inputs, *rest, **named)

    module.Durable.training_step = training_step


def plant_in_checkpoints(module):
    plant_in_training_step(module)
    plant_in_saves(module)


def plant_in_saves(module):
    """`no-check`: ranks do not check the free space before a save.

    `save`: a kill before the final rename. `save-waits`: the rank waits there for ever. `saving`: the fault
    happens there, in the save of this step.
    """
    publish, has_room = module.Durable._publish, module.Durable._has_room

    def blind(self):
        return json.loads(os.environ["PHALANX_FAULT"]).get("what") == "no-check" or has_room(self)

    def killed(self, entries):
        fault = json.loads(os.environ["PHALANX_FAULT"])
        if fault.get("what") == "save":
            strike({**fault, "what": "kill"}, self.state.global_step, None)
        if fault.get("saving") == self._saving.step:  # fsdp writes while training continues
            strike({**fault, "step": 0}, 0, None)
        if fault.get("what") == "save-waits":
            strike({**fault, "what": "wait"}, self.state.global_step, None)
        return publish(self, entries)

    module.Durable._publish = killed
    module.Durable._has_room = blind


def plant_in_run(module):
    """`versions`: a rank reports another version of torch."""
    versions = module.versions

    def planted():
        fault = json.loads(os.environ["PHALANX_FAULT"])
        mine = fault.get("what") == "versions" and fault["rank"] == int(os.environ["RANK"])
        return versions() | ({"torch": "1.0.0"} if mine else {})

    module.versions = planted


def plant_in_finish(module):
    """`phase`: the fault happens at the start of this action after training, or at its end ("merge done")."""
    report, save = module._reported, module.save_final_model

    def strike_in(phase):
        fault = json.loads(os.environ["PHALANX_FAULT"])
        if fault.get("phase") == phase:
            strike({**fault, "step": 0}, 0, None)

    @contextlib.contextmanager
    def reported(name):
        with report(name):
            strike_in(name)
            yield
            strike_in(f"{name} done")

    def save_final_model(trainer, context):
        strike_in("final save")
        ending = save(trainer, context)
        strike_in("final save done")
        return ending

    module._reported, module.save_final_model = reported, save_final_model


def plant_in_hub(module):
    """`pauses`: the seconds between the attempts of an upload."""
    push = module.push

    def hurried(config, folder):
        fault = json.loads(os.environ["PHALANX_FAULT"])
        return push(config, folder, fault.get("pauses", module.PAUSES))

    module.push = hurried


PLANTS = {
    "trainers.output.hub": plant_in_hub,
    "trainers.loop.finish": plant_in_finish,
    "trainers.loop.step_boundary": plant_in_boundary,
    "trainers.loop.planned_batches": plant_in_batches,
    "trainers.checkpoint.saving": plant_in_checkpoints,
    "trainers.loop.record": plant_in_run,
}


class Planter:
    """A finder that patches a module of Phalanx right after its import."""

    def find_spec(self, name, path, target=None):
        plant = PLANTS.get(name)
        if plant is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            plant(module)

        spec.loader.exec_module = exec_module
        return spec


if "PHALANX_FAULT" in os.environ:
    sys.meta_path.insert(0, Planter())
