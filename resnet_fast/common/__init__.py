"""Helpers for every module: argument checks, files written whole, clean terminal output, machine names, imports."""
