// The matrix products with a 4-bit weight against double precision: every kernel, at full tiles and at their edges.
#include <cstdint>
#include <vector>

#include "cuda/linear_4bit_tile.cuh"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/product.h"

using namespace qlora_native;
using cuemu::Case;
using cuemu::check_one_hot;
using cuemu::gemv_plan;
using cuemu::Product;
using cuemu::tile_plan;

namespace {

// Full tiles, then edges in M and N and a K that leaves the pipeline of copies unfilled or wraps it around.
template <typename T>
void check_tile(int tile, bool forward) {
  const int64_t rows = cuda::kTiles[tile].rows;
  const int64_t columns = cuda::kTiles[tile].columns;
  const std::vector<Case> cases = {
      {rows, columns, 256, forward},
      {rows + 3, columns + 24, 64, forward, 16, forward},
      {rows - 5, 64 + 8, 128, forward, 8, forward, 32, false},
      {2 * rows - 1, 2 * columns - 8, 192, forward, 72, false, 64, true, QuantType::kFp4},
  };
  for (const Case& c : cases) {
    Product<T> product(c);
    product.check(tile_plan(c, tile, 1));
  }
}

TEST(tile_16_forward) { check_tile<Bf16>(0, true), check_tile<Fp16>(0, true); }
TEST(tile_16_input_gradient) { check_tile<Bf16>(0, false), check_tile<Fp16>(0, false); }
TEST(tile_32_forward) { check_tile<Bf16>(1, true), check_tile<Fp16>(1, true); }
TEST(tile_32_input_gradient) { check_tile<Bf16>(1, false), check_tile<Fp16>(1, false); }
TEST(tile_64_forward) { check_tile<Bf16>(2, true), check_tile<Fp16>(2, true); }
TEST(tile_64_input_gradient) { check_tile<Bf16>(2, false), check_tile<Fp16>(2, false); }
TEST(tile_128_forward) { check_tile<Bf16>(3, true), check_tile<Fp16>(3, true); }
TEST(tile_128_input_gradient) { check_tile<Bf16>(3, false), check_tile<Fp16>(3, false); }

// Splits of one step each, of unequal parts, and with the low-rank term and bias, which must be added once.
template <typename T>
void check_splits(bool forward) {
  const Case one_step{16, 192, 192, forward};
  const Case unequal{20, 328, 320, forward, 16, forward};
  const Case odd{9, forward ? 77 : 200, 448, forward, 4, forward, 64, false};
  for (const int tile : {0, 1, 2, 3}) {
    Product<T>(one_step).check(tile_plan(one_step, tile, 3));
    Product<T>(unequal).check(tile_plan(unequal, tile, 2));
    Product<T>(odd).check(tile_plan(odd, tile, 3));
  }
}

TEST(split_k_forward) { check_splits<Bf16>(true), check_splits<Fp16>(true); }
TEST(split_k_input_gradient) { check_splits<Bf16>(false), check_splits<Fp16>(false); }

template <typename T>
void check_odd_sizes() {
  // Rows of y, low and up that allow no vectors, and columns that end within one.
  const std::vector<Case> cases = {
      {5, 67, 64, true, 3, true}, {33, 1, 128, true, 17, true}, {17, 130, 64, true, 65, false}};
  for (const Case& c : cases) {
    for (const int tile : {0, 2}) {
      Product<T>(c).check(tile_plan(c, tile, 1));
    }
  }
  const Case few_ranks{17, 136, 64, false, 5};
  Product<T>(few_ranks).check(tile_plan(few_ranks, 1, 1));
}

TEST(odd_sizes) { check_odd_sizes<Bf16>(), check_odd_sizes<Fp16>(); }

template <typename T>
void check_large_blocks(bool forward) {
  for (const int64_t block : {128, 512}) {
    const Case c{16, 72, 512, forward, 0, false, block};
    Product<T>(c).check(tile_plan(c, 0, 1));
  }
}

TEST(large_blocks) {
  check_large_blocks<Bf16>(true);
  check_large_blocks<Fp16>(false);
}

// Bands of row tiles: more than eight, not a multiple of eight.
TEST(many_row_tiles) {
  const Case c{16 * 11 - 3, 136, 64};
  Product<Bf16>(c).check(tile_plan(c, 0, 1));
}

template <typename T>
void check_gemv() {
  for (int64_t m = 1; m <= 16; ++m) {
    const Case c{m, 40, 192, true, m % 3 == 0 ? 16 : 0, m % 2 == 0};
    Product<T> product(c);
    product.check(gemv_plan(c, m % 4 < 2 ? 16 : 64));
  }
  const std::vector<Case> cases = {
      {1, 64, 64, true},                                          // most warps have nothing to do
      {3, 33, 1024, true, 5, true},                               // every warp one step
      {8, 50, 2368, true, 8, true, 64, false},                    // some more turns, and half a step
      {4, 16, 1280, true, 0, false, 256, true, QuantType::kFp4},  // a scale for several steps of lanes
      {16, 130, 576, true, 16, true},
      {10, 67, 640, true, 0, false, 128, false},
  };
  for (const Case& c : cases) {
    Product<T> product(c);
    for (const int rows : {16, 32, 64}) {
      product.check(gemv_plan(c, rows));
    }
  }
}

TEST(gemv_bf16) { check_gemv<Bf16>(); }
TEST(gemv_fp16) { check_gemv<Fp16>(); }

TEST(decoded_to_the_last_bit) {
  for (const int64_t m : {3, 7, 16}) {
    const Case c{m, 72, 704, true, 0, false, 64, m != 7};
    check_one_hot<Bf16>(c, gemv_plan(c, 32)), check_one_hot<Fp16>(c, gemv_plan(c, 16));
  }
  for (const int tile : {0, 1, 2, 3}) {
    for (const bool forward : {true, false}) {
      const Case c{70, 136, 192, forward, 0, false, forward ? 32 : 64, tile % 2 == 0};
      check_one_hot<Bf16>(c, tile_plan(c, tile, 1)), check_one_hot<Fp16>(c, tile_plan(c, tile, 2));
    }
  }
}

TEST(turing_multiplies_fp16) {
  const cuemu::WithDevice turing(75);
  for (const bool forward : {true, false}) {
    const Case c{40, 72, 192, forward, 16};
    for (const int tile : {0, 1, 2}) {
      Product<Fp16>(c).check(tile_plan(c, tile, tile == 1 ? 2 : 1));
    }
  }
  const Case few{3, 40, 192, true, 8, true};
  Product<Fp16>(few).check(gemv_plan(few, 16));
}

TEST(same_plan_same_bits) {
  const Case c{20, 72, 512, true, 8, true};
  Product<Bf16> product(c);
  const cuda::MatmulPlan plan = tile_plan(c, 0, 4);
  std::vector<Bf16> first;
  cuemu::over_all_schedules([&](const char* schedule) {
    const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(c.m * c.n));
    CHECK_LAUNCH(product.launch(plan, y));
    const std::vector<Bf16> got = y.host();
    first = first.empty() ? got : first;
    for (size_t i = 0; i < got.size(); ++i) {
      CHECK(got[i].bits == first[i].bits, "%s: element %zu differs", schedule, i);
    }
  });
}

