"""What the image task computes in C++ on the CPU: each Python file calls one C++ file, and falls back to torch."""
