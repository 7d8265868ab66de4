"""Throughput experiments for models larger than the GPU, around DeepSpeed ZeRO-Inference."""