// The choice of plan_matmul, run as it is, on the stream given.
TEST(planned_products_run_on_their_stream) {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "a stream");
  for (const int64_t m : {1, 7, 12, 20, 40, 70}) {
    for (const bool forward : {true, false}) {
      const Case c{m, 136, 256, forward, 16};
      const cuda::MatmulPlan plan =
          cuda::plan_matmul({c.m, c.n, c.k, c.r, c.block_size, Dtype::kBfloat16, forward, false, 86, 84});
      Product<Bf16> product(c);
      product.check(plan);
      const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(m * product.columns()));
      cuemu::take_launches();
      CHECK_LAUNCH(product.launch(plan, y, stream));
      const std::vector<cuemu::Launch> launches = cuemu::take_launches();
      CHECK(launches.size() == (plan.splits > 1 ? 2 : 1), "%zu launches", launches.size());
      for (const cuemu::Launch& launch : launches) {
        CHECK(launch.stream == stream, "m %ld: a launch on another stream", static_cast<long>(m));
      }
      CHECK(launches[0].shared_bytes == static_cast<size_t>(plan.shared_bytes), "m %ld: %zu bytes of shared memory",
            static_cast<long>(m), launches[0].shared_bytes);
    }
  }
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "the stream");
}

TEST(replayed_from_a_graph) {
  const Case c{20, 72, 512, true, 8, true};
  Product<Bf16> product(c);
  const cuda::MatmulPlan plan = tile_plan(c, 1, 3);
  const cuemu::DeviceBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes));
  cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(c.m * c.n));
  CHECK_LAUNCH(product.launch(plan, y, workspace.data(), nullptr));
  const std::vector<Bf16> expected = y.host();
  y.clear();

  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "a stream");
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess, "a capture");
  CHECK_LAUNCH(product.launch(plan, y, workspace.data(), stream));
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "a graph");
  CHECK(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess, "an executable graph");
  CHECK(cudaGraphLaunch(replay, stream) == cudaSuccess, "a replay");
  const std::vector<Bf16> got = y.host();
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(got[i].bits == expected[i].bits, "element %zu differs", i);
  }
  CHECK(cudaGraphExecDestroy(replay) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess, "the graph");
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "the stream");
}

