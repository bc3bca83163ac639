"""The double and cupy offer the same calls. Where cupy is installed, it need not find a GPU."""

import inspect

import pytest
import torch

from router.links.base import Dtype
from tests.router.nccl_api import COMMUNICATOR, CONSTANTS, MODULE, parameters
from tests.router.nccl_double import DoubleCommunicator, DoubleNccl, World

WHY = "cupy is not installed; make check-gpu-api installs it and runs this"


@pytest.fixture(scope="module")
def nccl():
    nccl = pytest.importorskip("cupy.cuda.nccl", reason=WHY)
    assert nccl.available, "cupy finds no NCCL library; pip install nvidia-nccl-cu13"
    return nccl


def public(kind: type) -> set[str]:
    """Return the names of the methods that the double itself defines for others."""
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}


def test_the_double_has_the_calls_of_the_table_and_no_others():
    assert public(DoubleNccl) == MODULE.keys()
    assert public(DoubleCommunicator) | {"__init__"} == COMMUNICATOR.keys()
    constants = {name: value for name, value in vars(DoubleNccl).items() if name.startswith("NCCL_")}
    assert constants == CONSTANTS


@pytest.mark.parametrize("name", COMMUNICATOR)
def test_the_doubles_parameters_are_those_of_the_table(name: str):
    ours = list(inspect.signature(getattr(DoubleCommunicator, name)).parameters)
    ours.remove("self")
    if name == "__init__":
        ours.remove("device")  # in NCCL, the calling thread's current one
    assert ours == parameters(COMMUNICATOR[name])


def test_every_type_of_rows_has_a_type_of_nccls():
    assert {f"NCCL_{dtype.name}" for dtype in Dtype if dtype != Dtype.NONE} == CONSTANTS.keys()


def test_an_id_of_the_double_looks_like_one_of_nccls():
    unique_id = World().device("a").nccl.get_unique_id()
    assert (type(unique_id), len(unique_id)) == (bytes, 128)


def test_torch_makes_streams_and_events_as_we_call_it():
    inspect.signature(torch.cuda.ExternalStream.__new__).bind("cls", 0x1000, torch.device("cuda", 0))
    inspect.signature(torch.cuda.Stream.wait_stream).bind("self", "stream")
    inspect.signature(torch.cuda.Stream.record_event).bind("self", "event")
    inspect.signature(torch.cuda.Event.__new__).bind("cls", blocking=True)
    inspect.signature(torch.cuda.Event.query).bind("self")
    inspect.signature(torch.cuda.Event.synchronize).bind("self")
    inspect.signature(torch.cuda.current_stream).bind(torch.device("cuda", 0))


@pytest.mark.parametrize(("table", "name"), [(MODULE, name) for name in MODULE])
def test_cupys_module_says_what_the_table_says(nccl, table, name: str):
    assert getattr(nccl, name).__doc__.splitlines()[0] == table[name]


@pytest.mark.parametrize("name", COMMUNICATOR)
def test_cupys_communicator_says_what_the_table_says(nccl, name: str):
    owner = nccl.NcclCommunicator if name == "__init__" else getattr(nccl.NcclCommunicator, name)
    assert owner.__doc__.splitlines()[0] == COMMUNICATOR[name]


def test_cupys_constants_are_those_of_the_table(nccl):
    assert {name: getattr(nccl, name) for name in CONSTANTS} == CONSTANTS


def test_cupys_ids_are_128_bytes(nccl):
    unique_id = nccl.get_unique_id()
    assert (type(unique_id), len(unique_id)) == (bytes, 128)


@pytest.mark.parametrize("name", ["send", "recv", "allGather", "check_async_error"])
def test_our_arguments_reach_the_nccl_library(nccl, name: str):
    """On a communicator that was never opened, NCCL itself refuses them, after cupy has taken them."""
    communicator = nccl.NcclCommunicator.__new__(nccl.NcclCommunicator)
    call, arguments = getattr(communicator, name), [0] * len(parameters(COMMUNICATOR[name]))
    with pytest.raises(nccl.NcclError, match="INVALID_ARGUMENT"):
        call(*arguments)
    with pytest.raises(TypeError):
        call(*arguments, 0)


def test_cupys_errors_are_what_a_communicator_catches(nccl):
    assert issubclass(nccl.NcclError, RuntimeError)


def test_cupy_has_no_name_for_every_error(nccl):
    """Hence the KeyError that a communicator catches, too."""
    nccl_in_progress = 7
    with pytest.raises(KeyError):
        nccl.NcclError(nccl_in_progress)


def test_cupy_makes_streams_as_we_call_it(nccl):
    stream = pytest.importorskip("cupy.cuda").Stream
    inspect.signature(stream).bind(non_blocking=True, priority=-1)
