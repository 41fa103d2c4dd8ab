#include "testing/block_emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define KD_FIBERS_ARE_SANITIZED 1
#endif

namespace kd::emulation {

class SharedArray {
 public:
  SharedArray(size_t elements, size_t element_bytes)
      : elements(elements), element_bytes(element_bytes), bytes(elements * element_bytes), cells(elements) {}

  // Who touched an element last. Accesses of one warp between two of its exchanges count like those between barriers.
  struct Cell {
    bool written = false, atomic = false;
    int writer = -1, reader = -1;  // -2: several
    uint64_t write_epoch = 0, read_epoch = 0;
    uint64_t write_warp_epoch = 0, read_warp_epoch = 0;
    uint64_t write_cluster_epoch = 0, peer_read_cluster_epoch = 0;
  };

  size_t elements, element_bytes;
  std::vector<char> bytes;
  std::vector<Cell> cells;
  std::pair<const void*, int> declaration;  // by which the other blocks of a cluster have theirs
};

namespace {

constexpr size_t stack_bytes = 256 << 10;

enum class State { ready, at_barrier, at_exchange, at_cluster_barrier, done };

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* sanitizer_stack = nullptr;
  State state = State::ready;
  int line = 0;
  unsigned mask = 0;
  Exchange kind = Exchange::shuffle;
  Index3 index;
  uint64_t given = 0;                 // to the exchange it waits at
  uint64_t received[warp_size] = {};  // of the last exchange, by lane
};

class Block;
Block* active_block = nullptr;

// The blocks that run side by side, in the order of their ranks.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t epoch = 1;
};

