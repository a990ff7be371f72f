"""Export: encoders for other libraries."""
