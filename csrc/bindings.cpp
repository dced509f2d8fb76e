// Python's view of the extension: conversion and checks, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/bucket.h"
#include "core/planner.h"
#include "cpu/engine.h"
#include "cuda/engine.h"
#include "cuda/launch_arguments.h"
#include "host/hyperparameters.h"
#include "host/parameter_list.h"
#include "host/tensor_view.h"
#include "rules/registry.h"

namespace py = pybind11;
using namespace fused_adamw;

namespace {

constexpr const char* kDecayNames[] = {"lr", "decoupled", "l2", "proximal"};

Decay decay_of(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kDecayNames[i]) return static_cast<Decay>(i);
  }
  throw py::value_error("decay: found '" + name +
                        "', accepted: 'lr', 'decoupled', 'l2', 'proximal'");
}

cpu::SimdLevel simd_level_of(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(cpu::best_simd_level()); ++i) {
    if (name == cpu::kSimdLevelNames[i]) return static_cast<cpu::SimdLevel>(i);
  }
  throw py::value_error("level: found '" + name + "', accepted: " +
                        cpu::kSimdLevelNames[static_cast<int>(cpu::best_simd_level())] +
                        " or lower, of baseline, avx2, avx512");
}

// A copy of one field of every tensor of a bucket.
template <class T, class Read>
py::array_t<T> column(const Bucket& bucket, Read&& read) {
  py::array_t<T> values(static_cast<py::ssize_t>(bucket.tensors.size()));
  std::transform(bucket.tensors.begin(), bucket.tensors.end(), values.mutable_data(), read);
  return values;
}

py::array_t<std::int64_t> addresses(const Bucket& bucket) {
  const int slots =
      kFirstState + visit_rule(bucket.rule, [](auto rule) { return decltype(rule)::kStates; });
  py::array_t<std::int64_t> values(
      {static_cast<py::ssize_t>(bucket.tensors.size()), static_cast<py::ssize_t>(slots)});
  auto* out = values.mutable_data();
  for (const TensorEntry& tensor : bucket.tensors) {
    for (int s = 0; s < slots; ++s) *out++ = reinterpret_cast<std::intptr_t>(tensor.slot[s]);
  }
  return values;
}

const char* name_of(Dtype dtype) { return kDtypeNames[static_cast<int>(dtype)]; }

void require_cpu(const Bucket& bucket) {
  if (bucket.device_type != dlpack::kCpu) throw py::value_error("the tensors are not on the CPU");
}

py::list plan_launches_for_tests(const std::vector<std::int64_t>& numels,
                                 const std::vector<std::int32_t>& rows, int tensors, int max_rows,
                                 std::int64_t chunk, std::int64_t blocks) {
  py::list launches;
  for (const Launch& launch : plan_launches(numels, rows, {tensors, max_rows, chunk, blocks})) {
    py::dict fields;
    fields["tensors"] = launch.tensors;
    fields["rows"] = launch.rows;
    fields["row_of"] = launch.row_of;
    fields["first_chunk"] = launch.first_chunk;
    launches.append(fields);
  }
  return launches;
}

