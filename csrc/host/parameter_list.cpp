#include "host/parameter_list.h"

#include <structmember.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>

#include "core/float_environment.h"
#include "core/square_sum.h"

// [note: host time] A step over a thousand tensors spends its host time here, so the loop in
// gather() uses the plain C API. A gradient costs one attribute read and one exchange-table call. A
// parameter costs one call, since `param.data = ...` is common: its memory is compared with what
// was registered. A state costs a look at reference counts: where nobody but the optimizer and this
// list has the tensor or a dict that it is in, nobody can reach it to give it other memory, and
// otherwise it is compared too. (A view of a state reaches its storage, which no count tells: the
// documentation forbids to move it so.) matches() sees objects replaced behind the optimizer's
// back.
//
// [note: holding] torch keeps a tensor's Python object alive from C++ only while C++ has a
// reference of its own, and pays some 40 ns to hand that over whenever a call takes the first such
// reference and drops it again. Holding a reference to every parameter makes a read three
// times as fast. Python's cycle collector cannot see through a reference held in C++, so a tensor
// that is part of a cycle (by a hook, say) would never be freed: all are let go of when a full
// collection starts, and the next gather() takes them again.
//
// [note: shards] Of a DTensor the local tensor is stepped, and those of its gradient and its
// states, without a call into its Python: two slots are read of a gradient. Its specification
// (mesh, placements) must be the parameter's; one that was found to be is remembered by its object,
// which gradients share from step to step (FSDP2) or have anew, for which Python is asked.

namespace fused_adamw::host {
namespace {

constexpr std::size_t kPrefetch = 4;  // parameters ahead

// Python's list items, borrowed.
PyObject* item(const py::list& list, std::size_t i) {
  return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
}

// How the gradient of a parameter is read: by torch's own descriptor where the type has no other,
// which spares the search for it, and as an attribute otherwise.
GradientReader gradient_reader(PyObject* param) {
  const auto found = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(param)), "grad"));
  if (!found) return PyErr_Clear(), GradientReader{};  // no tensor: refused when it is viewed
  if (Py_TYPE(found.ptr()) != &PyGetSetDescr_Type) return {};
  const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  return {definition->get, definition->closure};
}

// Where objects of a type have what one of its __slots__ names; -1 if it has no such slot.
Py_ssize_t slot_offset(PyTypeObject* type, const char* name) {
  const auto found = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name));
  if (!found) return PyErr_Clear(), -1;
  if (Py_TYPE(found.ptr()) != &PyMemberDescr_Type) return -1;
  return reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member->offset;
}

PyObject* read(const GradientReader& reader, PyObject* param) {
  static PyObject* const kGradName = PyUnicode_InternFromString("grad");
  return reader.get ? reader.get(param, reader.closure) : PyObject_GetAttr(param, kGradName);
}

}  // namespace

ParameterList::ParameterList(Registration registration) : registration_(std::move(registration)) {
  entries_.resize(registration_.params.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) specs_.append(py::none());
  for (std::size_t i = 0; i < entries_.size(); ++i) register_entry(i);
  check_overlaps();
}

ParameterList::~ParameterList() { let_go(); }

void ParameterList::hold() {
  for (const Entry& entry : entries_) {
    if (!entry.active) continue;
    PyObject* tensor = entry.sharded ? local(entry.param) : entry.param;
    if (tensor == nullptr) throw py::error_already_set();
    held_.push_back(managed(tensor));
  }
}

// A slot of a DTensor, borrowed; null where there is none.
PyObject* ParameterList::read_slot(PyObject* tensor, Py_ssize_t Slots::* slot) {
  if (Py_TYPE(tensor) != slots_.type) {
    PyTypeObject* type = Py_TYPE(tensor);
    slots_ = {type, slot_offset(type, "_local_tensor"), slot_offset(type, "_spec")};
  }
  const Py_ssize_t offset = slots_.*slot;
  if (offset < 0) return nullptr;
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset);
}

// The local tensor of a DTensor, borrowed; null, with Python's exception set, where it is none.
PyObject* ParameterList::local(PyObject* tensor) {
  PyObject* found = read_slot(tensor, &Slots::local);
  if (found == nullptr) {
    PyErr_SetString(PyExc_TypeError, "it is no DTensor");
    return nullptr;
  }
  // Another type may be one that a collective is still writing.
  if (reinterpret_cast<PyObject*>(Py_TYPE(found)) != registration_.tensor_type.ptr()) {
    temporaries_.append(registration_.to_local(py::handle(tensor)));
    found = item(temporaries_, temporaries_.size() - 1);
  }
  return found;
}

bool ParameterList::view_local(PyObject* tensor, bool sharded, dlpack::Tensor& out) {
  if (sharded) tensor = local(tensor);
  return tensor != nullptr && view(tensor, out);
}

