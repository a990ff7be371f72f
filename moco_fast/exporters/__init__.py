"""Exporters of encoders to other libraries."""
