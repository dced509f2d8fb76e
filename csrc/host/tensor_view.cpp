#include "host/tensor_view.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace fused_adamw::host {

namespace py = pybind11;

namespace {
const dlpack::ExchangeApi* exchange_api = nullptr;
}  // namespace

void use_exchange_api(const py::capsule& capsule) {
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr || api->tensor_from_object == nullptr) {
    throw std::runtime_error("this torch offers no DLPack C exchange table of major version 1");
  }
  exchange_api = api;
}

std::string dtype_name(PyObject* tensor) {
  const std::string name = py::str(py::handle(tensor).attr("dtype"));
  return name.substr(name.find('.') + 1);
}

bool to_dtype(dlpack::DataType dtype, Dtype& out) {
  if (dtype.lanes != 1) return false;
  if (dtype.code == dlpack::kFloat && dtype.bits == 32) return out = Dtype::kFloat32, true;
  if (dtype.code == dlpack::kFloat && dtype.bits == 16) return out = Dtype::kFloat16, true;
  if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return out = Dtype::kBfloat16, true;
  return false;
}

std::string device_name(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return "cpu";
  const std::string index = std::to_string(device.index);
  return device.type == dlpack::kCuda
             ? "cuda:" + index
             : "DLPack device " + std::to_string(device.type) + ":" + index;
}

std::string shape_name(int ndim, const std::int64_t* shape) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) {
    text += std::to_string(shape[i]) + (i + 1 < ndim || ndim == 1 ? "," : "");
    if (i + 1 < ndim) text += " ";
  }
  return text + ")";
}

std::int64_t count_elements(int ndim, const std::int64_t* shape) {
  return std::accumulate(shape, shape + ndim, std::int64_t{1}, std::multiplies<>());
}

bool is_dense(int ndim, const std::int64_t* shape, const std::int64_t* strides) {
  if (count_elements(ndim, shape) == 0) return true;
  std::vector<int> order(static_cast<std::size_t>(ndim));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int x, int y) { return strides[x] < strides[y]; });
  std::int64_t expected = 1;
  for (const int dim : order) {
    if (shape[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= shape[dim];
  }
  return true;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  if (count_elements(tensor.ndim, tensor.shape) == 0) return true;
  std::int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

bool view(PyObject* object, dlpack::Tensor& out) {
  if (exchange_api->tensor_from_object(object, &out) != 0) return false;
  if (out.data != nullptr || count_elements(out.ndim, out.shape) == 0) return true;
  PyErr_SetString(PyExc_RuntimeError, "the tensor has no memory");  // a FakeTensor
  return false;
}

std::string describe(PyObject* object) {
  const py::handle handle(object);
  const std::string type = "a " + std::string(Py_TYPE(object)->tp_name);
  if (!py::hasattr(handle, "layout")) return type;
  return type + " of dtype " + dtype_name(object) + " and layout " +
         std::string(py::str(handle.attr("layout"))) + " on " +
         std::string(py::str(handle.attr("device")));
}

Beside beside_of(const std::string& name) {
  for (std::size_t i = 0; i < std::size(kBesideNames); ++i) {
    if (name == kBesideNames[i]) return static_cast<Beside>(i);
  }
  throw py::value_error("beside: found '" + name + "'");
}

const char* beside_dtype_name(Beside beside) {
  constexpr const char* kNames[] = {"", "float32", "int16", "int8", "bfloat16"};
  return kNames[static_cast<int>(beside)];
}

bool is_beside(Beside beside, dlpack::DataType dtype) {
  constexpr dlpack::DataType kDtypes[] = {{},
                                          {dlpack::kFloat, 32, 1},
                                          {dlpack::kInt, 16, 1},
                                          {dlpack::kInt, 8, 1},
                                          {dlpack::kBfloat, 16, 1}};
  return dtype == kDtypes[static_cast<int>(beside)];
}

std::string format_name(const Format& format) {
  const auto name = [](Dtype dtype) { return std::string(kDtypeNames[static_cast<int>(dtype)]); };
  std::string text = name(format.param) + "/" + name(format.grad) + "/" + name(format.state);
  if (format.beside != Beside::kNothing) {
    text += std::string(" with ") + kBesideNames[static_cast<int>(format.beside)];
  }
  return format.stochastic ? text + " rounded stochastically" : text;
}

std::string supported_formats() {
  std::string text;
  for (const Format& format : kFormats) {
    if (!text.empty()) text += ", ";
    text += format_name(format);
  }
  return text;
}

dlpack::ManagedTensor* managed(PyObject* object) {
  dlpack::ManagedTensor* tensor = nullptr;
  if (exchange_api->managed_from_object(object, &tensor) != 0) throw py::error_already_set();
  return tensor;
}

void* current_stream(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return nullptr;
  void* stream = nullptr;
  if (exchange_api->current_work_stream(device.type, device.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

}  // namespace fused_adamw::host
