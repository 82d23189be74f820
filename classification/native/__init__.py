"""C++ for the image task on the CPU: each Python file calls one C++ file, or falls back to torch or Pillow."""
