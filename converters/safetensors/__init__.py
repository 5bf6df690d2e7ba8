"""Quantized weights in safetensors: schemes, packing, layouts."""