// The local tensor of a gradient that lies as its parameter does, borrowed.
PyObject* ParameterList::local_gradient(Entry& entry, PyObject* grad) {
  PyObject* spec = read_slot(grad, &Slots::spec);
  if (spec == nullptr || spec != entry.spec) {
    const py::object differ = registration_.mismatch(py::handle(entry.param), py::handle(grad));
    if (!differ.is_none()) fail(PyExc_ValueError, entry, py::str(differ));
    entry.spec = spec;
    specs_[static_cast<std::size_t>(&entry - entries_.data())] = py::handle(spec);
  }
  PyObject* found = local(grad);
  if (found == nullptr) throw py::error_already_set();
  return found;
}

void ParameterList::let_go() {
  for (dlpack::ManagedTensor* tensor : held_) {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
  held_.clear();
}

void ParameterList::register_entry(std::size_t i) {
  Entry& entry = entries_[i];
  entry = {};
  entry.label = item(registration_.labels, i);
  entry.group = registration_.groups[i].cast<int>();
  entry.active = registration_.active[i].cast<bool>();

  PyObject* param = item(registration_.params, i);
  entry.param = param;
  entry.sharded = registration_.sharded[i].cast<bool>();
  std::tie(entry.extent.offset, entry.extent.run, entry.extent.stride) =
      registration_.extents[i].cast<std::tuple<std::int64_t, std::int64_t, std::int64_t>>();
  entry.norm_class = registration_.classes[i].cast<int>();
  classes_ = std::max(classes_, entry.norm_class + 1);
  if (!entry.active) {
    entry.gradient = gradient_reader(param);
    return;
  }
  dlpack::Tensor tensor;
  if (!view_local(param, entry.sharded, tensor)) refuse(PyExc_RuntimeError, entry, "is ", param);
  if (!to_dtype(tensor.dtype, entry.dtype)) {
    fail(PyExc_TypeError, entry,
         "has dtype " + dtype_name(param) + "; accepted: float32, bfloat16, float16");
  }
  entry.ndim = tensor.ndim;
  entry.dims = dims_.size();
  dims_.insert(dims_.end(), tensor.shape, tensor.shape + tensor.ndim);
  dims_.insert(dims_.end(), tensor.strides, tensor.strides + tensor.ndim);
  entry.numel = count_elements(tensor.ndim, tensor.shape);
  entry.device = tensor.device;
  entry.gradient = gradient_reader(param);
  entry.data = address(tensor);
  if (!is_dense(tensor.ndim, tensor.shape, tensor.strides)) {
    fail(PyExc_ValueError, entry,
         "has strides " + shape_name(tensor.ndim, tensor.strides) + " for shape " +
             shape_of(entry) +
             "; accepted: dense memory without gaps or overlap, in any order of dimensions");
  }
  const py::object state = registration_.states[i];
  entry.has_state = !state.is_none();
  if (entry.has_state) register_state(entry, i, state);
}

void ParameterList::register_state(Entry& entry, std::size_t i, py::dict state) {
  const py::tuple names = registration_.names[i];
  const py::tuple scales = registration_.scales[i];
  const bool is_coded = !scales.empty();
  entry.states_by_name = state.ptr();
  dlpack::Tensor tensor;
  const auto read = [&](const std::string& name, bool sharded) {
    PyObject* value = PyDict_GetItemString(state.ptr(), name.c_str());
    if (value == nullptr) fail(PyExc_ValueError, entry, "has no '" + name + "' in its state");
    if (!view_local(value, sharded, tensor))
      refuse(PyExc_TypeError, entry, "has a state '" + name + "' that is ", value);
    return value;
  };

  const auto read_here = [&](const std::string& name) {
    PyObject* value = read(name, entry.sharded);
    if (!(tensor.device == entry.device)) {
      fail(PyExc_RuntimeError, entry,
           "is on " + device_name(entry.device) + ", its state '" + name + "' on " +
               device_name(tensor.device));
    }
    return value;
  };
  // An array of the parameter's shape, brought to its strides. `accepts` takes its dtype.
  const auto read_array = [&](const py::str& key, const std::string& accepted, auto&& accepts) {
    const std::string name = key;
    PyObject* value = read_here(name);
    if (!same_shape(entry, tensor)) {
      fail(PyExc_ValueError, entry,
           "has shape " + shape_of(entry) + ", its state '" + name + "' " +
               shape_name(tensor.ndim, tensor.shape));
    }
    if (!accepts(tensor.dtype)) {
      fail(PyExc_TypeError, entry,
           "has a state '" + name + "' of dtype " + dtype_name(value) + "; accepted: " + accepted);
    }
    if (!same_strides(entry, tensor)) {
      if (is_coded) {
        fail(PyExc_ValueError, entry,
             "has strides " + shape_name(entry.ndim, dims_.data() + entry.dims + entry.ndim) +
                 ", its codes '" + name + "' " + shape_name(tensor.ndim, tensor.strides) +
                 "; accepted: the same, since blocks of codes lie in the order of memory");
      }
      state[key] = registration_.restride(py::handle(value), py::handle(entry.param));
      value = read(name, entry.sharded);
    }
    keep(value);
    return StateMemory<void>{value, address(tensor)};
  };

  entry.states = static_cast<int>(names.size());
  entry.state_dtype = is_coded ? Dtype::kCode8 : entry.dtype;
  entry.fresh = registration_.fresh[i].cast<bool>();
  entry.stochastic = registration_.stochastic[i].cast<bool>();
  entry.key = registration_.keys[i].cast<std::uint64_t>();
  for (int k = 0; k < entry.states; ++k) {
    const py::str key = names[static_cast<std::size_t>(k)];
    if (is_coded) {
      entry.state[k] = read_array(key, "int8 or uint8", [&](dlpack::DataType dtype) {
        entry.is_signed[k] = dtype.code == dlpack::kInt;
        return dtype.bits == 8 && (dtype.code == dlpack::kInt || dtype.code == dlpack::kUInt);
      });
      const std::string name = py::str(scales[static_cast<std::size_t>(k)]);
      PyObject* value = read_here(name);
      const std::int64_t blocks = (entry.numel + kCodeBlock - 1) / kCodeBlock;
      // In the shape of a DTensor: [note: sharded codes] in fused_adamw/precision.py.
      if (!is_float(tensor.dtype, 32) || !(entry.sharded || tensor.ndim == 1) ||
          count_elements(tensor.ndim, tensor.shape) != blocks || !is_contiguous(tensor)) {
        fail(PyExc_ValueError, entry,
             "has a state '" + name + "' of dtype " + dtype_name(value) + " and shape " +
                 shape_name(tensor.ndim, tensor.shape) +
                 "; accepted: float32, contiguous, shape (" + std::to_string(blocks) +
                 ",), one for each block of codes");
      }
      keep(value);
      entry.scale[k] = {value, static_cast<float*>(address(tensor))};
    } else {
      const char* accepted = "float32, bfloat16 or float16, the same for every state";
      entry.state[k] = read_array(key, accepted, [&](dlpack::DataType found) {
        Dtype dtype;
        if (!to_dtype(found, dtype)) return false;
        if (k == 0) entry.state_dtype = dtype;
        return dtype == entry.state_dtype;
      });
    }
  }

  const py::object beside = registration_.besides[i];
  if (!beside.is_none()) {
    const auto [kind, key] = beside.cast<std::pair<std::string, py::str>>();
    entry.beside_kind = beside_of(kind);
    entry.beside = read_array(key, beside_dtype_name(entry.beside_kind),
                              [&](dlpack::DataType x) { return is_beside(entry.beside_kind, x); });
  }

  // Where there are no states their dtype is that of a format with such a parameter.
  if (entry.states == 0 && entry.beside_kind == Beside::kMaster) entry.state_dtype = kF32;
  if (entry.states == 0 && entry.beside_kind == Beside::kRemainder8) entry.state_dtype = kC8;

  const py::object average = registration_.averages[i];
  if (!average.is_none()) {
    const StateMemory<void> ema =
        read_array(average, "float32", [](dlpack::DataType dtype) { return is_float(dtype, 32); });
    entry.ema = {ema.object, static_cast<float*>(ema.memory)};
    entry.unaveraged = registration_.unaveraged[i].cast<bool>();
  }

  const auto read_scalar = [&](const std::string& name, int bits) {
    PyObject* value = read(name, false);
    const bool at_home = registration_.on_device ? tensor.device == entry.device
                                                 : tensor.device.type == dlpack::kCpu;
    if (!at_home || count_elements(tensor.ndim, tensor.shape) != 1 ||
        !is_float(tensor.dtype, bits)) {
      fail(PyExc_TypeError, entry,
           "has a state '" + name + "' of dtype " + dtype_name(value) + " and shape " +
               shape_name(tensor.ndim, tensor.shape) + " on " + device_name(tensor.device) +
               "; accepted: one float" + std::to_string(bits) + " on " +
               (registration_.on_device ? device_name(entry.device) : "the CPU"));
    }
    keep(value);
    return value;
  };
  const auto check_scalar = [&](const std::string& name, const auto* memory) {
    if (registration_.on_device) return;  // the host would wait for it
    const double found = *memory;
    if (found >= 0.0 && std::isfinite(found)) return;
    fail(PyExc_ValueError, entry,
         "has a state '" + name + "' of " + std::to_string(found) + "; accepted: a number >= 0");
  };
  if (registration_.counts[i].cast<bool>()) {
    PyObject* value = read_scalar("step", 32);
    entry.step = {value, static_cast<float*>(address(tensor))};
    check_scalar("step", entry.step.memory);
  }
  const py::object scalar = registration_.scalars[i];
  if (!scalar.is_none()) {
    const std::string name = py::str(scalar);
    PyObject* value = read_scalar(name, 64);
    entry.scalar = {value, static_cast<double*>(address(tensor))};
    check_scalar(name, entry.scalar.memory);
  }
}

void ParameterList::keep(PyObject* state) { kept_.append(py::handle(state)); }

// Until Python 3.13 a dict carries a version that changes with every modification of any dict;
// later the values of each state are compared one by one.
template <class Visit>
bool ParameterList::walk(const py::list& param_lists, const py::dict& states, Visit&& visit) {
  const auto visit_object = [&](PyObject* object) {
    return visit(reinterpret_cast<std::uintptr_t>(object));
  };
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_lists.ptr()); ++g) {
    PyObject* params = PyList_GET_ITEM(param_lists.ptr(), g);
    if (!PyList_Check(params) || !visit_object(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      if (!visit_object(PyList_GET_ITEM(params, i))) return false;
    }
  }
  Py_ssize_t outer = 0;
  PyObject *param, *state;
  while (PyDict_Next(states.ptr(), &outer, &param, &state)) {
    if (!visit_object(param) || !visit_object(state)) return false;
    if (!PyDict_Check(state)) continue;
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    if (!visit(reinterpret_cast<PyDictObject*>(state)->ma_version_tag)) return false;
#pragma GCC diagnostic pop
#else
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(state, &inner, &name, &value)) {
      if (!visit_object(value)) return false;
    }
#endif
  }
  return true;
}

