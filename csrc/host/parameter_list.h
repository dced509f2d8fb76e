// The list of parameters and states of an optimizer, registered once. A step reads the gradients,
// checks everything, and hands buckets to the engines.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/bucket.h"
#include "host/hyperparameters.h"
#include "host/tensor_view.h"

namespace fused_adamw::host {

namespace py = pybind11;

// What Python registers; the lists have an item for each parameter.
struct Registration {
  py::list params;      // tensors
  py::list states;      // the parameter's state, a dict, or None before its first step
  py::list names;       // a tuple of the keys of its states, in the order of the rule's slots
  py::list counts;      // whether its state has a 'step'
  py::list scalars;     // the key of what its rule carries from step to step, or None
  py::list fresh;       // whether its state has been created for this step
  py::list besides;     // (name of what is beside it: storage/beside.h, its key), or None
  py::list scales;      // a tuple of the keys of its states' scales; empty where none are coded
  py::list stochastic;  // whether it is rounded stochastically
  py::list keys;        // of its random bits
  py::list averages;    // the key of its exponential moving average, or None
  py::list unaveraged;  // whether its average begins with its next step
  py::list active;      // whether it can have a gradient; what cannot may be of any kind
  py::list groups;      // index of its param group
  py::list labels;      // how messages call it: "parameter 3 ('head.weight')"
  py::list sharded;     // whether it is a DTensor, whose local shard is stepped: [note: shards]
  py::list extents;     // core/extent.h
  py::list classes;     // of the parameters whose squares are summed over the same ranks, from 0
  bool on_device;       // whether counts and scalars are beside their parameter on its device
  py::object restride;  // (tensor, like) -> a copy of tensor with the strides of like
  py::object to_local;  // (DTensor) -> its local tensor, once that is complete
  py::object mismatch;  // (parameter, gradient) -> how their placements differ, or None
  py::object tensor_type;
  py::object increment_version;  // (list of tensors) -> None
};

// torch's descriptor of `grad`; empty where a type has one of its own.
struct GradientReader {
  getter get = nullptr;
  void* closure = nullptr;
};

// What a step does beside its rule.
struct StepOptions {
  float ema_weight = 1.0f;  // of the new parameters in their averages
  bool zero_grads = false;
  std::vector<std::int64_t> steps;  // taken by each param group, where anything is drawn
};

// Chunks [begin, begin + count) of the list, of one row: of one class and param group. A class has
// a row for each param group, and the chunks of a class follow one another.
struct ChunkRun {
  std::int64_t row, begin, count;
};

// A state's memory, and the object whose it was.
template <class T>
struct StateMemory {
  PyObject* object = nullptr;
  T* memory = nullptr;
};

class ParameterList {
 public:
  // Checks states against parameters; a state of other strides is replaced by a restrided copy.
  explicit ParameterList(Registration registration);
  ParameterList(const ParameterList&) = delete;
  ParameterList& operator=(const ParameterList&) = delete;
  ~ParameterList();

  // Remembers which objects an optimizer holds (the params of each group, and its dict of parameter
  // -> state), and whether it still holds the same.
  void remember(const py::list& param_lists, const py::dict& states);
  bool matches(const py::list& param_lists, const py::dict& states) const;

  // Reads the gradients (of the parameters, or those given; None: not updated), checks every tensor
  // and fills the buckets. Nothing is written. False if the list must be registered anew: a
  // parameter has its first gradient, or has been given other memory. `is_state_held`: someone else
  // has the dict of states.
  bool gather(const std::vector<const Hyperparameters*>& groups,
              const std::optional<py::list>& grads, bool is_state_held, const StepOptions& options);
  // A number that tells which DTensors have a gradient in the step that was gathered.
  std::uint64_t sharded_gradients() const { return sharded_gradients_; }

  // Of the gradients that gather() found: the number of their chunks ([note: square sums]), those
  // of each row, and with zero_grads the tensors, and which of them were read as copies.
  std::int64_t chunks() const { return chunks_; }
  const std::vector<ChunkRun>& chunk_runs() const { return chunk_runs_; }
  py::list zeroed() const { return zeroed_; }
  py::list restrided() const { return restrided_; }

  // Completes the buckets: the factor of every gradient; where the chunks' observations go.
  void set_grad_factor(float factor);
  void set_observed(double* observed);

  // Where coefficients are worked out on the device: where their rows and the decision to skip are,
  // and the record of every parameter that gather() found (cuda/tick.h), of which rules that count
  // no steps have them in `steps`. One address each, of every parameter of the list.
  void set_device(const float* rows, const std::int32_t* skip);
  std::vector<std::array<std::int64_t, 5>> device_records(
      const std::vector<std::int64_t>& steps, const std::vector<std::int64_t>& averaged) const;

  // Ends the references to what only this step needs.
  void release();

  // For Python's cycle collector: visits what is referenced; ends the references held in C++, which
  // the next step takes again. See [note: holding].
  int traverse(visitproc visit, void* arg) const;
  void let_go();

  // What gather() found, to be run by the engines.
  std::vector<Bucket*> buckets() const;

