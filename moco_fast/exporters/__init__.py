"""Exporters: encoders for other libraries."""
