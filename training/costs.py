"""What a run cost and how much electricity it took, estimated from its hours: rough on purpose, and said how."""

_WATTS = {
    "B200": 1000.0,
    "GH200": 700.0,
    "H200": 700.0,
    "H100 PCIe": 350.0,
    "H100": 700.0,
    "A100": 400.0,
    "L40S": 350.0,
    "A10G": 300.0,
    "RTX 4090": 450.0,
    "RTX 3090": 350.0,
}
"""Board power by the vendors' data sheets. Longer names first: "H100 PCIe" is an "H100" too."""

_DOLLARS_PER_HOUR = {
    "B200": 5.0,
    "GH200": 2.0,
    "H200": 3.5,
    "H100": 3.0,
    "A100": 2.0,
    "L40S": 1.0,
    "A10G": 1.0,
    "RTX 4090": 0.5,
    "RTX 3090": 0.3,
}
"""What an hour of one of them is assumed to cost rented: round figures to be multiplied, no offer of anybody's."""


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
