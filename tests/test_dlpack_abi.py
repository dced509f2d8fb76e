"""csrc/host/dlpack.h declares what DLPack's own header does, and only known versions are accepted.

The header that torch carries is the one that its exchange table was compiled with.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from fused_adamw import _C, FusedAdamW

pytestmark = pytest.mark.xdist_group("compiled with torch")

CSRC = Path(__file__).parents[1] / "csrc"

# --- Layout --------------------------------------------------------------------------------------

# Ours, DLPack's, and the fields of each in order.
STRUCTS = {
    ("Version", "DLPackVersion"): "major minor",
    ("Device", "DLDevice"): "type=device_type index=device_id",
    ("DataType", "DLDataType"): "code bits lanes",
    ("Tensor", "DLTensor"): "data device ndim dtype shape strides byte_offset",
    ("ManagedTensor", "DLManagedTensorVersioned"): (
        "version manager_context=manager_ctx deleter flags tensor=dl_tensor"
    ),
    ("ExchangeApi", "DLPackExchangeAPI"): (
        "version=header.version previous=header.prev_api allocate=managed_tensor_allocator "
        "managed_from_object=managed_tensor_from_py_object_no_sync "
        "managed_to_object=managed_tensor_to_py_object_no_sync "
        "tensor_from_object=dltensor_from_py_object_no_sync current_work_stream"
    ),
}
FUNCTIONS = {
    ("ManagedTensor", "DLManagedTensorVersioned"): ["deleter"],
    ("ExchangeApi", "DLPackExchangeAPI"): [
        field
        for field in STRUCTS["ExchangeApi", "DLPackExchangeAPI"].split()
        if not field.startswith(("version", "previous"))
    ],
}
CONSTANTS = {
    "kMajorVersion": "DLPACK_MAJOR_VERSION",
    "kCpu": "kDLCPU",
    "kCuda": "kDLCUDA",
    "kInt": "kDLInt",
    "kUInt": "kDLUInt",
    "kFloat": "kDLFloat",
    "kBfloat": "kDLBfloat",
    "kComplex": "kDLComplex",
    "kBool": "kDLBool",
}
PRELUDE = """
#include <ATen/dlpack.h>
#include <array>
#include <cstddef>
#include "host/dlpack.h"
namespace ours = fused_adamw::dlpack;

// Sizes of a function's result and arguments.
template <class Result, class... Arguments>
constexpr std::array<std::size_t, 1 + sizeof...(Arguments)> sizes(Result (*)(Arguments...)) {
  return {sizeof(Result), sizeof(Arguments)...};
}
template <class Ours, class Theirs>
constexpr bool same_call(Ours ours_function, Theirs theirs_function) {
  constexpr std::size_t kOurs = std::tuple_size<decltype(sizes(ours_function))>::value;
  if (kOurs != std::tuple_size<decltype(sizes(theirs_function))>::value) return false;
  for (std::size_t i = 0; i < kOurs; ++i) {
    if (sizes(ours_function)[i] != sizes(theirs_function)[i]) return false;
  }
  return true;
}
"""


def checks() -> Iterator[str]:
    for (our_struct, their_struct), fields in STRUCTS.items():
        ours, theirs = f"ours::{our_struct}", their_struct
        yield f"sizeof({ours}) == sizeof({theirs})"
        yield f"alignof({ours}) == alignof({theirs})"
        for field in fields.split():
            our_field, _, their_field = field.partition("=")
            their_field = their_field or our_field
            yield f"offsetof({ours}, {our_field}) == offsetof({theirs}, {their_field})"
            yield f"sizeof({ours}::{our_field}) == sizeof((({theirs}*)nullptr)->{their_field})"
    for (our_struct, their_struct), functions in FUNCTIONS.items():
        for function in functions:
            our_field, _, their_field = function.partition("=")
            our_type = f"decltype(ours::{our_struct}::{our_field})"
            their_type = f"decltype({their_struct}::{their_field or our_field})"
            yield f"same_call({our_type}(nullptr), {their_type}(nullptr))"
    for our_constant, their_constant in CONSTANTS.items():
        yield f"int(ours::{our_constant}) == int({their_constant})"


def compile_checks(compiler: str, folder: Path, conditions: list[str]) -> str:
    """What the compiler says; nothing, if every condition holds."""
    asserts = "".join(f'static_assert({c}, "{c}");\n' for c in conditions)
    source = folder / "layout.cpp"
    source.write_text(PRELUDE + asserts)
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), CSRC)]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", *includes]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def compiler() -> str:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no C++ compiler was found")
    return path


def test_layout(compiler: str, tmp_path: Path) -> None:
    errors = compile_checks(compiler, tmp_path, list(checks()))
    assert not errors, errors


@pytest.mark.parametrize(
    "condition",
    [
        "offsetof(ours::Tensor, shape) == offsetof(DLTensor, strides)",
        "sizeof(ours::Device) == sizeof(DLTensor)",
        "same_call(decltype(ours::ExchangeApi::managed_from_object)(nullptr), "
        "decltype(DLPackExchangeAPI::current_work_stream)(nullptr))",
        "int(ours::kFloat) == int(kDLBfloat)",
    ],
)
def test_layout_check_can_fail(condition: str, compiler: str, tmp_path: Path) -> None:
    assert condition in compile_checks(compiler, tmp_path, [condition])


# --- Versions ------------------------------------------------------------------------------------


class ExchangeApi(ctypes.Structure):
    """The head of DLPack's table, and room for its functions, which are all null."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    )


NAME = b"dlpack_exchange_api"
TABLES: list[ExchangeApi] = []  # capsules do not keep them alive


def capsule_of(table: ExchangeApi, name: bytes = NAME) -> Any:
    TABLES.append(table)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(table), name, None)


def torchs_table() -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype = ctypes.c_void_p
    get.argtypes = (ctypes.py_object, ctypes.c_char_p)
    address: int = get(torch.Tensor.__dlpack_c_exchange_api__, NAME)
    return address


@pytest.fixture
def _torchs_table_afterwards() -> Iterator[None]:
    yield
    _C.use_exchange_api(torch.Tensor.__dlpack_c_exchange_api__)


def a_step_works() -> bool:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    FusedAdamW([param]).step()
    return bool((param < 1).all())


@pytest.mark.usefixtures("_torchs_table_afterwards")
@pytest.mark.parametrize("major", [0, 2, 99])
def test_unknown_major_version_is_refused(major: int) -> None:
    with pytest.raises(RuntimeError, match=r"torch offers no DLPack .* version 1"):
        _C.use_exchange_api(capsule_of(ExchangeApi(major, 0)))
    assert a_step_works()  # by the table in use before


@pytest.mark.usefixtures("_torchs_table_afterwards")
def test_table_without_functions_is_refused() -> None:
    with pytest.raises(RuntimeError, match="torch offers no DLPack"):
        _C.use_exchange_api(capsule_of(ExchangeApi(1, 0)))
    assert a_step_works()


@pytest.mark.usefixtures("_torchs_table_afterwards")
def test_older_table_is_found_behind_a_newer_one() -> None:
    newer = ExchangeApi(2, 0, torchs_table())
    TABLES.append(newer)
    newest = ExchangeApi(3, 0, ctypes.addressof(newer))
    _C.use_exchange_api(capsule_of(newest))
    assert a_step_works()


@pytest.mark.usefixtures("_torchs_table_afterwards")
def test_capsule_of_another_name_is_refused() -> None:
    name = b"dltensor"
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.use_exchange_api(capsule_of(ExchangeApi(1, 0), name))
    assert a_step_works()