void ParameterList::remember(const py::list& param_lists, const py::dict& states) {
  snapshot_.clear();
  walk(param_lists, states, [&](std::uintptr_t found) {
    snapshot_.push_back(found);
    return true;
  });
}

bool ParameterList::matches(const py::list& param_lists, const py::dict& states) const {
  auto expected = snapshot_.begin();
  const bool same = walk(param_lists, states, [&](std::uintptr_t found) {
    return expected != snapshot_.end() && *expected++ == found;
  });
  return same && expected == snapshot_.end();
}

bool ParameterList::gather(const std::vector<const Hyperparameters*>& groups,
                           const std::optional<py::list>& grads, bool is_state_held,
                           const StepOptions& options) {
  if (held_.empty()) hold();
  release();
  options_ = options;
  updated_.clear();
  routes_.clear();
  chunks_ = 0;
  sharded_gradients_ = 0;
  groups_ = static_cast<int>(groups.size());
  chunk_runs_.clear();
  for (const auto& bucket : buckets_) {
    bucket->tensors.clear();
    bucket->coefficients.clear();
    bucket->numel = 0;
    bucket->zero_grads = options.zero_grads;
    bucket->observed = nullptr;
    bucket->device_rows = nullptr;
    bucket->skip = nullptr;
  }

  const Route* route = nullptr;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (i + kPrefetch < entries_.size()) prefetch(entries_[i + kPrefetch]);
    const auto grad = grads ? py::reinterpret_borrow<py::object>(item(*grads, i))
                            : py::reinterpret_steal<py::object>(read(entry.gradient, entry.param));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    if (!entry.active || !unchanged(entry)) return false;
    // torch's own attribute holds the gradient; any other may hand out a tensor of the moment.
    if (!grads && !entry.gradient.get) temporaries_.append(grad);
    PyObject* own_grad = entry.sharded ? local_gradient(entry, grad.ptr()) : grad.ptr();
    if (entry.sharded) sharded_gradients_ = sharded_gradients_ * 0x100000001b3u + i + 1;

    Dtype grad_dtype;
    void* grad_memory = read_gradient(entry, own_grad, grad_dtype);
    if (!entry.has_state || !states_unchanged(entry, is_state_held)) return false;
    if (grad_memory != entry.checked_grad || grad_dtype != entry.checked_grad_dtype) {
      check_gradient_memory(entry, grad_memory, grad_dtype);
      entry.checked_grad = grad_memory;
      entry.checked_grad_dtype = grad_dtype;
    }

    const Position at = position(entry);
    // Neighbours nearly always go the same way.
    if (route == nullptr || !route->fits(entry, grad_dtype, at)) {
      const Hyperparameters& group = *groups.at(static_cast<std::size_t>(entry.group));
      if (entry.states != group.states) return false;
      if (entry.state_dtype == kC8) {
        check_codes(entry, functor_info(group.functor).kinds);
      }
      route = &route_of(entry, group, grad_dtype, at);
    }
    TensorEntry& tensor = route->bucket->tensors.emplace_back();
    tensor.slot[kParam] = entry.data;
    tensor.slot[kGrad] = grad_memory;
    for (int k = 0; k < entry.states; ++k) {
      tensor.slot[kFirstState + k] = entry.state[k].memory;
    }
    tensor.ema = entry.ema.memory;
    tensor.beside = entry.beside.memory;
    for (int k = 0; k < kMaxStates; ++k) tensor.scale[k] = entry.scale[k].memory;
    tensor.key = entry.key;
    tensor.extent = entry.extent;
    tensor.numel = entry.numel;
    tensor.row = registration_.on_device ? static_cast<std::int32_t>(i) : route->row;
    tensor.chunk = chunks_;
    tensor.group = entry.group;
    tensor.step = at.t;
    tensor.scalar = at.scalar;
    route->bucket->numel += entry.numel;
    updated_.emplace_back(i, route);
    count_chunks(entry);
    if (options.zero_grads) zeroed_.append(py::handle(own_grad));
  }
  if (classes_ > 1) order_chunks();
  if (options.zero_grads) check_gradients_disjoint();
  return true;
}

