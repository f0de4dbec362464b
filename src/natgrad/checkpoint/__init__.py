"""Snapshots of a run: one safetensors file with a checksum, replaced atomically, read without pickle."""

from natgrad.checkpoint.snapshot import load, save

__all__ = ["load", "save"]
