// torch.ops.tinylora.decode_linear, by PyTorch's stable ABI: one build serves 2.11 and later. Fakes are registered in Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "decode_linear.cuh"

// Weak: a build of PyTorch without CUDA does not have it, and loads this library all the same, for schemas and fakes.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));

namespace tinylora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Device device_of(int index) {
  auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, index);
    return value;
  };
  const double clock = get(cudaDevAttrMemoryClockRate), width = get(cudaDevAttrGlobalMemoryBusWidth);  // kHz, bits
  Device d{get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
           get(cudaDevAttrMaxSharedMemoryPerBlockOptin), 2 * clock * 1e3 * (width / 8) / 1e9};
  if (d.bytes_per_ns < 1) d.bytes_per_ns = 25.0 * d.processors;  // a driver that does not tell
  return d;
}

// A matrix that copies of 16 bytes can read, and the distance of its rows.
int64_t rows_of(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.stride(1) == 1, name, " must be (", rows, ", ",
                  columns, ") with rows in one piece");
  return x.stride(0);
}

int64_t aligned_rows_of(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  const int64_t stride = rows_of(x, name, rows, columns);
  STD_TORCH_CHECK((rows < 2 || stride % kChunk == 0) && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
                  "'s rows must begin on 16 bytes");
  return stride;
}

template <class E>
const E* data(const Optional& x) {
  return x.has_value() ? static_cast<const E*>(x->const_data_ptr()) : nullptr;
}

template <class E>
Tensor run(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& a, const Optional& bt,
           const Optional& m, const Optional& row_adapter, const Optional& residual, bool swiglu) {
  const int64_t rows = x.size(0), n = weight.size(0), k = weight.size(1), rank = a.has_value() ? a->size(0) : 0;
  STD_TORCH_CHECK(rows >= 1 && rows <= kMaxRows, "decode_linear takes 1 to ", kMaxRows, " rows, not ", rows);
  STD_TORCH_CHECK(k >= 1 && n >= 1 && k < (1 << 24) && n < (1 << 24), "weight is empty or beyond 2^24");
  STD_TORCH_CHECK(rank <= kRank, "decode_linear takes ranks up to ", kRank, " in all, not ", rank);
  STD_TORCH_CHECK(a.has_value() == bt.has_value() && a.has_value() == m.has_value(), "A, Bt and M come together");
  STD_TORCH_CHECK(!swiglu || (n % 2 == 0 && !residual.has_value()), "SwiGLU takes an even N and no residual");
  for (const Optional& other : {Optional(weight), bias, a, bt, residual})
    STD_TORCH_CHECK(!other.has_value() || (other->scalar_type() == x.scalar_type() && other->get_device() == x.get_device()),
                    "all tensors must have x's dtype and device");
  Problem<E> p{};
  p.shape = {static_cast<int>(rows), static_cast<int>(n), static_cast<int>(k), static_cast<int>(rank), 1, swiglu};
  p.ldx = aligned_rows_of(x, "x", rows, k);
  p.ldw = aligned_rows_of(weight, "weight", n, k);
  if (rank) {
    p.shape.r = static_cast<int>(m->size(3));
    STD_TORCH_CHECK(m->dim() == 4 && m->size(1) * m->size(2) == rank && m->size(2) == m->size(3) && m->is_contiguous() &&
                        m->scalar_type() == ScalarType::Float && m->get_device() == x.get_device(),
                    "M must be (adapters, segments, r, r), fp32 and contiguous");
    p.lda = aligned_rows_of(*a, "A", rank, k);
    p.ldb = rows_of(*bt, "Bt", rank, n);
  }
  if (row_adapter.has_value())
    STD_TORCH_CHECK(row_adapter->dim() == 1 && row_adapter->size(0) == rows && row_adapter->is_contiguous() &&
                        row_adapter->scalar_type() == ScalarType::Long && row_adapter->get_device() == x.get_device(),
                    "row_adapter must be (T,) int64");
  if (bias.has_value()) STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous(), "bias must be (N,)");
  if (residual.has_value()) p.ldr = rows_of(*residual, "residual", rows, n);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  cudaSetDevice(x.get_device());  // this library has a CUDA runtime of its own, and that a current device of its own
  Plan plan;
  STD_TORCH_CHECK(make_plan(p.shape, device_of(x.get_device()), &plan), "no tile fits into this GPU's shared memory");
  Tensor y = torch::stable::new_empty(x, {rows, swiglu ? n / 2 : n});
  Tensor scratch = torch::stable::new_empty(x, {plan.splits > 1 ? plan.splits * rows * (n + kRank) : 0}, ScalarType::Float);
  p.splits = plan.splits;
  p.x = static_cast<const E*>(x.const_data_ptr());
  p.weight = static_cast<const E*>(weight.const_data_ptr());
  p.a = data<E>(a), p.bt = data<E>(bt), p.bias = data<E>(bias), p.residual = data<E>(residual);
  p.m = data<float>(m), p.adapter = data<int64_t>(row_adapter);
  p.y = static_cast<E*>(y.mutable_data_ptr());
  p.partial = static_cast<float*>(scratch.mutable_data_ptr());
  p.shrunk = p.partial + plan.splits * rows * n;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  const cudaError_t error = run_decode_linear(p, plan, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "decode_linear: ", cudaGetErrorString(error));
  return y;
}

Tensor decode_linear_op(const Tensor& x, const Tensor& weight, Optional bias, Optional a, Optional bt, Optional m,
                        Optional row_adapter, Optional residual, bool swiglu) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be (T, K) and weight (N, K)");
  if (x.scalar_type() == ScalarType::BFloat16)
    return run<__nv_bfloat16>(x, weight, bias, a, bt, m, row_adapter, residual, swiglu);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "decode_linear takes bfloat16 and float16");
  return run<__half>(x, weight, bias, a, bt, m, row_adapter, residual, swiglu);
}

}  // namespace
}  // namespace tinylora

STABLE_TORCH_LIBRARY_FRAGMENT(tinylora, m) {
  m.def(
      "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? A, Tensor? Bt, Tensor? M, Tensor? row_adapter, "
      "Tensor? residual, bool swiglu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tinylora, CUDA, m) { m.impl("decode_linear", TORCH_BOX(&tinylora::decode_linear_op)); }