class Block {
 public:
  Block(const Launch& launch, const std::function<void()>& kernel, Cluster& cluster, int rank)
      : cluster_(cluster),
        rank_(rank),
        launch_(launch),
        kernel_(kernel),
        threads_(int(launch.block.x * launch.block.y * launch.block.z)) {
    fibers_.resize(threads_);
    warp_epochs_.resize((threads_ + warp_size - 1) / warp_size);
    for (int i = 0; i < threads_; ++i) {
      fibers_[i] = std::make_unique<Fiber>();
      fibers_[i]->index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                           i / (launch.block.x * launch.block.y)};
    }
  }

  void begin(Index3 block) {
    block_ = block;
    epoch_ = 1;
    std::fill(warp_epochs_.begin(), warp_epochs_.end(), 1);
    arrays_.clear();
    dynamic_.reset();
    error_ = nullptr;
    for (auto& fiber : fibers_) start(*fiber);
  }

  // Runs every thread until it waits, and lets go on those that wait for this block alone. False: nothing could be done.
  bool advance() {
    active_block = this;
    bool progress = false;
    for (current_ = 0; current_ < threads_ && !error_; ++current_) {
      if (fibers_[current_]->state != State::ready) continue;
      progress = true;
      resume(*fibers_[current_]);
    }
    if (!error_) progress = release_warps() || release_barrier() || progress;
    active_block = nullptr;
    if (error_) std::rethrow_exception(error_);
    return progress;
  }

  bool all_in(State state) const {
    return std::all_of(fibers_.begin(), fibers_.end(), [&](const auto& fiber) { return fiber->state == state; });
  }

  void release_from_cluster_barrier() {
    for (auto& fiber : fibers_) fiber->state = State::ready;
    ++epoch_;
  }

  // The fault of threads that can never go on.
  [[noreturn]] void complain() const {
    for (int i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state == State::at_barrier)
        throw Fault(where(fiber.line, i) + "a block barrier that not all threads reach");
      if (fiber.state == State::at_cluster_barrier)
        throw Fault(where(fiber.line, i) + "a cluster barrier that not all threads reach");
      if (fiber.state == State::at_exchange)
        throw Fault(where(fiber.line, i) + "a warp's exchange that not all lanes of its mask reach");
    }
    throw Fault("the emulator is stuck");
    // The fibers that wait are left where they are: a kernel's frame holds nothing that must be destroyed.
  }

  int rank() const { return rank_; }

  char* peer_access(const SharedArray& array, int line, int64_t index, int rank) {
    const auto fail = [&](const std::string& what) {
      throw Fault(where(line, current_) + "shared memory of block " + std::to_string(rank) + " of the cluster" + what);
    };
    if (rank < 0 || rank >= static_cast<int>(cluster_.blocks.size())) fail(", which has fewer");
    Block& peer = *cluster_.blocks[rank];
    if (peer.all_in(State::done)) fail(": the block has ended");
    const auto found = peer.arrays_.find(array.declaration);
    if (found == peer.arrays_.end()) fail(" is read before it is there");
    SharedArray& theirs = *found->second;
    if (index < 0 || index >= static_cast<int64_t>(theirs.elements))
      fail(": index " + std::to_string(index) + " of " + std::to_string(theirs.elements));
    auto& cell = theirs.cells[index];
    if (!cell.written) fail(" is read before it is written, index " + std::to_string(index));
    if (&peer != this && cell.write_cluster_epoch == cluster_.epoch)
      fail(", index " + std::to_string(index) + ": it was written, and no cluster barrier lies between");
    if (&peer != this) cell.peer_read_cluster_epoch = cluster_.epoch;
    return theirs.bytes.data() + index * theirs.element_bytes;
  }

  Fiber& current() { return *fibers_[current_]; }
  int current_number() const { return current_; }
  Index3 block() const { return block_; }
  const Launch& launch() const { return launch_; }

  std::string where(int line, int thread) const {
    return std::string(launch_.kernel) + ", line " + std::to_string(line) + ", block (" + std::to_string(block_.x) +
           ", " + std::to_string(block_.y) + ", " + std::to_string(block_.z) + "), thread " + std::to_string(thread) +
           ": ";
  }

  void wait(State state, int line) {
    Fiber& fiber = current();
    fiber.state = state;
    fiber.line = line;
    leave(fiber, false);
  }

  const uint64_t* exchange(int line, unsigned mask, Exchange kind, uint64_t value) {
    Fiber& fiber = current();
    if (!(mask >> (current_ % warp_size) & 1))
      throw Fault(where(line, current_) + "the mask of a warp's exchange lacks this lane");
    fiber.given = value;
    fiber.mask = mask;
    fiber.kind = kind;
    wait(State::at_exchange, line);
    return fiber.received;
  }

  SharedArray& shared(const void* declaration, int line, size_t elements, size_t element_bytes) {
    auto& array = arrays_[{declaration, line}];
    if (!array) {
      array = std::make_unique<SharedArray>(elements, element_bytes);
      array->declaration = {declaration, line};
    }
    return *array;
  }

  SharedArray& dynamic(int line, size_t element_bytes) {
    if (!dynamic_)
      dynamic_ = std::make_unique<SharedArray>(launch_.dynamic_shared_bytes / element_bytes, element_bytes);
    if (dynamic_->element_bytes != element_bytes)
      throw Fault(where(line, current_) + "dynamic shared memory is read as elements of two sizes");
    return *dynamic_;
  }

  enum class Access { read, write, atomic };

  char* access(SharedArray& array, int line, int64_t index, Access kind) {
    if (index < 0 || index >= static_cast<int64_t>(array.elements))
      throw Fault(where(line, current_) + "shared memory: index " + std::to_string(index) + " of " +
                  std::to_string(array.elements));
    auto& cell = array.cells[index];
    const uint64_t warp_epoch = warp_epochs_[current_ / warp_size];
    const auto conflicts = [&](int other, uint64_t epoch, uint64_t other_warp_epoch) {
      if (other == -1 || other == current_ || epoch != epoch_) return false;
      // Within a warp, an exchange between the two orders them.
      return other == -2 || other / warp_size != current_ / warp_size || other_warp_epoch == warp_epoch;
    };
    if (kind == Access::read && !cell.written)
      throw Fault(where(line, current_) + "shared memory is read before it is written, index " + std::to_string(index));
    const bool both_atomic = kind == Access::atomic && cell.atomic;
    if (!both_atomic && conflicts(cell.writer, cell.write_epoch, cell.write_warp_epoch))
      throw Fault(where(line, current_) + "shared memory, index " + std::to_string(index) + ": thread " +
                  std::to_string(cell.writer) + " wrote it, and no barrier lies between");
    if (kind != Access::read && !both_atomic && conflicts(cell.reader, cell.read_epoch, cell.read_warp_epoch))
      throw Fault(where(line, current_) + "shared memory, index " + std::to_string(index) + ": thread " +
                  std::to_string(cell.reader) + " reads it, and no barrier lies between");
    if (kind != Access::read && cell.peer_read_cluster_epoch == cluster_.epoch)
      throw Fault(where(line, current_) + "shared memory, index " + std::to_string(index) +
                  ": another block of the cluster reads it, and no cluster barrier lies between");
    if (kind == Access::read) {
      const bool others_read = cell.reader != -1 && cell.reader != current_ && cell.read_epoch == epoch_;
      const bool same_warp = cell.reader >= 0 && cell.reader / warp_size == current_ / warp_size;
      cell.reader = others_read && !same_warp ? -2 : current_;
      cell.read_epoch = epoch_;
      cell.read_warp_epoch = warp_epoch;
    } else {
      if (kind == Access::atomic && !cell.written)
        throw Fault(where(line, current_) + "an atomic reads shared memory before it is written, index " +
                    std::to_string(index));
      cell.written = true;
      cell.atomic = kind == Access::atomic;
      cell.writer = current_;
      cell.write_epoch = epoch_;
      cell.write_warp_epoch = warp_epoch;
      cell.write_cluster_epoch = cluster_.epoch;
    }
    return array.bytes.data() + index * array.element_bytes;
  }

 private:
  static void enter() {
    Block& block = *active_block;
#if KD_FIBERS_ARE_SANITIZED
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
#endif
    try {
      block.kernel_();
    } catch (...) {
      if (!block.error_) block.error_ = std::current_exception();
    }
    Fiber& fiber = block.current();
    fiber.state = State::done;
    block.leave(fiber, true);
  }

  void start(Fiber& fiber) {
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
  }

  void resume(Fiber& fiber) {
#if KD_FIBERS_ARE_SANITIZED
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack.get(), stack_bytes);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if KD_FIBERS_ARE_SANITIZED
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  void leave(Fiber& fiber, [[maybe_unused]] bool for_good) {
#if KD_FIBERS_ARE_SANITIZED
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.sanitizer_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if KD_FIBERS_ARE_SANITIZED
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  // Lets the warps go on all of whose lanes in the mask have come to the same exchange.
  bool release_warps() {
    bool released = false;
    for (int first = 0; first < threads_; first += warp_size) {
      const int lanes = std::min(warp_size, threads_ - first);
      for (int i = 0; i < lanes; ++i) {
        const Fiber& fiber = *fibers_[first + i];
        if (fiber.state != State::at_exchange) continue;
        bool complete = true;
        for (int j = 0; j < lanes && complete; ++j) {
          if (!(fiber.mask >> j & 1)) continue;
          const Fiber& other = *fibers_[first + j];
          complete = other.state == State::at_exchange && other.line == fiber.line && other.mask == fiber.mask &&
                     other.kind == fiber.kind;
        }
        if (!complete) continue;
        const unsigned mask = fiber.mask;
        for (int j = 0; j < lanes; ++j) {
          if (!(mask >> j & 1)) continue;
          fibers_[first + j]->state = State::ready;
          for (int source = 0; source < lanes; ++source)
            if (mask >> source & 1) fibers_[first + j]->received[source] = fibers_[first + source]->given;
        }
        ++warp_epochs_[first / warp_size];
        released = true;
      }
    }
    return released;
  }

  bool release_barrier() {
    const int line = fibers_[0]->line;
    for (const auto& fiber : fibers_)
      if (fiber->state != State::at_barrier || fiber->line != line) return false;
    for (auto& fiber : fibers_) fiber->state = State::ready;
    ++epoch_;
    return true;
  }

  Cluster& cluster_;
  int rank_;
  Launch launch_;
  const std::function<void()>& kernel_;
  int threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<uint64_t> warp_epochs_;
  ucontext_t scheduler_{};
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void* scheduler_fake_stack_ = nullptr;
  Index3 block_;
  int current_ = 0;
  uint64_t epoch_ = 1;
  std::map<std::pair<const void*, int>, std::unique_ptr<SharedArray>> arrays_;
  std::unique_ptr<SharedArray> dynamic_;
  std::exception_ptr error_;
};

