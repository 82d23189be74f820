"""Apollo's step in one native call for a whole list of tensors: C++ on the CPU, Triton on CUDA."""
