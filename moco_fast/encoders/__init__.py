"""Encoders: backbones by name, stems and heads."""
