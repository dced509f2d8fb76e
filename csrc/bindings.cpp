// Python's view of the extension: conversion and checks, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/bucket.h"
#include "core/float_environment.h"
#include "core/planner.h"
#include "core/square_sum.h"
#include "cpu/engine.h"
#include "cuda/engine.h"
#include "cuda/launch_arguments.h"
#include "host/hyperparameters.h"
#include "host/parameter_list.h"
#include "host/tensor_view.h"
#include "rules/registry.h"
#include "schedules/program.h"

namespace py = pybind11;
using namespace fused_adamw;

namespace {

// How Python passes the values of a range.
const char* kind_of(Range range) {
  return range == Range::kFlag ? "flag" : range == Range::kDecay ? "decay" : "number";
}

const RuleInfo& rule_named(const std::string& name) {
  for (const RuleInfo& rule : rule_infos()) {
    if (name == rule.name) return rule;
  }
  throw py::value_error("no rule is called '" + name + "'");
}

double decay_number(const std::string& name) {
  std::string accepted;
  for (int i = 0; i < kDecays; ++i) {
    if (name == kDecayNames[i]) return i;
    accepted += std::string(i ? ", '" : "'") + kDecayNames[i] + "'";
  }
  throw py::value_error("decay: found '" + name + "', accepted: " + accepted);
}

// The keys of a rule's values, made once: this is read whenever a learning rate changes.
const std::vector<PyObject*>& keys_of(const RuleInfo& rule) {
  static std::unordered_map<const RuleInfo*, std::vector<PyObject*>> known;
  std::vector<PyObject*>& keys = known[&rule];
  if (keys.empty()) {
    for (const Field& field : rule.fields) keys.push_back(PyUnicode_InternFromString(field.name));
  }
  return keys;
}

host::Hyperparameters make_hyperparameters(const std::string& rule, const py::dict& values) {
  const RuleInfo& info = rule_named(rule);
  const std::vector<PyObject*>& keys = keys_of(info);
  std::vector<double> numbers;
  numbers.reserve(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const py::handle value = PyDict_GetItemWithError(values.ptr(), keys[i]);
    if (!value) {
      throw py::value_error("rule " + rule + ": '" + info.fields[i].name + "' is missing");
    }
    numbers.push_back(info.fields[i].range == Range::kDecay
                          ? decay_number(value.cast<std::string>())
                          : value.cast<double>());
  }
  if (values.size() != numbers.size()) throw py::value_error("rule " + rule + ": unknown values");
  return {info, std::move(numbers)};
}

py::dict values_of(const host::Hyperparameters& h) {
  py::dict values;
  for (std::size_t i = 0; i < h.values.size(); ++i) {
    const Field& field = h.rule.fields[i];
    const double value = h.values[i];
    values[field.name] = field.range == Range::kDecay
                             ? py::object(py::str(kDecayNames[static_cast<int>(value)]))
                         : field.range == Range::kFlag ? py::object(py::bool_(value != 0.0))
                                                       : py::object(py::float_(value));
  }
  return values;
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
  const int slots = kFirstState + functor_info(bucket.functor).states;
  py::array_t<std::int64_t> values(
      {static_cast<py::ssize_t>(bucket.tensors.size()), static_cast<py::ssize_t>(slots)});
  auto* out = values.mutable_data();
  for (const TensorEntry& tensor : bucket.tensors) {
    for (int s = 0; s < slots; ++s) *out++ = reinterpret_cast<std::intptr_t>(tensor.slot[s]);
  }
  return values;
}

// Where the averages of the parameters begin; none in a bucket without.
py::array_t<std::int64_t> emas(const Bucket& bucket) {
  if (!bucket.has_ema) return py::array_t<std::int64_t>(0);
  return column<std::int64_t>(
      bucket, [](auto& tensor) { return reinterpret_cast<std::intptr_t>(tensor.ema); });
}

// Where what is beside the parameters begins; none in a bucket without.
py::array_t<std::int64_t> besides(const Bucket& bucket) {
  if (bucket.format.beside == Beside::kNothing) return py::array_t<std::int64_t>(0);
  return column<std::int64_t>(
      bucket, [](auto& tensor) { return reinterpret_cast<std::intptr_t>(tensor.beside); });
}

// Where the scales of the states begin: [tensors, states]; none in a bucket without codes.
py::array_t<std::int64_t> scales(const Bucket& bucket) {
  if (bucket.format.state != Dtype::kCode8) return py::array_t<std::int64_t>(0);
  const int states = functor_info(bucket.functor).states;
  py::array_t<std::int64_t> values(
      {static_cast<py::ssize_t>(bucket.tensors.size()), static_cast<py::ssize_t>(states)});
  auto* out = values.mutable_data();
  for (const TensorEntry& tensor : bucket.tensors) {
    for (int k = 0; k < states; ++k) *out++ = reinterpret_cast<std::intptr_t>(tensor.scale[k]);
  }
  return values;
}

py::array_t<std::int64_t> extents(const Bucket& bucket) {
  py::array_t<std::int64_t> result(
      {static_cast<py::ssize_t>(bucket.tensors.size()),
       static_cast<py::ssize_t>(sizeof(Extent) / sizeof(std::int64_t))});
  auto* to = reinterpret_cast<Extent*>(result.mutable_data());
  for (const TensorEntry& tensor : bucket.tensors) *to++ = tensor.extent;
  return result;
}

// For tests: what only shards have.
void set_extents(Bucket& bucket, const std::vector<std::array<std::int64_t, 3>>& extents) {
  if (extents.size() != bucket.tensors.size()) throw py::value_error("extents: one a tensor");
  for (std::size_t i = 0; i < extents.size(); ++i) {
    const auto [offset, run, stride] = extents[i];
    bucket.tensors[i].extent = {offset, run, stride};
  }
}

py::tuple state_kinds(const Bucket& bucket) {
  py::list kinds;
  for (const StateKind kind : functor_info(bucket.functor).kinds) {
    kinds.append(kStateKindNames[static_cast<int>(kind)]);
  }
  return py::tuple(kinds);
}

// A list's chunks by class and param group, kept beyond its next step.
struct ChunkRuns {
  std::vector<host::ChunkRun> runs;
};

template <class T>
T* at(std::intptr_t address) {
  return reinterpret_cast<T*>(address);
}

double* doubles_at(std::intptr_t address) { return at<double>(address); }

// Records as rows of words, to be copied to the device.
template <class Record>
py::array_t<std::int64_t> words(const std::vector<Record>& records) {
  constexpr std::size_t kWords = sizeof(Record) / sizeof(std::int64_t);
  static_assert(sizeof(Record) == kWords * sizeof(std::int64_t), "records are made of words");
  py::array_t<std::int64_t> table(
      {static_cast<py::ssize_t>(records.size()), static_cast<py::ssize_t>(kWords)});
  std::memcpy(table.mutable_data(), records.data(), records.size() * sizeof(Record));
  return table;
}

// Where the chunks of each of `sums` end, each of which has `rows` neighbouring rows of the list:
// of the param groups of each class, one after the other. Groups follow one another in an
// optimizer's list.
std::vector<std::int64_t> chunk_ends(const host::ParameterList& list, int sums, int rows) {
  std::vector<std::int64_t> ends(static_cast<std::size_t>(sums), 0);
  std::int64_t end = 0, sum = 0;
  for (const host::ChunkRun& run : list.chunk_runs()) {
    if (run.row / rows < sum) throw py::value_error("groups: found them mixed");
    for (; sum < run.row / rows; ++sum) ends.at(static_cast<std::size_t>(sum)) = end;
    end = run.begin + run.count;
  }
  for (; sum < sums; ++sum) ends.at(static_cast<std::size_t>(sum)) = end;
  return ends;
}

// A param group for the device: cuda/tick.h. `sources` has an address for each field, or 0.
py::array_t<std::int64_t> group_record(const host::Hyperparameters& h,
                                       const std::vector<std::int64_t>& sources,
                                       std::int64_t is_double, std::intptr_t schedule,
                                       std::intptr_t schedule_step, double ema_weight) {
  cuda::GroupRecord record{};
  record.rule = h.rule.index;
  for (std::size_t k = 0; k < h.values.size(); ++k) {
    record.value[k] = h.values[k];
    record.source[k] = at<const void>(sources.at(k));
    if (h.rule.fields[k].name == std::string(kScheduleField.name)) {
      record.multiplier = static_cast<std::int64_t>(k);
    }
  }
  record.is_double = is_double;
  record.schedule = at<const double>(schedule);
  record.schedule_step = at<std::int64_t>(schedule_step);
  record.ema_weight = ema_weight;
  return words(std::vector<cuda::GroupRecord>{record});
}

// Sums of chunks, with `stride` columns, folded into `sums`: see chunk_ends().
py::array_t<double> fold(std::intptr_t address, int stride, const ChunkRuns& runs, int sums,
                         int rows) {
  std::vector<std::vector<double>> of_sum(static_cast<std::size_t>(sums));
  py::array_t<double> folded({sums, stride});
  const double* partials = doubles_at(address);
  for (int column = 0; column < stride; ++column) {
    for (auto& values : of_sum) values.clear();
    for (const host::ChunkRun& run : runs.runs) {
      auto& values = of_sum.at(static_cast<std::size_t>(run.row / rows));
      for (std::int64_t i = run.begin; i < run.begin + run.count; ++i) {
        values.push_back(partials[i * stride + column]);
      }
    }
    for (int k = 0; k < sums; ++k) {
      const auto& values = of_sum[static_cast<std::size_t>(k)];
      folded.mutable_at(k, column) =
          fold_chunks(values.data(), static_cast<std::int64_t>(values.size()));
    }
  }
  return folded;
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

double evaluate_schedule_for_tests(std::vector<double> program, std::int64_t t) {
  if (program.size() > schedules::kMaxWords) throw py::value_error("program: too long");
  program.resize(schedules::kMaxWords);
  if (schedules::is_empty(program.data())) throw py::value_error("program: it is empty");
  return schedules::evaluate(program.data(), t);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engines in C++. Private: use fused_adamw.";
  m.attr("VERSION") = FUSED_ADAMW_VERSION;
  m.attr("COMPILER") = __VERSION__;
  py::list decays;
  for (const char* name : kDecayNames) decays.append(name);
  m.attr("DECAYS") = py::tuple(decays);
  py::list formats;  // of numbers that are rounded to nearest, with nothing beside them
  for (const Format& f : kFormats) {
    if (!f.is_plain()) continue;
    formats.append(py::make_tuple(name_of(f.param), name_of(f.grad), name_of(f.state)));
  }
  m.attr("FORMATS") = py::tuple(formats);

  // Rules and their hyperparameters.
  py::dict rules;
  for (const RuleInfo& rule : rule_infos()) {
    py::list fields;
    for (const Field& field : rule.fields) {
      fields.append(py::make_tuple(field.name, field.argument, kind_of(field.range)));
    }
    rules[rule.name] = py::make_tuple(py::tuple(fields),
                                      rule.scalar ? py::object(py::str(rule.scalar)) : py::none());
  }
  m.attr("RULES") = rules;
  py::class_<host::Hyperparameters>(m, "Hyperparameters")
      .def(py::init(&make_hyperparameters), py::arg("rule"), py::arg("values"))
      .def_property_readonly("rule", [](const host::Hyperparameters& h) { return h.rule.name; })
      .def_property_readonly("values", &values_of)
      .def(
          "coefficients",
          [](const host::Hyperparameters& h, std::int64_t t, double scalar) {
            std::vector<float> row(static_cast<std::size_t>(h.coefficients));
            Position at{t, scalar};
            h.coefficients_at(at, row.data());
            return py::make_tuple(row, at.scalar);
          },
          py::arg("t"), py::arg("scalar") = 0.0);

  py::class_<ChunkRuns>(m, "ChunkRuns");
  m.def("fold", &fold, py::arg("partials"), py::arg("columns"), py::arg("runs"), py::arg("sums"),
        py::arg("rows") = 1);

  // The list of parameters, and what a step makes of it.
  m.def("random_key", &random_key, py::arg("seed"), py::arg("parameter"));
  m.def("use_exchange_api", &host::use_exchange_api, py::arg("capsule"));
  py::class_<Bucket>(m, "Bucket")
      .def_property_readonly("functor",
                             [](const Bucket& b) { return functor_info(b.functor).name; })
      .def_property_readonly(
          "options",
          [](const Bucket& b) { return py::tuple(py::cast(functor_info(b.functor).options)); })
      .def_property_readonly("param_dtype", [](const Bucket& b) { return name_of(b.format.param); })
      .def_property_readonly("grad_dtype", [](const Bucket& b) { return name_of(b.format.grad); })
      .def_property_readonly("state_dtype", [](const Bucket& b) { return name_of(b.format.state); })
      .def_property_readonly(
          "beside", [](const Bucket& b) { return kBesideNames[static_cast<int>(b.format.beside)]; })
      .def_property_readonly("stochastic", [](const Bucket& b) { return b.format.stochastic; })
      .def_property_readonly("state_kinds", &state_kinds)
      .def_property_readonly("besides", &besides)
      .def_property_readonly("scales", &scales)
      .def_property_readonly(
          "keys",
          [](const Bucket& b) { return column<std::uint64_t>(b, [](auto& t) { return t.key; }); })
      .def_property("extents", &extents, &set_extents)
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
      .def_property_readonly(
          "scalars",
          [](const Bucket& b) { return column<double>(b, [](auto& t) { return t.scalar; }); })
      .def_property_readonly(
          "chunks",
          [](const Bucket& b) { return column<std::int64_t>(b, [](auto& t) { return t.chunk; }); })
      .def_property_readonly("emas", &emas)
      .def_readonly("zero_grads", &Bucket::zero_grads)
      .def_property_readonly(
          "observed", [](const Bucket& b) { return reinterpret_cast<std::intptr_t>(b.observed); })
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
      .def(py::init([](py::list params, py::list states, py::list names, py::list counts,
                       py::list scalars, py::list fresh, py::list besides, py::list scales,
                       py::list stochastic, py::list keys, py::list averages, py::list unaveraged,
                       py::list active, py::list groups, py::list labels, py::list sharded,
                       py::list extents, py::list classes, bool on_device, py::object restride,
                       py::object to_local, py::object mismatch, py::object tensor_type,
                       py::object increment_version) {
             for (const py::list& list :
                  {states, names, counts, scalars, fresh, besides, scales, stochastic, keys,
                   averages, unaveraged, active, groups, labels, sharded, extents, classes}) {
               if (list.size() != params.size()) {
                 throw py::value_error("lists of one registration differ in length");
               }
             }
             return std::make_unique<host::ParameterList>(host::Registration{
                 params,    states,   names,      counts,   scalars,     fresh,
                 besides,   scales,   stochastic, keys,     averages,    unaveraged,
                 active,    groups,   labels,     sharded,  extents,     classes,
                 on_device, restride, to_local,   mismatch, tensor_type, increment_version});
           }),
           py::kw_only(), py::arg("params"), py::arg("states"), py::arg("names"), py::arg("counts"),
           py::arg("scalars"), py::arg("fresh"), py::arg("besides"), py::arg("scales"),
           py::arg("stochastic"), py::arg("keys"), py::arg("averages"), py::arg("unaveraged"),
           py::arg("active"), py::arg("groups"), py::arg("labels"), py::arg("sharded"),
           py::arg("extents"), py::arg("classes"), py::arg("on_device"), py::arg("restride"),
           py::arg("to_local"), py::arg("mismatch"), py::arg("tensor_type"),
           py::arg("increment_version"))
      .def("remember", &host::ParameterList::remember, py::arg("param_lists"), py::arg("states"))
      .def("matches", &host::ParameterList::matches, py::arg("param_lists"), py::arg("states"))
      .def(
          "gather",
          [](host::ParameterList& list, const std::vector<const host::Hyperparameters*>& groups,
             const std::optional<py::list>& grads, bool is_state_held, double ema_weight,
             bool zero_grads, const std::vector<std::int64_t>& steps) {
            return list.gather(groups, grads, is_state_held,
                               {static_cast<float>(ema_weight), zero_grads, steps});
          },
          py::arg("groups"), py::arg("grads") = py::none(), py::arg("is_state_held") = false,
          py::arg("ema_weight") = 1.0, py::arg("zero_grads") = false,
          py::arg("steps") = std::vector<std::int64_t>{})
      .def_property_readonly("sharded_gradients", &host::ParameterList::sharded_gradients)
      .def_property_readonly("chunks", &host::ParameterList::chunks)
      .def_property_readonly("zeroed", &host::ParameterList::zeroed)
      .def_property_readonly("restrided", &host::ParameterList::restrided)
      .def_property_readonly("chunk_runs",
                             [](const host::ParameterList& list) {
                               return std::make_unique<ChunkRuns>(ChunkRuns{list.chunk_runs()});
                             })
      .def("set_grad_factor", &host::ParameterList::set_grad_factor, py::arg("factor"))
      .def(
          "set_observed",
          [](host::ParameterList& list, std::intptr_t address) {
            list.set_observed(doubles_at(address));
          },
          py::arg("address"))
      .def(
          "set_device",
          [](host::ParameterList& list, std::intptr_t rows, std::intptr_t skip) {
            list.set_device(at<const float>(rows), at<const std::int32_t>(skip));
          },
          py::arg("rows"), py::arg("skip"))
      .def(
          "device_records",
          [](const host::ParameterList& list, const std::vector<std::int64_t>& steps,
             const std::vector<std::int64_t>& averaged) {
            return words(list.device_records(steps, averaged));
          },
          py::arg("steps"), py::arg("averaged"))
      .def("chunk_ends", &chunk_ends, py::arg("sums"), py::arg("rows") = 1)
      .def("release", &host::ParameterList::release)
      .def("let_go", &host::ParameterList::let_go)
      .def("buckets", &host::ParameterList::buckets, py::return_value_policy::reference_internal)
      .def("commit", &host::ParameterList::commit, py::arg("bucket"));

  // Rounding and denormals as IEEE 754 has them, for engines that are not in this extension.
  m.def(
      "in_default_float_environment",
      [](const py::function& run) {
        const DefaultFloatEnvironment environment;
        run();
      },
      py::arg("run"));

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

  m.def(
      "square_sums_cpu",
      [](const Bucket& bucket, std::intptr_t partials, int threads,
         const std::optional<std::string>& level) {
        require_cpu(bucket);
        const cpu::SimdLevel simd = level ? simd_level_of(*level) : cpu::best_simd_level();
        const py::gil_scoped_release release;
        cpu::square_sums(bucket, doubles_at(partials), threads, simd);
      },
      py::arg("bucket"), py::arg("partials"), py::arg("threads"), py::arg("level") = py::none());
  m.attr("OBSERVED") = kObserved;

  // What is worked out on the device.
  m.attr("DEVICE_ROW") = cuda::kDeviceRow;
  m.def("group_record", &group_record, py::arg("hyperparameters"), py::arg("sources"),
        py::arg("is_double"), py::arg("schedule"), py::arg("schedule_step"), py::arg("ema_weight"));
  py::class_<cuda::FoldArguments>(m, "FoldArguments")
      .def(py::init(
               [](std::intptr_t partials, std::intptr_t ends, std::intptr_t squares, int groups) {
                 return cuda::FoldArguments{doubles_at(partials), at<const std::int64_t>(ends),
                                            doubles_at(squares), groups};
               }),
           py::kw_only(), py::arg("partials"), py::arg("ends"), py::arg("squares"),
           py::arg("groups"));
  py::class_<cuda::TickArguments>(m, "TickArguments")
      .def(py::init([](std::intptr_t groups, std::intptr_t parameters, int group_count,
                       int parameter_count, std::intptr_t squares, std::intptr_t grad_scale,
                       std::intptr_t found_inf, bool clips, std::intptr_t max_grad_norm_at,
                       double max_grad_norm, bool skip_nonfinite, std::intptr_t rows,
                       std::intptr_t grad_norm, std::intptr_t skip) {
             return cuda::TickArguments{at<const cuda::GroupRecord>(groups),
                                        at<const cuda::ParameterRecord>(parameters),
                                        group_count,
                                        parameter_count,
                                        doubles_at(squares),
                                        at<const float>(grad_scale),
                                        at<const float>(found_inf),
                                        clips,
                                        at<const float>(max_grad_norm_at),
                                        max_grad_norm,
                                        skip_nonfinite,
                                        at<float>(rows),
                                        at<float>(grad_norm),
                                        at<std::int32_t>(skip)};
           }),
           py::kw_only(), py::arg("groups"), py::arg("parameters"), py::arg("group_count"),
           py::arg("parameter_count"), py::arg("squares"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("clips"), py::arg("max_grad_norm_at"),
           py::arg("max_grad_norm"), py::arg("skip_nonfinite"), py::arg("rows"),
           py::arg("grad_norm"), py::arg("skip"));
  m.def("fold_on_host", &cuda::fold_on_host, py::arg("arguments"));
  m.def("tick_on_host", &cuda::tick_on_host, py::arg("arguments"));
  m.def("norm", &norm_of, py::arg("total"), py::arg("scale"));
  m.def("clip_coefficient", &clip_coefficient, py::arg("norm"), py::arg("max_norm"));

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
  m.def(
      "square_sums_cuda",
      [](const Bucket& bucket, std::intptr_t partials) {
        const py::gil_scoped_release release;
        cuda::square_sums(bucket, doubles_at(partials), bucket.stream);
      },
      py::arg("bucket"), py::arg("partials"));
  m.def(
      "fold_cuda",
      [](const cuda::FoldArguments& arguments, int device) {
        cuda::fold(arguments, device, host::current_stream({dlpack::kCuda, device}));
      },
      py::arg("arguments"), py::arg("device"));
  m.def(
      "tick_cuda",
      [](const cuda::TickArguments& arguments, int device) {
        cuda::tick(arguments, device, host::current_stream({dlpack::kCuda, device}));
      },
      py::arg("arguments"), py::arg("device"));
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
  m.def(
      "square_sums_cuda_on_host",
      [](const Bucket& bucket, std::intptr_t partials) {
        require_cpu(bucket);
        const py::gil_scoped_release release;
        cuda::square_sums_on_host(bucket, doubles_at(partials));
      },
      py::arg("bucket"), py::arg("partials"));
  m.def("count_cuda_launches", &cuda::count_launches, py::arg("bucket"));
  m.attr("CHUNK") = kChunk;

  // Schedules as a device evaluates them.
  py::list opcodes;
  for (const char* name : schedules::kOpcodeNames) opcodes.append(name);
  m.attr("SCHEDULE_OPCODES") = py::tuple(opcodes);
  m.attr("SCHEDULE_ROW_WORDS") = schedules::kRowWords;
  m.attr("SCHEDULE_MAX_WORDS") = schedules::kMaxWords;
  m.def("evaluate_schedule", &evaluate_schedule_for_tests, py::arg("program"), py::arg("t"));

  // The planner, for tests: it cuts sizes that no test could allocate.
  m.def("plan_launches", &plan_launches_for_tests, py::arg("numels"), py::arg("rows"),
        py::arg("tensors"), py::arg("max_rows"), py::arg("chunk"), py::arg("blocks"));
  m.def("plan_ranges", &plan_ranges_for_tests, py::arg("numels"), py::arg("target"));
}
