"""A whole UNet step of SDXL: ComfyUI as shipped, its faster settings, its own int8, and ours, in one run and one table.

    COMFYUI_PATH=<a ComfyUI checkout> python speed.py [--out results.jsonl] [--seconds 240] [--profile] [--others compile sdnq ...]

Full-size UNet with random weights, 1024x1024, CFG batch 2, fp16; no text encoder and, but for the two sessions after our first
rows, no VAE and no sampler. Times are medians of 20 calls by CUDA events. A graph row is the same call in a CUDA graph: ours
through the runner that ComfyUI uses, the others' recorded here. The first of our rows starts with an empty Triton cache,
so its first call is the cold start. SQNR is against the fp16 row's output on the same inputs; random weights amplify any
noise, so it compares modes and says nothing about pictures. Every row is written as soon as it is measured. Profiles come
last, so that the profiler is in no row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_session import start_comfyui, unload
from speed_gpu import Gpu
from speed_table import Table, say

HERE = Path(__file__).resolve().parent
# What --others takes.
OTHERS = {
    "channels_last": "fp16 channels_last",
    "compile": "fp16 torch.compile",
    "int8_tensorwise": "comfy-kitchen int8 Linears",
    "float8_e4m3fn": "ComfyUI native fp8 Linears",
    "sdnq": "SDNQ int8 Linears",
    "sdnq_convs": "SDNQ int8 Linears and convolutions",
}
# What --schemes takes.
PRESETS = {"token": "w8a8-token", "static": "w8a8-static", "fp8": "w8a8-fp8", "int4": "w4a8-token"}
# Of --in-turns.
TURNS = 12
# What a new process, two models and two pictures take on a slow host; below it the sessions are left out.
LEAST_SECONDS_FOR_A_SESSION = 30


def load(patcher: Any) -> Any:
    """All weights on the GPU, nothing else there."""
    import comfy.model_management

    unload()
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def record_graph(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """(replay, where its output appears) of a call that nobody records by itself."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = call()
    return graph.replay, output


def measure_foreign(table: Table, gpu: Gpu, mode: str, patcher: Any, call: Callable[[], Any]) -> None:
    """A mode that is not ours: eager, then recorded here."""
    gpu.forget_peak()
    output, first_s = gpu.first(call)
    if table.reference is None:
        table.reference = output.float().cpu()
        sqnr = None
    else:
        sqnr = table.sqnr(output)
    step = gpu.step(call)
    cold = first_s if "compile" in mode or "SDNQ" in mode else None
    table.add(mode, False, **step, **gpu.peak(), cold_start_s=cold, sqnr_db=sqnr)
    del output
    if gpu.is_cuda:
        gpu.forget_peak()
        replay, output = record_graph(call)
        replay()
        step = gpu.step(replay)
        table.add(mode, True, **step, **gpu.peak(), sqnr_db=None if sqnr is None else table.sqnr(output))


def measure_others(table: Table, gpu: Gpu, source: Path, inputs: Any, arguments: argparse.Namespace) -> Any:
    """ComfyUI as shipped, which is the reference, and --others. Returns the fp16 model, which ours are made of."""
    import speed_models
    import torch

    fp16 = None
    with table.attempt("ComfyUI fp16"):
        fp16 = load(speed_models.load_fp16(source))
        measure_foreign(table, gpu, "ComfyUI fp16", fp16, inputs.on(fp16))
    for name in arguments.others:
        mode = OTHERS[name]
        with table.attempt(mode):
            if table.seconds_left < 0:
                raise TimeoutError("time is up")
            torch.backends.cudnn.benchmark = name == "channels_last"
            if name == "channels_last":
                patcher = load(speed_models.load_channels_last(source))
            elif name == "compile":
                patcher = load(speed_models.load_fp16(source))
            elif name.startswith("sdnq"):
                patcher = speed_models.load_sdnq(source, gpu.device, convs=name == "sdnq_convs")
            else:
                patcher = load(speed_models.load_native(source, gpu.device, name))
            call = inputs.on(patcher, channels_last=name == "channels_last")
            measure_foreign(table, gpu, mode, patcher, torch.compile(call) if name == "compile" else call)
            del patcher, call
    torch.backends.cudnn.benchmark = False
    gc.collect()
    return fp16


def _quantized(scheme: str, fp16: Any, calibration: Any, inputs: Any, **how: Any) -> tuple[Any, Callable[[], Any]]:
    """(model, its call) with all weights on the GPU."""
    from stepquant.hosts.comfy.quantize import quantize_model

    patcher = load(quantize_model(fp16, PRESETS[scheme], calibration, **how))
    return patcher, inputs.on(patcher, ours=True)


