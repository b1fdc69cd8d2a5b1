"""Reports: what an ``evaluate`` method returns, and how a run shows it."""

from plait.report.model import Curve, Image, Panel, Report, png

__all__ = ["Curve", "Image", "Panel", "Report", "png"]