  // After an engine has run a bucket: counts the step of every parameter in it and tells autograd
  // of the writes.
  void commit(const Bucket& bucket);

 private:
  struct Entry {
    PyObject* label;
    GradientReader gradient;
    int group;
    int ndim;
    std::size_t dims;  // where its shape and then its strides start in dims_
    std::int64_t numel;
    dlpack::Device device;
    Dtype dtype;
    bool has_state;
    int states;
    Dtype state_dtype;
    Beside beside_kind;
    bool stochastic;
    std::uint64_t key;
    PyObject* param;
    bool sharded;
    Extent extent;
    int norm_class;
    PyObject* spec;  // of the gradient that was last found to lie as the parameter does
    void* data;
    bool active;
    PyObject* states_by_name;  // the dict of the following
    StateMemory<void> state[kMaxStates];
    bool is_signed[kMaxStates];  // of codes
    StateMemory<void> beside;    // null where there is nothing
    StateMemory<float> scale[kMaxStates];
    StateMemory<float> step;     // null where the rule counts none
    StateMemory<double> scalar;  // likewise
    StateMemory<float> ema;      // null where there is none
    bool fresh;
    bool unaveraged;
    const void* checked_grad;  // the gradient's memory when it was last found to be its own
    Dtype checked_grad_dtype;
  };

  // Where a type of DTensors has its slots.
  struct Slots {
    PyTypeObject* type;
    Py_ssize_t local, spec;
  };

  // Memory that a step writes.
  struct Range {
    const char* begin;
    const char* end;
    const Entry* entry;

    bool before(const Range& other) const;
    bool operator==(const Range& other) const {
      return begin == other.begin && end == other.end && entry == other.entry;
    }
  };
  // Where tensors of one group, dtypes and position go.
  struct Route {
    Bucket* bucket;
    int group;
    bool unaveraged;
    Position at;
    double scalar;  // after the step
    std::int32_t row;

    bool fits(const Entry& entry, Dtype grad_dtype, const Position& position) const;
  };

  // Calls visit(number) for each until it returns false; whether it never did.
  template <class Visit>
  static bool walk(const py::list& param_lists, const py::dict& states, Visit&& visit);

  void register_entry(std::size_t i);
  void register_state(Entry& entry, std::size_t i, py::dict state);
  void keep(PyObject* state);
  void hold();
  PyObject* read_slot(PyObject* tensor, Py_ssize_t Slots::* slot);
  PyObject* local(PyObject* tensor);
  bool view_local(PyObject* tensor, bool sharded, dlpack::Tensor& out);
  PyObject* local_gradient(Entry& entry, PyObject* grad);
  bool same_shape(const Entry& entry, const dlpack::Tensor& tensor) const;
  bool same_strides(const Entry& entry, const dlpack::Tensor& tensor) const;
  bool unchanged(const Entry& entry);
  bool states_unchanged(const Entry& entry, bool is_held);
  static void prefetch(const Entry& entry);
  Position position(const Entry& entry) const;
  void* read_gradient(const Entry& entry, PyObject* grad, Dtype& dtype);
  const Route& route_of(const Entry& entry, const Hyperparameters& group, Dtype grad_dtype,
                        const Position& at);
  Bucket& bucket_for(const Entry& entry, int functor, const Format& format);
  static std::int32_t share_last_row(Bucket& bucket);
  void check_codes(const Entry& entry, const std::vector<StateKind>& kinds) const;
  void count_chunks(const Entry& entry);
  void order_chunks();
  void check_gradient_memory(const Entry& entry, const void* grad, Dtype dtype) const;
  void check_overlaps();
  void check_gradients_disjoint();
  std::string label_of(const Entry& entry) const;
  std::string shape_of(const Entry& entry) const;
  [[noreturn]] void refuse(PyObject* exception, const Entry& entry, const std::string& what,
                           PyObject* object) const;
  [[noreturn]] void fail(PyObject* exception, const Entry& entry, const std::string& what) const;

  Registration registration_;
  std::vector<Entry> entries_;
  std::vector<std::int64_t> dims_;
  std::vector<std::uintptr_t> snapshot_;
  std::vector<dlpack::ManagedTensor*> held_;
  py::list kept_;              // every state, so that its object outlives what points to it
  py::list specs_;             // of each parameter's gradient, as Entry::spec
  std::vector<Range> ranges_;  // sorted

  // Of the current step.
  std::vector<std::unique_ptr<Bucket>> buckets_;
  StepOptions options_;
  std::map<std::tuple<const Bucket*, int, bool, std::int64_t, double>, Route> routes_;
  std::vector<std::pair<std::size_t, const Route*>> updated_;
  py::list temporaries_;
  py::list zeroed_, restrided_;
  std::int64_t chunks_ = 0;
  std::uint64_t sharded_gradients_ = 0;
  std::vector<ChunkRun> chunk_runs_;
  int classes_ = 1;
  int groups_ = 0;
  Slots slots_{};                // of the type that was read last
  std::vector<Range> disjoint_;  // gradients that were last found not to overlap
};

}  // namespace fused_adamw::host