def measure_ours(
    table: Table, gpu: Gpu, scheme: str, fp16: Any, calibration: Any, inputs: Any, arguments: argparse.Namespace, cold: bool
) -> None:
    """One scheme: the whole UNet as ComfyUI runs it, then the same without a graph, then layer by layer if asked for."""
    from stepquant.hosts.acceleration import Acceleration
    from stepquant.hosts.comfy.attach import counting_macs, state_of

    name, share = f"ours {PRESETS[scheme]}", None

    def row(mode: str, graph: bool, output: Any, step: dict[str, object], **more: object) -> None:
        table.add(mode, graph, **step, **gpu.peak(), sqnr_db=table.sqnr(output), integer_mac_share=share, **more)

    with table.attempt(name):
        patcher, call = _quantized(scheme, fp16, calibration, inputs)
        state = state_of(patcher)
        gpu.forget_peak()
        output, first_s = gpu.first(call)
        compiled = _compiled_kernels()
        with counting_macs(patcher.model) as counter:
            call()
        share = counter.integer_share()
        step = gpu.step(call)
        reason = state.runner.last_reason
        more = {"cold_start_s": first_s if cold else None, "first_call_s": first_s, "kernels_compiled": compiled}
        row(f"{name} fused", reason is None, call(), step, **more, runner=state.runner.describe())
        if gpu.is_cuda and reason is not None:
            say(f"  no graph: {reason}")
        state.acceleration = Acceleration.FUSED
        state.runner.release()
        gpu.forget_peak()
        call()
        step = gpu.step(call)
        row(f"{name} fused", False, call(), step)
    if not arguments.layerwise:
        return
    with table.attempt(f"{name} layerwise"):
        patcher, call = _quantized(scheme, fp16, calibration, inputs, acceleration=Acceleration.OFF)
        gpu.forget_peak()
        output, _ = gpu.first(call)
        row(f"{name} layerwise", False, output, gpu.step(call))
        if gpu.is_cuda:
            gpu.forget_peak()
            replay, output = record_graph(call)
            replay()
            row(f"{name} layerwise", True, output, gpu.step(replay))


def measure_in_turns(table: Table, gpu: Gpu, fp16: Any, calibrations: dict, inputs: Any, arguments: argparse.Namespace) -> None:
    """Eager steps of fp16 and ours in turns, all on the GPU: what the host's clock does within seconds, it does to all of them."""
    import comfy.model_management

    from stepquant.hosts.comfy.quantize import quantize_model

    with table.attempt("eager in turns"):
        patchers = {"ComfyUI fp16": fp16}
        for scheme in arguments.schemes:
            name = f"ours {PRESETS[scheme]} fused"
            patchers[name] = quantize_model(fp16, PRESETS[scheme], calibrations.get(scheme), acceleration="fused")
        unload()
        comfy.model_management.load_models_gpu(list(patchers.values()), force_full_load=True)
        calls = {name: inputs.on(patcher, ours=patcher is not fp16) for name, patcher in patchers.items()}
        turns = [{name: statistics.median(gpu.calls_ms(call, 3)) for name, call in calls.items()} for _ in range(TURNS)]
        for name in calls:
            ratio = statistics.median(turn["ComfyUI fp16"] / turn[name] for turn in turns)
            step_ms = statistics.median(turn[name] for turn in turns)
            table.add(
                name, False, kind="in turns", step_ms=step_ms, turns_ms=[round(turn[name], 2) for turn in turns], fp16_over_this=ratio
            )


def profile_ours(table: Table, gpu: Gpu, scheme: str, fp16: Any, calibration: Any, inputs: Any) -> None:
    """Where one scheme's GPU time goes, as a graph and without."""
    import speed_profile

    from stepquant.hosts.acceleration import Acceleration
    from stepquant.hosts.comfy.attach import state_of

    name = f"ours {PRESETS[scheme]} fused"
    with table.attempt(f"profile {name}"):
        patcher, call = _quantized(scheme, fp16, calibration, inputs)
        state = state_of(patcher)
        for acceleration in (Acceleration.AUTO, Acceleration.FUSED):
            state.acceleration = acceleration
            for _ in range(3):
                call()
            graph = state.runner.last_reason is None
            with gpu.alone():
                split = speed_profile.time_split(call)
            table.add(name, graph, kind="time split", time_split=split)
            say("\n".join(speed_profile.lines(split)))


def measure_session(table: Table, mode: str, source: Path, arguments: argparse.Namespace) -> None:
    """Two pictures in a ComfyUI of their own, with default flags."""
    if table.seconds_left < LEAST_SECONDS_FOR_A_SESSION:
        say(f"  left out, time is up: session {mode}")
        return
    command = [sys.executable, str(HERE / "speed_session.py"), "--mode", mode, "--source", str(source), "--steps", str(arguments.steps)]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--cpu"] if arguments.device == "cpu" else []
    with table.attempt(f"session {mode}"):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=max(30, table.seconds_left), check=False)
        if answer.returncode:
            log = table.keep(f"session_{mode}.log", answer.stdout + answer.stderr)
            raise RuntimeError(f"exit code {answer.returncode}; what it said is in {log}")
        found = json.loads(answer.stdout.strip().splitlines()[-1])
        say("  " + json.dumps(found))
        name = "ComfyUI fp16" if mode == "fp16" else "ours w8a8-token fused"
        graph = (found["runner"] or "").startswith("CUDA graph")
        table.add(name, graph, kind="session", step_ms=found["step_ms"], peak_gib=found["peak_gib"], session=found)


