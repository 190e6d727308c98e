// Checks the structure of a .pte that ExecuTorch takes on trust: every index an instruction holds.
#pragma once

#include <string>

// "" if every instruction of every method names operators, delegates and values that are there, else what is wrong, in
// one line. Reads the program part of the file `path` only, never its weights.
std::string program_fault(const std::string& path);
