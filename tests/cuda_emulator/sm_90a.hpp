// What sm_90a adds: barriers that copies complete, boxes copied by TMA, products of four warps.
#pragma once
#include "instructions.hpp"

// What the host encodes (emulate.py) for a matrix; the driver's own is opaque.
struct alignas(64) CUtensorMap { char* base; int64_t columns, rows, stride, box_columns, box_rows, size, swizzle, unused[8]; };

void tvm_builtin_ptx_setmaxnreg_dec_sync_aligned_u32_56();
void tvm_builtin_ptx_setmaxnreg_inc_sync_aligned_u32_224();
void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster();
void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta();
void tvm_builtin_ptx_mbarrier_init_init_shared_b64(uint32_t address, uint32_t count);
void tvm_builtin_ptx_mbarrier_arrive_nocount_arrive_shared_b64(uint32_t address);
void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared_b64(uint32_t address, uint32_t bytes);
void tvm_builtin_cuda_mbarrier_wait(void* pointer, int parity);
void tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_2d_shared__cluster_global_tile_mbarrier__complete_tx__bytes(
    uint32_t to, const void* map, int column, int row, uint32_t address);
void ptx_wgmma_encode_matrix_descriptor(uint64_t* descriptor, void* matrix, int leading, int stride, int swizzle);
void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned();
void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned();
#define WAIT(n) void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_##n();
WAIT(0) WAIT(1) WAIT(2) WAIT(3)
#undef WAIT

#define FOUR(n) float &a##n, float &b##n, float &c##n, float &d##n
#define SUMS_128                                                                                           \
  FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10),      \
      FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)
#define SUMS_256                                                                                           \
  SUMS_128, FOUR(16), FOUR(17), FOUR(18), FOUR(19), FOUR(20), FOUR(21), FOUR(22), FOUR(23), FOUR(24),      \
      FOUR(25), FOUR(26), FOUR(27), FOUR(28), FOUR(29), FOUR(30), FOUR(31)
#define WGMMA(name, n)                                                                                     \
  void tvm_builtin_ptx_wgmma_##name##_ss_mma_async_sync_aligned_m64n##n##k16_f32_##name##_##name##_1_1_0_0( \
      SUMS_##n, uint64_t a, uint64_t b, int adds)
WGMMA(bf16, 128);
WGMMA(f16, 128);
WGMMA(bf16, 256);
WGMMA(f16, 256);
