"""Repeated operations: later calls launch the first one's kernels on their own tensors, or run as written where that is not certain."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stepquant.kernels import plan, repeat
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.repeat import Kept, Repeated, call, empty, launch

CPU = torch.device("cpu")


class Kernel:
    """Stands in for a Triton kernel of three parameters. dispatched, launched: arguments of both ways to launch it."""

    arg_names = ("x_ptr", "y_ptr", "SIZE")

    def __init__(self) -> None:
        self.dispatched: list[tuple] = []
        self.launched: list[tuple] = []
        self.compiled = SimpleNamespace(run=self._run, function=7, packed_metadata=(4, 1, 0))

    def __getitem__(self, grid):
        def dispatch(*arguments, **constants):
            self.dispatched.append((grid, *arguments, *constants.values()))
            return self.compiled

        return dispatch

    def _run(self, *arguments):
        self.launched.append(arguments)


class Side(Enum):
    LEFT = "left"


@dataclass
class Descriptor:
    base: torch.Tensor
    shape: list


class Layer:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.operands = tensor, (Kept(tensor),)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    """A kernel; operations on the CPU count as repeatable, on stream 5."""
    monkeypatch.setattr(repeat, "_is_possible", lambda first: getattr(repeat._thread, "watcher", None) is None)
    monkeypatch.setattr(plan, "_stream_getter", lambda: lambda device: 5)
    return Kernel()


def doubling(kernel: Kernel, calls: list) -> Repeated:
    def double(x, scale=1.0, side=None):
        calls.append(x)
        y = empty(x.shape, x.dtype, x.device)
        launch(kernel, (x.shape[0],), x, y, SIZE=x.shape[0])
        return y

    return Repeated(double)


def test_repeated_launches_on_the_new_operands_without_the_function(kernel):
    calls: list = []
    double = doubling(kernel, calls)
    double(torch.zeros(8, 4))
    x = torch.zeros(8, 4)
    y = double(x)
    assert len(calls) == 1 and len(kernel.dispatched) == 1
    assert kernel.launched == [(8, 1, 1, 5, 7, (4, 1, 0), None, None, None, x.data_ptr(), y.data_ptr(), 8)]
    assert y.shape == x.shape and y.dtype == x.dtype


@pytest.mark.parametrize(
    "other",
    [torch.zeros(9, 4), torch.zeros(4, 8).t(), torch.zeros(8, 4).half(), torch.zeros(40)[1:33].view(8, 4)],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_repeated_runs_the_function_for_another_layout(kernel, other):
    calls: list = []
    double = doubling(kernel, calls)
    double(torch.zeros(8, 4))
    double(other)
    assert len(calls) == 2 and not kernel.launched


def test_repeated_runs_the_function_for_another_value(kernel):
    calls: list = []
    double, x = doubling(kernel, calls), torch.zeros(8, 4)
    for scale, side in ((1.0, None), (2.0, None), (2.0, Side.LEFT), (2.0, Side.LEFT)):
        double(x, scale, side=side)
    assert len(calls) == 3 and len(kernel.launched) == 1


def test_repeated_follows_a_weight_that_has_moved(kernel):
    @Repeated
    def scaled(x, weight):
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), weight.tensor, y, SIZE=1)
        return y

    old, new = torch.zeros(64), torch.zeros(64)
    for weight in (old, old, new):
        scaled(torch.zeros(4), Layer(weight))
    assert [arguments[9] for arguments in kernel.launched] == [old.data_ptr(), new.data_ptr()]


def test_kept_operands_of_equal_layout_share_a_number():
    first, second, third = Kept(torch.zeros(4), 1), Kept(torch.ones(4), 1), Kept(torch.zeros(5), 1)
    assert first.number == second.number != third.number


def test_copied_kept_operands_are_launched_on_where_the_copies_are(kernel):
    @Repeated
    def scaled(x, weight):
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), weight.tensor, y, SIZE=1)
        return y

    layer = Layer(torch.zeros(64))
    copied = copy.deepcopy(layer)
    for one in (layer, layer, copied):
        scaled(torch.zeros(4), one)
    assert [arguments[9] for arguments in kernel.launched] == [layer.tensor.data_ptr(), copied.tensor.data_ptr()]


def test_repeated_passes_parts_of_operands_and_returns_parts_of_allocations(kernel):
    @Repeated
    def halves(x):
        y = empty((4, 6), x.dtype, CPU)
        launch(kernel, (1,), x[2:], y[:, 3:], SIZE=1)
        return list(y.split(3, 1)), QuantizedActivation(y, y[:, 0], None, 1)

    x = torch.zeros(4, 6, dtype=torch.int8)
    halves(x)
    (left, right), activation = halves(x)
    assert kernel.launched[0][9:11] == (x.data_ptr() + 12, left.data_ptr() + 3)
    assert right.data_ptr() == left.data_ptr() + 3 and right.shape == (4, 3) and right.stride() == (6, 1)
    assert activation.codes.data_ptr() == left.data_ptr() and activation.scale.stride() == (6,) and activation.rows == 4


def test_repeated_gives_descriptors_their_new_tensors(kernel):
    @Repeated
    def described(x):
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), Descriptor(x, [8, 4]), y, SIZE=1)
        return y

    first, second = torch.zeros(8, 4), torch.zeros(8, 4)
    described(first)
    described(second)
    described(first)
    assert [arguments[9].base.data_ptr() for arguments in kernel.launched] == [second.data_ptr(), first.data_ptr()]
    assert kernel.launched[0][9].shape == [8, 4] and kernel.launched[0][9] is not kernel.launched[1][9]


@pytest.mark.parametrize("what", ["copies", "returns torch's result", "another tensor"])
def test_repeated_runs_the_function_every_time_when_it_does_more_than_launch(kernel, what):
    foreign, calls = torch.zeros(8, 4), []

    @Repeated
    def operation(x):
        calls.append(x)
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), {"copies": x.clone(), "another tensor": foreign}.get(what, x), y, SIZE=1)
        return y + 1 if what == "returns torch's result" else y

    for _ in range(3):
        operation(torch.zeros(8, 4))
    assert len(calls) == 3 and not kernel.launched


def test_repeated_tells_one_operand_passed_twice_from_two(kernel):
    calls: list = []

    @Repeated
    def added(x, residual):
        calls.append(x)
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), residual, y, SIZE=1)
        return y

    x, other = torch.zeros(8, 4), torch.zeros(8, 4)
    for residual in (x, x, other, other):
        added(x, residual)
    assert len(calls) == 2 and [arguments[9] for arguments in kernel.launched] == [x.data_ptr(), other.data_ptr()]


def test_repeated_runs_the_function_every_time_when_operands_share_memory(kernel):
    calls: list = []

    @Repeated
    def added(x, residual):
        calls.append(x)
        y = empty(x.shape, x.dtype, CPU)
        launch(kernel, (1,), residual, y, SIZE=1)
        return y

    x = torch.zeros(8, 4)
    for _ in range(3):
        added(x, x.view(8, 4))
    assert len(calls) == 3 and not kernel.launched


def test_repeated_runs_the_function_every_time_for_objects_it_does_not_know(kernel):
    calls: list = []
    double = doubling(kernel, calls)
    for _ in range(2):
        double(torch.zeros(8, 4), SimpleNamespace())
    assert len(calls) == 2 and not kernel.launched


def _copied(kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
    y = empty(x.shape, x.dtype, CPU)
    launch(kernel, (1,), x, y, SIZE=1)
    return y


def _addresses(kernel: Kernel) -> list[tuple[int, int]]:
    return [arguments[9:11] for arguments in kernel.launched]


def test_repeated_torch_function_gets_the_new_tensors_and_its_result_is_launched_on(kernel):
    given = []

    def added(a, b):
        given.append((a.data_ptr(), b.data_ptr(), b.shape))
        return a + b

    @Repeated
    def operation(x, residual):
        return _copied(kernel, call(added, _copied(kernel, x), residual[1:]))

    operation(torch.zeros(2, 8), torch.zeros(3, 8))
    y = operation(x := torch.zeros(2, 8), residual := torch.zeros(3, 8))
    before, after = _addresses(kernel)
    assert given[1] == (before[1], residual.data_ptr() + 32, (2, 8))
    assert before[0] == x.data_ptr() and after[1] == y.data_ptr() and after[0] not in (x.data_ptr(), before[1], y.data_ptr())


def test_repeated_torch_function_with_a_result_of_another_layout_is_put_into_the_known_one(kernel):
    results = [torch.arange(12.0).view(3, 4), torch.arange(12.0).view(4, 3).t()]
    expected = results[1].clone()

    @Repeated
    def operation(x):
        y = call(lambda _: results.pop(0), x)
        launch(kernel, (1,), x, y, SIZE=1)
        return y

    operation(torch.zeros(3, 4))
    y = operation(torch.zeros(3, 4))
    assert y.stride() == (4, 1) and torch.equal(y, expected) and _addresses(kernel)[0][1] == y.data_ptr()


def test_repeated_torch_function_that_gives_its_operand_back_runs_as_written_every_time(kernel):
    calls: list = []

    @Repeated
    def operation(x):
        calls.append(x)
        return _copied(kernel, call(lambda y: y.view(4, 8), x))

    for _ in range(3):
        operation(torch.zeros(8, 4))
    assert len(calls) == 3 and not kernel.launched


def test_repeated_holds_no_more_memory_than_is_needed_at_a_time(kernel, monkeypatch):
    made: list[int] = []
    torch_empty = torch.empty

    def counted(*arguments, **options):
        tensor = torch_empty(*arguments, **options)
        made.append(tensor.nbytes)
        return tensor

    @Repeated
    def chain(x):
        for _ in range(6):
            x = _copied(kernel, x)
        return x

    chain(torch.zeros(1024))
    monkeypatch.setattr(torch, "empty", counted)
    chain(torch.zeros(1024))
    inner = [one[1] for one in _addresses(kernel)][:-1]
    assert made == [2 * 4096] and len(set(inner)) == 2
    assert all(source != target for source, target in _addresses(kernel))


def test_repeated_lets_go_of_a_torch_result_when_its_last_reader_is_launched(kernel):
    import weakref

    alive: list = []

    def noted(x):
        y = x + 1
        alive.append(weakref.ref(y))
        return y

    def looks(x):
        alive.append(alive[-1]() is not None)
        return x + 1

    @Repeated
    def operation(x):
        y = _copied(kernel, call(noted, x))
        return _copied(kernel, call(looks, y))

    operation(torch.zeros(8))
    operation(torch.zeros(8))
    assert alive[-1] is False


def test_repeated_on_another_stream_launches_there(kernel, monkeypatch):
    streams = iter((1, 2))
    monkeypatch.setattr(plan, "_stream_getter", lambda: lambda device: next(streams))
    double = doubling(kernel, [])
    for _ in range(3):
        double(torch.zeros(8, 4))
    assert [arguments[3] for arguments in kernel.launched] == [1, 2]


def test_repeated_in_two_threads_mixes_no_addresses(kernel):
    from threading import Barrier, Thread

    barrier, pairs = Barrier(2), []
    chain = Repeated(lambda x: _copied(kernel, call(torch.neg, _copied(kernel, x))))
    chain(torch.zeros(64))

    def work():
        barrier.wait()
        for _ in range(50):
            x = torch.zeros(64)
            pairs.append((x, chain(x)))

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = _addresses(kernel)
    ends = {(first[0], last[1]) for first, last in zip(launched[::2], launched[1::2], strict=True)}
    assert ends == {(x.data_ptr(), y.data_ptr()) for x, y in pairs}


def test_repeated_inside_another_is_a_part_of_it(kernel):
    calls: list = []
    double = doubling(kernel, calls)
    twice = Repeated(lambda x: double(double(x)))
    twice(torch.zeros(8, 4))
    y = twice(x := torch.zeros(8, 4))
    (first, second) = kernel.launched
    assert len(calls) == 2 and first[9] == x.data_ptr() and second[9] == first[10] and second[10] == y.data_ptr()


def test_repeated_keeps_nothing_of_a_call_that_failed(kernel):
    @Repeated
    def failing(x):
        raise RuntimeError("no memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            failing(torch.zeros(1))


def test_forget_plans_works_everything_out_anew(kernel):
    calls: list = []
    double = doubling(kernel, calls)
    double(torch.zeros(8, 4))
    repeat.forget_plans()
    double(torch.zeros(8, 4))
    assert len(calls) == 2


def test_repeated_interpreted_kernels_give_the_function_s_results(triton_device, monkeypatch, generator):
    if triton_device.type != "cpu":
        pytest.skip("there are compiled kernels here")
    from stepquant.kernels.triton_ops.quantize_token import quantize_token

    monkeypatch.setattr(repeat, "_is_possible", lambda first: getattr(repeat._thread, "watcher", None) is None)
    repeated = Repeated(quantize_token)
    for _ in range(2):
        x = torch.randn(3, 40, generator=generator)
        expected, found = quantize_token(x), repeated(x)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


def test_compile_ahead_asks_for_each_kernel_once_and_launches_none(kernel, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")
    from contextlib import nullcontext

    from stepquant.kernels.triton_ops.compile_ahead import compile_ahead

    monkeypatch.setattr(triton, "AsyncCompileMode", lambda *_, **__: nullcontext())
    asked: list = []
    kernel.warmup = lambda *arguments, grid, **constants: asked.append(constants)
    calls: list = []
    double = doubling(kernel, calls)
    shapes = []
    compile_ahead(lambda: shapes.extend(double(torch.zeros(rows, 4)).shape for rows in (8, 8, 16, 7)), CPU)
    assert asked == [{"SIZE": 8}, {"SIZE": 16}, {"SIZE": 7}] and shapes == [(8, 4), (8, 4), (16, 4), (7, 4)]
    assert not kernel.dispatched and not kernel.launched
    double(torch.zeros(8, 4))
    assert len(kernel.dispatched) == 1


def test_compile_ahead_goes_on_with_what_torch_gives(kernel, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")
    from contextlib import nullcontext

    from stepquant.kernels.triton_ops.compile_ahead import compile_ahead

    monkeypatch.setattr(triton, "AsyncCompileMode", lambda *_, **__: nullcontext())
    asked: list = []
    kernel.warmup = lambda *arguments, grid, **constants: asked.append(arguments[0].shape)
    compile_ahead(lambda: _copied(kernel, call(torch.t, _copied(kernel, torch.zeros(8, 4)))), CPU)
    assert asked == [(8, 4)] and not kernel.dispatched


def test_first_call_lets_go_of_memory_as_the_function_does_and_is_repeated_all_the_same(kernel):
    held = []

    @Repeated
    def twice(x):
        first = empty((64, 64), x.dtype, CPU)
        launch(kernel, (1,), x, first, SIZE=1)
        memory = StorageWeakRef(first.untyped_storage())
        second = empty((8, 8), x.dtype, CPU)
        launch(kernel, (2,), first, second, SIZE=2)
        kernel.dispatched.clear()  # which hold their operands
        del first
        held.append(not memory.expired())
        third = empty((64, 64), x.dtype, CPU)  # may well lie where the first one did
        launch(kernel, (3,), second, third, SIZE=3)
        return third

    twice(torch.zeros(4))
    x = torch.zeros(4)
    y = twice(x)
    assert held == [False]
    (_, *_, x_1, first, _), (_, *_, first_2, second, _), (_, *_, second_3, third, _) = kernel.launched
    assert (x_1, third) == (x.data_ptr(), y.data_ptr()) and first == first_2 and second == second_3
    assert y.shape == (64, 64) and first != second != third