void ParameterList::check_codes(const Entry& entry, const std::vector<StateKind>& kinds) const {
  for (int k = 0; k < entry.states; ++k) {
    const StateKind kind = kinds[static_cast<std::size_t>(k)];
    if (entry.is_signed[k] == (kind == StateKind::kSigned)) continue;
    fail(PyExc_TypeError, entry,
         std::string("has codes of dtype ") + (entry.is_signed[k] ? "int8" : "uint8") +
             " for a state that is a " + kStateKindNames[static_cast<int>(kind)] +
             "; accepted: " + (entry.is_signed[k] ? "uint8" : "int8"));
  }
}

void ParameterList::count_chunks(const Entry& entry) {
  const std::int64_t count = chunks_of(entry.numel);
  const std::int64_t row = entry.norm_class * groups_ + entry.group;
  if (chunk_runs_.empty() || chunk_runs_.back().row != row) {
    chunk_runs_.push_back({row, chunks_, 0});
  }
  chunk_runs_.back().count += count;
  chunks_ += count;
}

// Numbers the chunks anew, row after row.
void ParameterList::order_chunks() {
  std::vector<std::int64_t> shift;  // of each run
  std::vector<std::size_t> order(chunk_runs_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t x, std::size_t y) {
    return chunk_runs_[x].row < chunk_runs_[y].row;
  });
  shift.resize(order.size());
  std::int64_t begin = 0;
  std::vector<ChunkRun> ordered;
  for (const std::size_t i : order) {
    const ChunkRun& run = chunk_runs_[i];
    shift[i] = begin - run.begin;
    ordered.push_back({run.row, begin, run.count});
    begin += run.count;
  }
  std::map<const Bucket*, std::size_t> next;
  std::size_t run = 0;
  std::int64_t counted = 0;  // of the run
  for (const auto& [i, route] : updated_) {
    const std::int64_t count = chunks_of(entries_[i].numel);
    const std::int64_t row = entries_[i].norm_class * groups_ + entries_[i].group;
    while (chunk_runs_[run].row != row || counted + count > chunk_runs_[run].count) {
      ++run;
      counted = 0;
    }
    route->bucket->tensors[next[route->bucket]++].chunk += shift[run];
    counted += count;
  }
  chunk_runs_ = std::move(ordered);
}

