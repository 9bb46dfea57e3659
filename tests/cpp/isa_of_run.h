#pragma once

// Settles the instruction set that QLORA_NATIVE_ISA asks for, before any test needs it, and checks how it is chosen.
// Returns false, and prints why, if the name is one of ours but this machine or build lacks it.
bool isa_of_run();