// What the layout in shared memory is for: ldmatrix meets each bank once.
TEST(no_bank_conflicts) {
  for (const bool forward : {true, false}) {
    for (const int tile : {0, 1, 2, 3}) {
      const Case c{cuda::kTiles[tile].rows, 256, 256, forward};
      Product<Bf16> product(c);
      const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(c.m * product.columns()));
      cuemu::counters() = {};
      CHECK_LAUNCH(product.launch(tile_plan(c, tile, 1), y));
      const cuemu::Counters& counted = cuemu::counters();
      CHECK((counted.ldmatrix == 0) == cuda::tile_of(forward, tile).fragments &&
                counted.ldmatrix_wavefronts == counted.ldmatrix,
            "tile %d: %lu passes for %lu", tile, static_cast<unsigned long>(counted.ldmatrix_wavefronts),
            static_cast<unsigned long>(counted.ldmatrix));
      CHECK(counted.mma * 2048 == static_cast<uint64_t>(c.m * c.n * c.k), "tile %d: %lu products", tile,
            static_cast<unsigned long>(counted.mma));
    }
  }
}

// Where a CTA of a product too large to run here would begin to read.
template <typename T, bool kForward>
__global__ void first_reads_kernel(const cuda::TileJob<T> job,
                                   int64_t* reads) {  // [3, threads]
  const cuda::Tile<T, cuda::Tile16, kForward> tile(job);
  cuda::Run<T, cuda::Tile16, kForward> run(tile);
  const cuda::Copies<T, cuda::Tile16, kForward> copies(tile);
  if (tile.split == 1) {
    const unsigned threads = blockDim.x;
    reads[threadIdx.x] = run.element;
    run.advance(job);
    reads[threads + threadIdx.x] = run.element;
    reads[2 * threads + threadIdx.x] = copies.from - job.x;
  }
}

