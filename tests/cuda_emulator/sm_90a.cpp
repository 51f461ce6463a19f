// Barriers, boxes and products of sm_90a, which happen when they are waited for if copies are late.
#include "fibers.hpp"
#include "sm_90a.hpp"
#include <map>

namespace emulator {

struct Box { CUtensorMap map; uint32_t to; int column, row; };
struct Barrier { int count, pending; int64_t bytes; long phase; std::vector<Box> open; };
struct Product { uint64_t a, b; bool adds; int columns; float* sums[128][128]; float (*part)(uint16_t); };
struct Group { Meeting meeting; std::vector<Product> open; std::deque<std::vector<Product>> groups; };

static std::map<uint32_t, Barrier> barriers;  // by address
static std::map<int, Group> groups;           // by number of the warpgroup

static void start_anew() {
  barriers.clear();
  groups.clear();
}
static bool registered = (block_starts.push_back(start_anew), true);

// ---- barriers --------------------------------------------------------------------------------

static Barrier& barrier(uint32_t address) {
  auto entry = barriers.find(address);
  if (entry == barriers.end()) fail_here("an mbarrier is used before its init");
  return entry->second;
}

static void complete(Barrier& b) {
  if (b.pending < 0) fail_here("more threads arrive at an mbarrier than its count");
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  b.phase++;
  stuck = 0;
}

// ---- boxes -----------------------------------------------------------------------------------

static uint32_t swizzled(uint32_t address, int kind) {
  return kind ? address ^ (address >> 7 & ((1 << kind) - 1)) << 4 : address;
}

static void copy(Barrier& b, const Box& box) {
  const CUtensorMap& m = box.map;
  for (int r = 0; r < m.box_rows; r++)
    for (int c = 0; c < m.box_columns; c++) {
      char* to = shared(swizzled(box.to + (r * m.box_columns + c) * m.size, m.swizzle), m.size);
      bool inside = box.row + r < m.rows && box.column + c < m.columns;
      if (inside) memcpy(to, m.base + (box.row + r) * m.stride + (box.column + c) * m.size, m.size);
      else memset(to, 0, m.size);
    }
  b.bytes -= m.box_rows * m.box_columns * m.size;
  complete(b);
}

// ---- products --------------------------------------------------------------------------------

static Group& group() { return groups[now->index / 128]; }

static void warpgroup(const char* what, void* brought, Action action, const void* context = nullptr) {
  meet(group().meeting, what, now->index % 128, 128, brought, action, context);
}

// PTX ISA, matrix descriptor: K-major with the 128-byte swizzle.
static float element(const Product& p, uint64_t descriptor, int row, int k) {
  uint32_t stride = (descriptor >> 32 & 0x3fff) * 16;
  uint32_t address = (descriptor & 0x3fff) * 16 + row / 8 * stride + row % 8 * 128 + k * 2;
  uint16_t bits;
  memcpy(&bits, shared(swizzled(address, 3), 2), 2);
  return p.part(bits);
}

// PTX ISA, wgmma m64nNk16: which elements of D a thread has.
static void multiply(const Product& p) {
  static float a[64][16], b[256][16];
  for (int k = 0; k < 16; k++) {
    for (int i = 0; i < 64; i++) a[i][k] = element(p, p.a, i, k);
    for (int j = 0; j < p.columns; j++) b[j][k] = element(p, p.b, j, k);
  }
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < p.columns; j++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[i][k] * b[j][k];
      float& d = *p.sums[i / 16 * 32 + i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i % 16 / 8 * 2 + j % 2];
      d = p.adds ? d + sum : sum;
    }
}

static void multiply_until(size_t left) {
  for (auto& open = group().groups; open.size() > left; open.pop_front())
    for (auto& p : open.front()) multiply(p);
}

struct Lane { std::vector<float*> sums; uint64_t a, b; bool adds; float (*part)(uint16_t); };

static void multiply_group(Lane& mine) {
  warpgroup("wgmma", &mine, [](void** lanes, const void*) {
    static Product p;
    auto lane = [&](int i) -> Lane& { return *(Lane*)lanes[i]; };
    p.a = lane(0).a, p.b = lane(0).b, p.adds = lane(0).adds, p.part = lane(0).part;
    p.columns = lane(0).sums.size() * 2;
    for (int i = 0; i < 128; i++) {
      if (lane(i).a != p.a || lane(i).b != p.b) fail_here("a warpgroup gives several descriptors");
      memcpy(p.sums[i], lane(i).sums.data(), p.columns / 2 * sizeof(float*));
    }
    if (late) group().open.push_back(p);
    else multiply(p);
  });
}

