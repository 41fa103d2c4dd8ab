// Kernels with one fault each, for the tests of the emulator.
#pragma once

#include <string>
#include <vector>

namespace kd::emulation {

// The names of what can be run, the first of them without a fault.
std::vector<std::string> faulty_kernels();

// What the emulator says of it; empty if it finds nothing.
std::string run_faulty(const std::string& name);

}  // namespace kd::emulation