TEST(indices_beyond_32_bits) {
  constexpr int64_t kLong = int64_t{1} << 34;
  constexpr int kThreads = cuda::Tile16::kThreads;
  const cuemu::DeviceBuffer<int64_t> reads(3 * kThreads);
  cuda::TileJob<Bf16> job{};
  job.m = 16;
  job.splits = 2;
  job.row_tiles = job.column_tiles = 1;
  job.reduction = kLong;

  job.k = kLong;
  job.columns = 64;
  CHECK_LAUNCH(wp::launch(first_reads_kernel<Bf16, true>, dim3(1, 2), dim3(kThreads),
                          static_cast<size_t>(cuda::Tile16::kSize.shared_bytes()), nullptr, job, reads.data()));
  std::vector<int64_t> got = reads.host();
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    const int64_t element = thread / 2 * kLong + kLong / 2 + thread % 2 * 32;
    CHECK(got[static_cast<size_t>(thread)] == element, "forward, thread %ld", static_cast<long>(thread));
    CHECK(got[static_cast<size_t>(kThreads + thread)] == element + 64, "forward, thread %ld",
          static_cast<long>(thread));
    CHECK(got[static_cast<size_t>(2 * kThreads + thread)] == thread / 8 * kLong + kLong / 2 + thread % 8 * 8,
          "x of thread %ld", static_cast<long>(thread));
  }

  job.k = 4096;  // 2^46 weights
  job.columns = 4096;
  CHECK_LAUNCH(wp::launch(first_reads_kernel<Bf16, false>, dim3(1, 2), dim3(kThreads),
                          static_cast<size_t>(cuda::Tile16::kSize.shared_bytes()), nullptr, job, reads.data()));
  got = reads.host();
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    const int64_t element = (kLong / 2 + thread / 2) * 4096 + thread % 2 * 32;
    CHECK(got[static_cast<size_t>(thread)] == element, "gradient, thread %ld", static_cast<long>(thread));
    CHECK(got[static_cast<size_t>(kThreads + thread)] == element + 64 * 4096, "gradient, thread %ld",
          static_cast<long>(thread));
  }
}

TEST(refused) {
  const Case c{17, 64, 64};
  Product<Bf16> product(c);
  const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(17 * 64));
  cuda::MatmulPlan plan = tile_plan(c, 0, 1);
  cuemu::take_launches();
  plan.kind = cuda::MatmulKind::kTwoStep;
  CHECK(product.launch(plan, y) == cudaErrorInvalidValue, "two steps are not one launch");
  CHECK(product.launch(gemv_plan(c, 16), y) == cudaErrorInvalidValue, "17 tokens");
  CHECK(product.launch(tile_plan(c, 0, 2), y) == cudaErrorInvalidValue, "more parts than steps");
  plan = tile_plan(c, 0, 1);
  plan.rows = 48;
  CHECK(product.launch(plan, y) == cudaErrorInvalidValue, "no such tile");
  const Case long_rows{17, 64, 128};
  Product<Bf16> in_parts(long_rows);
  plan = tile_plan(long_rows, 0, 2);
  --plan.workspace_bytes;
  CHECK(in_parts.launch(plan, y) == cudaErrorInvalidValue, "a workspace that is too small");
  for (const Case& irregular : {Case{17, 64, 96}, Case{17, 64, 64, true, 0, false, 128}, Case{17, 60, 64, false}}) {
    Product<Bf16> other(irregular);
    CHECK(other.launch(tile_plan(irregular, 0, 1), y) == cudaErrorInvalidValue, "rows of %ld in blocks of %ld",
          static_cast<long>(irregular.k), static_cast<long>(irregular.block_size));
  }
  ProductJob wide{};
  wide.dtype = Dtype::kBfloat16;
  wide.forward = true;
  wide.weight.block_size = 64;
  wide.m = 17, wide.n = 64, wide.k = int64_t{1} << 31;
  CHECK(cuda::launch_linear_4bit(wide, tile_plan({17, 64, wide.k}, 1, 1), nullptr, nullptr) == cudaErrorInvalidValue,
        "columns beyond 32 bits");
  CHECK(cuemu::take_launches().empty(), "a launch");
}

TEST(nothing_to_multiply) {
  cuemu::take_launches();
  ProductJob call{};
  call.dtype = Dtype::kBfloat16;
  call.forward = true;
  call.n = call.k = 64;
  CHECK_LAUNCH(cuda::launch_linear_4bit(call, tile_plan({16, 64, 64}, 0, 1), nullptr, nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
