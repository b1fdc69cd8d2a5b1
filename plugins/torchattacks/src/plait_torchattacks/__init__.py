"""``attack: torchattacks``: every attack of the torchattacks library as a method."""

__plait_api__ = "0.1"
