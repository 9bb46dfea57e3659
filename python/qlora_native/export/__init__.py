"""What leaves this library: merged models with the error of the merge, GGUF files, adapters for PEFT."""