// A NaN is made the usual one: another's payload could round to a number, see [note: pairs].
void ParameterList::set_grad_factor(float factor) {
  if (std::isnan(factor)) factor = std::numeric_limits<float>::quiet_NaN();
  for (const auto& bucket : buckets_) {
    for (int row = 0; row < bucket->rows(); ++row) bucket->pass(row).grad_factor = factor;
  }
}

void ParameterList::set_observed(double* observed) {
  for (const auto& bucket : buckets_) bucket->observed = observed;
}

void ParameterList::set_device(const float* rows, const std::int32_t* skip) {
  for (const auto& bucket : buckets_) {
    bucket->device_rows = rows;
    bucket->skip = skip;
  }
}

std::vector<std::array<std::int64_t, 5>> ParameterList::device_records(
    const std::vector<std::int64_t>& steps, const std::vector<std::int64_t>& averaged) const {
  std::vector<std::array<std::int64_t, 5>> records;
  const auto word = [](const void* memory) { return reinterpret_cast<std::intptr_t>(memory); };
  for (const auto& [i, route] : updated_) {
    const Entry& entry = entries_[i];
    records.push_back({entry.step.memory ? word(entry.step.memory) : steps.at(i),
                       word(entry.scalar.memory), entry.ema.object ? averaged.at(i) : 0,
                       entry.group, static_cast<std::int64_t>(i)});
  }
  return records;
}

void ParameterList::release() {
  for (py::list* list : {&temporaries_, &zeroed_, &restrided_}) {
    if (!list->empty()) *list = py::list();
  }
}

// Where no steps are counted a rule only asks whether this is the first.
Position ParameterList::position(const Entry& entry) const {
  if (registration_.on_device) return {1, 0.0};  // what only the device knows
  const double scalar = entry.scalar.memory ? *entry.scalar.memory : 0.0;
  if (!entry.step.memory) return {entry.fresh ? 1 : 2, scalar};
  const float steps = *entry.step.memory;
  if (!(steps >= 0.0f && steps < 0x1p53f)) {
    fail(PyExc_ValueError, entry,
         "has a state 'step' of " + std::to_string(steps) + "; accepted: a finite number >= 0");
  }
  return {static_cast<std::int64_t>(steps) + 1, scalar};
}

