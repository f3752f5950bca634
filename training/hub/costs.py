"""What a run cost and how much electricity it took, estimated from its hours: rough on purpose, and said how."""

_WATTS = {
    "Laptop": None,  # from 80 W to 175 W, as its maker pleases
    "GB200": 1200.0,
    "B200": 1000.0,
    "GH200": 700.0,
    "H200 NVL": 600.0,
    "H200": 700.0,
    "H100 NVL": 400.0,
    "H100 PCIe": 350.0,
    "H100": 700.0,
    "A100 80GB PCIe": 300.0,
    "A100-PCIE": 250.0,
    "A100": 400.0,
    "L40S": 350.0,
    "L40": 300.0,
    "A10G": 300.0,
    "RTX 5090": 575.0,
    "RTX 4090": 450.0,
    "RTX 3090": 350.0,
}
"""Rated board power, by what is in the name that CUDA gives. More special names come first."""

_DOLLARS_PER_HOUR = {
    "Laptop": None,
    "B200": 5.0,
    "GH200": 2.0,
    "H200": 3.5,
    "H100": 3.0,
    "A100": 2.0,
    "L40": 1.0,
    "A10G": 1.0,
    "RTX 5090": 0.8,
    "RTX 4090": 0.5,
    "RTX 3090": 0.3,
}
"""What an hour of one of them is assumed to cost rented: round figures, no offer of anybody's."""


def running_costs(device: str, devices: int, seconds: float) -> list[str]:
    """Lines on cost and energy with the way they were estimated; none for devices that the tables do not know.

    Args:
        device: its name.
        devices: how many of them.
        seconds: for which they worked.
    """
    hours = devices * seconds / 3600
    lines = []
    watts = next((value for name, value in _WATTS.items() if name in device), None)
    dollars = next((value for name, value in _DOLLARS_PER_HOUR.items() if name in device), None)
    if dollars is not None:
        lines.append(
            f"Cost: about US$ {hours * dollars:,.2f} ({hours:,.2f} GPU-hours, US$ {dollars:.2f} assumed for one)"
        )
    if watts is not None:
        lines.append(
            f"Energy: about {hours * watts / 1000:,.2f} kWh (GPU-hours × {watts:.0f} W, the boards' rated power; "
            "without the rest of the machine and its cooling)"
        )
    return lines