Record* record = nullptr;  // of the kernel that runs

}  // namespace

Device& device() {
  static Device device;
  return device;
}

std::map<std::string, Record>& records() {
  static std::map<std::string, Record> records;
  return records;
}

void count_loaded(size_t bytes) { record->loaded += bytes; }
void count_stored(size_t bytes) { record->stored += bytes; }

void run(const Launch& launch, const std::function<void()>& kernel) {
  const uint64_t threads = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024)
    throw Fault(std::string(launch.kernel) + ": a block of " + std::to_string(threads) + " threads");
  if (launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > 0x7FFFFFFFu)
    throw Fault(std::string(launch.kernel) + ": the grid is too large");
  if (launch.cluster < 1 || launch.cluster > 8 || launch.grid.x % launch.cluster)
    throw Fault(std::string(launch.kernel) + ": a grid of " + std::to_string(launch.grid.x) +
                " blocks in clusters of " + std::to_string(launch.cluster));
  if (static_cast<int64_t>(launch.dynamic_shared_bytes) > device().most_shared_bytes)
    throw Fault(std::string(launch.kernel) + ": " + std::to_string(launch.dynamic_shared_bytes) +
                " bytes of shared memory, and a block has " + std::to_string(device().most_shared_bytes));
  if (launch.cluster > 1 && !device().clusters)
    throw Fault(std::string(launch.kernel) + ": a cluster, and the device has none");
  record = &records()[launch.kernel];
  record->cluster = std::max(record->cluster, launch.cluster);
  const unsigned columns = launch.grid.x / launch.cluster;
  std::vector<uint64_t> order(uint64_t(columns) * launch.grid.y * launch.grid.z);
  if (order.empty()) throw Fault(std::string(launch.kernel) + ": an empty grid");
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (launch.block_order_seed) std::shuffle(order.begin(), order.end(), std::mt19937_64(launch.block_order_seed));
  Cluster cluster;
  for (unsigned rank = 0; rank < launch.cluster; ++rank)
    cluster.blocks.push_back(std::make_unique<Block>(launch, kernel, cluster, int(rank)));
  const auto all_in = [&](State state) {
    return std::all_of(cluster.blocks.begin(), cluster.blocks.end(),
                       [&](const auto& one) { return one->all_in(state); });
  };
  for (const uint64_t number : order) {
    for (unsigned rank = 0; rank < launch.cluster; ++rank)
      cluster.blocks[rank]->begin({unsigned(number % columns) * launch.cluster + rank,
                                   unsigned(number / columns % launch.grid.y),
                                   unsigned(number / (uint64_t(columns) * launch.grid.y))});
    while (!all_in(State::done)) {
      bool progress = false;
      for (auto& block : cluster.blocks) progress = block->advance() || progress;
      if (progress) continue;
      if (!all_in(State::at_cluster_barrier)) {
        for (auto& block : cluster.blocks)
          if (!block->all_in(State::done)) block->complain();
      }
      for (auto& block : cluster.blocks) block->release_from_cluster_barrier();
      ++cluster.epoch;
    }
  }
}