// What an entry points to lies in allocations of their own, for which the loop would wait.
void ParameterList::prefetch(const Entry& entry) {
  __builtin_prefetch(entry.step.memory);
  __builtin_prefetch(entry.step.object);
  __builtin_prefetch(entry.states_by_name);
  for (int k = 0; k < entry.states; ++k) __builtin_prefetch(entry.state[k].object);
}

bool ParameterList::Route::fits(const Entry& entry, Dtype grad_dtype,
                                const Position& position) const {
  return position == at && entry.group == group && entry.unaveraged == unaveraged &&
         grad_dtype == bucket->format.grad && entry.dtype == bucket->format.param &&
         entry.state_dtype == bucket->format.state && entry.beside_kind == bucket->format.beside &&
         entry.stochastic == bucket->format.stochastic &&
         entry.device.type == bucket->device_type && entry.device.index == bucket->device_index;
}

// Param groups often have the same values, and a launch takes but so many rows: the last row gives
// way to an equal one among the few before it.
std::int32_t ParameterList::share_last_row(Bucket& bucket) {
  constexpr std::int32_t kFew = 8;
  const std::int32_t last = bucket.rows() - 1;
  const auto length = static_cast<std::size_t>(bucket.coefficients_per_row);
  const float* row = bucket.coefficients.data() + static_cast<std::size_t>(last) * length;
  for (std::int32_t other = last - 1; other >= 0 && other >= last - kFew; --other) {
    const float* former = bucket.coefficients.data() + static_cast<std::size_t>(other) * length;
    if (std::memcmp(former, row, length * sizeof(float)) != 0) continue;
    bucket.coefficients.resize(bucket.coefficients.size() - length);
    return other;
  }
  return last;
}

const ParameterList::Route& ParameterList::route_of(const Entry& entry,
                                                    const Hyperparameters& group, Dtype grad_dtype,
                                                    const Position& at) {
  Bucket& bucket =
      bucket_for(entry, group.functor,
                 {entry.dtype, grad_dtype, entry.state_dtype, entry.beside_kind, entry.stochastic});
  bucket.coefficients_per_row = group.coefficients + kPassCoefficients;
  const auto [found, is_new] =
      routes_.try_emplace({&bucket, entry.group, entry.unaveraged, at.t, at.scalar},
                          Route{&bucket, entry.group, entry.unaveraged, at, 0.0, bucket.rows()});
  if (is_new) {
    const std::size_t size = bucket.coefficients.size();
    bucket.coefficients.resize(size + static_cast<std::size_t>(bucket.coefficients_per_row));
    const DefaultFloatEnvironment environment;
    Position after = at;
    group.coefficients_at(after, bucket.coefficients.data() + size);
    const std::int64_t steps =
        bucket.format.draws() ? options_.steps.at(static_cast<std::size_t>(entry.group)) : 0;
    bucket.pass(found->second.row) = {1.0f, entry.unaveraged ? 1.0f : options_.ema_weight,
                                      static_cast<std::uint32_t>(steps)};
    found->second.scalar = after.scalar;
    found->second.row = share_last_row(bucket);
  }
  return found->second;
}

void* ParameterList::read_gradient(const Entry& entry, PyObject* grad, Dtype& dtype) {
  dlpack::Tensor tensor;
  if (!view(grad, tensor)) refuse(PyExc_RuntimeError, entry, "has a gradient that is ", grad);
  if (!(tensor.device == entry.device)) {
    fail(PyExc_RuntimeError, entry,
         "is on " + device_name(entry.device) + ", its gradient on " + device_name(tensor.device));
  }
  if (!same_shape(entry, tensor)) {
    fail(
        PyExc_ValueError, entry,
        "has shape " + shape_of(entry) + ", its gradient " + shape_name(tensor.ndim, tensor.shape));
  }
  if (!to_dtype(tensor.dtype, dtype)) {
    fail(PyExc_TypeError, entry,
         "has a gradient of dtype " + dtype_name(grad) + "; accepted: float32, bfloat16, float16");
  }
  if (!same_strides(entry, tensor)) {
    if (options_.zero_grads) {
      if (!is_dense(tensor.ndim, tensor.shape, tensor.strides)) {
        fail(PyExc_ValueError, entry,
             "has a gradient with strides " + shape_name(tensor.ndim, tensor.strides) +
                 " for shape " + shape_of(entry) +
                 "; accepted with zero_grads: dense memory without gaps or overlap");
      }
      check_gradient_memory(entry, address(tensor), dtype);  // the copy's is checked by the caller
      restrided_.append(py::handle(grad));
    }
    PyObject* like = entry.sharded ? local(entry.param) : entry.param;
    const py::object copy = registration_.restride(py::handle(grad), py::handle(like));
    if (!view(copy.ptr(), tensor)) throw py::error_already_set();
    temporaries_.append(copy);
  }
  return address(tensor);
}

