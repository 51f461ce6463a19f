// Each function that TVM writes around one PTX instruction, and the CUDA functions that kernels
// call, under their names: what is missing here is an error when a kernel is compiled.
#pragma once
#include "block.hpp"
#include "types.hpp"
#include <initializer_list>

template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T max(T a, T b) { return a > b ? a : b; }

// ---- the block ---------------------------------------------------------------------------

void __syncthreads();

static int atomicAdd(int* to, int value) {
  int before = *to;
  *to += value;
  return before;
}

// ---- values of the lanes of a warp ---------------------------------------------------------

static int __syncwarp() {
  emulator::warp("__syncwarp", nullptr, [](void**, const void*) {});
  return 0;
}

// Every lane gives a value and gets what `choose` makes of all 32.
template <class T, class R, class Choose>
static R exchange(const char* what, unsigned mask, T value, Choose choose) {
  struct Lane { T value; R result; } mine{value, R()};
  if (mask != 0xffffffffu) emulator::fail(what, " of a part of a warp is not emulated");
  emulator::warp(what, &mine, [](void** lanes, const void* context) {
    const Choose& choose = *(const Choose*)context;
    T values[32];
    for (int l = 0; l < 32; l++) values[l] = ((Lane*)lanes[l])->value;
    for (int l = 0; l < 32; l++) ((Lane*)lanes[l])->result = choose(values, l);
  }, &choose);
  return mine.result;
}

template <class T> static T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return exchange<T, T>("__shfl_xor_sync", mask, value, [lanes](T* v, int l) { return v[l ^ lanes]; });
}
template <class T> static T __shfl_sync(unsigned mask, T value, int lane) {
  return exchange<T, T>("__shfl_sync", mask, value, [lane](T* v, int) { return v[lane & 31]; });
}
static int __reduce_max_sync(unsigned mask, int value) {
  return exchange<int, int>("__reduce_max_sync", mask, value, [](int* v, int) {
    int r = v[0];
    for (int l = 1; l < 32; l++) r = max(r, v[l]);
    return r;
  });
}
static int __reduce_min_sync(unsigned mask, int value) {
  return exchange<int, int>("__reduce_min_sync", mask, value, [](int* v, int) {
    int r = v[0];
    for (int l = 1; l < 32; l++) r = min(r, v[l]);
    return r;
  });
}
static unsigned __ballot_sync(unsigned mask, int condition) {
  return exchange<int, unsigned>("__ballot_sync", mask, condition, [](int* v, int) {
    unsigned r = 0;
    for (int l = 0; l < 32; l++) r |= unsigned(v[l] != 0) << l;
    return r;
  });
}
static unsigned __match_any_sync(unsigned mask, int value) {
  return exchange<int, unsigned>("__match_any_sync", mask, value, [](int* v, int mine) {
    unsigned r = 0;
    for (int l = 0; l < 32; l++) r |= unsigned(v[l] == v[mine]) << l;
    return r;
  });
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---- shared memory: addresses and asynchronous copies ---------------------------------------

uint32_t tvm_builtin_cuda_cvta_generic_to_shared(void* pointer);
void tvm_builtin_ptx_cp_async_cg_async_cg_shared_global_16(uint32_t to, const void* from);
void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t to, const void* from, uint32_t size);
void tvm_builtin_ptx_cp_async_commit_group_async_commit_group();
#define WAIT(n) void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##n();
WAIT(0) WAIT(1) WAIT(2) WAIT(3) WAIT(4) WAIT(5)
#undef WAIT

// ---- reads of 16 bytes -----------------------------------------------------------------------

void tvm_builtin_ptx_ld_vec_global_nc_L1__no_allocate_v4_u32(
    uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* from);
void tvm_builtin_ptx_ld_vec_shared_v4_f32(float& r0, float& r1, float& r2, float& r3, uint32_t from);

// ---- matrices of a warp ----------------------------------------------------------------------

void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(
    uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t row);
void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(
    uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t row);

void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3);
void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3);
void tvm_builtin_ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3);

static void tvm_builtin_ptx_mov_s32(int& d, int a) { d = a; }

// To nearest, ties away from zero; NaN and infinities stay.
static void tvm_builtin_ptx_cvt_tf32_f32_rna_tf32_f32(uint32_t& d, float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  d = (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

template <class T> static uint32_t pair_of(float high, float low) { return uint32_t(T(high).bits) << 16 | T(low).bits; }
static void tvm_builtin_ptx_cvt_bf16x2_f32_rn_bf16x2_f32(uint32_t& d, float high, float low) { d = pair_of<nv_bfloat16>(high, low); }
static void tvm_builtin_ptx_cvt_f16x2_f32_rn_f16x2_f32(uint32_t& d, float high, float low) { d = pair_of<half>(high, low); }

// What kernels make of codes is exact in half; other results may be rounded twice here.
static void tvm_builtin_ptx_fma_half_rn_f16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift : {0, 16}) {
    half x, y, z;
    x.bits = a >> shift, y.bits = b >> shift, z.bits = c >> shift;
    result |= uint32_t(half(float(double(float(x)) * float(y) + float(z))).bits) << shift;
  }
  d = result;
}
