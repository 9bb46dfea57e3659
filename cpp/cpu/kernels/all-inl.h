// Every CPU kernel, once. Each isa_*.cc names a namespace and includes this with its own compiler flags.
//
// No standard-library templates in here: an instantiation compiled for AVX-512 could be the one the linker keeps.
#include "core/layout.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/activations-inl.h"
#include "cpu/kernels/attention-grad-inl.h"
#include "cpu/kernels/dequantize-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/optim-inl.h"
#include "cpu/kernels/quantize-inl.h"
#include "cpu/kernels/scales-inl.h"
// What builds on them.
#include "cpu/kernels/dense-inl.h"
#include "cpu/kernels/gemm-bf16dot-inl.h"
#include "cpu/kernels/gptq-inl.h"
#include "cpu/kernels/outer-inl.h"
#include "cpu/kernels/rows-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr Kernels kTable = {
    {quantize_blocks<float>, quantize_blocks<Bf16>, quantize_blocks<Fp16>},
    {dequantize_span<float>, dequantize_span<Bf16>, dequantize_span<Fp16>},
    sum_groups,
    quantize_scale_groups,
    decode_scales,
    {kRows<float>, kRows<Bf16>, kRows<Fp16>},
    {dense_rows<float, float>, dense_rows<Bf16, Bf16>, dense_rows<Fp16, Fp16>},
    {dense_rows<float, float>, dense_rows<Bf16, float>, dense_rows<Fp16, float>},
    {kGemm<float>, kGemmBf16, kGemm<Fp16>},
    nullptr,
    kOptimTable,
    kActivations,
    {attention_kernels<float>(), attention_kernels<Bf16>(), attention_kernels<Fp16>()},
    kCalibration,
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