bool ParameterList::unchanged(const Entry& entry) {
  dlpack::Tensor tensor;
  if (!view_local(entry.param, entry.sharded, tensor)) {
    PyErr_Clear();
    return false;
  }
  Dtype dtype;
  return address(tensor) == entry.data && tensor.device == entry.device &&
         to_dtype(tensor.dtype, dtype) && dtype == entry.dtype && same_shape(entry, tensor) &&
         same_strides(entry, tensor);
}

bool ParameterList::states_unchanged(const Entry& entry, bool is_held) {
  // A dict of states is referred to by the optimizer's state, the member and registration_; a
  // tensor by the dict and kept_.
  constexpr Py_ssize_t kOfDict = 3, kOfTensor = 2;
  is_held = is_held || Py_REFCNT(entry.states_by_name) > kOfDict;
  const auto same = [&](const auto& state, bool sharded) {
    if (state.object == nullptr) return true;
    if (!is_held && Py_REFCNT(state.object) <= kOfTensor) return true;
    dlpack::Tensor tensor;
    if (view_local(state.object, sharded, tensor)) return address(tensor) == state.memory;
    PyErr_Clear();
    return false;
  };
  for (int k = 0; k < entry.states; ++k) {
    if (!same(entry.state[k], entry.sharded) || !same(entry.scale[k], entry.sharded)) return false;
  }
  return same(entry.step, false) && same(entry.scalar, false) && same(entry.ema, entry.sharded) &&
         same(entry.beside, entry.sharded);
}

bool ParameterList::same_shape(const Entry& entry, const dlpack::Tensor& tensor) const {
  if (tensor.ndim != entry.ndim) return false;
  const std::int64_t* shape = dims_.data() + entry.dims;
  for (int i = 0; i < entry.ndim; ++i) {
    if (shape[i] != tensor.shape[i]) return false;
  }
  return true;
}

bool ParameterList::same_strides(const Entry& entry, const dlpack::Tensor& tensor) const {
  if (entry.numel == 0) return true;
  const std::int64_t* shape = dims_.data() + entry.dims;
  const std::int64_t* strides = shape + entry.ndim;
  for (int i = 0; i < entry.ndim; ++i) {
    if (shape[i] != 1 && strides[i] != tensor.strides[i]) return false;
  }
  return true;
}

Bucket& ParameterList::bucket_for(const Entry& entry, int functor, const Format& format) {
  const bool has_ema = entry.ema.object != nullptr;
  for (const auto& bucket : buckets_) {
    if (bucket->functor == functor && bucket->format == format && bucket->has_ema == has_ema &&
        bucket->device_type == entry.device.type && bucket->device_index == entry.device.index) {
      return *bucket;
    }
  }
  if (!is_supported(format)) {
    fail(PyExc_TypeError, entry,
         "has dtypes " + format_name(format) +
             " (parameter/gradient/states); accepted: " + supported_formats());
  }
  auto bucket = std::make_unique<Bucket>();
  bucket->functor = functor;
  bucket->format = format;
  bucket->has_ema = has_ema;
  bucket->zero_grads = options_.zero_grads;
  bucket->device_type = entry.device.type;
  bucket->device_index = entry.device.index;
  buckets_.push_back(std::move(bucket));
  return *buckets_.back();
}

std::vector<Bucket*> ParameterList::buckets() const {
  std::vector<Bucket*> found;
  for (const auto& bucket : buckets_) {
    if (bucket->tensors.empty()) continue;
    bucket->stream = current_stream({bucket->device_type, bucket->device_index});
    found.push_back(bucket.get());
  }
  return found;
}

int ParameterList::traverse(visitproc visit, void* arg) const {
  Py_VISIT(registration_.params.ptr());
  Py_VISIT(registration_.states.ptr());
  Py_VISIT(registration_.restride.ptr());
  Py_VISIT(registration_.increment_version.ptr());
  Py_VISIT(registration_.to_local.ptr());
  Py_VISIT(registration_.mismatch.ptr());
  Py_VISIT(kept_.ptr());
  Py_VISIT(specs_.ptr());
  Py_VISIT(temporaries_.ptr());
  Py_VISIT(zeroed_.ptr());
  Py_VISIT(restrided_.ptr());
  return 0;
}