def _compiled_kernels() -> int:
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def facts_of(gpu: Gpu, arguments: argparse.Namespace) -> dict[str, object]:
    import importlib.metadata

    import speed_models
    import torch

    versions = {}
    for package in ("triton", "comfy-kitchen", "comfy-aimdo", "sdnq"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    sm = "".join(map(str, torch.cuda.get_device_capability())) if gpu.is_cuda else None
    return {
        "kind": "unet step",
        "model": (speed_models.TINY if arguments.tiny else speed_models.SDXL).name,
        "gpu": torch.cuda.get_device_name() if gpu.is_cuda else "CPU",
        "sm": sm,
        "torch": torch.__version__,
        "triton": versions["triton"],
        "comfy_kitchen": versions["comfy-kitchen"],
        "comfy_aimdo": versions["comfy-aimdo"],
        "sdnq": versions["sdnq"],
        "commit": os.environ.get("STEPQUANT_COMMIT"),
        "command": arguments.command,
    }


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append every row to this JSON-lines file")
    parser.add_argument("--seconds", type=float, default=240, help="rows that would start later than this are left out")
    parser.add_argument("--steps", type=int, default=20, help="of the two pictures")
    parser.add_argument("--schemes", nargs="*", choices=tuple(PRESETS), default=["token", "static"])
    parser.add_argument(
        "--others",
        nargs="*",
        choices=tuple(OTHERS),
        default=["channels_last", "int8_tensorwise", "float8_e4m3fn"],
        help="what to measure beside ours and fp16, the reference; compile and sdnq (pip install sdnq) take minutes to start",
    )
    parser.add_argument("--source", type=Path, help="the UNet of another process of this run, which wrote it, to use and not to write")
    parser.add_argument("--lock", type=Path, help="a file; of processes on one GPU that are given the same, one at a time measures")
    parser.add_argument("--no-session", action="store_true", help="without the two pictures through ComfyUI's sampler")
    parser.add_argument("--layerwise", action="store_true", help="also our modes layer by layer, without fused blocks")
    parser.add_argument(
        "--in-turns", action="store_true", help="also fp16's and our eager steps in turns, against a host whose clock changes"
    )
    parser.add_argument("--profile", action="store_true", help="also where the GPU time of our rows goes, by groups of kernels")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tests' small model, to try this script")
    return parser.parse_args(given)


def measure(table: Table, gpu: Gpu, folder: Path, arguments: argparse.Namespace) -> None:
    import speed_models
    import torch

    size = speed_models.TINY if arguments.tiny else speed_models.SDXL
    source = arguments.source or folder / "unet.safetensors"
    with torch.inference_mode():
        if arguments.source is None:
            with table.attempt("write the source"):
                speed_models.write_source(source, arguments.tiny)
        inputs = speed_models.UNetCall(size, gpu.device, torch.float16 if gpu.is_cuda else torch.float32)
        fp16, calibrations = measure_others(table, gpu, source, inputs, arguments), {}
        for number, scheme in enumerate(arguments.schemes):
            if table.seconds_left < 0:
                say(f"  left out, time is up: {PRESETS[scheme]}")
                continue
            if scheme == "static":
                with table.attempt("calibrate"):
                    calibrations[scheme] = speed_models.calibrate_source(fp16, size)
            measure_ours(table, gpu, scheme, fp16, calibrations.get(scheme), inputs, arguments, cold=number == 0)
            if number == 0:
                measure_sessions(table, gpu, source, arguments)
        if arguments.in_turns:
            measure_in_turns(table, gpu, fp16, calibrations, inputs, arguments)
        for scheme in arguments.schemes if arguments.profile and gpu.is_cuda else ():
            if table.seconds_left < 0:
                say(f"  left out, time is up: profile of {PRESETS[scheme]}")
                continue
            profile_ours(table, gpu, scheme, fp16, calibrations.get(scheme), inputs)


def measure_sessions(table: Table, gpu: Gpu, source: Path, arguments: argparse.Namespace) -> None:
    unload()
    for mode in () if arguments.no_session else ("int8", "fp16"):
        with gpu.alone():
            measure_session(table, mode, source, arguments)


def main() -> int:
    arguments = parse(sys.argv[1:])
    arguments.out = arguments.out.resolve() if arguments.out else None
    arguments.command = " ".join(["speed.py", *sys.argv[1:]])
    folder = Path(tempfile.mkdtemp(prefix="speed"))
    # Set before Triton is imported: the first of our calls shall find nothing compiled.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        start_comfyui(dynamic=False, cpu=arguments.device == "cpu")
        gpu = Gpu(arguments.device, arguments.lock)
        facts = facts_of(gpu, arguments)
        say(json.dumps(facts))
        table = Table(arguments.out, arguments.seconds, facts)
        measure(table, gpu, folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table.print_all()
    say("FAILED: " + ", ".join(table.failed) if table.failed else "all rows measured")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
