// Runs CUDA kernels on the host, a block or a cluster of blocks at a time, so that they can be tested where there is no GPU.
//
// The threads of a block are fibers that one system thread runs in turn; a fiber goes on until it must wait for others: at a
// block or cluster barrier, or at a warp's shuffle, vote or barrier. What would be undefined on a GPU is an error here, with the kernel,
// the block, the thread and the line: barriers and shuffles that not all threads reach, shared memory out of bounds, read
// before it was written, or touched by two threads without a barrier between them. Run it under the address and
// undefined-behaviour sanitizers, which see the rest: the host's memory stands for the GPU's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace kd::emulation {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr int warp_size = 32;

// What a kernel did that a GPU leaves undefined.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Launch {
  const char* kernel = "";
  Dim3 grid;
  Dim3 block;
  unsigned cluster = 1;  // blocks of a cluster, next to each other along x
  size_t dynamic_shared_bytes = 0;
  uint64_t block_order_seed = 0;  // blocks run in an order drawn from it; 0: by number
};

// Runs `kernel` once per thread. Throws Fault.
void run(const Launch& launch, const std::function<void()>& kernel);

// The device that is emulated.
struct Device {
  int64_t most_shared_bytes = 48 << 10;  // of a block
  bool clusters = true;
};
Device& device();

// What launches of a kernel did since they were forgotten: bytes of rows in memory, and the blocks of its largest cluster.
struct Record {
  uint64_t loaded = 0, stored = 0;
  unsigned cluster = 0;
};
std::map<std::string, Record>& records();  // by the names of launches
void count_loaded(size_t bytes);
void count_stored(size_t bytes);

// Of the thread that is running.
Index3 thread_index();
Index3 block_index();
Dim3 block_extent();
Dim3 grid_extent();
[[noreturn]] void fault(int line, const std::string& what);

// Waits for all threads of the block.
void sync_threads(int line);

// Of the cluster that the running thread's block is in.
int cluster_size();
int cluster_rank();
void sync_cluster(int line);

// Waits for the threads of `mask` in this warp; returns what each lane of it gave, by lane.
enum class Exchange { shuffle, vote, barrier };
const uint64_t* exchange(int line, unsigned mask, Exchange kind, uint64_t value);
int lane();

// The shared memory named by where it is declared. All threads of a block get the same.
class SharedArray;
SharedArray& shared_array(const void* declaration, int line, size_t elements, size_t element_bytes);
SharedArray& dynamic_shared(int line, size_t element_bytes);
char* shared_for_read(SharedArray& array, int line, int64_t index);
char* shared_for_write(SharedArray& array, int line, int64_t index);
char* peer_shared_for_read(SharedArray& array, int line, int64_t index, int rank);  // of another block of the cluster

// An element of shared memory: reads and writes are seen.
template <class T>
class SharedElement {
 public:
  SharedElement(SharedArray& array, int line, int64_t index) : array_(array), line_(line), index_(index) {}
  SharedElement(const SharedElement&) = default;
  operator T() const { return *reinterpret_cast<const T*>(shared_for_read(array_, line_, index_)); }
  SharedElement& operator=(const T& value) {
    *reinterpret_cast<T*>(shared_for_write(array_, line_, index_)) = value;
    return *this;
  }
  SharedElement& operator=(const SharedElement& other) { return *this = static_cast<T>(other); }
  SharedElement& operator+=(const T& value) { return *this = static_cast<T>(*this) + value; }
  SharedElement& operator-=(const T& value) { return *this = static_cast<T>(*this) - value; }
  SharedElement& operator*=(const T& value) { return *this = static_cast<T>(*this) * value; }

  // For atomics: an access that others may make at the same time.
  template <class Change>
  T change(Change change_value) {
    T* place = reinterpret_cast<T*>(shared_for_atomic());
    const T old = *place;
    *place = change_value(old);
    return old;
  }

 private:
  char* shared_for_atomic();
  SharedArray& array_;
  int line_;
  int64_t index_;
};

char* shared_for_atomic_access(SharedArray& array, int line, int64_t index);
template <class T>
char* SharedElement<T>::shared_for_atomic() {
  return shared_for_atomic_access(array_, line_, index_);
}

// A kernel's view of a shared array.
template <class T>
class Shared {
 public:
  Shared(SharedArray& array, int line, int64_t offset = 0) : array_(&array), line_(line), offset_(offset) {}
  template <class Integer>
  SharedElement<T> operator[](Integer index) const {
    return {*array_, line_, offset_ + static_cast<int64_t>(index)};
  }
  Shared operator+(int64_t elements) const { return {*array_, line_, offset_ + elements}; }
  template <class Integer>
  T of_peer(int rank, Integer index) const {
    return *reinterpret_cast<const T*>(
        peer_shared_for_read(*array_, line_, offset_ + static_cast<int64_t>(index), rank));
  }

 private:
  SharedArray* array_;
  int line_;
  int64_t offset_;
};

}  // namespace kd::emulation