std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>>
plan_ranges_for_tests(std::vector<std::int64_t> numels, std::int64_t target) {
  const FlatRanges ranges(std::move(numels), target);
  std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>> spans;
  for (std::int64_t i = 0; i < ranges.count(); ++i) {
    ranges.for_each(i, [&](const Span& s) { spans.emplace_back(i, s.tensor, s.begin, s.end); });
  }
  return spans;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engines in C++. Private: use fused_adamw.";
  m.attr("VERSION") = FUSED_ADAMW_VERSION;
  m.attr("COMPILER") = __VERSION__;
  m.attr("ADAM_COEFFICIENT_NAMES") = py::make_tuple("l2", "b1", "c1", "b2", "c2", "eps", "d", "a");
  m.attr("DECAYS") = py::make_tuple("lr", "decoupled", "l2", "proximal");
  py::list formats;
  for_each_format(Formats{}, [&](const Format& f) {
    formats.append(py::make_tuple(name_of(f.param), name_of(f.grad), name_of(f.state)));
  });
  m.attr("FORMATS") = py::tuple(formats);

  // Hyperparameters.
  py::class_<host::Hyperparameters>(m, "Hyperparameters");
  py::class_<host::Adam, host::Hyperparameters>(m, "AdamHyperparameters")
      .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay,
                       double schedule_multiplier, const std::string& decay, bool amsgrad,
                       bool maximize) {
             return host::Adam({lr, beta1, beta2, eps, weight_decay, schedule_multiplier,
                                decay_of(decay), amsgrad, maximize});
           }),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("schedule_multiplier"), py::arg("decay"),
           py::arg("amsgrad"), py::arg("maximize"))
      .def_property_readonly("lr", [](const host::Adam& h) { return h.values.lr; })
      .def_property_readonly("beta1", [](const host::Adam& h) { return h.values.beta1; })
      .def_property_readonly("beta2", [](const host::Adam& h) { return h.values.beta2; })
      .def_property_readonly("eps", [](const host::Adam& h) { return h.values.eps; })
      .def_property_readonly("weight_decay",
                             [](const host::Adam& h) { return h.values.weight_decay; })
      .def_property_readonly("schedule_multiplier",
                             [](const host::Adam& h) { return h.values.schedule_multiplier; })
      .def_property_readonly(
          "decay",
          [](const host::Adam& h) { return kDecayNames[static_cast<int>(h.values.decay)]; })
      .def_property_readonly("amsgrad", [](const host::Adam& h) { return h.values.amsgrad; })
      .def_property_readonly("maximize", [](const host::Adam& h) { return h.values.maximize; })
      .def("coefficients", [](const host::Adam& h, std::int64_t t) {
        std::vector<float> row(static_cast<std::size_t>(h.coefficient_count()));
        h.coefficients_at(t, row.data());
        return row;
      });

  // The list of parameters, and what a step makes of it.
  m.def("use_exchange_api", &host::use_exchange_api, py::arg("capsule"));
  py::class_<Bucket>(m, "Bucket")
      .def_property_readonly("l2", [](const Bucket& b) { return b.rule.l2; })
      .def_property_readonly("amsgrad", [](const Bucket& b) { return b.rule.amsgrad; })
      .def_property_readonly("param_dtype", [](const Bucket& b) { return name_of(b.format.param); })
      .def_property_readonly("grad_dtype", [](const Bucket& b) { return name_of(b.format.grad); })
      .def_property_readonly("state_dtype", [](const Bucket& b) { return name_of(b.format.state); })
      .def_readonly("device_type", &Bucket::device_type)
      .def_readonly("device_index", &Bucket::device_index)
      .def_readonly("numel", &Bucket::numel)
      .def_property_readonly("addresses", &addresses)
      .def_property_readonly(
          "numels",
          [](const Bucket& b) { return column<std::int64_t>(b, [](auto& t) { return t.numel; }); })
      .def_property_readonly(
          "rows",
          [](const Bucket& b) { return column<std::int32_t>(b, [](auto& t) { return t.row; }); })
      .def_property_readonly(
          "groups",
          [](const Bucket& b) { return column<std::int32_t>(b, [](auto& t) { return t.group; }); })
      .def_property_readonly(
          "steps",
          [](const Bucket& b) { return column<std::int64_t>(b, [](auto& t) { return t.step; }); })
      .def_property_readonly("coefficients", [](const Bucket& b) {
        py::array_t<float> values(
            {static_cast<py::ssize_t>(b.rows()), static_cast<py::ssize_t>(b.coefficients_per_row)});
        std::copy(b.coefficients.begin(), b.coefficients.end(), values.mutable_data());
        return values;
      });
  py::class_<host::ParameterList>(
      m, "ParameterList", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject& type = heap_type->ht_type;
        type.tp_flags |= Py_TPFLAGS_HAVE_GC;
        type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
          Py_VISIT(Py_TYPE(self));
          if (!py::detail::is_holder_constructed(self)) return 0;
          return py::cast<host::ParameterList&>(py::handle(self)).traverse(visit, arg);
        };
      }))
      .def(py::init([](py::list params, py::list states, py::list names, py::list groups,
                       py::list labels, py::object restride, py::object increment_version) {
             for (const py::list& list : {states, names, groups, labels}) {
               if (list.size() != params.size()) {
                 throw py::value_error("lists of one registration differ in length");
               }
             }
             return std::make_unique<host::ParameterList>(host::Registration{
                 params, states, names, groups, labels, restride, increment_version});
           }),
           py::kw_only(), py::arg("params"), py::arg("states"), py::arg("names"), py::arg("groups"),
           py::arg("labels"), py::arg("restride"), py::arg("increment_version"))
      .def("remember", &host::ParameterList::remember, py::arg("param_lists"), py::arg("states"))
      .def("matches", &host::ParameterList::matches, py::arg("param_lists"), py::arg("states"))
      .def("gather", &host::ParameterList::gather, py::arg("groups"), py::arg("grads") = py::none())
      .def("let_go", &host::ParameterList::let_go)
      .def("buckets", &host::ParameterList::buckets, py::return_value_policy::reference_internal)
      .def("commit", &host::ParameterList::commit);

  // The CPU engine.
  m.def("simd_level",
        [] { return cpu::kSimdLevelNames[static_cast<int>(cpu::best_simd_level())]; });
  m.def(
      "update_cpu",
      [](const Bucket& bucket, int threads, const std::optional<std::string>& level) {
        require_cpu(bucket);
        const cpu::SimdLevel simd = level ? simd_level_of(*level) : cpu::best_simd_level();
        const py::gil_scoped_release release;
        cpu::update(bucket, threads, simd);
      },
      py::arg("bucket"), py::arg("threads"), py::arg("level") = py::none());

  // The CUDA engine.
#if defined(FUSED_ADAMW_CUDA)
  m.attr("CUDA_BUILT") = true;
  m.attr("CUDA_ARCHS") = FUSED_ADAMW_CUDA_ARCHS_BUILT;
  m.attr("NVCC") = FUSED_ADAMW_NVCC_VERSION;
  m.def("cuda_unavailable_reason", &cuda::unavailable_reason);
  m.def(
      "update_cuda",
      [](const Bucket& bucket) {
        if (bucket.device_type != dlpack::kCuda) {
          throw py::value_error("the tensors are not on a CUDA device");
        }
        const py::gil_scoped_release release;
        return cuda::update(bucket, bucket.stream);
      },
      py::arg("bucket"));
#else
  m.attr("CUDA_BUILT") = false;
  m.attr("CUDA_ARCHS") = "";
  m.attr("NVCC") = "";
#endif
  m.def(
      "update_cuda_on_host",
      [](const Bucket& bucket) {
        require_cpu(bucket);
        const py::gil_scoped_release release;
        cuda::update_on_host(bucket);
      },
      py::arg("bucket"));
  m.def("count_cuda_launches", &cuda::count_launches, py::arg("bucket"));
  m.attr("CUDA_CHUNK") = cuda::kChunk;

  // The planner, for tests: it cuts sizes that no test could allocate.
  m.def("plan_launches", &plan_launches_for_tests, py::arg("numels"), py::arg("rows"),
        py::arg("tensors"), py::arg("max_rows"), py::arg("chunk"), py::arg("blocks"));
  m.def("plan_ranges", &plan_ranges_for_tests, py::arg("numels"), py::arg("target"));
}