Index3 thread_index() { return active_block->current().index; }
Index3 block_index() { return active_block->block(); }
Dim3 block_extent() { return active_block->launch().block; }
Dim3 grid_extent() { return active_block->launch().grid; }
int lane() { return active_block->current_number() % warp_size; }
void fault(int line, const std::string& what) {
  throw Fault(active_block->where(line, active_block->current_number()) + what);
}
void sync_threads(int line) { active_block->wait(State::at_barrier, line); }
void sync_cluster(int line) { active_block->wait(State::at_cluster_barrier, line); }
int cluster_size() { return static_cast<int>(active_block->launch().cluster); }
int cluster_rank() { return active_block->rank(); }

const uint64_t* exchange(int line, unsigned mask, Exchange kind, uint64_t value) {
  return active_block->exchange(line, mask, kind, value);
}

SharedArray& shared_array(const void* declaration, int line, size_t elements, size_t element_bytes) {
  return active_block->shared(declaration, line, elements, element_bytes);
}
SharedArray& dynamic_shared(int line, size_t element_bytes) { return active_block->dynamic(line, element_bytes); }
char* shared_for_read(SharedArray& array, int line, int64_t index) {
  return active_block->access(array, line, index, Block::Access::read);
}
char* shared_for_write(SharedArray& array, int line, int64_t index) {
  return active_block->access(array, line, index, Block::Access::write);
}
char* peer_shared_for_read(SharedArray& array, int line, int64_t index, int rank) {
  return active_block->peer_access(array, line, index, rank);
}
char* shared_for_atomic_access(SharedArray& array, int line, int64_t index) {
  return active_block->access(array, line, index, Block::Access::atomic);
}

}  // namespace kd::emulation
