"""Peak rates of GPUs: the most that bf16 matrix products with float32 sums could do."""

from __future__ import annotations

import torch

PEAKS_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
}
"""Dense bf16, by the makers' data sheets, by the exact name that the driver gives."""


def peak_tflops(name: str) -> float | None:
    """None for a device that isn't in the table: another of a like name may be half as fast."""
    return PEAKS_TFLOPS.get(name)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
