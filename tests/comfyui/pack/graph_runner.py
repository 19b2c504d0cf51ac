"""Child process of the node tests: a whole ComfyUI without a port, in which the command line's extras cannot be imported.

Reads one JSON request a line from stdin, answers with one JSON line. Requests:
{"prompt": {...}, "cancel_after": n, "kill_after": n, "extra_pnginfo": {...}}  run an API-format graph; at the n-th progress report
                                      cancel it, or kill this process as a crash or a closed window does, if given
{"limit": bytes or null}              let this process write no file larger than that, as on a full disk
{"memory": true}                      RAM that this process holds, in bytes, once the allocator has given back what it can
{"schemas": true}                     what ComfyUI would send the front end for our nodes
"""

import asyncio
import gc
import json
import os
import signal
import sys
import traceback

BLOCKED = ("typer", "rich", "matplotlib", "diffusers", "accelerate", "sklearn", "torchmetrics", "resvg_py")


class _Blocked:
    """Stands before another finder and hides the blocked packages: they look as if they were not installed."""

    def __init__(self, finder) -> None:
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self._finder.find_spec(name, path, target)


sys.meta_path[:] = [_Blocked(finder) for finder in sys.meta_path]
answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints must not disturb the answers

comfyui, base = sys.argv[1:3]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--base-directory", base, "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import execution  # noqa: E402
import server  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

import nodes  # noqa: E402

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)


class Runner:
    def __init__(self) -> None:
        self.server = server.PromptServer(loop)
        self.server.send_sync = lambda event, data, sid=None: None
        self.executor = execution.PromptExecutor(
            self.server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0}
        )
        loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        self.count = 0

    def run(self, prompt: dict, cancel_after: int | None = None, kill_after: int | None = None, extra_pnginfo: dict | None = None) -> dict:
        self.count += 1
        name, reports = f"prompt{self.count}", 0

        def on_progress(value, total, preview, prompt_id=None, node_id=None):
            nonlocal reports
            comfy.model_management.throw_exception_if_processing_interrupted()  # as main.py's hook does
            reports += 1
            if reports == cancel_after:
                comfy.model_management.interrupt_current_processing()
            if reports == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        comfy.utils.set_progress_bar_global_hook(on_progress)
        valid, error, outputs, node_errors = loop.run_until_complete(execution.validate_prompt(name, prompt, None))
        if not valid:
            return {"valid": False, "error": error, "node_errors": node_errors}
        self.executor.execute(prompt, name, {"extra_pnginfo": extra_pnginfo} if extra_pnginfo else {}, outputs)
        failures = [data for event, data in self.executor.status_messages if event in ("execution_error", "execution_interrupted")]
        return {
            "valid": True,
            "success": self.executor.success,
            "failure": {key: failures[0].get(key) for key in ("exception_type", "exception_message", "node_type")} if failures else None,
            "outputs": self.executor.history_result["outputs"],
            "progress_reports": reports,
            "hooks_left": count_hooks(),
        }


def count_hooks() -> int:
    """Forward hooks on any layer of any UNet in memory."""
    unets = [one for one in gc.get_objects() if isinstance(one, UNetModel)]
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for unet in unets for module in unet.modules())


def is_ours(node_id: str) -> bool:
    return node_id.startswith("StepQuant")


def limit_file_size(size: int | None) -> dict:
    """Writing beyond it fails with an error, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))
    return {}


def held_memory() -> dict:
    """Without free blocks that glibc keeps for later: how much of them it keeps is chance."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status", encoding="utf-8") as status:
        return {"bytes": 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])}


def main() -> None:
    runner = Runner()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "limit" in request:
                answer = limit_file_size(request["limit"])
            elif "memory" in request:
                answer = held_memory()
            elif "schemas" in request:
                answer = {name: node.GET_NODE_INFO_V1() for name, node in nodes.NODE_CLASS_MAPPINGS.items() if is_ours(name)}
            else:
                answer = runner.run(**request)
        except Exception:
            answer = {"crash": traceback.format_exc()}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


main()
