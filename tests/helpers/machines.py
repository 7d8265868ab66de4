"""Machines written down by hand."""

from dataclasses import replace

from zi_experiments.config.schema import Calibration, Ceilings
from zi_experiments.system.machines import Machine

MACHINES = {
    "h200": Machine(
        device="cuda",
        gpu_name="NVIDIA H200",
        gpus_visible=8,
        gpu_memory_bytes=150_000_000_000,
        gpu_memory_is_capped=False,
        host_memory_bytes=2_000_000_000_000,
        disk_free_bytes=None,
        dtypes=("float16", "bfloat16"),
        ceilings=Ceilings(
            link_bytes_per_s=63e9,
            hbm_bytes_per_s=4.8e12,
            flops=989e12,
            disk_bytes_per_s=2.4e9,
            host_memory_bytes_per_s=None,
            source="by hand",
        ),
        calibration=None,
        driver="580.00",
        peer_bytes_per_s=450e9,
    ),
    "cpu": Machine(
        device="cpu",
        gpu_name=None,
        gpus_visible=0,
        gpu_memory_bytes=None,
        gpu_memory_is_capped=False,
        host_memory_bytes=2_000_000_000_000,
        disk_free_bytes=None,
        dtypes=("bfloat16",),
        ceilings=Ceilings(**dict.fromkeys(Ceilings.__dataclass_fields__)),
        calibration=None,
        driver=None,
    ),
}


MACHINES["measured"] = replace(
    MACHINES["h200"],
    ceilings=Ceilings(
        link_bytes_per_s=50e9,
        hbm_bytes_per_s=4e12,
        flops=800e12,
        disk_bytes_per_s=5e9,
        host_memory_bytes_per_s=150e9,
        source="by hand",
    ),
    calibration=Calibration(
        link_back_bytes_per_s=40e9,
        link_both_bytes_per_s=45e9,
        link_pageable_bytes_per_s=10e9,
        pin_bytes_per_s=4e9,
        host_bytes_per_s=20e9,
        disk_write_bytes_per_s=2e9,
        gemm_flops={name: {1: 2e12, 16: 32e12, 1024: 512e12} for name in ("float16", "bfloat16")},
        attention_flops=None,
        cache_bytes_per_s=None,
        expand_elements_per_s=1e12,
        layer_s=1e-4,
        step_s=2e-3,
        host_read_bytes_per_s=None,
        host_layer_s=None,
        host_layer_busy_s=None,
        link_busy_bytes_per_s=None,
        host_experts_bytes_per_s=None,
        moments=None,
    ),
)
