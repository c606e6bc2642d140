"""`resnet-fast doctor`: what runs on this machine and why, a self-check, and advice if something is missing."""

from .diagnosis import Finding, diagnose, exit_code, format_end, format_finding

__all__ = ["Finding", "diagnose", "exit_code", "format_end", "format_finding"]