template <class T> static float float_of(uint16_t bits) {
  T t;
  t.bits = bits;
  return float(t);
}

}  // namespace emulator

void tvm_builtin_ptx_setmaxnreg_dec_sync_aligned_u32_56() {}
void tvm_builtin_ptx_setmaxnreg_inc_sync_aligned_u32_224() {}
void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster() {}
void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() { emulator::now->unpublished = false; }
void tvm_builtin_ptx_mbarrier_init_init_shared_b64(uint32_t address, uint32_t count) {
  emulator::barriers[address] = {int(count), int(count), 0, 0, {}};
}
void tvm_builtin_ptx_mbarrier_arrive_nocount_arrive_shared_b64(uint32_t address) {
  auto& b = emulator::barrier(address);
  if (emulator::now->unpublished) emulator::fail_here("copies are handed to wgmma without fence.proxy.async");
  b.pending--;
  emulator::complete(b);
}
void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared_b64(uint32_t address, uint32_t bytes) {
  auto& b = emulator::barrier(address);
  b.bytes += bytes;
  b.pending--;
  emulator::complete(b);
}
void tvm_builtin_cuda_mbarrier_wait(void* pointer, int parity) {
  uint32_t address = tvm_builtin_cuda_cvta_generic_to_shared(pointer);
  auto& b = emulator::barrier(address);
  emulator::now->waits = "the mbarrier at " + std::to_string(address % emulator::STATIC) + ", parity " + std::to_string(parity);
  for (bool first = true; (b.phase & 1) == parity; first = false) {
    if (first || b.open.empty()) {
      emulator::yield();
      continue;
    }
    auto boxes = std::move(b.open);
    b.open.clear();
    for (auto& box : boxes) emulator::copy(b, box);
  }
}
void tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_2d_shared__cluster_global_tile_mbarrier__complete_tx__bytes(
    uint32_t to, const void* map, int column, int row, uint32_t address) {
  emulator::Box box{*(const CUtensorMap*)map, to, column, row};
  auto& b = emulator::barrier(address);
  if (to % 1024) emulator::fail_here("a box with the 128-byte swizzle is not aligned to 1024 bytes");
  if (emulator::late) b.open.push_back(box);
  else emulator::copy(b, box);
}
void ptx_wgmma_encode_matrix_descriptor(uint64_t* descriptor, void* matrix, int leading, int stride, int swizzle) {
  if (swizzle != 3) emulator::fail("only the 128-byte swizzle is emulated");
  uint64_t address = tvm_builtin_cuda_cvta_generic_to_shared(matrix) >> 4 & 0x3fff;
  *descriptor = address | uint64_t(leading) << 16 | uint64_t(stride) << 32 | 1ull << 62;
}
void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned() {}
void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned() {
  emulator::warpgroup("wgmma.commit_group", nullptr, [](void**, const void*) {
    auto& group = emulator::group();
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}
#define WAIT(n)                                                                                            \
  void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_##n() {                             \
    emulator::warpgroup("wgmma.wait_group", nullptr, [](void**, const void*) { emulator::multiply_until(n); });         \
  }
WAIT(0) WAIT(1) WAIT(2) WAIT(3)
#undef WAIT

#define TAKE(n) lane.sums.insert(lane.sums.end(), {&a##n, &b##n, &c##n, &d##n});
#define TAKE_128                                                                                           \
  TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7)                                          \
  TAKE(8) TAKE(9) TAKE(10) TAKE(11) TAKE(12) TAKE(13) TAKE(14) TAKE(15)
#define TAKE_256                                                                                           \
  TAKE_128 TAKE(16) TAKE(17) TAKE(18) TAKE(19) TAKE(20) TAKE(21) TAKE(22) TAKE(23)                         \
  TAKE(24) TAKE(25) TAKE(26) TAKE(27) TAKE(28) TAKE(29) TAKE(30) TAKE(31)
#define DEFINE(name, n, type)                                                                              \
  WGMMA(name, n) {                                                                                         \
    emulator::Lane lane{{}, a, b, adds != 0, emulator::float_of<type>};                                    \
    TAKE_##n                                                                                               \
    emulator::multiply_group(lane);                                                                        \
  }
DEFINE(bf16, 128, nv_bfloat16)
DEFINE(f16, 128, half)
DEFINE(bf16, 256, nv_bfloat16)
DEFINE(f16, 256, half)