void ParameterList::commit(const Bucket& bucket) {
  py::list params;
  const bool all = bucket.tensors.size() == entries_.size();
  if (all) params = registration_.params;
  for (const auto& [i, route] : updated_) {
    if (route->bucket != &bucket) continue;
    Entry& entry = entries_[i];
    if (!registration_.on_device) {
      if (entry.step.memory) *entry.step.memory += 1.0f;
      if (entry.scalar.memory) *entry.scalar.memory = route->scalar;
    }
    entry.fresh = false;
    entry.unaveraged = false;
    if (!all) params.append(py::handle(entry.param));
  }
  registration_.increment_version(params);
}

bool ParameterList::Range::before(const Range& other) const {
  return std::tie(entry->device.type, entry->device.index, begin) <
         std::tie(other.entry->device.type, other.entry->device.index, other.begin);
}

// Parameters and states: registered once, so sorted once.
void ParameterList::check_overlaps() {
  for (const Entry& entry : entries_) {
    const auto add = [&](const void* memory, std::int64_t bytes) {
      const auto* begin = static_cast<const char*>(memory);
      if (bytes) ranges_.push_back({begin, begin + bytes, &entry});
    };
    const std::int64_t numel = entry.numel;
    add(entry.data, numel * element_size(entry.dtype));
    for (int k = 0; k < entry.states; ++k) {
      add(entry.state[k].memory, numel * element_size(entry.state_dtype));
      if (entry.scale[k].object != nullptr) {
        add(entry.scale[k].memory, (numel + kCodeBlock - 1) / kCodeBlock * 4);
      }
    }
    if (entry.beside.object != nullptr) {
      add(entry.beside.memory, numel * besides_size(entry.beside_kind));
    }
    if (entry.ema.object != nullptr) add(entry.ema.memory, numel * 4);
  }
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& x, const Range& y) { return x.before(y); });
  for (std::size_t i = 1; i < ranges_.size(); ++i) {
    const Range &previous = ranges_[i - 1], &next = ranges_[i];
    if (!(previous.entry->device == next.entry->device) || next.begin >= previous.end) continue;
    fail(PyExc_ValueError, *next.entry,
         "shares memory with " + label_of(*previous.entry) +
             " or its states; accepted: parameters and states with memory of their own");
  }
}

// A gradient is read while others are written, so it must not lie in what a step writes.
void ParameterList::check_gradient_memory(const Entry& entry, const void* grad, Dtype dtype) const {
  if (entry.numel == 0) return;
  const auto* begin = static_cast<const char*>(grad);
  const Range range{begin, begin + entry.numel * element_size(dtype), &entry};
  // The ranges do not overlap: only the last that starts before the gradient ends can reach into
  // it.
  const auto after = std::lower_bound(ranges_.begin(), ranges_.end(), Range{range.end, {}, &entry},
                                      [](const Range& x, const Range& y) { return x.before(y); });
  if (after == ranges_.begin()) return;
  const Range& last = *(after - 1);
  if (!(last.entry->device == entry.device) || last.end <= range.begin) return;
  fail(PyExc_ValueError, entry,
       "has a gradient that shares memory with " + label_of(*last.entry) +
           " or its states; accepted: a gradient with memory of its own");
}

// A gradient that is zeroed once it has been read must not be another's too.
void ParameterList::check_gradients_disjoint() {
  std::vector<Range> found;
  for (const auto& [i, route] : updated_) {
    const Entry& entry = entries_[i];
    const auto* begin = static_cast<const char*>(entry.checked_grad);
    if (entry.numel == 0) continue;
    found.push_back({begin, begin + entry.numel * element_size(entry.checked_grad_dtype), &entry});
  }
  if (found == disjoint_) return;
  disjoint_.clear();
  std::vector<Range> ranges = found;
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& x, const Range& y) { return x.before(y); });
  for (std::size_t k = 1; k < ranges.size(); ++k) {
    const Range &previous = ranges[k - 1], &next = ranges[k];
    if (!(previous.entry->device == next.entry->device) || next.begin >= previous.end) continue;
    fail(PyExc_ValueError, *next.entry,
         "has a gradient that shares memory with that of " + label_of(*previous.entry) +
             "; accepted with zero_grads: gradients with memory of their own");
  }
  disjoint_ = std::move(found);
}

std::string ParameterList::label_of(const Entry& entry) const {
  return py::str(py::handle(entry.label));
}

std::string ParameterList::shape_of(const Entry& entry) const {
  return shape_name(entry.ndim, dims_.data() + entry.dims);
}

void ParameterList::refuse(PyObject* exception, const Entry& entry, const std::string& what,
                           PyObject* object) const {
  PyErr_Clear();
  const bool is_tensor = py::hasattr(py::handle(object), "layout");
  fail(is_tensor ? exception : PyExc_TypeError, entry,
       what + describe(object) + "; accepted: a dense tensor with memory on cpu or cuda");
}

void ParameterList::fail(PyObject* exception, const Entry& entry, const std::string& what) const {
  const std::string message = label_of(entry) + " " + what;
  PyErr_SetString(exception, message.c_str());
  throw py::error_already_set();
}

}  // namespace fused_adamw::host
