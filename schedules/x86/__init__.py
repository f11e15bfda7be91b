"""Hand-written schedules for x86: AVX2, AVX-512 and AVX-512 VNNI."""
