// The part of DLPack's public ABI (version 1) by which tensors are read here, declared anew so that
// neither torch nor DLPack is needed to build. A test compares the layout with torch's own header.
#pragma once

#include <cstdint>

namespace fused_adamw::dlpack {

constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

// The table behind `torch.Tensor.__dlpack_c_exchange_api__`. Functions return 0, or -1 with a
// Python exception set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor*, void** out_object);
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed: no reference is taken
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_index,
                             void** out_stream);
};
constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace fused_adamw::dlpack
