"""GGUF: the file format of llama.cpp, and of what is built on it."""
