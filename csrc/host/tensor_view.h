// Reads torch tensors through DLPack's C exchange table, and names what it finds for messages.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "host/dlpack.h"
#include "storage/format.h"

namespace fused_adamw::dlpack {

inline bool operator==(Device x, Device y) { return x.type == y.type && x.index == y.index; }
inline bool operator==(DataType x, DataType y) {
  return x.code == y.code && x.bits == y.bits && x.lanes == y.lanes;
}

}  // namespace fused_adamw::dlpack

namespace fused_adamw::host {

// Takes `torch.Tensor.__dlpack_c_exchange_api__`; to be called once, before any tensor is read.
void use_exchange_api(const pybind11::capsule& capsule);

// A borrowed view of a tensor; false, with Python's exception set, if it has no memory to view.
bool view(PyObject* object, dlpack::Tensor& out);
// A reference of our own to the tensor, to be ended by its deleter.
dlpack::ManagedTensor* managed(PyObject* object);
// The stream on which torch currently works on a device; null on a CPU.
void* current_stream(dlpack::Device device);

inline void* address(const dlpack::Tensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}
std::int64_t count_elements(int ndim, const std::int64_t* shape);
// Whether the elements fill one block of memory without gaps or overlap, in whatever order.
bool is_dense(int ndim, const std::int64_t* shape, const std::int64_t* strides);
bool is_contiguous(const dlpack::Tensor& tensor);
// False if the dtype is none that a rule can work on.
bool to_dtype(dlpack::DataType dtype, Dtype& out);

inline bool is_float(dlpack::DataType dtype, int bits) {
  return dtype.code == dlpack::kFloat && dtype.bits == bits && dtype.lanes == 1;
}
// What lies beside a parameter, by name; and of which dtype it is.
Beside beside_of(const std::string& name);
const char* beside_dtype_name(Beside beside);
bool is_beside(Beside beside, dlpack::DataType dtype);

std::string dtype_name(PyObject* tensor);
std::string device_name(dlpack::Device device);
std::string shape_name(int ndim, const std::int64_t* shape);
std::string format_name(const Format& format);
std::string supported_formats();
// "a Tensor of dtype float32 and layout torch.sparse_coo on cpu", for what cannot be viewed.
std::string describe(PyObject* object);

}  // namespace fused_adamw::host
