"""Launches through the CUDA driver: the kernel reads what Triton's launcher would give it, or Triton's launcher is used."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from stepquant.errors import HostError
from stepquant.kernels import plan, repeat
from stepquant.kernels.driver_launch import Described, DriverLaunches, Launch, Place, UnsupportedError
from stepquant.kernels.repeat import Repeated, empty, launch

SIGNATURE = {"x_ptr": "*fp16", "y_ptr": "*i8", "rows": "i32", "scale": "fp32", "SIZE": "constexpr"}
SIZES = (8, 8, 4, 4, 8, 8)  # as the driver knows them: two workspaces follow


class Driver:
    """Stands in for libcuda: reads launches as a GPU would. launched: (grid, block, shared bytes, stream, function, argument bytes)."""

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes, self.launched, self.statuses = sizes, [], []

    def cuFuncGetParamInfo(self, function: int, index: int, offset: int, size: int) -> int:  # noqa: N802 - the driver's name
        if index >= len(self.sizes):
            return 1
        ctypes.c_size_t.from_address(size).value = self.sizes[index]
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, pointers: int, extra: None) -> int:  # noqa: N802 - the driver's name
        if self.statuses and (status := self.statuses.pop(0)):
            return status
        *grid_and_block, shared = (ctypes.c_uint * 7).from_address(config)
        stream = ctypes.c_uint64.from_address(config + 32).value
        places = (ctypes.c_uint64 * len(self.sizes)).from_address(pointers)
        arguments = [ctypes.string_at(place, size) for place, size in zip(places, self.sizes, strict=True)]
        self.launched.append((tuple(grid_and_block), shared, stream, function, arguments))
        return 0

    @property
    def addresses(self) -> list[tuple[int, int]]:
        return [tuple(int.from_bytes(one, "little") for one in arguments[:2]) for *_, arguments in self.launched]


def compiled(signature: dict[str, str] = SIGNATURE, **metadata: object) -> SimpleNamespace:
    source = SimpleNamespace(signature=signature)
    return SimpleNamespace(name="k", function=7, packed_metadata=(4, 1, 96), metadata=SimpleNamespace(**metadata), src=source, run=None)


def one_launch(kernel: SimpleNamespace, values: tuple = (Place(0), Place(1), 5, 0.5, 64)) -> Launch:
    return Launch(kernel, (3, 2, 1), values)


def test_driver_launch_gives_the_kernel_its_addresses_and_constants_and_no_workspace():
    driver = Driver()
    DriverLaunches([one_launch(compiled())], driver)(9, [1 << 40, 2 << 40])
    ((shape, shared, stream, function, arguments),) = driver.launched
    assert (shape, shared, stream, function) == ((3, 2, 1, 128, 1, 1), 96, 9, 7)
    assert driver.addresses == [(1 << 40, 2 << 40)]
    assert int.from_bytes(arguments[2], "little") == 5 and arguments[3] == bytes.fromhex("0000003f") and arguments[4:] == [bytes(8)] * 2


def test_driver_launch_follows_new_addresses_and_another_stream():
    driver = Driver()
    launches = DriverLaunches([one_launch(compiled()), one_launch(compiled(), (Place(1), Place(2), 5, 0.5, 64))], driver)
    for stream, addresses in ((1, [10, 20, 30]), (1, [10, 20, 30]), (2, [40, 20, 50]), (2, [10, 20, 30])):
        launches(stream, addresses)
    assert driver.addresses == [(10, 20), (20, 30), (10, 20), (20, 30), (40, 20), (20, 50), (10, 20), (20, 30)]
    assert [one[2] for one in driver.launched] == [1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "kernel",
    [
        compiled(launch_pdl=True),
        compiled(launch_cooperative_grid=True),
        compiled(global_scratch_size=128),
        compiled({**SIGNATURE, "scale": "bf16"}),
        compiled({**SIGNATURE, "rows": ("i32", "i32")}),
        compiled({"x_ptr": "*fp16"}),
        SimpleNamespace(run=None, function=7, packed_metadata=(4, 2, 96), metadata=None, name="clusters"),
        SimpleNamespace(run=None),
    ],
    ids=["overlap", "cooperative", "workspace", "type", "tuple", "other arguments", "clusters", "no kernel"],
)
def test_driver_launch_leaves_to_triton_what_it_does_not_know(kernel):
    with pytest.raises(UnsupportedError):
        DriverLaunches([one_launch(kernel)], Driver())


@pytest.mark.parametrize("sizes", [(8, 8, 8, 4), (8, 8), (8, 8, 4, 4, 4), ()], ids=["another size", "fewer", "something more", "unknown"])
def test_driver_launch_leaves_to_triton_what_the_driver_reads_otherwise(sizes):
    with pytest.raises(UnsupportedError):
        DriverLaunches([one_launch(compiled())], Driver(sizes))


def test_driver_launch_needs_a_driver():
    with pytest.raises(UnsupportedError):
        DriverLaunches([one_launch(compiled())], None)


def test_driver_launch_says_which_kernel_failed_and_launches_again_afterwards():
    driver = Driver()
    launches = DriverLaunches([one_launch(compiled())], driver)
    driver.statuses = [700]
    with pytest.raises(HostError, match=r"^k: CUDA error 700 .*Restart"):
        launches(1, [10, 20])
    launches(1, [30, 40])
    assert driver.addresses == [(30, 40)]


def test_driver_launch_in_a_new_thread_first_makes_the_device_current(monkeypatch):
    driver, current = Driver(), []
    launches = DriverLaunches([one_launch(compiled())], driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    driver.statuses = [201]
    launches(1, [10, 20])
    assert current == [3] and driver.addresses == [(10, 20)]


def test_driver_launch_encodes_a_descriptor_once_for_each_address(monkeypatch):
    from stepquant.kernels import driver_launch

    made: list[int] = []

    def encode(self, address: int) -> object:
        made.append(address)
        return SimpleNamespace(address=address)

    monkeypatch.setattr(driver_launch._Descriptors, "_encode", encode)
    monkeypatch.setattr(driver_launch, "MOST_DESCRIPTORS", 2)
    signature = {"x": "tensordesc<i8[64, 64]>", "y_ptr": "*i8"}
    described = Described(Place(0), SimpleNamespace, {"shape": [128, 64], "strides": [64, 1], "base": None})
    driver = Driver((128, 4, 4, 8, 8, 8, 8, 8))
    launches = DriverLaunches([Launch(compiled(signature, tensordesc_meta=[{}]), (1, 1, 1), (described, Place(1)))], driver)
    for address in (10, 20, 10, 20, 30, 10):
        launches(1, [address, 5])
    assert made == [10, 20, 30, 10]
    assert [[int.from_bytes(one, "little") for one in arguments[1:6]] for *_, arguments in driver.launched] == [[128, 64, 64, 1, 5]] * 6


@pytest.fixture
def driver(monkeypatch) -> Driver:
    """Operations on the CPU count as repeatable, on stream 5, and are launched by this driver."""
    driver = Driver((8, 8, 8, 8))
    monkeypatch.setattr(repeat, "_is_possible", lambda first: getattr(repeat._thread, "watcher", None) is None)
    monkeypatch.setattr(plan, "_stream_getter", lambda: lambda device: 5)
    monkeypatch.setattr(plan, "driver", lambda: driver)
    return driver


class Kernel:
    arg_names = ("x_ptr", "y_ptr")

    def __init__(self, **metadata: object) -> None:
        self.compiled = compiled({"x_ptr": "*i8", "y_ptr": "*i8"}, **metadata)
        self.compiled.run = self._run
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.compiled

    def _run(self, *arguments):
        self.launched.append(arguments[-2:])


def _copied(kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
    y = empty(x.shape, x.dtype, x.device)
    launch(kernel, (1,), x, y)
    return y


def test_repeated_launches_through_the_driver_in_a_chain_of_its_own_memory(driver):
    kernel = Kernel()
    chain = Repeated(lambda x: _copied(kernel, _copied(kernel, _copied(kernel, x))))
    chain(torch.zeros(2048, dtype=torch.int8))
    y = chain(x := torch.zeros(2048, dtype=torch.int8))
    first, second, third = driver.addresses
    assert first[0] == x.data_ptr() and first[1] == second[0] and second[1] == third[0] and third[1] == y.data_ptr()
    assert len({x.data_ptr(), first[1], second[1], y.data_ptr()}) == 4 and not kernel.launched


def test_repeated_keeps_the_order_of_launches_of_both_kinds(driver):
    plain, overlapping, order = Kernel(), Kernel(launch_pdl=True), []
    overlapping._run = lambda *arguments: order.append("Triton")
    overlapping.compiled.run = overlapping._run
    real = driver.cuLaunchKernelEx
    driver.cuLaunchKernelEx = lambda *arguments: order.append("driver") or real(*arguments)
    mixed = Repeated(lambda x: _copied(plain, _copied(overlapping, _copied(plain, _copied(plain, x)))))
    for _ in range(2):
        mixed(torch.zeros(64, dtype=torch.int8))
    assert order == ["driver", "driver", "Triton", "driver"]


def test_repeated_after_a_failed_launch_starts_anew(driver):
    kernel = Kernel()
    chain = Repeated(lambda x: _copied(kernel, _copied(kernel, x)))
    chain(torch.zeros(64, dtype=torch.int8))
    driver.statuses = [0, 700]
    with pytest.raises(HostError):
        chain(torch.zeros(64, dtype=torch.int8))
    driver.launched.clear()
    y = chain(x := torch.zeros(64, dtype=torch.int8))
    assert driver.addresses[0][0] == x.data_ptr() and driver.addresses[1][1] == y.data_ptr()
