"""Steps of the decoder in C++ for CPUs: optional, compiled on this host at first use."""
