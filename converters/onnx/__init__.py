"""A folder as an ONNX decoder."""
