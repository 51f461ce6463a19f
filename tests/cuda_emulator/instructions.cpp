// The instructions that wait for others or read shared memory.
#include "fibers.hpp"
#include "instructions.hpp"

// ---- the block ---------------------------------------------------------------------------

void __syncthreads() {
  using namespace emulator;
  if (alive != int(fibers.size())) fail("a barrier that threads which have ended do not reach" + where());
  meet(block, "__syncthreads", now->index, fibers.size(), nullptr, [](void**, const void*) {});
}

// ---- shared memory: addresses and asynchronous copies ---------------------------------------

uint32_t tvm_builtin_cuda_cvta_generic_to_shared(void* pointer) {
  char* p = (char*)pointer;
  if (p >= __start_block_memory && p < __stop_block_memory) return emulator::STATIC + uint32_t(p - __start_block_memory);
  return uint32_t(p - emulator::dynamic_memory);
}

namespace emulator {
static void copy(const Copy& c) {
  char* to = shared(c.to, 16);
  memcpy(to, c.from, c.size);
  memset(to + c.size, 0, 16 - c.size);
  now->unpublished = true;
}
static void copy_async(uint32_t to, const void* from, uint32_t size) {
  if (to % 16 || uintptr_t(from) % 16) fail_here("cp.async of memory that is not aligned to 16 bytes");
  if (size > 16) fail_here("cp.async of more than 16 bytes");
  if (late) now->open.push_back({to, from, size});
  else copy({to, from, size});
}
static void wait_copies(size_t left) {
  for (auto& groups = now->groups; groups.size() > left; groups.pop_front())
    for (auto& c : groups.front()) copy(c);
}
}  // namespace emulator

void tvm_builtin_ptx_cp_async_cg_async_cg_shared_global_16(uint32_t to, const void* from) { emulator::copy_async(to, from, 16); }
void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t to, const void* from, uint32_t size) {
  emulator::copy_async(to, from, size);
}
void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() {
  emulator::now->groups.push_back(std::move(emulator::now->open));
  emulator::now->open.clear();
}
#define WAIT(n) \
  void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##n() { emulator::wait_copies(n); }
WAIT(0) WAIT(1) WAIT(2) WAIT(3) WAIT(4) WAIT(5)
#undef WAIT

// ---- reads of 16 bytes -----------------------------------------------------------------------

void tvm_builtin_ptx_ld_vec_global_nc_L1__no_allocate_v4_u32(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* from) {
  if (uintptr_t(from) % 16) emulator::fail_here("a read of 16 bytes that is not aligned to them");
  uint32_t words[4];
  memcpy(words, from, 16);
  r0 = words[0], r1 = words[1], r2 = words[2], r3 = words[3];
}

void tvm_builtin_ptx_ld_vec_shared_v4_f32(float& r0, float& r1, float& r2, float& r3, uint32_t from) {
  if (from % 16) emulator::fail_here("a read of 16 bytes that is not aligned to them");
  float floats[4];
  memcpy(floats, emulator::shared(from, 16), 16);
  r0 = floats[0], r1 = floats[1], r2 = floats[2], r3 = floats[3];
}

// ---- matrices of a warp ----------------------------------------------------------------------

// PTX ISA, ldmatrix: lane l has two neighbours of row l / 4 of each matrix, or of its transpose.
template <bool transposed>
static void load_matrices(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t row) {
  struct Lane { uint32_t *r[4], row; } mine{{&r0, &r1, &r2, &r3}, row};
  if (row % 16) emulator::fail_here("ldmatrix of a row that is not aligned to 16 bytes");
  emulator::warp("ldmatrix", &mine, [](void** lanes, const void*) {
    for (int i = 0; i < 4; i++)
      for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) {
          int r = l / 4, column = l % 4 * 2 + h;
          if (transposed) std::swap(r, column);
          const char* from = emulator::shared(((Lane*)lanes[i * 8 + r])->row, 16);
          memcpy((char*)((Lane*)lanes[l])->r[i] + h * 2, from + column * 2, 2);
        }
  });
}
void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t row) {
  load_matrices<false>(r0, r1, r2, r3, row);
}
void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t row) {
  load_matrices<true>(r0, r1, r2, r3, row);
}

namespace emulator {
// PTX ISA, mma.m16n8k16: which elements of A, B and D a lane has.
template <class T>
static void multiply(float* const d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
  struct Lane { float* const* d; const uint32_t *a, *b; const float* c; } mine{d, a, b, c};
  warp("mma", &mine, [](void** lanes, const void*) {
    auto lane = [&](int l) -> Lane& { return *(Lane*)lanes[l]; };
    auto part = [](uint32_t word, int high) {
      T t;
      t.bits = high ? word >> 16 : word & 0xffff;
      return float(t);
    };
    float left[16][16], right[8][16];
    for (int l = 0; l < 32; l++)
      for (int h = 0; h < 2; h++) {
        for (int q = 0; q < 4; q++) left[l / 4 + q % 2 * 8][l % 4 * 2 + q / 2 * 8 + h] = part(lane(l).a[q], h);
        for (int q = 0; q < 2; q++) right[l / 4][l % 4 * 2 + q * 8 + h] = part(lane(l).b[q], h);
      }
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < 4; q++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += left[l / 4 + q / 2 * 8][k] * right[l % 4 * 2 + q % 2][k];
        *lane(l).d[q] = lane(l).c[q] + sum;
      }
  });
}
}  // namespace emulator

#define MMA(name, type)                                                                                              \
  void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_##name##_##name##_f32(                           \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,   \
      uint32_t b1, float c0, float c1, float c2, float c3) {                                                         \
    float* d[4] = {&d0, &d1, &d2, &d3};                                                                              \
    uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                               \
    float c[4] = {c0, c1, c2, c3};                                                                                   \
    emulator::multiply<type>(d, a, b, c);                                                                            \
  }
MMA(bf16, nv_bfloat16)
MMA(f16, half)
#undef MMA

// PTX ISA, mma.m16n8k8 of tf32: the low 13 bits of the factors are not read.
void tvm_builtin_ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
  struct Lane { float *d[4]; uint32_t a[4], b[2]; float c[4]; } mine{
      {&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  emulator::warp("mma", &mine, [](void** lanes, const void*) {
    auto lane = [&](int l) -> Lane& { return *(Lane*)lanes[l]; };
    auto factor = [](uint32_t word) { return float_of_bits(word & 0xffffe000); };
    float left[16][8], right[8][8];
    for (int l = 0; l < 32; l++) {
      for (int q = 0; q < 4; q++) left[l / 4 + q % 2 * 8][l % 4 + q / 2 * 4] = factor(lane(l).a[q]);
      for (int q = 0; q < 2; q++) right[l / 4][l % 4 + q * 4] = factor(lane(l).b[q]);
    }
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < 4; q++) {
        float sum = 0;
        for (int k = 0; k < 8; k++) sum += left[l / 4 + q / 2 * 8][k] * right[l % 4 * 2 + q % 2][k];
        *lane(l).d[q] = lane(l).c[q] + sum;
      }
  });
}
