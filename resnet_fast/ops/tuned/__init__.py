"""The tables of choices that ship with the package: <gpu>.json for each GPU on which one was measured.

There is none yet: not measured on any GPU. For one, on a machine that has it (an "NVIDIA H200", say), from a checkout:

    resnet-fast tune --out resnet_fast/ops/tuned/nvidia-h200.json

A table counts for the GPU whose name it holds, with the very kernels that it was measured with, whatever the versions
of torch, triton and cuDNN; one's own, by `resnet-fast tune`, goes before it.
"""
